"""One plane: a flat array for each chunk, in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slidecore import _core
from slidecore.errors import PlaneError
from slidecore.partition import Chunk, Entry

PAGE_BYTES = 4096


def round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def part_bytes(numel: int, dtype: torch.dtype) -> int:
    """What a part of so many elements takes: whole pages."""
    return round_up(numel * dtype.itemsize, PAGE_BYTES)


def entry_view(part: torch.Tensor, entry: Entry, group: int = 1) -> torch.Tensor:
    """The entry's elements in a chunk's flat part, in its shape; of a plane whose elements stand for groups, flat."""
    begin = entry.offset // group
    view = part[begin : begin + -(-entry.numel // group)]
    return view.view(entry.shape) if group == 1 else view


class Plane:
    """One plane: of each chunk a flat part of `numels[chunk.index]` elements, in a buffer of exactly its size.

    An element stands for `group` parameters. Parts that are present are zero until written. One without elements has
    no buffer, and is always present.
    """

    def __init__(
        self,
        name: str,
        device: _core.Device,
        numels: Sequence[int],
        dtype: torch.dtype,
        *,
        pinned: bool,
        group: int,
        absent: Sequence[bool],
    ) -> None:
        """`absent` says which parts are not allocated; it is as long as `numels`."""
        self.name = name
        self.numels = list(numels)
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.group = group
        self._device = device
        self._pinned = pinned
        self._parts: list[torch.Tensor | None] = []
        for numel, without in zip(self.numels, absent, strict=True):
            self._parts.append(None if numel and without else self._allocate(numel, pinned))

    def _allocate(self, numel: int, pinned: bool) -> torch.Tensor:
        if numel == 0:
            return torch.empty(0, dtype=self.dtype)
        # The tensor keeps the buffer alive: views of it (p.data) may outlive this object.
        return torch.frombuffer(_core.HostBuffer(self._device, numel * self.itemsize, pinned), dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the parts take which are present."""
        return sum(part_bytes(part.numel(), self.dtype) for part in self._parts if part is not None)

    def present(self, chunk: Chunk) -> bool:
        """Whether the chunk's part is in memory."""
        return self._parts[chunk.index] is not None

    def of(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's part, flat.

        Raises:
            PlaneError: it is absent.
        """
        part = self._parts[chunk.index]
        if part is None:
            raise PlaneError(f"the {self.name} plane of {chunk.name!r} is not in memory; it has to be borrowed")
        return part

    def address(self, chunk: Chunk) -> int:
        """Where the chunk's part begins; 0 if it has no elements. Valid until `release`.

        Raises:
            PlaneError: the part is absent.
        """
        part = self.of(chunk)
        return part.data_ptr() if part.numel() else 0

    def view(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        """The entry's elements in a part that is present, see `entry_view`."""
        return entry_view(self.of(chunk), entry, self.group)

    def form(self, chunk: Chunk) -> torch.Tensor:
        """The dtype and the shape of the chunk's part, as a tensor without storage."""
        return torch.empty(self.numels[chunk.index], dtype=self.dtype, device="meta")

    def temporary(self, chunk: Chunk) -> torch.Tensor:
        """Plain memory of the part's size, zero, from a whole page on: to borrow the part into."""
        return self._allocate(self.numels[chunk.index], pinned=False)

    def release(self, chunk: Chunk) -> None:
        """Lets go of the part's buffer. It is unmapped when nobody holds a tensor over it any more."""
        if self.numels[chunk.index]:
            self._parts[chunk.index] = None

    def restore(self, chunk: Chunk) -> torch.Tensor:
        """Gives an absent part a new buffer, zero and elsewhere than before; returns the part.

        Raises:
            PlaneError: the part is present, so that its content would be lost.
            Error: there is not enough memory.
        """
        numel = self.numels[chunk.index]
        if numel and self.present(chunk):
            raise PlaneError(f"the {self.name} plane of {chunk.name!r} is in memory already")
        part = self._parts[chunk.index] = self._allocate(numel, self._pinned)
        return part
