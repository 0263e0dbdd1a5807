"""The directory that a run writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slidecore.checkpoints import latest_checkpoint
from slidecore.checkpoints.directories import count_complete
from slidecore.checkpoints.saving import write_model
from slidecore.errors import InputError

METRICS, LOSS_PLOT, TIMELINE_PLOT, TRACE = "metrics.jsonl", "loss.png", "timeline.png", "trace.json"
CHECKPOINTS = "checkpoints"
_FIGURES = (LOSS_PLOT, TIMELINE_PLOT, TRACE)
SHARD_SIZE = "4GB"
_SAVING, _SCRATCH = ".saving-", ".data-"


class OutputDirectory:
    """Creates and checks the directory, and puts a saved model into it in one go.

    Until `release()`, no other run can have it. Raises InputError where another has, where it cannot be written, or
    where it has files in it and neither `overwrite` nor `resume` allows that.

    Attributes:
        path: the directory.
        checkpoints: the directory of its checkpoints.
        newest: the checkpoint to go on from, if `resume` and there is one.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            # What a killed run has left is of no use to anyone.
            for pattern in (f"{_SAVING}*", f"{_SCRATCH}*"):
                for leftover in path.glob(pattern):
                    shutil.rmtree(leftover)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(
                f"cannot write to {path}: {error.strerror}", "Give an --out directory that you may write to."
            ) from error
        self.checkpoints = path / CHECKPOINTS
        self.newest = latest_checkpoint(self.checkpoints) if resume else None
        if any(path.iterdir()) and not (overwrite or resume):
            self.release()
            again = ", or --resume to go on with the run in it" if self.checkpoints.is_dir() else ""
            raise InputError(
                f"{path} is not empty", f"Give another --out, or --overwrite to replace what is there{again}."
            )
        if resume and self.newest is None and self.checkpoints.is_dir() and any(self.checkpoints.glob("[!.]*")):
            self.release()
            raise InputError(
                f"no checkpoint in {self.checkpoints} is complete",
                "Look at what is there: another run from the beginning would remove it. --overwrite does.",
            )
        if resume and self.newest is None and (path / "config.json").exists():
            self.release()
            raise InputError(
                f"{path} holds a model and no checkpoint to go on from",
                "The run that wrote it has ended. Give another --out, or --overwrite instead of --resume.",
            )

    def _acquire(self) -> None:
        """Locks the directory itself: that leaves nothing behind, and ends with the process however it ends."""
        descriptor = os.open(self.path, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(
                f"another run is writing to {self.path}", "Wait until it has ended, or give another --out."
            ) from error
        except OSError:  # a file system without locks of directories
            pass

    def check_space(self, model_bytes: int, checkpoint_bytes: int, *, keep: int, saves: int) -> None:
        """Raises InputError where the disk has too little space for the run.

        Args:
            model_bytes: of the weights that are written at the end.
            checkpoint_bytes: of a checkpoint.
            keep: how many checkpoints are kept. One more is there while the next is written.
            saves: how often a checkpoint will be saved.
        """
        if self.newest is not None:
            there = count_complete(
                self.checkpoints
            )  # which take a part of the places, one is removed for every new one
            more, freed = min(saves, max(1, keep + 1 - there)), 0
        else:
            more, freed = min(saves, keep + 1), self._earlier_bytes()
        needed = model_bytes + more * checkpoint_bytes
        free = shutil.disk_usage(self.path).free + freed
        if free < needed:
            raise InputError(
                f"saving the model{f' and {more} checkpoints' if more else ''} takes {needed / 2**30:.1f} GiB, but "
                f"{self.path} has {free / 2**30:.1f} GiB free",
                "Free some space, or give an --out on another disk.",
            )

    def _earlier_bytes(self) -> int:
        """What `remove_earlier_run` will free."""
        found = [*self.checkpoints.rglob("*"), *(self.path / name for name in _FIGURES)]
        return sum(path.stat().st_blocks * 512 for path in found if path.is_file() and not path.is_symlink())

    def remove_earlier_run(self) -> None:
        """What this run may not replace, as it may trace no step, or stop on its way: figures and checkpoints."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in _FIGURES:
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary directory inside, removed at the end."""
        directory = tempfile.mkdtemp(prefix=_SCRATCH, dir=self.path)
        try:
            yield Path(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Writes the model and its tokenizer; until all of it is on the disk, nothing that was there changes.

        `config.json` goes last and an older one goes first, so that an interrupted replacement cannot be mistaken for
        a model.
        """
        staging = Path(tempfile.mkdtemp(prefix=_SAVING, dir=self.path))
        try:
            write_model(model, staging, tokenizer=tokenizer, shard_size=SHARD_SIZE)
            config = self.path / "config.json"
            config.unlink(missing_ok=True)
            for old in (*self.path.glob("*.safetensors"), *self.path.glob("*.safetensors.index.json")):
                old.unlink()
            for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, self.path / file.name)
            _sync(self.path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says so: libraries wrap it, and some keep only the text."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(chain) for text in (os.strerror(errno.ENOSPC), "Not enough disk space")):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
