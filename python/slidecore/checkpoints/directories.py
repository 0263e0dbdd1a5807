"""Directories of checkpoints: making one appear whole or not at all, finding the newest, keeping the last few."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from slidecore.checkpoints.files import failure, sync_directory
from slidecore.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from slidecore.errors import CheckpointError

# Hidden, so that nobody takes them for checkpoints: being written; and on their way out.
_SAVING, _REMOVING = ".slidecore-saving-", ".slidecore-removing-"
_SHOWN_BYTES = 100  # of a checkpoint's name, in those
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def resolve_target(directory: str | Path) -> Path:
    """The absolute path to save at. Of a symbolic link it is what it points to: a rename would replace the link itself.

    Raises:
        CheckpointError: no file can have that name.
    """
    target = Path(directory).absolute()
    try:
        if stat.S_ISLNK(os.lstat(target).st_mode):
            target = target.resolve()
            os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass  # to be made, or refused where it is
    except OSError as error:
        raise failure("save at", target, error) from error
    except (ValueError, RuntimeError) as error:  # a NUL; links that lead back to themselves
        raise CheckpointError(f"cannot save at {str(target)!r}: {error}") from error
    return target


def _hidden(prefix: str, name: str) -> str:
    """A name that nobody has, and that is not too long where `name` is just short enough."""
    return f"{prefix}{os.fsdecode(os.fsencode(name)[:_SHOWN_BYTES])}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write a checkpoint into; removed at the end unless `publish` has moved it.

    It is locked while it is in use, so that another save beside it can tell it from what a killed process has left.

    Raises:
        CheckpointError: it cannot be made.
    """
    parent = target.parent
    try:
        os.makedirs(parent, exist_ok=True)
        _remove_leftovers(parent)
        directory = parent / _hidden(_SAVING, target.name)
        os.mkdir(directory)
    except OSError as error:
        raise failure("create a directory in", parent, error) from error
    lock = -1
    try:
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise failure("open", directory, error) from error
        with contextlib.suppress(OSError):  # a file system without locks of directories
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if lock >= 0:
            with contextlib.suppress(OSError):
                os.close(lock)


def publish(directory: Path, target: Path) -> None:
    """Gives a finished directory its name; what was there before, if anything, is then in `directory`.

    Everything in `directory` must be on the disk. Until the rename the target is what it was; from then on it is new.

    Raises:
        CheckpointError: a call failed. If it was the last one, the checkpoint is in place, but a power failure now
            could still take its name back.
    """
    sync_directory(directory)
    try:
        if is_occupied(target):
            _exchange(directory, target)
        else:
            os.rename(directory, target)
    except OSError as error:
        raise failure(f"rename {directory} to", target, error) from error
    sync_directory(target.parent)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError where something at `target` may not be replaced: it is no checkpoint, or not allowed."""
    if not is_occupied(target):
        return
    if not (target / MANIFEST).is_file():
        raise CheckpointError(f"{target} is not empty and holds no checkpoint; save into another directory")
    if not overwrite:
        raise CheckpointError(f"there is a checkpoint at {target}; give another name, or overwrite=True to replace it")


def is_occupied(target: Path) -> bool:
    """Whether something other than an empty directory is at `target`."""
    if target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return os.path.lexists(target)


def check_exchange(directory: Path) -> None:
    """Raises CheckpointError where two directories inside `directory` cannot be exchanged in one step."""
    first, second = directory / "exchange-1", directory / "exchange-2"
    try:
        os.mkdir(first)
        os.mkdir(second)
        _exchange(first, second)
        os.rmdir(first)
        os.rmdir(second)
    except OSError as error:
        raise CheckpointError(
            f"this file system cannot replace a checkpoint in one step ({error.strerror}); save under another name, or "
            f"remove the old one first"
        ) from error


def _exchange(first: Path, second: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE, which Python's `os` does not offer."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(0, "the C library has no renameat2")
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _remove_leftovers(parent: Path) -> None:
    """Removes what killed processes have left, but not what is locked: that is being written."""
    for pattern in (f"{_SAVING}*", f"{_REMOVING}*"):
        for leftover in parent.glob(pattern):
            with contextlib.suppress(OSError):
                descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(leftover, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _complete(directory: Path) -> dict[Path, Manifest]:
    """The checkpoints inside `directory` whose manifest is good and whose files have their sizes, by directory."""
    found: dict[Path, Manifest] = {}
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return found
    except OSError as error:
        raise failure("look for checkpoints in", directory, error) from error
    except ValueError as error:  # a NUL
        raise CheckpointError(f"cannot look for checkpoints in {str(directory)!r}: {error}") from error
    for path in paths:
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            manifest = read_manifest(path)
            manifest.check_sizes()
        except CheckpointError as error:
            # What has no manifest may be anything; what has a bad one was a checkpoint once.
            if (path / MANIFEST).is_file():
                warnings.warn(f"{path} is left out: {error.message}", stacklevel=3)
            continue
        found[path] = manifest
    return found


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint that was saved last among the sub-directories of `directory`; None where there is none.

    Only complete ones count: a save that was interrupted leaves none, and one with a missing or truncated file is left
    out with a warning. (Checksums are checked by `load_checkpoint`.) "Last" goes by a number that every save takes, one
    higher than those beside it, not by names or clocks.

    Raises:
        CheckpointError: `directory` cannot be read.
    """
    found = _complete(Path(directory))
    return max(found, key=lambda path: (found[path].sequence, path.name), default=None)


def count_complete(directory: Path) -> int:
    """How many complete checkpoints lie in `directory`; says nothing of those that are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return len(_complete(directory))


def next_sequence(parent: Path) -> int:
    """A number above those of all checkpoints in `parent`, damaged ones too."""
    sequences = [0]
    if parent.is_dir():
        for path in parent.iterdir():
            with contextlib.suppress(CheckpointError):
                sequences.append(read_manifest(path).sequence)
    return max(sequences) + 1


def remove_old(newest: Path, keep: int) -> None:
    """Removes all but the last `keep` complete checkpoints of the series that `newest` ends.

    A series is what lies in one directory under names that differ in the digits at their end. `newest` always stays.

    Raises:
        CheckpointError: an old one cannot be removed; `newest` is not touched by that.
    """
    stem = re.sub(r"\d+$", "", newest.name)
    found = _complete(newest.parent)
    series = [path for path in found if re.sub(r"\d+$", "", path.name) == stem and path.name != newest.name]
    series.sort(key=lambda path: (found[path].sequence, path.name))
    for path in series[: max(0, len(series) + 1 - keep)]:
        leaving = path.parent / _hidden(_REMOVING, path.name)
        try:
            os.rename(path, leaving)  # at once: half of a checkpoint must not look like one
            shutil.rmtree(leaving)
        except OSError as error:
            raise failure("remove the old checkpoint", path, error) from error
