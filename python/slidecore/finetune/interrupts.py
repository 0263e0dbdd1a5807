"""Ctrl-C, SIGTERM and SIGHUP: what runs is finished and saved, a second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from slidecore.errors import InterruptedRunError, TerminatedRunError

# SIGHUP comes when the terminal or the connection goes, and would otherwise end the process with nothing saved.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Handles these signals while it is entered; where that is not possible (another thread), Python's own remain.

    Outside of `deferred()` a signal raises KeyboardInterrupt at once; inside, the first one only sets `requested`.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.work = ""  # what a signal does not stop, for the person who sent it; "" if it does
        self._before: dict[int, Any] = {}
        self._signal = signal.SIGINT
        self.requested = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:  # as nohup leaves it: somebody wants it ignored
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextlib.contextmanager
    def deferred(self, what: str) -> Iterator[None]:
        """For work that looks at `requested` often enough and ends in order, or that is worth finishing.

        `what` is being done, for the person who has interrupted it; where that changes, set `work`.
        """
        self.work = what
        try:
            yield
        finally:
            self.work = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        if not self.work or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say(f"{self.work}; once more to stop at once")

    def error(self, message: str, hint: str) -> InterruptedRunError:
        """The error that ends the run, with the exit code of the signal that came."""
        kind = InterruptedRunError if self._signal == signal.SIGINT else TerminatedRunError
        return kind(message, hint)
