"""When the update happens: behind each chunk's backward (`overlap`), or from `optimizer.step()` on (`deferred`)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from slidecore import _core
from slidecore.errors import UsageError
from slidecore.gradient_handles import GradientHandle
from slidecore.gradients import GradientSum
from slidecore.partition import Chunk, Entry
from slidecore.planes import Plane

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.optimizer import AdamW

logger = logging.getLogger("slidecore")


class Updates(ABC):
    """What becomes of gradients."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._handles: dict[Entry, GradientHandle] = {}

    @abstractmethod
    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        """Takes a pass's whole gradient of `chunk`; returns whether anything came of it."""

    @abstractmethod
    def end_of_backward(self) -> None:
        """Every gradient of the pass has been submitted."""

    @abstractmethod
    def step(self, optimizer: AdamW) -> None:
        """optimizer.step()."""

    def forget(self) -> None:
        """Lets go of the gradients that wait for a step."""
        for entry, handle in self._handles.items():
            if entry.parameter.grad is handle:
                entry.parameter.grad = None
        self._handles.clear()

    def waiting(self) -> bool:
        """Whether gradients wait for a step."""
        return False

    def _sink(self) -> _core.AdamWSink:
        sink = self.engine.sink
        assert sink is not None  # gradients exist only where a model trains
        return sink

    def _send(self, chunk: Chunk, gradient: GradientSum, host: int | None, adds: bool = False) -> int:
        """Starts the download of `gradient`: to `host`, or else to the sink. Returns its ticket."""
        engine, scheduler = self.engine, self.engine.scheduler
        flat = gradient.finish()
        address, nbytes = flat.data_ptr(), flat.numel() * flat.element_size()
        stream = engine.backend.stream()
        if host is not None:
            ticket = scheduler.save_gradient(chunk.index, host, address, nbytes, stream)
        elif adds:
            ticket = scheduler.add_gradient(chunk.index, address, nbytes, stream)
        else:
            ticket = scheduler.submit_gradient(chunk.index, address, nbytes, stream)
        engine.gradient_buffers.landing(flat, ticket)
        return ticket


class OverlapUpdates(Updates):
    """Each chunk is updated as soon as its gradient comes down, with the groups' options at the start of backward."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._hyper: dict[Entry, _core.AdamWHyper] = {}
        self._options: list[object] = []

    def begin(self, optimizer: AdamW | None) -> None:
        """A backward pass begins."""
        self._hyper = optimizer.hyper_parameters() if optimizer is not None else {}
        self._options = optimizer.options() if optimizer is not None else []

    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        segments = []
        for entry in sorted(gradient.contributed, key=lambda e: e.offset):
            hyper = self._hyper.get(entry)
            if hyper is None:
                continue  # not in any group of the optimizer
            entry.step += 1
            hyper.step = entry.step
            segments.append((entry.offset, entry.numel, hyper))
            self._handles[entry] = GradientHandle.make(entry.parameter, None)
        if not segments:
            return False
        self._sink().prepare(chunk.index, segments, self.engine.compute_dtype == torch.float32)
        self._send(chunk, gradient, None)
        return True

    def end_of_backward(self) -> None:
        for entry, handle in self._handles.items():
            entry.parameter.grad = handle

    def step(self, optimizer: AdamW) -> None:
        self.forget()
        if self._options and optimizer.options() != self._options:
            self._options = []
            raise UsageError(
                "options of the optimizer's groups (lr, betas, eps, weight_decay) were changed between backward and "
                "step(), but backward has made the update with those it found. Change them before backward (a "
                "scheduler's step() comes after the optimizer's), or use slidecore.AdamW(..., update='deferred')"
            )
        self._options = []


@dataclass(eq=False)
class _Waiting:
    """A chunk's gradient in the `grad` plane."""

    entries: set[Entry] = field(default_factory=set)
    ticket: int = 0  # of the download that brought it; 0: the sink adds it up
    norms: dict[Entry, torch.Tensor] = field(default_factory=dict)  # float32 scalars
    summed: list[Entry] = field(default_factory=list)  # of the last addition, whose squares the sink knows


class DeferredUpdates(Updates):
    """Gradients collect in the `grad` plane; `step()` starts all updates in the order the next forward needs them.

    A single backward's gradient comes down as it is, its norms are taken on the device. Where several are added up the
    plane is float32, the update lane adds, and takes the norm of the sum.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.adds_up = False  # several backward passes to a step were announced or seen
        self._waiting: dict[Chunk, _Waiting] = {}
        self._places: dict[GradientHandle, tuple[Chunk, Entry]] = {}
        self._factors: dict[Entry, float] = {}

    def allocate(self) -> None:
        """Makes the `grad` plane, so that a lack of memory shows before training."""
        self._plane()

    def announce_addition(self) -> None:
        """Several backward passes to a step will come."""
        if not self.adds_up:
            self._add_up()

    # --- during backward

    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        entries = sorted(gradient.contributed, key=lambda e: e.offset)
        waiting = self._waiting.setdefault(chunk, _Waiting())
        old = {e for e in waiting.entries if self._is_alive(e)}
        if old and not self.adds_up:
            logger.info(
                "a second backward came before optimizer.step(): gradients are added up in float32 from now on (4 "
                "bytes a parameter); `with model.no_sync():` announces it"
            )
            self._add_up()
        for entry in old:
            self._apply_factor(chunk, entry)
        for entry in entries:
            self._factors.pop(entry, None)
            if entry not in old:
                handle = GradientHandle.make(entry.parameter, self)
                self._handles[entry] = handle
                self._places[handle] = (chunk, entry)
        waiting.entries = old | set(entries)
        plane = self._plane()
        if self.adds_up:
            segments = [(e.offset, e.numel, e not in old) for e in entries]
            narrow = self.engine.compute_dtype != torch.float32
            self._sink().prepare_sum(chunk.index, segments, plane.address(chunk), not narrow)
            self._send(chunk, gradient, None, adds=True)
            waiting.ticket, waiting.summed, waiting.norms = 0, entries, {}
        else:
            waiting.norms = self._norms_on_device(gradient, entries)
            waiting.ticket = self._send(chunk, gradient, plane.address(chunk))
        return True

    def end_of_backward(self) -> None:
        for entry, handle in self._handles.items():
            entry.parameter.grad = handle

    def waiting(self) -> bool:
        return any(self._is_alive(e) for w in self._waiting.values() for e in w.entries)

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()
        self._places.clear()
        self._factors.clear()

    def _is_alive(self, entry: Entry) -> bool:
        handle = self._handles.get(entry)
        return handle is not None and entry.parameter.grad is handle

    def _plane(self) -> Plane:
        dtype = torch.float32 if self.adds_up else self.engine.compute_dtype
        planes = self.engine.planes
        if planes.grad is not None and planes.grad.flat.dtype != dtype:
            self.engine.drain()  # updates may still read the plane that goes
        return planes.gradients(dtype)

    def _add_up(self) -> None:
        """Goes over to a float32 plane, with what has come so far."""
        self.adds_up = True
        if self.engine.compute_dtype == torch.float32:
            return
        before = self.engine.planes.grad
        after = self._plane()
        for chunk, waiting in self._waiting.items():
            waiting.ticket = 0
            if before is not None:
                after.of(chunk).copy_(before.of(chunk))

    def _norms_on_device(self, gradient: GradientSum, entries: Sequence[Entry]) -> dict[Entry, torch.Tensor]:
        flat = gradient.finish()
        views = [flat[e.offset : e.offset + e.numel] for e in entries]
        if self.engine.backend.is_host:
            norms = [torch.linalg.vector_norm(v, dtype=torch.float32) for v in views]
        else:
            norms = list(torch._foreach_norm(views, 2.0, torch.float32))
        return dict(zip(entries, norms, strict=True))

    # --- what handles ask for

    def _place_of(self, handle: GradientHandle) -> tuple[Chunk, Entry]:
        place = self._places.get(handle)
        if place is None or not self._is_alive(place[1]):
            raise UsageError("this gradient is gone: optimizer.step() has used it, or it was set to None")
        return place

    def _fetch_norms(self) -> None:
        """Brings the norms of all waiting gradients to the CPU, with one wait for the device."""
        on_device = [(w, e, n) for w in self._waiting.values() for e, n in w.norms.items() if n.device.type != "cpu"]
        if on_device:
            values = torch.stack([n for _, _, n in on_device]).cpu()
            for (waiting, entry, _), value in zip(on_device, values.unbind(), strict=True):
                waiting.norms[entry] = value
        if any(w.summed for w in self._waiting.values()):
            self.engine.scheduler.wait_updates()
        for chunk, waiting in self._waiting.items():
            if waiting.summed:
                squares = torch.tensor(self._sink().squares(chunk.index), dtype=torch.float64)
                norms = squares.sqrt().to(torch.float32).unbind()
                waiting.norms |= zip(waiting.summed, norms, strict=True)
                waiting.summed = []
            for entry in waiting.entries - waiting.norms.keys():
                waiting.norms[entry] = torch.linalg.vector_norm(self._view(chunk, entry), dtype=torch.float32)

    def norm(self, handle: GradientHandle) -> torch.Tensor:
        chunk, entry = self._place_of(handle)
        return self._norm(chunk, entry)

    def _norm(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        if entry not in self._waiting[chunk].norms or self._waiting[chunk].norms[entry].device.type != "cpu":
            self._fetch_norms()
        return self._waiting[chunk].norms[entry] * abs(self._factors.get(entry, 1.0))

    def scale(self, handle: GradientHandle, factor: float) -> None:
        _, entry = self._place_of(handle)
        self._factors[entry] = self._factors.get(entry, 1.0) * factor

    def tensor(self, handle: GradientHandle, writes: bool) -> torch.Tensor:
        chunk, entry = self._place_of(handle)
        self._apply_factor(chunk, entry)
        waiting = self._waiting[chunk]
        if writes:
            if entry not in waiting.norms:
                self._fetch_norms()
            del waiting.norms[entry]
        return self._view(chunk, entry)

    def _view(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        """The entry's part of the plane, when it is there."""
        ticket = self._waiting[chunk].ticket
        if ticket:
            self.engine.scheduler.synchronize_ticket(ticket)
        else:
            self.engine.scheduler.wait_updates()
        return self._plane().view(chunk, entry)

    def _apply_factor(self, chunk: Chunk, entry: Entry) -> None:
        factor = self._factors.pop(entry, 1.0)
        if factor != 1.0:
            self._fetch_norms()
            self._waiting[chunk].norms[entry] = self._waiting[chunk].norms[entry] * abs(factor)
            self._view(chunk, entry).mul_(factor)

    # --- at the step

    def step(self, optimizer: AdamW) -> None:
        self._check_not_replaced()
        hyper = optimizer.hyper_parameters()
        entries: dict[Chunk, list[Entry]] = {}
        for chunk in self._in_order(self._waiting):
            alive = [e for e in self._waiting[chunk].entries if self._is_alive(e) and e in hyper]
            if alive:
                entries[chunk] = sorted(alive, key=lambda e: e.offset)
        clip = self._clip(optimizer, [(c, e) for c, es in entries.items() for e in es]) if entries else None
        if clip is not None:
            for chunk in entries:
                self._start_update(chunk, entries[chunk], hyper, clip)
            self.engine.generation += 1
        self.forget()

    def _start_update(
        self, chunk: Chunk, entries: Sequence[Entry], hyper: dict[Entry, _core.AdamWHyper], clip: float
    ) -> None:
        plane = self._plane()
        segments = []
        for entry in entries:
            entry.step += 1
            options = hyper[entry]
            options.step = entry.step
            options.gradient_scale = self._factors.get(entry, 1.0) * clip
            segments.append((entry.offset, entry.numel, options))
        self._sink().prepare(chunk.index, segments, plane.flat.dtype == torch.float32)
        nbytes = chunk.trainable_numel * plane.itemsize
        self.engine.scheduler.update(chunk.index, plane.address(chunk), nbytes, self._waiting[chunk].ticket)

    def _check_not_replaced(self) -> None:
        for _, entry in self.engine.entries.values():
            gradient = entry.parameter.grad
            if gradient is not None and not isinstance(gradient, GradientHandle):
                entry.parameter.grad = None
                raise UsageError(
                    f"{entry.name}.grad was replaced by another tensor; gradients of an offloaded model lie in their "
                    f"plane: change them in place ({entry.name}.grad.copy_(...)), or set .grad to None to skip one"
                )

    def _in_order(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """In the order in which the next forward needs them."""
        order = {index: i for i, index in reversed(list(enumerate(self.engine.forward_order())))}
        return sorted(chunks, key=lambda c: order.get(c.index, len(order)))

    def _clip(self, optimizer: AdamW, entries: Sequence[tuple[Chunk, Entry]]) -> float | None:
        """The factor that max_grad_norm asks for; None if the step is to be skipped."""
        if optimizer.max_grad_norm is None and not optimizer.skip_nonfinite:
            return 1.0
        # As in torch.nn.utils.clip_grad_norm_: the norm of the tensors' norms, in float32.
        total = torch.linalg.vector_norm(torch.stack([self._norm(c, e) for c, e in entries]))
        optimizer.grad_norm = total
        if optimizer.skip_nonfinite and not torch.isfinite(total):
            optimizer.skipped_steps += 1
            logger.warning(
                "the gradient's norm is %s: this step is skipped, nothing was changed (%d skipped so far)",
                float(total),
                optimizer.skipped_steps,
            )
            return None
        if optimizer.max_grad_norm is None:
            return 1.0
        return float((optimizer.max_grad_norm / (total + 1e-6)).clamp(max=1.0))
