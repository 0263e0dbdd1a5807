"""Files written and read as streams of pieces, every transfer checked, every piece with a checksum.

A file is cut into pieces of `PIECE` bytes, each with a checksum of 128 bits, so that an error says where a file is
damaged. They guard against accidents, not against forgery, so that what counts is speed: a load reads everything twice.
XXH3 (package xxhash) does 35 GB/s on one core of the machine where this was written, which is nothing beside a disk.
Where that package is not installed, BLAKE2b of the standard library takes its place, at 1.4 GB/s a core (SHA-256: 2.0
there, a third of that on CPUs without instructions for it; zlib's CRC-32: 1 to 7, depending on the build). The manifest
says which. Both release the interpreter's lock, so that threads, one a file, add up.

The calls into the system go through this module's `os`, which tests replace to let them fail.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slidecore import _core
from slidecore.errors import CheckpointError

PIECE = 16 << 20
# How much of a file may wait in the page cache: what is on the disk is dropped from it, so that saving a state of
# hundreds of GB neither evicts everything else nor ends in one long wait.
SYNC_BYTES = 256 << 20
_IOV_MAX = 1024


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=16)


@functools.cache
def checksum(name: str) -> Callable[[], Any]:
    """What makes a hash object (update, hexdigest) of the kind "xxh3-128" or "blake2b-128".

    Raises:
        CheckpointError: there is no such kind, or its package is not installed.
    """
    if name == "xxh3-128":
        try:
            import xxhash
        except ImportError as error:
            raise CheckpointError(
                "the checkpoint's checksums are XXH3; install the package that knows them: pip install xxhash"
            ) from error
        return xxhash.xxh3_128
    if name == "blake2b-128":
        return _blake2b
    raise CheckpointError(f"checksums of kind {name!r} are not known to this version of slidecore")


@functools.cache
def preferred_checksum() -> str:
    """The fastest kind of checksum that is installed."""
    return "xxh3-128" if importlib.util.find_spec("xxhash") is not None else "blake2b-128"


@dataclass(frozen=True)
class FileRecord:
    """What a file has to be: its size, its pieces' checksums in hexadecimal, and of which kind these are."""

    nbytes: int
    pieces: tuple[str, ...]
    checksum: str


# More would only queue at the disk.
_MOST_THREADS = 8


def choose_threads(threads: int) -> int:
    """How many files to work on at the same time: `threads`, or where it is 0 one a usable CPU, at most 8."""
    if threads < 0:
        raise ValueError(f"threads={threads} must be at least 0 (0 for one a CPU, at most {_MOST_THREADS})")
    return threads or min(_MOST_THREADS, _core.usable_cpus())


class Stop:
    """Tells the threads of a save or a load that one of them has failed."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise CheckpointError("stopped, because another file failed")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def record_of(data: bytes | bytearray) -> FileRecord:
    """The record of a file with this content."""
    pieces = []
    for begin in range(0, len(data), PIECE):
        digest = checksum(preferred_checksum())()
        digest.update(memoryview(data)[begin : begin + PIECE])
        pieces.append(digest.hexdigest())
    return FileRecord(len(data), tuple(pieces), preferred_checksum())


def failure(what: str, path: Path, error: OSError, offset: int | None = None) -> CheckpointError:
    where = "" if offset is None else f" at byte {offset}"
    return CheckpointError(f"cannot {what} {path}{where}: {error.strerror or error}")


class FileWriter:
    """Writes a new file front to back from memory that is not copied; use as a context, `finish` at the end."""

    def __init__(self, path: Path, stop: Stop | None = None) -> None:
        self.path = path
        self._stop = stop or Stop()
        self._checksum = preferred_checksum()
        self._digest = checksum(self._checksum)()
        self._pieces: list[str] = []
        self._in_piece = 0
        self._waiting: list[memoryview] = []
        self._written = 0
        self._synced = 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise failure("create", path, error) from error

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:  # after an error: the file is going to be removed
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)

    def write(self, data: memoryview | bytes) -> None:
        """Appends `data`, which must not change until `flush` or `finish` has returned."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: PIECE - self._in_piece]
            view = view[len(part) :]
            self._digest.update(part)
            self._waiting.append(part)
            self._in_piece += len(part)
            if self._in_piece == PIECE:
                self._end_piece()
                self.flush()
            elif len(self._waiting) == _IOV_MAX:
                self.flush()

    def flush(self) -> None:
        """Hands what was given to `write` to the system: the memory may be reused afterwards."""
        self._stop.check()
        waiting, self._waiting = self._waiting, []
        while waiting:
            try:
                done = os.pwritev(self._fd, waiting[:_IOV_MAX], self._written)
            except OSError as error:
                raise failure("write", self.path, error, self._written) from error
            if done <= 0:
                raise CheckpointError(f"cannot write {self.path} at byte {self._written}: the system took no bytes")
            self._written += done
            waiting = _after(waiting, done)
        if self._written - self._synced >= SYNC_BYTES:
            self._sync()

    def finish(self) -> FileRecord:
        """Writes the rest, waits until all of it is on the disk, and closes the file."""
        if self._in_piece:
            self._end_piece()
        self.flush()
        self._sync()
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:  # network file systems report here what they could not store
            raise failure("close", self.path, error) from error
        return FileRecord(self._written, tuple(self._pieces), self._checksum)

    def _end_piece(self) -> None:
        self._pieces.append(self._digest.hexdigest())
        self._digest = checksum(self._checksum)()
        self._in_piece = 0

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise failure("sync", self.path, error, self._written) from error
        _drop_from_cache(self._fd, self._synced, self._written - self._synced)
        self._synced = self._written


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `buffers` when their first `done` bytes have been transferred."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


def _drop_from_cache(fd: int, offset: int, nbytes: int) -> None:
    with contextlib.suppress(OSError):  # advice: without it the cache is only fuller
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def read_file(
    path: Path,
    record: FileRecord,
    parts: Iterable[tuple[int, memoryview]] = (),
    stop: Stop | None = None,
    *,
    scratch: memoryview | None = None,
    keep_cached: bool = False,
) -> None:
    """Reads a whole file, checks it against its record, and puts parts of it where they belong on the way.

    Args:
        path: the file.
        record: what it has to be.
        parts: (offset in the file, writable bytes to fill), not overlapping, in any order. The rest is only checked.
        stop: raises when another thread has failed.
        scratch: `PIECE` writable bytes, for what is not in `parts`; None: made here.
        keep_cached: leave the file in the page cache, for a second reading.

    Raises:
        CheckpointError: the file cannot be read, has another size, or a piece has another checksum. Parts of the
            pieces before (and of that piece) have been filled.
    """
    for _ in checked_pieces(path, record, parts, stop, scratch=scratch, keep_cached=keep_cached):
        pass


def checked_pieces(
    path: Path,
    record: FileRecord,
    parts: Iterable[tuple[int, memoryview]] = (),
    stop: Stop | None = None,
    *,
    scratch: memoryview | None = None,
    keep_cached: bool = False,
) -> Iterator[tuple[int, list[memoryview]]]:
    """As `read_file`, giving each piece when it has been checked: its offset, and the buffers it was read into.

    What is not in `parts` is in `scratch`, which the next piece overwrites.
    """
    stop = stop or Stop()
    new = checksum(record.checksum)
    scratch = scratch if scratch is not None else memoryview(bytearray(min(PIECE, max(1, record.nbytes))))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise failure("read", path, error) from error
    try:
        size = os.fstat(fd).st_size
        if size != record.nbytes:
            raise CheckpointError(
                f"{path} has {size} bytes and should have {record.nbytes}: it is truncated or foreign"
            )
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        pieces = _pieces(record.nbytes, sorted(parts, key=lambda part: part[0]), scratch)
        for (begin, buffers), expected in zip(pieces, record.pieces, strict=True):
            stop.check()
            _read(fd, path, begin, buffers)
            digest = new()
            for buffer in buffers:
                digest.update(buffer)
            if digest.hexdigest() != expected:
                end = begin + sum(len(buffer) for buffer in buffers)
                raise CheckpointError(f"{path} is damaged: bytes {begin} to {end} do not have the checksum they should")
            if not keep_cached:
                _drop_from_cache(fd, begin, PIECE)
            yield begin, buffers
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def _pieces(
    nbytes: int, parts: Sequence[tuple[int, memoryview]], scratch: memoryview
) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, buffers) of each piece of a file: the parts where there are any, `scratch` in between."""
    index = 0
    for begin in range(0, nbytes, PIECE):
        end = min(begin + PIECE, nbytes)
        buffers: list[memoryview] = []
        at = begin
        while at < end:
            while index < len(parts) and parts[index][0] + len(parts[index][1]) <= at:
                index += 1
            if index < len(parts) and parts[index][0] <= at:
                start, target = parts[index]
                taken = target[at - start : end - start]
            else:
                until = min(end, parts[index][0]) if index < len(parts) else end
                taken = scratch[at - begin : until - begin]
            buffers.append(taken)
            at += len(taken)
        yield begin, buffers


def _read(fd: int, path: Path, offset: int, buffers: list[memoryview]) -> None:
    while buffers:
        try:
            done = os.preadv(fd, buffers[:_IOV_MAX], offset)
        except OSError as error:
            raise failure("read", path, error, offset) from error
        if done <= 0:
            raise CheckpointError(f"cannot read {path} at byte {offset}: it ends there")
        offset += done
        buffers = _after(buffers, done)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory last: renames and new files are on the disk only after this."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failure("open", path, error) from error
    try:
        os.fsync(fd)
    except OSError as error:
        raise failure("sync", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def run_all(tasks: Sequence[Callable[[], Any]], threads: int, stop: Stop) -> list[Any]:
    """Runs the tasks in threads; returns their results in order, or raises the first error when all have ended."""
    pool = ThreadPoolExecutor(max_workers=max(1, min(threads, len(tasks))), thread_name_prefix="slidecore-file")
    try:
        futures = [pool.submit(task) for task in tasks]
        finished, running = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in futures if future in finished and future.exception() is not None]
        if failed:
            stop.set()
            for future in running:
                future.cancel()
            raise failed[0].exception()  # type: ignore[misc]
        return [future.result() for future in futures]
    except BaseException:
        stop.set()  # an interrupt, too: the threads end at their next piece
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
