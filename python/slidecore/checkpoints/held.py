"""Weights that are not in memory, as a stream over weight files needs them: one chunk's after the other, each once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from slidecore.partition import Chunk
    from slidecore.planes import Planes


class HeldWeights:
    """Keeps one chunk's weights borrowed until another's are asked for; a context, used by one thread.

    A chunk's tensors follow each other in the weight files, also where one ends and the next begins.
    """

    def __init__(
        self, planes: Planes, *, write: bool = False, arrived: Callable[[Chunk], None] = lambda _: None
    ) -> None:
        """
        Args:
            planes: whose.
            write: every entry of each chunk will be written.
            arrived: called for each chunk when its weights are there.
        """
        self._planes = planes
        self._write = write
        self._arrived = arrived
        self._chunk: Chunk | None = None
        self._part = torch.empty(0)
        self._seen: set[Chunk] = set()
        self._stack = ExitStack()

    def __enter__(self) -> HeldWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._part = torch.empty(0)
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def holds(self, chunk: Chunk) -> bool:
        return chunk is self._chunk

    def turn_to(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's weights, flat, until the next call for another chunk."""
        if chunk is not self._chunk:
            self._chunk, self._part = None, torch.empty(0)
            self._stack.close()  # stores what was written
            # Whoever comes back to a chunk finds what was written to it before.
            fresh = self._write and chunk not in self._seen
            parts = self._stack.enter_context(self._planes.borrowed(chunk, ("weight",), write=self._write, fresh=fresh))
            self._chunk, self._part = chunk, parts["weight"]
            self._seen.add(chunk)
            self._arrived(chunk)
        return self._part
