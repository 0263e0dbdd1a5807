"""The block size, queue depth and backend that suit a set of drives: measured once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slidecore import _core
from slidecore.drives import Workload, identify

_VERSION = 1
_BLOCKS = tuple(2**i << 10 for i in (8, 9, 10, 11, 12))  # 256 KiB to 4 MiB
_DEPTHS = (2, 4, 8, 16, 32)
_MIDDLE_DEPTH = 8
# Points this close to the best count as equal; the one with the fewest bytes in flight is then taken.
_EQUAL = 0.03


@dataclass(frozen=True)
class Point:
    """Rates in GB/s, CPU time in seconds per GB, each the best of two passes."""

    backend: str
    block_bytes: int
    queue_depth: int
    read_gb_per_s: float
    write_gb_per_s: float
    read_cpu_s_per_gb: float
    write_cpu_s_per_gb: float

    @property
    def seconds_per_gb(self) -> float:
        """Of a GB read and a GB written: what a plane that is on disk costs each time that it is used."""
        return 1 / self.read_gb_per_s + 1 / self.write_gb_per_s


@dataclass(frozen=True)
class Calibration:
    chosen: Point
    points: list[Point]
    drives: list[dict[str, object]]
    kernel: str
    why_no_io_uring: str
    nbytes: int

    def to_json(self) -> dict[str, object]:
        return {"version": _VERSION, **asdict(self)}


def calibrate(
    directories: Sequence[str], nbytes: int = 512 << 20, progress: Callable[[Point], None] = lambda point: None
) -> Calibration:
    """Measures block sizes at one queue depth, then queue depths at the best block size, with each backend.

    Args:
        directories: where the swap files are to lie; striped over all of them, as in training.
        nbytes: how much each pass moves; so much space and host memory is needed for the time being.
        progress: called after each point.

    Raises:
        slidecore._core.Error: a directory cannot be used, is in use, or lacks the space.
    """
    reason = _core.why_no_io_uring()
    storage = _core.Storage(list(directories))
    try:
        work = Workload(storage, nbytes)
        points: list[Point] = []
        for backend in ["threads"] if reason else ["uring", "threads"]:
            mine: list[Point] = []

            def add(block: int, depth: int, backend: str = backend, mine: list[Point] = mine) -> None:
                mine.append(_measure(storage, work, backend, block, depth))
                progress(mine[-1])

            for block in _BLOCKS:
                if block <= nbytes:
                    add(block, _MIDDLE_DEPTH)
            block = choose(mine).block_bytes
            for depth in _DEPTHS:
                if depth != _MIDDLE_DEPTH:
                    add(block, depth)
            points += mine
        drives = [identify(facts).to_json() for facts in storage.directories]
    finally:
        storage.close()
    return Calibration(choose(points), points, drives, platform.release(), reason, nbytes)


def choose(points: Sequence[Point]) -> Point:
    """Of the points that are as good as the best, the one with the fewest bytes in flight, io_uring first."""
    best = min(point.seconds_per_gb for point in points)
    equal = [point for point in points if point.seconds_per_gb <= best * (1 + _EQUAL)]
    return min(equal, key=lambda point: (point.block_bytes * point.queue_depth, point.backend != "uring"))


def _measure(storage: _core.Storage, work: Workload, backend: str, block: int, depth: int) -> Point:
    transfers = _core.Transfers(storage, backend=backend, block_bytes=block, queue_depth=depth)
    try:
        writes = [work.run(transfers, "write") for _ in range(2)]
        reads = [work.run(transfers, "read") for _ in range(2)]
    finally:
        transfers.close()
    return Point(
        backend,
        block,
        depth,
        read_gb_per_s=max(rate.gb_per_s for rate in reads),
        write_gb_per_s=max(rate.gb_per_s for rate in writes),
        read_cpu_s_per_gb=min(rate.cpu_s_per_gb for rate in reads),
        write_cpu_s_per_gb=min(rate.cpu_s_per_gb for rate in writes),
    )


def open_transfers(storage: _core.Storage, known: Calibration | None) -> _core.Transfers:
    """Transfers with what was found best for the storage's drives, or with the core's own choice."""
    if known is None:
        return _core.Transfers(storage)
    chosen = known.chosen
    # io_uring is the core's own first choice, where it is allowed; SLIDECORE_IO overrules both.
    automatic = chosen.backend == "uring" or "SLIDECORE_IO" in os.environ
    return _core.Transfers(
        storage,
        backend="" if automatic else chosen.backend,
        block_bytes=chosen.block_bytes,
        queue_depth=chosen.queue_depth,
    )


def path_for(directories: Sequence[str]) -> Path:
    """The file that holds the calibration of these directories' drives, whether or not it exists.

    It lies under `$XDG_CACHE_HOME` (`~/.cache` if that is not set) and is named after the drives and the kernel, so
    that another drive under the same directory, or another kernel, finds nothing.
    """
    drives = [identify(_core.inspect_directory(directory)).to_json() for directory in directories]
    key = json.dumps([drives, platform.release(), _VERSION], sort_keys=True)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path there is to be ignored.
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return base / "slidecore" / f"disk-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def check_writable(directories: Sequence[str]) -> None:
    """Raises OSError if `save` could not write: to be known before minutes of measuring."""
    path = path_for(directories)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp"):
        pass


def save(calibration: Calibration, directories: Sequence[str]) -> Path:
    """Writes it where `load` finds it, whole or not at all, and returns the path."""
    path = path_for(directories)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(calibration.to_json(), file, indent=2)
        file.write("\n")
    os.replace(file.name, path)
    return path


def load(directories: Sequence[str]) -> Calibration | None:
    """The saved calibration of these directories' drives; None if there is none, or it cannot be read."""
    try:
        content = json.loads(path_for(directories).read_text())
        if content.pop("version") != _VERSION:
            return None
        content["chosen"] = Point(**content["chosen"])
        content["points"] = [Point(**point) for point in content["points"]]
        return Calibration(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
