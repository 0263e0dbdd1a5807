"""The exceptions that slidecore raises, besides those of the native core (`slidecore._core.Error` and below)."""

from __future__ import annotations

from typing import ClassVar


class SlidecoreError(Exception):
    """Base of the Python layer's errors.

    `message` says what is wrong; `hint` what to do about it, in a sentence, or nothing where the message does. The
    command line returns `exit_code`: 2 where what was given cannot be used and nothing was started, 1 where a run
    stopped on its way, 130 after an interrupt, 143 after SIGTERM or SIGHUP.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class ModelError(SlidecoreError, ValueError):
    """The model (or its files) cannot be offloaded as it is; nothing was changed."""

    exit_code = 2


class BudgetError(SlidecoreError, ValueError):
    """A memory budget is too small; the message says the smallest that works."""

    exit_code = 2


class UsageError(SlidecoreError, RuntimeError):
    """A call that this mode cannot honour; the message says what to write instead."""


class PlaneError(SlidecoreError, RuntimeError):
    """A part of a plane was used as if it were in memory, and is not: a defect of slidecore."""


class CheckpointError(SlidecoreError, RuntimeError):
    """A checkpoint could not be written, or is refused: damaged, incomplete, or of another model.

    The message names the file and the reason. Unless it says so, nothing was changed: neither model nor checkpoints.
    """


class InputError(SlidecoreError, ValueError):
    """A file, a directory or an option given to a command cannot be used; nothing was changed."""

    exit_code = 2


class MissingDependencyError(SlidecoreError, ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 2


class TrainingError(SlidecoreError, RuntimeError):
    """A run cannot go on."""


class InterruptedRunError(SlidecoreError):
    """A run was interrupted from the keyboard."""

    exit_code = 130


class TerminatedRunError(InterruptedRunError):
    """A run was asked to end, by SIGTERM or SIGHUP."""

    exit_code = 143
