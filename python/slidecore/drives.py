"""Drives behind directories: which they are, and how fast they move bytes."""

from __future__ import annotations

import random
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from slidecore import _core

# One ticket each: large enough that asking costs nothing, small enough that reads and writes can alternate.
_TICKET_BYTES = 16 << 20


@dataclass(frozen=True)
class Drive:
    """What the kernel calls the drive of a file system. Empty strings and None where it does not say."""

    device: str  # "nvme0n1", or "MAJOR:MINOR" of a file system that lies on no single drive
    model: str
    serial: str
    size_bytes: int | None
    rotational: bool | None
    filesystem: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def identify(facts: _core.DirectoryFacts) -> Drive:
    """Returns the drive that a directory lies on."""
    number = f"{facts.device_major}:{facts.device_minor}"
    try:
        node = Path("/sys/dev/block", number).resolve(strict=True)
    except OSError:
        return Drive(number, "", "", None, None, facts.filesystem)
    if (node / "partition").exists():
        node = node.parent
    rotational = _line(node / "queue" / "rotational")
    sectors = _line(node / "size")
    return Drive(
        device=node.name,
        model=_line(node / "device" / "model"),
        serial=_line(node / "device" / "serial") or _line(node / "wwid") or _line(node / "serial"),
        size_bytes=int(sectors) * 512 if sectors.isdecimal() else None,
        rotational=rotational == "1" if rotational else None,
        filesystem=facts.filesystem,
    )


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Rate:
    """One measurement: bytes moved, wall-clock seconds, and this process's CPU seconds (the kernel's work included)."""

    nbytes: int
    seconds: float
    cpu_seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_seconds / (self.nbytes / 1e9)


class Workload:
    """A region of a storage and as much memory, filled with bytes that do not compress.

    Everything is written once at construction: reading preallocated space that was never written moves nothing.
    """

    def __init__(self, storage: _core.Storage, nbytes: int) -> None:
        self._storage = storage
        self.nbytes = nbytes
        self._region = storage.allocate("measurement", nbytes)
        self._buffer = _core.HostBuffer(_core.Device("host", 0), nbytes, False)
        memory = memoryview(self._buffer)
        noise = random.Random(0).randbytes(min(nbytes, 8 << 20))
        for at in range(0, nbytes, len(noise)):
            end = min(at + len(noise), nbytes)
            memory[at:end] = noise[: end - at]
        self._address = self._buffer.address
        transfers = _core.Transfers(storage)
        transfers.wait(transfers.write(self._region, 0, self._address, nbytes))
        transfers.close()

    def run(self, transfers: _core.Transfers, mode: str) -> Rate:
        """Moves all of it in order once: "read", "write", or "both" (every second ticket writes)."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        for number, at in enumerate(range(0, self.nbytes, _TICKET_BYTES)):
            length = min(_TICKET_BYTES, self.nbytes - at)
            write = mode == "write" or (mode == "both" and number % 2 == 1)
            move = transfers.write if write else transfers.read
            move(self._region, at, self._address + at, length)
        transfers.synchronize()
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
        return Rate(self.nbytes, seconds, cpu)
