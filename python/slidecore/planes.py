"""The planes of a model: for each kind one flat array a chunk, each with memory of its own.

A chunk's part of a plane begins at a whole page (as direct I/O wants it), an entry at a multiple of `ENTRY_ALIGNMENT`
elements (a group of 8-bit moments, and more than a device's vector width).
Trainable entries come first, so that gradient, residual and moments cover a prefix of the weights.

Any part may be absent: it then lies in another tier, and comes into memory when it is borrowed (see `borrowing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch

from slidecore import _core
from slidecore.borrowing import Loans, PartTransfer
from slidecore.errors import ModelError, PlaneError
from slidecore.partition import Chunk, Entry
from slidecore.plane import Plane, entry_view, part_bytes, round_up
from slidecore.tier_plan import Part

ENTRY_ALIGNMENT = _core.MOMENTS_GROUP
# Planes with one element for a whole group.
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")

Moments = Literal["float32", "8bit"]


def lay_out(chunks: Sequence[Chunk]) -> None:
    """Sets each entry's offset and each chunk's `numel` and `trainable_numel` (in elements)."""
    for chunk in chunks:
        chunk.entries.sort(key=lambda e: not e.trainable)  # stable: registration order is kept within both halves
        offset = 0
        chunk.trainable_numel = 0
        for entry in chunk.entries:
            entry.offset = offset
            offset += round_up(entry.numel, ENTRY_ALIGNMENT)
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
    """Bytes of all planes of laid-out `chunks`, wherever they lie."""
    return sum(
        part_bytes(numel, dtype)
        for kind, dtype in _kinds(compute_dtype, train, moments).items()
        for numel in _numels(chunks, kind)
    )


def parts_of(
    chunks: Sequence[Chunk], compute_dtype: torch.dtype, train: bool = True, moments: Moments = "float32"
) -> list[Part]:
    """Every part of every plane of laid-out `chunks` that has something in it."""
    return [
        Part(chunk.index, kind, numel * dtype.itemsize)
        for kind, dtype in _kinds(compute_dtype, train, moments).items()
        for chunk, numel in zip(chunks, _numels(chunks, kind), strict=True)
        if numel
    ]


class Planes:
    """Weight, residual and moments of all chunks, and the gradients that wait; zero until written.

    Content is read and written inside `borrowed`, which brings parts that are absent. What hands out views or
    addresses (`Planes.of`, and `of`, `view`, `address` of a `Plane`) knows parts that are present only.

    Attributes:
        fetch, store: bring an absent part into temporary memory, and back after it was changed. None: no part may be
            absent.
    """

    def __init__(
        self,
        device: _core.Device,
        pool: _core.ThreadPool,
        chunks: Sequence[Chunk],
        compute_dtype: torch.dtype,
        train: bool,
        moments: Moments = "float32",
        absent: Callable[[Chunk, str], bool] = lambda *_: False,
    ) -> None:
        """`absent` says which parts, by chunk and plane, are not allocated."""
        self.compute_dtype = compute_dtype
        self.fetch: PartTransfer | None = None
        self.store: PartTransfer | None = None
        self.grad: Plane | None = None
        self._device = device
        self._chunks = list(chunks)
        self._pool = pool
        self._absent = absent
        self._all = {
            kind: self._make(kind, _numels(chunks, kind), dtype, pinned=kind == "weight")
            for kind, dtype in _kinds(compute_dtype, train, moments).items()
        }
        self.weight = self._all["weight"]
        self.residual = self._all.get("residual")
        self.moments = {kind: p for kind, p in self._all.items() if kind.startswith("exp_avg")}
        self._loans = Loans(self)

    def _make(self, kind: str, numels: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Plane:
        absent = [self._absent(chunk, kind) for chunk in self._chunks]
        return Plane(kind, self._device, numels, dtype, pinned=pinned, group=_group(kind), absent=absent)

    @property
    def nbytes(self) -> int:
        """Host bytes of all parts that are present."""
        planes = [*self._all.values(), *([self.grad] if self.grad is not None else [])]
        return sum(plane.nbytes for plane in planes)

    def gradients(self, dtype: torch.dtype, keep: Iterable[Chunk] = ()) -> Plane:
        """The `grad` plane of deferred updates, in `dtype`; its first use allocates it.

        Another dtype replaces it: with what it held of the chunks in `keep`, converted.
        """
        before = self.grad
        if before is None or before.dtype != dtype:
            after = self._make("grad", _numels(self._chunks, "grad"), dtype, pinned=True)
            if before is not None:
                for chunk in keep:
                    self._convert(chunk, before, after)
            self.grad = after
        assert self.grad is not None
        return self.grad

    def gradient_bytes(self, dtype: torch.dtype) -> int:
        """What `gradients` allocates."""
        return sum(part_bytes(numel, dtype) for numel in _numels(self._chunks, "grad"))

    def _convert(self, chunk: Chunk, before: Plane, after: Plane) -> None:
        loans = self._loans
        with loans.lent(chunk, before) as old, loans.lent(chunk, after, write=True, fresh=True) as new:
            new.copy_(old)

    def plane(self, name: str) -> Plane:
        """By its name, "grad" included.

        Raises:
            PlaneError: the model has no such plane.
        """
        plane = self.grad if name == "grad" else self._all.get(name)
        if plane is None:
            raise PlaneError(f"this model has no {name} plane")
        return plane

    def names(self, chunk: Chunk) -> list[str]:
        """The planes of which the chunk has something and that outlast a step, in a fixed order."""
        return [name for name, plane in self._all.items() if plane.numels[chunk.index]]

    def of(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """The chunk's part of every plane that it has (see `names`), all of which must be present.

        Each is a flat view that begins at a whole page: of `chunk.numel` elements for `weight`, of
        `chunk.trainable_numel` for the others, and of one for each 128 of these for the scales of 8-bit moments.
        Padding between entries is in it, and is zero. Planes of which the chunk has nothing (those of the update, if
        all of it is frozen or the model does not train) are left out. Pending updates write to these views: `drain()`
        the engine first.

        Raises:
            PlaneError: a part is absent.
        """
        return {name: self._all[name].of(chunk) for name in self.names(chunk)}

    def forms(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """What `of` would give, as tensors without storage; for parts that are absent, too."""
        return {name: self._all[name].form(chunk) for name in self.names(chunk)}

    def borrowed(
        self, chunk: Chunk, names: Iterable[str] | None = None, *, write: bool = False, fresh: bool = False
    ) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """The chunk's parts of the planes `names`, as `of` gives them, absent ones in temporary memory.

        For absent parts the context calls `fetch`, and with `write`, if it is left without an exception, `store`.
        Inside of it the same thread may borrow the same parts again, which moves nothing; other threads wait until it
        is left, so that only one at a time holds temporary memory. Parts must not change their tier meanwhile.

        Args:
            chunk: whose parts.
            names: of planes, "grad" included; None: all of `names(chunk)`.
            write: the parts will be changed.
            fresh: all entries will be written: absent parts are not fetched, but zero (present ones are as they are).

        Raises:
            PlaneError: there is no such plane, or a part is absent and nothing was set that could bring it.
        """
        return self._loans.borrowed(chunk, self.names(chunk) if names is None else names, write=write, fresh=fresh)

    def bring(self, chunk: Chunk, name: str) -> None:
        """Makes an absent part present, with its content. Whoever holds its address or views has to ask for new ones.

        Raises:
            PlaneError: the part is present, or borrowed by this thread, or nothing was set that could bring it.
            Error: there is not enough memory.
        """
        plane = self.plane(name)
        part = plane.restore(chunk)
        try:
            self._loans.fetch(chunk, plane, part)
        except BaseException:
            plane.release(chunk)
            raise

    def borrowed_masters(self, chunk: Chunk, *, fresh: bool = False) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """All parts that `write` changes, borrowed to do so for several entries."""
        names = [name for name in self.names(chunk) if name in ("weight", "residual")]
        return self.borrowed(chunk, names, write=True, fresh=fresh)

    def views(self, parts: Mapping[str, torch.Tensor], entry: Entry) -> dict[str, torch.Tensor]:
        """The entry's view (see `entry_view`) in each of these parts of its chunk that has something of it."""
        return {
            name: entry_view(part, entry, _group(name))
            for name, part in parts.items()
            if name == "weight" or entry.trainable
        }

    def state_names(self, chunk: Chunk) -> list[str]:
        """`names` without the weight: what an optimizer calls its state."""
        return [name for name in self.names(chunk) if name != "weight"]

    def state_of(self, chunk: Chunk, entry: Entry) -> dict[str, torch.Tensor]:
        """The entry's part of every plane but `weight`, in its shape (scales of 8-bit moments flat).

        Views where a part is present, copies where it is absent.
        """
        with self.borrowed(chunk, self.state_names(chunk)) as parts:
            views = self.views(parts, entry)
            return {name: v if self._all[name].present(chunk) else v.clone() for name, v in views.items()}

    def master_names(self, entry: Entry) -> list[str]:
        """The planes that hold the entry's master value."""
        return ["weight", "residual"] if self.residual is not None and entry.trainable else ["weight"]

    def write(self, chunk: Chunk, entry: Entry, value: torch.Tensor) -> None:
        """Sets the master value of `entry` from `value` (any float dtype; float32 exactly), which it must match.

        Raises:
            ModelError: `value` has another shape or no float dtype.
        """
        if value.shape != entry.shape:
            raise ModelError(f"{entry.name}: expected shape {tuple(entry.shape)}, got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise ModelError(f"{entry.name}: expected a floating-point tensor, got {value.dtype}")
        with self.borrowed(chunk, self.master_names(entry), write=True) as parts:
            views = self.views(parts, entry)
            weight, residual = views["weight"], views.get("residual")
            if residual is None or value.dtype == torch.bfloat16:
                weight.copy_(value)
                if residual is not None:
                    residual.zero_()
                return
            master = value.detach().to(device="cpu", dtype=torch.float32).contiguous()
            _core.split(self._pool, master.data_ptr(), weight.data_ptr(), residual.data_ptr(), entry.numel)

    def master(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        """The float32 master value, a copy of the entry's shape."""
        with self.borrowed(chunk, self.master_names(entry)) as parts:
            views = self.views(parts, entry)
            weight, residual = views["weight"], views.get("residual")
            if residual is None:
                return weight.float() if weight.dtype != torch.float32 else weight.clone()
            out = torch.empty(entry.shape, dtype=torch.float32)
            _core.merge(self._pool, weight.data_ptr(), residual.data_ptr(), out.data_ptr(), entry.numel)
            return out

    def clear_residual(self, chunk: Chunk, entry: Entry) -> None:
        """Makes the master value equal to the weight: the weight was written by somebody else."""
        self._clear(chunk, [name for name in self.master_names(entry) if name != "weight"], [entry])

    def clear_moments(self, chunk: Chunk, entries: Sequence[Entry]) -> None:
        """Zeroes the moments of trainable `entries` of the chunk."""
        self._clear(chunk, list(self.moments), entries)

    def _clear(self, chunk: Chunk, names: Sequence[str], entries: Sequence[Entry]) -> None:
        with self.borrowed(chunk, names, write=True) as parts:
            for entry in entries:
                for view in self.views(parts, entry).values():
                    view.zero_()
