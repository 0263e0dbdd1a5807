"""What memory the machine has left, as this process may use it."""

from __future__ import annotations

import logging
from pathlib import Path

from slidecore import machine_checks
from slidecore.sizes import format_size

logger = logging.getLogger("slidecore")

# Below this share of the machine's (or the control group's) memory, planes go down by themselves.
LOW_SHARE, LEAST_LOW = 0.03, 512 << 20
MUCH_STALLING = 0.05
_PRESSURE = Path("/proc/pressure/memory")


def available_memory() -> int:
    """Bytes: the kernel's MemAvailable, or what the control group has left where that is less."""
    left = [machine_checks.available_memory(), *(limit - used for limit, used in _group_memory())]
    return max(0, min(left))


def low_water() -> int:
    """Bytes of available memory below which the machine counts as short of it: twice as many while programs stall."""
    sizes = [_total_memory(), *(limit for limit, _ in _group_memory())]
    low = max(LEAST_LOW, int(min(sizes) * LOW_SHARE))
    return 2 * low if stalled_share() > MUCH_STALLING else low


def warn_if_short(nbytes: int) -> None:
    """Says so if the machine has less than `nbytes` left, which are about to be taken.

    No error: some virtual machines grow, and swap space does not count as available.
    """
    available = available_memory()
    if nbytes > available:
        logger.warning(
            "planes and buffers take %s of host memory, and the machine has %s left: the kernel may end this process. "
            "Use moments='8bit', or disk=[directory, ...] for what memory has no room for",
            format_size(nbytes),
            format_size(available),
        )


def stalled_share() -> float:
    """Of the last ten seconds, the share in which all programs waited for memory (pressure stall information).

    0 where the kernel does not tell.
    """
    try:
        for line in _PRESSURE.read_text().splitlines():
            if line.startswith("full "):
                return float(line.split("avg10=")[1].split()[0]) / 100
    except (OSError, ValueError, IndexError):
        pass
    return 0.0


def _total_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemTotal")


def _group_memory() -> list[tuple[int, int]]:
    """Limit and use of the control group, inactive page cache not counted, if it has a limit (cgroup v2)."""
    try:
        name = next(
            line.split("::", 1)[1].strip()
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        group = Path("/sys/fs/cgroup") / name.lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return []
        cache = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        return [(int(limit), int((group / "memory.current").read_text()) - cache)]
    except (OSError, StopIteration, ValueError):
        return []  # no control group of that kind, or without a memory controller
