"""Standard output and standard error for work that must not end because nobody reads any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, Literal

_NOWHERE = io.StringIO()


class Outlet:
    """`sys.stdout` or `sys.stderr` as a file whose writes never fail.

    A closed pipe (`| head`) or a terminal that is gone says nothing of the work itself: from the first failure on, what
    is written is dropped. Of standard output that is said once, on standard error.
    """

    def __init__(self, name: Literal["stdout", "stderr"], instead: str = "") -> None:
        """`instead` tells where what is not printed any more can be found."""
        self._name = name
        self._instead = instead
        self._gone = False

    def write(self, text: str) -> int:
        """Writes `text`, or drops it."""
        if not self._gone and self._stream is not None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what has been written."""
        if not self._gone and self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._drop(error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._stream is not None and not self._stream.closed and self._stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream if self._stream is not None else _NOWHERE, name)

    @property
    def _stream(self) -> Any:
        # Asked for each time: tests and embedding programs replace it. None where it was closed as the process began.
        return getattr(sys, self._name)

    def _drop(self, error: OSError | ValueError) -> None:
        if isinstance(error, ValueError) and not self._stream.closed:
            raise error  # text that cannot be encoded, say
        self._gone = True
        # What is still buffered would fail again when the interpreter ends, and change the exit code.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._name == "stdout":
            with contextlib.suppress(OSError):
                why = getattr(error, "strerror", None) or error
                text = f"standard output cannot be written to ({why}): going on without it. {self._instead}"
                print(text.strip(), file=sys.stderr, flush=True)
