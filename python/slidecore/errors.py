"""Errors that a user can act on. What went wrong is the message; what to do about it is the hint."""

from __future__ import annotations

from typing import ClassVar


class SlidecoreError(Exception):
    """Base of the package's own errors.

    `hint` says what to do, in one sentence, and may be empty. `exit_code` is what the command line returns: 2 where
    nothing has been started yet, 1 where a run stopped on its way, 130 after an interrupt.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class InputError(SlidecoreError, ValueError):
    """Something given to a command or function cannot be used. Raised before any work is lost."""

    exit_code = 2


class MissingDependencyError(SlidecoreError, ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 2


class TrainingError(SlidecoreError, RuntimeError):
    """A run cannot go on."""


class InterruptedRunError(SlidecoreError):
    """A run was interrupted from the keyboard."""

    exit_code = 130
