"""Parts of planes that are not in memory, lent for a while in temporary memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from slidecore.errors import PlaneError

if TYPE_CHECKING:
    from slidecore.partition import Chunk
    from slidecore.plane import Plane
    from slidecore.planes import Planes


class PartTransfer(Protocol):
    """Moves a chunk's absent part between its tier and temporary memory.

    `part` is flat, of the plane's dtype and the part's size; its memory begins at a whole page and can be used up to
    the end of its last one. It must not be kept. A part that was never stored is fetched as zeros. Called by one thread
    at a time, whichever it is, between steps.
    """

    def __call__(self, chunk: Chunk, name: str, part: torch.Tensor, /) -> None: ...


@dataclass(eq=False)
class _Loan:
    part: torch.Tensor
    borrowers: int = 0
    changed: bool = False


class Loans:
    """What of absent parts is lent now: to one thread at a time, and to that as often as it asks."""

    def __init__(self, planes: Planes) -> None:
        self._planes = planes
        self._lock = threading.RLock()
        self._loans: dict[tuple[Plane, int], _Loan] = {}

    @contextlib.contextmanager
    def borrowed(
        self, chunk: Chunk, names: Iterable[str], *, write: bool, fresh: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """See `Planes.borrowed`."""
        planes = [self._planes.plane(name) for name in names]
        parts: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            if not all(plane.present(chunk) for plane in planes):
                stack.enter_context(self._lock)  # until nothing holds the memory any more
            stack.callback(parts.clear)  # the caller's variable would hold it until its next use
            for plane in planes:
                parts[plane.name] = stack.enter_context(self.lent(chunk, plane, write=write, fresh=fresh))
            yield parts

    @contextlib.contextmanager
    def lent(self, chunk: Chunk, plane: Plane, *, write: bool = False, fresh: bool = False) -> Iterator[torch.Tensor]:
        """One part, as `Planes.borrowed` gives it."""
        if plane.present(chunk):
            yield plane.of(chunk)
            return
        with self._lock:
            loan = self._open(chunk, plane, write=write, fresh=fresh)
            loan.borrowers += 1
            try:
                yield loan.part
                loan.changed |= write
            finally:
                loan.borrowers -= 1
                if loan.borrowers == 0:
                    del self._loans[plane, chunk.index]
                    if loan.changed:  # by this borrower, or one inside of it that had no error
                        self._transfer(self._planes.store, "store", chunk, plane, loan.part)

    def fetch(self, chunk: Chunk, plane: Plane, part: torch.Tensor) -> None:
        """Fetches a part that nobody has borrowed into `part`."""
        with self._lock:
            if (plane, chunk.index) in self._loans:
                raise PlaneError(f"the {plane.name} plane of {chunk.name!r} is borrowed and cannot change its tier")
            self._transfer(self._planes.fetch, "fetch", chunk, plane, part)

    def _open(self, chunk: Chunk, plane: Plane, *, write: bool, fresh: bool) -> _Loan:
        if write and self._planes.store is None:  # found now, not when the changes are made
            self._transfer(None, "store", chunk, plane, plane.form(chunk))
        loan = self._loans.get((plane, chunk.index))
        if loan is None:
            loan = _Loan(plane.temporary(chunk))
            if not fresh:
                self._transfer(self._planes.fetch, "fetch", chunk, plane, loan.part)
            self._loans[plane, chunk.index] = loan
        return loan

    @staticmethod
    def _transfer(hook: PartTransfer | None, what: str, chunk: Chunk, plane: Plane, part: torch.Tensor) -> None:
        if hook is None:
            raise PlaneError(
                f"the {plane.name} plane of {chunk.name!r} is not in memory, and nothing was set to {what} it"
            )
        hook(chunk, plane.name, part)
