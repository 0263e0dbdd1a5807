"""Updates from `optimizer.step()` on: what gradients wait for, how they add up, and what clips them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from slidecore import _core
from slidecore.errors import UsageError
from slidecore.gradient_handles import GradientHandle
from slidecore.gradients import GradientSum
from slidecore.partition import Chunk, Entry
from slidecore.plane import Plane, entry_view
from slidecore.updates import Updates

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.optimizer import AdamW

logger = logging.getLogger("slidecore")


@dataclass(eq=False)
class _Waiting:
    """A chunk's gradient in the `grad` plane."""

    entries: set[Entry] = field(default_factory=set)
    ticket: int = 0  # of the download that brought it; 0: the sink adds it up
    norms: dict[Entry, torch.Tensor] = field(default_factory=dict)  # float32 scalars, without `_factors`
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
        # What the user may hold views of. The plane's next use must not show through them, so they have memory of their
        # own, which is copied back when the gradient is used.
        self._shown: dict[Entry, torch.Tensor] = {}

    def allocate(self) -> None:
        """Makes the `grad` plane, so that a lack of memory shows before training."""
        self._plane()

    def announce_addition(self) -> None:
        """Several backward passes to a step will come."""
        if not self.adds_up:
            self._add_up()

    # --- during backward

    def begin(self, optimizer: AdamW | None) -> None:
        self._check_not_replaced()

    def submit(self, chunk: Chunk, gradient: GradientSum) -> bool:
        entries = sorted(gradient.contributed, key=lambda e: e.offset)
        gradient.finish()  # may run out of memory; nothing is changed by then
        waiting = self._waiting.setdefault(chunk, _Waiting())
        old = {e for e in waiting.entries if self._is_alive(e)}
        if old and not self.adds_up:
            logger.info(
                "a second backward came before optimizer.step(): gradients are added up in float32 from now on (4 "
                "bytes a parameter); `with model.no_sync():` announces it"
            )
            self._add_up()
        self._settle(chunk, [e for e in old if e in self._shown or e in self._factors])
        for entry in entries:
            if entry not in old:
                self._factors.pop(entry, None)
                self._shown.pop(entry, None)
                handle = GradientHandle.make(entry.parameter, self)
                self._handles[entry] = handle
                self._places[handle] = (chunk, entry)
                self._new.add(entry)
        waiting.entries = old | set(entries)
        plane = self._plane()
        if self.adds_up:
            segments = [(e.offset, e.numel, e not in old) for e in entries]
            float32 = self.engine.compute_dtype == torch.float32
            add = self.engine.scheduler.add_gradient
            self._send(gradient, functools.partial(add, chunk.index, segments, plane.address(chunk), float32))
            waiting.ticket, waiting.summed, waiting.norms = 0, entries, {}
        else:
            waiting.norms = self._norms_on_device(gradient, entries)
            save = self.engine.scheduler.save_gradient
            waiting.ticket = self._send(gradient, functools.partial(save, chunk.index, plane.address(chunk)))
        return True

    def waiting(self) -> bool:
        return any(self._is_alive(e) for w in self._waiting.values() for e in w.entries)

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()
        self._places.clear()
        self._factors.clear()
        self._shown.clear()

    def _is_alive(self, entry: Entry) -> bool:
        """Whether a gradient of `entry` waits: one of this pass, or one that is still its parameter's `.grad`."""
        handle = self._handles.get(entry)
        return handle is not None and (entry in self._new or entry.parameter.grad is handle)

    def _plane(self) -> Plane:
        dtype = torch.float32 if self.adds_up else self.engine.compute_dtype
        planes = self.engine.planes
        if planes.grad is not None and planes.grad.dtype == dtype:
            return planes.grad
        self.engine.drain()  # updates may still read the plane that goes
        if not self._waiting:
            planes.grad = None  # nothing in it is needed: room for both would keep other planes on disk
        before = planes.grad.nbytes if planes.grad is not None else 0
        after = planes.gradient_bytes(dtype)
        self.engine.tiers.make_room(before + after)
        plane = planes.gradients(dtype, keep=self._waiting)
        self.engine.tiers.grad_takes(after)
        return plane

    def _add_up(self) -> None:
        """Goes over to a float32 plane, with what has come so far."""
        self.adds_up = True
        try:
            self._plane()
        except BaseException:
            self.adds_up = False  # there is no room for it
            raise
        if self.engine.compute_dtype == torch.float32:
            return
        for waiting in self._waiting.values():
            waiting.ticket = 0

    def _norms_on_device(self, gradient: GradientSum, entries: Sequence[Entry]) -> dict[Entry, torch.Tensor]:
        flat = gradient.finish()
        views = [flat[e.offset : e.offset + e.numel] for e in entries]
        if self.engine.backend.is_host:
            norms = [torch.linalg.vector_norm(v, dtype=torch.float32) for v in views]
        else:
            norms = list(torch._foreach_norm(views, 2.0, torch.float32))
        return dict(zip(entries, norms, strict=True))

    # --- what handles ask for

    def norm(self, handle: GradientHandle) -> torch.Tensor:
        return self._norm(*self._place_of(handle))

    def scale(self, handle: GradientHandle, factor: float) -> None:
        _, entry = self._place_of(handle)
        if entry in self._shown:
            self._shown[entry].mul_(factor)
        else:
            self._factors[entry] = self._factors.get(entry, 1.0) * factor

    @contextlib.contextmanager
    def tensor(self, handle: GradientHandle, writes: bool = False, shows: bool = False) -> Iterator[torch.Tensor]:
        chunk, entry = self._place_of(handle)
        if entry not in self._shown:
            self._apply_factor(chunk, entry)
            if writes or shows:
                self._drop_norm(self._waiting[chunk], entry)
            if not shows:
                with self._gradient(chunk, write=writes) as part:
                    yield entry_view(part, entry)
                return
            with self._gradient(chunk) as part:
                self._shown[entry] = entry_view(part, entry).clone()
        yield self._shown[entry]

    def _place_of(self, handle: GradientHandle) -> tuple[Chunk, Entry]:
        place = self._places.get(handle)
        if place is None or not self._is_alive(place[1]) or self._handles[place[1]] is not handle:
            raise UsageError(
                "this gradient is gone: optimizer.step() has used it, or zero_grad() or setting .grad has dropped it. "
                "Read p.grad before that; p.grad.clone() keeps"
            )
        return place

    def _norm(self, chunk: Chunk, entry: Entry) -> torch.Tensor:
        if entry in self._shown:  # which may change at any time
            return torch.linalg.vector_norm(self._shown[entry], dtype=torch.float32)
        norms = self._waiting[chunk].norms
        if entry not in norms or norms[entry].device.type != "cpu":
            self._fetch_norms()
        return self._waiting[chunk].norms[entry] * abs(self._factors.get(entry, 1.0))

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
                assert self.engine.sink is not None  # which has added up
                squares = torch.tensor(self.engine.sink.squares(chunk.index), dtype=torch.float64)
                norms = squares.sqrt().to(torch.float32).unbind()
                waiting.norms |= zip(waiting.summed, norms, strict=True)
                waiting.summed = []
            unknown = [e for e in waiting.entries - waiting.norms.keys() - self._shown.keys() if self._is_alive(e)]
            waiting.norms |= self._norms_of_plane(chunk, unknown)

    def _norms_of_plane(self, chunk: Chunk, entries: Sequence[Entry]) -> dict[Entry, torch.Tensor]:
        if not entries:
            return {}
        with self._gradient(chunk) as part:
            return {e: torch.linalg.vector_norm(entry_view(part, e), dtype=torch.float32) for e in entries}

    def _drop_norm(self, waiting: _Waiting, entry: Entry) -> None:
        """The gradient is about to change."""
        if waiting.summed:
            self._fetch_norms()  # what the sink knows is of before
        waiting.norms.pop(entry, None)

    @contextlib.contextmanager
    def _gradient(self, chunk: Chunk, *, write: bool = False) -> Iterator[torch.Tensor]:
        """The chunk's part of the plane, when the gradient is there."""
        ticket = self._waiting[chunk].ticket
        if ticket:
            self.engine.scheduler.synchronize_ticket(ticket)
        else:
            self.engine.scheduler.wait_updates()
        self._plane()
        with self.engine.planes.borrowed(chunk, ("grad",), write=write) as parts:
            yield parts["grad"]

    def _apply_factor(self, chunk: Chunk, entry: Entry) -> None:
        factor = self._factors.pop(entry, 1.0)
        if factor != 1.0:
            self._drop_norm(self._waiting[chunk], entry)
            with self._gradient(chunk, write=True) as part:
                entry_view(part, entry).mul_(factor)

    def _settle(self, chunk: Chunk, entries: Sequence[Entry]) -> None:
        """Makes the plane hold the gradients of `entries` as the user has left them."""
        if not entries:
            return
        with self._gradient(chunk, write=True) as part:
            for entry in entries:
                self._apply_factor(chunk, entry)
                shown = self._shown.pop(entry, None)
                if shown is not None:
                    entry_view(part, entry).copy_(shown)

    # --- at the step

    def step(self, optimizer: AdamW) -> None:
        self._check_not_replaced()
        hyper = optimizer.hyper_parameters()
        entries: dict[Chunk, list[Entry]] = {}
        for chunk in self._in_order(self._waiting):
            alive = [e for e in self._waiting[chunk].entries if self._is_alive(e) and e in hyper]
            if alive:
                entries[chunk] = sorted(alive, key=lambda e: e.offset)
        if entries:
            clip = self._clip(optimizer, [(c, e) for c, es in entries.items() for e in es])
            if clip is None:
                self.engine.expect_no_updates()
            else:
                for chunk in entries:
                    self._start_update(chunk, entries[chunk], hyper, clip)
                self.engine.generation += 1
        self.forget()

    def _start_update(
        self, chunk: Chunk, entries: Sequence[Entry], hyper: dict[Entry, _core.AdamWHyper], clip: float
    ) -> None:
        plane = self._plane()
        self._settle(chunk, [entry for entry in entries if entry in self._shown])
        segments = []
        for entry in entries:
            options = hyper[entry]
            options.step = entry.step + 1
            options.gradient_scale = self._factors.get(entry, 1.0) * clip
            segments.append((entry.offset, entry.numel, options))
        self.engine.scheduler.update(
            chunk.index,
            segments,
            plane.dtype == torch.float32,
            plane.address(chunk),
            chunk.trainable_numel * plane.itemsize,
            self._waiting[chunk].ticket,
        )
        for entry in entries:
            entry.step += 1

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
