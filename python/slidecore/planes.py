"""The host planes of a model: one flat array a kind, chunks one behind the other.

A chunk begins at a whole page of each plane (as direct I/O wants it), an entry at a multiple of `ENTRY_ALIGNMENT`
elements (a group of 8-bit moments, and more than a device's vector width).
Trainable entries come first, so that gradient, residual and moments cover a prefix of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from slidecore import _core
from slidecore.errors import ModelError
from slidecore.partition import Chunk, Entry

ENTRY_ALIGNMENT = _core.MOMENTS_GROUP
PAGE_BYTES = 4096
# Planes with one element for a whole group.
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")

Moments = Literal["float32", "8bit"]


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def lay_out(chunks: Sequence[Chunk]) -> None:
    """Sets each entry's offset and each chunk's `numel` and `trainable_numel` (in elements)."""
    for chunk in chunks:
        chunk.entries.sort(key=lambda e: not e.trainable)  # stable: registration order is kept within both halves
        offset = 0
        chunk.trainable_numel = 0
        for entry in chunk.entries:
            entry.offset = offset
            offset += _round_up(entry.numel, ENTRY_ALIGNMENT)
            if entry.trainable:
                chunk.trainable_numel = offset
        chunk.numel = offset


def _kinds(compute_dtype: torch.dtype, train: bool, moments: Moments) -> dict[str, torch.dtype]:
    """The planes of a model and their dtypes; all but `weight` cover the trainable entries only."""
    kinds = {"weight": compute_dtype}
    if train:
        if compute_dtype != torch.float32:
            kinds["residual"] = torch.int16
        if moments == "float32":
            kinds |= {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        else:
            kinds |= {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, **dict.fromkeys(_SCALES, torch.float32)}
    return kinds


def _group(kind: str) -> int:
    return ENTRY_ALIGNMENT if kind in _SCALES else 1


def _numels(chunks: Sequence[Chunk], kind: str) -> list[int]:
    return [(c.numel if kind == "weight" else c.trainable_numel) // _group(kind) for c in chunks]


def state_bytes(
    chunks: Sequence[Chunk], compute_dtype: torch.dtype, train: bool = True, moments: Moments = "float32"
) -> int:
    """Host bytes of all planes of laid-out `chunks`."""
    return sum(
        _round_up(numel * dtype.itemsize, PAGE_BYTES)
        for kind, dtype in _kinds(compute_dtype, train, moments).items()
        for numel in _numels(chunks, kind)
    )


class Plane:
    """One flat plane; `start[i]` is the first element of chunk i, `numels[i]` how many it has.

    An element stands for `group` parameters.
    """

    def __init__(
        self, device: _core.Device, numels: Sequence[int], dtype: torch.dtype, pinned: bool, group: int = 1
    ) -> None:
        self.start: list[int] = []
        self.numels = list(numels)
        self.itemsize = dtype.itemsize
        self.group = group
        total = 0
        for numel in numels:
            self.start.append(total)
            total += _round_up(numel * self.itemsize, PAGE_BYTES) // self.itemsize
        self.buffer = _core.HostBuffer(device, total * self.itemsize, pinned)
        # The tensor keeps the buffer alive: views of it (p.data) may outlive the planes object.
        self.flat = torch.frombuffer(self.buffer, dtype=dtype) if total else torch.empty(0, dtype=dtype)

    def of(self, chunk: Chunk) -> torch.Tensor:
        begin = self.start[chunk.index]
        return self.flat[begin : begin + self.numels[chunk.index]]

    def address(self, chunk: Chunk) -> int:
        return self.buffer.address + self.start[chunk.index] * self.itemsize

    def view(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        """The entry's part, in its shape; of a plane of groups, flat."""
        begin = self.start[chunk.index] + entry.offset // self.group
        part = self.flat[begin : begin + -(-entry.numel // self.group)]
        return part.view(entry.shape) if self.group == 1 else part


class Planes:
    """Weight, residual and moments of all chunks in host memory; zero until written."""

    def __init__(
        self,
        device: _core.Device,
        pool: _core.ThreadPool,
        chunks: Sequence[Chunk],
        compute_dtype: torch.dtype,
        train: bool,
        moments: Moments = "float32",
    ) -> None:
        self.compute_dtype = compute_dtype
        self.grad: Plane | None = None
        self._device = device
        self._trainable = [c.trainable_numel for c in chunks]
        self._pool = pool
        kinds = _kinds(compute_dtype, train, moments)
        self._all = {
            kind: Plane(device, _numels(chunks, kind), dtype, kind == "weight", _group(kind))
            for kind, dtype in kinds.items()
        }
        self.weight = self._all["weight"]
        self.residual = self._all.get("residual", Plane(device, [], torch.int16, pinned=False))
        self.moments = {kind: p for kind, p in self._all.items() if kind.startswith("exp_avg")}

    @property
    def nbytes(self) -> int:
        """Host bytes of all planes."""
        planes = [*self._all.values(), *([self.grad] if self.grad is not None else [])]
        return sum(len(p.buffer) for p in planes)

    def gradients(self, dtype: torch.dtype) -> Plane:
        """The `grad` plane of deferred updates, in `dtype`; its first use allocates it, another dtype replaces it."""
        if self.grad is None or self.grad.flat.dtype != dtype:
            self.grad = Plane(self._device, self._trainable, dtype, pinned=True)
        return self.grad

    def of(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """The chunk's part of every plane that it has, by the plane's name, in a fixed order.

        Each is a flat view that begins at a whole page: of `chunk.numel` elements for `weight`, of
        `chunk.trainable_numel` for the others, and of one for each 128 of these for the scales of 8-bit moments.
        Padding between entries is in it, and is zero. Planes of which the chunk has nothing (those of the update, if
        all of it is frozen or the model does not train) are left out. Pending updates write to these views: `drain()`
        the engine first.
        """
        return {name: plane.of(chunk) for name, plane in self._all.items() if plane.numels[chunk.index]}

    def state_of(self, chunk: Chunk, entry: Entry) -> dict[str, torch.Tensor]:
        """The entry's part of every plane but `weight`, in its shape (scales of 8-bit moments flat); views."""
        return {name: plane.view(chunk, entry) for name, plane in self._all.items() if name != "weight"}

    def write(self, chunk: Chunk, entry: Entry, value: torch.Tensor) -> None:
        """Sets the master value of `entry` from `value` (any float dtype; float32 exactly), which it must match.

        Raises:
            ModelError: `value` has another shape or no float dtype.
        """
        if value.shape != entry.shape:
            raise ModelError(f"{entry.name}: expected shape {tuple(entry.shape)}, got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise ModelError(f"{entry.name}: expected a floating-point tensor, got {value.dtype}")
        weight = self.weight.view(chunk, entry)
        if self.compute_dtype == torch.float32 or not entry.trainable or value.dtype == torch.bfloat16:
            weight.copy_(value)
            if self.residual.start and entry.trainable:
                self.residual.view(chunk, entry).zero_()
            return
        master = value.detach().to(device="cpu", dtype=torch.float32).contiguous()
        residual = self.residual.view(chunk, entry)
        _core.split(self._pool, master.data_ptr(), weight.data_ptr(), residual.data_ptr(), entry.numel)

    def master(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        """The float32 master value, a copy of the entry's shape."""
        weight = self.weight.view(chunk, entry)
        if not self.residual.start or not entry.trainable:
            return weight.float() if weight.dtype != torch.float32 else weight.clone()
        out = torch.empty(entry.shape, dtype=torch.float32)
        residual = self.residual.view(chunk, entry)
        _core.merge(self._pool, weight.data_ptr(), residual.data_ptr(), out.data_ptr(), entry.numel)
        return out

    def clear_residual(self, chunk: Chunk, entry: Entry) -> None:
        """Makes the master value equal to the weight: the weight was written by somebody else."""
        if self.residual.start and entry.trainable:
            self.residual.view(chunk, entry).zero_()

    def clear_moments(self, chunk: Chunk, entry: Entry) -> None:
        for plane in self.moments.values():
            plane.view(chunk, entry).zero_()
