"""Collects a chunk's gradients on the device, in its plane layout, and hands them to the download lane once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from slidecore import _core, kernels
from slidecore.backend import Backend
from slidecore.partition import Chunk, Entry

# Gradients that wait to be added in one launch, at most; a large one is worth a launch of its own.
_PENDING_BYTES = 16 << 20


class GradientSum:
    """The gradient of one chunk in one step.

    Contributions (micro-batches, several uses of a tied weight) are added in float32. A single contribution stays in
    the compute dtype: widening a bf16 value that is rounded back unchanged would only cost traffic.
    """

    def __init__(self, chunk: Chunk, backend: Backend, take: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        """`take` allocates the flat gradient in the compute dtype `dtype`; it is called when first needed."""
        self.chunk = chunk
        self._backend = backend
        self._take = take
        self._narrow = dtype != torch.float32
        self._flat: torch.Tensor | None = None
        self._wide: torch.Tensor | None = None
        self._contributed: set[Entry] = set()
        self._pending: dict[Entry, tuple[torch.Tensor, bool]] = {}  # and whether it is the entry's first
        self._pending_bytes = 0

    def _compute_dtype_flat(self) -> torch.Tensor:
        if self._flat is None:
            self._flat = self._take()
        return self._flat

    def widen(self) -> torch.Tensor:
        """The float32 sum as a flat tensor of `trainable_numel`; call before several contributions come."""
        if self._wide is None:
            if not self._narrow:
                self._wide = self._compute_dtype_flat()
                return self._wide
            self._wide = self._backend.empty(self.chunk.trainable_numel, torch.float32)
            if self._flat is not None:
                for entry in self._contributed:
                    self._view(self._wide, entry).copy_(self._view(self._flat, entry))
                self._flat = None
        return self._wide

    def _sum(self) -> torch.Tensor:
        self._add_pending()
        return self._wide if self._wide is not None else self._compute_dtype_flat()

    @staticmethod
    def _view(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
        return flat[entry.offset : entry.offset + entry.numel].view(entry.shape)

    def wide_view(self, entry: Entry) -> tuple[torch.Tensor, bool]:
        """The float32 sum of `entry` for adding in place, and whether it is still unwritten; it counts as written."""
        self._add_pending()
        view = self._view(self.widen(), entry)
        fresh = entry not in self._contributed
        self._contributed.add(entry)
        return view, fresh

    def only_view(self, entry: Entry) -> torch.Tensor:
        """Where the only contribution to `entry` is written, in the compute dtype; it counts as written."""
        assert self._wide is None
        assert entry not in self._contributed
        self._contributed.add(entry)
        return self._view(self._compute_dtype_flat(), entry)

    def add(self, entry: Entry, gradient: torch.Tensor) -> None:
        first = entry not in self._contributed
        if kernels.run_for(gradient) and (self._wide is not None or not first):
            if entry in self._pending:
                self._add_pending()
            self.widen()
            self._contributed.add(entry)
            self._pending[entry] = (gradient, first)
            self._pending_bytes += gradient.nbytes
            if self._pending_bytes >= _PENDING_BYTES:
                self._add_pending()
            return
        if entry not in self._contributed:
            self._contributed.add(entry)
            self._view(self._sum(), entry).copy_(gradient)
        else:
            self._view(self.widen(), entry).add_(gradient)

    def _add_pending(self) -> None:
        if not self._pending:
            return
        from slidecore.triton.accumulate import accumulate

        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        for dtype in {gradient.dtype for gradient, _ in pending.values()}:
            own = {e: (gradient, first) for e, (gradient, first) in pending.items() if gradient.dtype == dtype}
            accumulate(
                self.widen(),
                [gradient for gradient, _ in own.values()],
                [entry.offset for entry in own],
                fresh=[first for _, first in own.values()],
            )

    def scale(self, factor: torch.Tensor) -> None:
        """Multiplies what has come so far by a scalar tensor on the device."""
        scale(self._sum(), factor)

    def add_all(self, other: GradientSum) -> None:
        """Adds another sum for the same chunk."""
        for entry in other._contributed:
            self.add(entry, self._view(other._sum(), entry))

    @property
    def contributed(self) -> set[Entry]:
        return self._contributed

    def finish(self) -> torch.Tensor:
        """The gradient in the compute dtype, rounded once; regions of absent entries are undefined."""
        self._add_pending()
        if not self._narrow or self._wide is None:
            return self._sum()
        flat = self._compute_dtype_flat()
        flat.copy_(self._wide)
        self._wide = None
        return flat


def scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """X *= factor; on a card at no cost where the factor, which only the device knows, is 1."""
    if kernels.run_for(x) and x.is_contiguous():
        from slidecore.triton.scale import scale_

        scale_(x, factor)
    else:
        x.mul_(factor)


class GradientBuffers:
    """Device buffers for gradients on their way down: at most `limit` chunks' worth at once, reused when landed."""

    def __init__(self, backend: Backend, limit: int) -> None:
        self._backend = backend
        self._limit = limit
        self._landing: deque[tuple[torch.Tensor, int]] = deque()
        self._submitted: torch.Tensor | None = None  # and perhaps being read, by a download whose ticket is not known

    def take(self, scheduler: _core.Scheduler, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer; waits (on the compute stream, and for the lane to get that far) while `limit` are landing."""
        while self._landing and scheduler.done(self._landing[0][1]):
            self._landing.popleft()
        while len(self._landing) >= self._limit:
            _, ticket = self._landing.popleft()
            # PyTorch reuses the memory in the order of the compute stream, which now comes after the download.
            scheduler.wait(ticket, self._backend.stream())
        return self._backend.empty(numel, dtype)

    def release(self, scheduler: _core.Scheduler) -> None:
        """Lets go of all buffers; the compute stream, in whose order memory is reused, comes after their downloads."""
        self._settle(scheduler)
        while self._landing:
            scheduler.wait(self._landing.popleft()[1], self._backend.stream())

    def send(self, scheduler: _core.Scheduler, buffer: torch.Tensor, submit: Callable[[], int]) -> int:
        """`submit` starts a download of `buffer`, which is kept until it is done, and returns its ticket."""
        self._settle(scheduler)
        self._submitted = buffer
        ticket = submit()
        self._landing.append((buffer, ticket))
        self._submitted = None
        return ticket

    def _settle(self, scheduler: _core.Scheduler) -> None:
        """After Ctrl-C came as a download was submitted: it may have begun, and nobody knows its ticket."""
        if self._submitted is not None:
            scheduler.synchronize()
            self._submitted = None

    def drain(self, scheduler: _core.Scheduler) -> None:
        self._settle(scheduler)
        while self._landing:
            scheduler.synchronize_ticket(self._landing.popleft()[1])
