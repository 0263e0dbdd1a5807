"""Host memory of a process, measured from outside it.

Three views, because none alone is the truth for pinned memory:
- RssAnon + RssShmem of the process and its children (anonymous mappings, and shared ones such as driver allocations);
- VmHWM, the kernel's own high-water mark of the whole resident set, file pages included, which no sampling can miss;
- how far MemAvailable of the whole machine fell, which also counts pages that a driver took without mapping them as
  ordinary memory. It is the only view that includes everything, and the only one that other processes disturb.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from _machine import memory_bytes

_STATUS = ("RssAnon", "RssShmem", "RssFile", "VmHWM", "VmRSS")


def _status(pid: int) -> dict[str, int]:
    """Resident-set fields of /proc/PID/status in bytes; empty when the process is gone."""
    values: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in _STATUS:
                values[key] = int(rest.split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return {}
    return values


def _family(pid: int) -> list[int]:
    """The process and all its descendants."""
    members, queue = [], [pid]
    while queue:
        current = queue.pop()
        members.append(current)
        for path in Path(f"/proc/{current}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                queue.extend(int(word) for word in path.read_text().split())
    return members


def proportional_set_bytes(pid: int) -> int | None:
    """Pss of the process and its descendants in bytes. Walks page tables: not to be called inside a timed window."""
    total, seen = 0, False
    for member in _family(pid):
        try:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
                    seen = True
        except OSError:
            continue
    return total if seen else None


class HostMemorySampler:
    """Samples a process from a thread of the parent; `take()` ends one phase and starts the next.

    Sampling reads a few lines of /proc every `interval_s` seconds and does not stop the sampled process.
    """

    def __init__(self, pid: int, idle_used_bytes: int, interval_s: float = 0.02) -> None:
        self._pid = pid
        self._idle_used_bytes = idle_used_bytes
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._peak: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host-memory-sampler", daemon=True)

    def __enter__(self) -> HostMemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> dict[str, int]:
        anonymous = shared = file = high = resident = 0
        for member in _family(self._pid):
            status = _status(member)
            anonymous += status.get("RssAnon", 0)
            shared += status.get("RssShmem", 0)
            file += status.get("RssFile", 0)
            resident += status.get("VmRSS", 0)
            high += status.get("VmHWM", 0)
        return {
            "rss_anon_bytes": anonymous,
            "rss_shmem_bytes": shared,
            "rss_file_bytes": file,
            "rss_anon_shmem_bytes": anonymous + shared,
            "rss_bytes": resident,
            "vm_hwm_bytes": high,
            "machine_used_bytes": max(0, used_bytes() - self._idle_used_bytes),
        }

    def _observe(self) -> dict[str, int]:
        now = self._read()
        with self._lock:
            for key, value in now.items():
                self._peak[key] = max(self._peak.get(key, 0), value)
        return now

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._observe()

    def take(self) -> dict[str, dict[str, int] | int | None]:
        """The phase's peaks and the present values, in bytes. Call while the process waits."""
        now = self._observe()
        with self._lock:
            peak, self._peak = self._peak, {}
        # Starts VmHWM afresh, so that it belongs to one phase. Where that is not allowed it stays the peak so far.
        with contextlib.suppress(OSError):
            for member in _family(self._pid):
                Path(f"/proc/{member}/clear_refs").write_text("5")
        return {"peak": peak, "now": now, "pss_now_bytes": proportional_set_bytes(self._pid)}


def used_bytes() -> int:
    """Memory of the machine that is not available to a new process, in bytes."""
    values = memory_bytes()
    return values.get("MemTotal", 0) - values.get("MemAvailable", 0)
