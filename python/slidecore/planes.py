"""The host planes of a model: one flat array a kind, chunks one behind the other.

A chunk's planes begin at a multiple of `CHUNK_ALIGNMENT` elements (whole pages in every dtype, as direct I/O wants
them), an entry at a multiple of `ENTRY_ALIGNMENT` (a group of 8-bit moments, and more than a device's vector width).
Trainable entries come first, so that gradient, residual and moments cover a prefix of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slidecore import _core
from slidecore.errors import ModelError
from slidecore.partition import Chunk, Entry

ENTRY_ALIGNMENT = 128
CHUNK_ALIGNMENT = 2048


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


def state_bytes(chunks: Sequence[Chunk], compute_dtype: torch.dtype, train: bool = True) -> int:
    """Host bytes of all planes of laid-out `chunks`."""
    itemsize = compute_dtype.itemsize
    trained = (0 if compute_dtype == torch.float32 else 2) + 8 if train else 0
    return sum(
        _round_up(c.numel, CHUNK_ALIGNMENT) * itemsize + _round_up(c.trainable_numel, CHUNK_ALIGNMENT) * trained
        for c in chunks
    )


class _Plane:
    """One flat plane; `start[i]` is the first element of chunk i."""

    def __init__(self, device: _core.Device, numels: Sequence[int], dtype: torch.dtype, pinned: bool) -> None:
        self.start: list[int] = []
        total = 0
        for numel in numels:
            self.start.append(total)
            total += _round_up(numel, CHUNK_ALIGNMENT)
        self.buffer = _core.HostBuffer(device, total * dtype.itemsize, pinned)
        self.itemsize = dtype.itemsize
        # The tensor keeps the buffer alive: views of it (p.data) may outlive the planes object.
        self.flat = torch.frombuffer(self.buffer, dtype=dtype) if total else torch.empty(0, dtype=dtype)

    def address(self, chunk: Chunk) -> int:
        return self.buffer.address + self.start[chunk.index] * self.itemsize

    def view(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        begin = self.start[chunk.index] + entry.offset
        return self.flat[begin : begin + entry.numel].view(entry.shape)


class Planes:
    """Weight, residual and moments of all chunks in host memory; zero until written."""

    def __init__(
        self,
        device: _core.Device,
        pool: _core.ThreadPool,
        chunks: Sequence[Chunk],
        compute_dtype: torch.dtype,
        train: bool,
    ) -> None:
        self.compute_dtype = compute_dtype
        self._pool = pool
        self.weight = _Plane(device, [c.numel for c in chunks], compute_dtype, pinned=True)
        trainable = [c.trainable_numel for c in chunks] if train else []
        split = compute_dtype != torch.float32
        self.residual = _Plane(device, trainable if split else [], torch.int16, pinned=False)
        self.exp_avg = _Plane(device, trainable, torch.float32, pinned=False)
        self.exp_avg_sq = _Plane(device, trainable, torch.float32, pinned=False)
        self.nbytes = sum(len(p.buffer) for p in (self.weight, self.residual, self.exp_avg, self.exp_avg_sq))

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
