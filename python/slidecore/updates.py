"""When the update happens: behind each chunk's backward (`overlap`), or from `optimizer.step()` on (`deferred`)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from slidecore import _core
from slidecore.errors import UsageError
from slidecore.gradient_handles import GradientHandle
from slidecore.gradients import GradientSum
from slidecore.partition import Chunk, Entry

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.optimizer import AdamW


class Updates(ABC):
    """What becomes of gradients."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._handles: dict[Entry, GradientHandle] = {}
        self._new: set[Entry] = set()  # whose handles are of this pass, and become `p.grad` at its end

    @abstractmethod
    def begin(self, optimizer: AdamW | None) -> None:
        """A backward pass begins. Raises UsageError where it must not."""

    @abstractmethod
    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        """Takes a pass's whole gradient of `chunk`; returns whether anything came of it."""

    @abstractmethod
    def step(self, optimizer: AdamW) -> None:
        """optimizer.step()."""

    def end_of_backward(self) -> None:
        """Every gradient of the pass has been submitted."""
        for entry in self._new:
            entry.parameter.grad = self._handles[entry]
        self._new.clear()

    def forget(self) -> None:
        """Lets go of the gradients that wait for a step."""
        for entry, handle in self._handles.items():
            if entry.parameter.grad is handle:
                entry.parameter.grad = None
        self._handles.clear()
        self._new.clear()

    def waiting(self) -> bool:
        """Whether gradients wait for a step."""
        return False

    def _check_not_replaced(self) -> None:
        for _, entry in self.engine.entries.values():
            gradient = entry.parameter.grad
            if gradient is not None and not isinstance(gradient, GradientHandle):
                raise UsageError(
                    f"{entry.name}.grad was replaced by another tensor, but gradients of an offloaded model lie in "
                    f"their plane. With update='deferred' they can be changed in place ({entry.name}.grad.copy_(...)); "
                    f"set .grad to None to drop one"
                )

    def _send(self, gradient: GradientSum, submit: Callable[[int, int, int], int]) -> int:
        """Starts the download of `gradient` by `submit` (address, bytes, stream). Returns its ticket."""
        engine = self.engine
        flat = gradient.finish()
        address, nbytes, stream = flat.data_ptr(), flat.nbytes, engine.backend.stream()
        return engine.gradient_buffers.send(engine.scheduler, flat, lambda: submit(address, nbytes, stream))


class OverlapUpdates(Updates):
    """Each chunk is updated as soon as its gradient comes down, with the groups' options at the start of backward."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._hyper: dict[Entry, _core.AdamWHyper] = {}
        self._options: list[object] = []
        self._updated: set[Chunk] = set()

    def begin(self, optimizer: AdamW | None) -> None:
        self._check_not_replaced()
        self._hyper = optimizer.hyper_parameters() if optimizer is not None else {}
        self._options = optimizer.options() if optimizer is not None else []
        self._updated.clear()

    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        entries = [e for e in sorted(gradient.contributed, key=lambda e: e.offset) if e in self._hyper]
        if not entries:  # those of this chunk are in no group of the optimizer
            return False
        if chunk in self._updated:
            raise UsageError(
                f"the gradient of {chunk.name!r} came in two parts in one backward pass (a backward inside of a "
                f"backward?), and the first part has updated it already; use slidecore.AdamW(..., update='deferred')"
            )
        self._updated.add(chunk)
        segments = []
        for entry in entries:
            hyper = self._hyper[entry]
            hyper.step = entry.step + 1
            segments.append((entry.offset, entry.numel, hyper))
        submit = self.engine.scheduler.submit_gradient
        float32 = self.engine.compute_dtype == torch.float32
        self._send(gradient, functools.partial(submit, chunk.index, segments, float32))
        for entry in entries:
            entry.step += 1
            self._handles[entry] = GradientHandle.make(entry.parameter, None)
            self._new.add(entry)
        return True

    def step(self, optimizer: AdamW) -> None:
        dropped = next((e.name for e, handle in self._handles.items() if e.parameter.grad is not handle), None)
        changed = bool(self._options) and optimizer.options() != self._options
        self.forget()
        self._options = []
        if changed:
            raise UsageError(
                "options of the optimizer (lr, betas, eps, weight_decay, max_grad_norm, skip_nonfinite) were changed "
                "between backward and step(), but backward has made the update with those it found. Change them before "
                "backward (a scheduler's step() comes after the optimizer's), or use "
                "slidecore.AdamW(..., update='deferred')"
            )
        if dropped is not None:
            raise UsageError(
                f"{dropped}.grad was set to None (by zero_grad?) or replaced between backward and step(), but backward "
                f"has made the update already. To drop or change gradients use slidecore.AdamW(..., update='deferred')"
            )
