"""Ctrl-C wherever it may come: before a line of slidecore, one after another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import slidecore

Line = tuple[str, str, int]  # file, function, number
_SOURCES = Path(slidecore.__file__).parent


def lines_of(call: Callable[[], object], files: Sequence[str]) -> Counter[Line]:
    """The lines of these files of slidecore that `call` runs, and how often."""
    lines: Counter[Line] = Counter()
    _traced(call, files, lambda line: lines.update([line]))
    return lines


def interrupt(call: Callable[[], object], line: Line, occurrence: int) -> bool:
    """Raises KeyboardInterrupt in `call` before `line` is run for the given time; returns whether it came out."""
    seen = 0

    def visit(reached: Line) -> None:
        nonlocal seen
        seen += reached == line
        if reached == line and seen == occurrence:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        _traced(call, [line[0]], visit)
    except KeyboardInterrupt:
        return True
    return False


def _traced(call: Callable[[], object], files: Sequence[str], visit: Callable[[Line], None]) -> None:
    names = {str(_SOURCES / name): name for name in files}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = names.get(frame.f_code.co_filename)
        if name is None:
            return None
        if event == "line":
            visit((name, frame.f_code.co_name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
