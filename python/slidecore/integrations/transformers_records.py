"""The records that transformers' models make of what their submodules compute (`output_router_logits=True` and such).

Hooks on the submodules append to lists of the forward that is under way. A visit gives them lists of its own, whose
new entries become outputs of the visit.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Recording:
    """The lists of one visit: those of the forward, copied, as hooks look at how long they are."""

    def __init__(self, lists: dict[str, Any]) -> None:
        self._lengths = {key: len(value) for key, value in lists.items() if isinstance(value, list)}
        self.lists = {key: list(value) if isinstance(value, list) else value for key, value in lists.items()}

    def taken(self) -> dict[str, list[Any]]:
        """What was recorded since."""
        return {key: self.lists[key][length:] for key, length in self._lengths.items()}


def _collector() -> Any:
    """The context variable with the forward's lists, None where this transformers has none."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)


@contextlib.contextmanager
def recording() -> Iterator[Recording | None]:
    """Lists for the hooks of one run, thrown away after it unless `add` gets them; None where nothing is recorded."""
    collector = _collector()
    lists = collector.get() if collector is not None else None
    if not lists:
        yield None
        return
    made = Recording(lists)
    token = collector.set(made.lists)
    try:
        yield made
    finally:
        collector.reset(token)


def add(recorded: dict[str, list[Any]]) -> None:
    """Appends to the lists of the forward that is under way."""
    if any(recorded.values()):
        lists = _collector().get()
        for key, values in recorded.items():
            lists[key].extend(values)
