"""The engine of one offloaded model: its chunks, planes, scheduler, and where in a training step it is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from slidecore import _core, host_pressure, kernels
from slidecore.activations import Activations
from slidecore.backend import Backend
from slidecore.compiling import uncompiled
from slidecore.deferred_updates import DeferredUpdates
from slidecore.edits import note_version, take_over
from slidecore.errors import UsageError
from slidecore.gradients import GradientBuffers, GradientSum
from slidecore.integrations.huggingface import accelerated
from slidecore.kept import kept_bytes
from slidecore.parameters import check_pointing, move_into_planes, point_parameters
from slidecore.partition import Chunk, Entry, partition
from slidecore.planes import Moments, Planes, lay_out, parts_of
from slidecore.planner import (
    check_device_budget,
    device_needs,
    head_costs,
)
from slidecore.refusals import check_held, check_trainable
from slidecore.repeating import OtherDraws
from slidecore.saved_inputs import SavedInputs
from slidecore.tiers import DISK_PIECES, Tiers
from slidecore.updates import OverlapUpdates, Updates
from slidecore.visit import ChangedWeightError, Record, Use, Visits, leaves_of, swapped

if TYPE_CHECKING:
    from slidecore.head import HeadRecord
    from slidecore.optimizer import AdamW

logger = logging.getLogger("slidecore")

FORWARD, BACKWARD = _core.Scheduler.FORWARD, _core.Scheduler.BACKWARD
GRADIENT_BUFFERS = 2
# The ring that gradients come down in. The update lane idles in a forward once it has used up what the ring holds, and
# a forward without recomputation is not a long part of a step that updates limit: a larger ring would only cost memory.
# Updates of 8-bit moments take half the time.
RING_SHARE: dict[Moments, float] = {"float32": 1 / 8, "8bit": 1 / 16}
LEAST_RING_PIECES = 8

ScheduledVisit = tuple[int, int, bool, bool]
engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _stray_gradient(name: str) -> Callable[[torch.Tensor], None]:
    """A hook for the parameter in host memory: visits compute with leaves over a slot, so it never gets a gradient."""

    def hook(parameter: torch.Tensor) -> None:
        parameter.grad = None
        raise UsageError(
            f"a gradient reached {name!r} past the offloaded modules' own forward (a penalty on model.parameters(), or "
            f"a weight that is used outside its module), where it would be lost. Use weights inside the forward of the "
            f"modules that hold them; for an L2 penalty, weight_decay= of slidecore.AdamW"
        )

    return hook


def _without_updates(schedule: Sequence[ScheduledVisit]) -> list[ScheduledVisit]:
    return [(chunk, phase, weights, False) for chunk, phase, weights, _ in schedule]


class Engine:
    """Ties a model to its planes and its scheduler.

    States of a step: "idle" -> first forward visit with a graph -> "forward" -> first backward visit -> "backward"
    -> end of the backward pass -> "updated" (overlap updates) -> optimizer.step() -> "idle". With deferred updates the
    end of a backward pass is "idle" again: another may come before the step.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        *,
        compute_dtype: torch.dtype,
        moments: Moments,
        device_memory: int | None,
        window: int,
        micro_batch: int | None,
        keep_graphs: int | None,
        blocks: Sequence[str | nn.Module] | None,
        kept: Mapping[int, tuple[str, nn.Parameter]],
        train: bool,
        threads: int,
        piece_bytes: int,
        ring_pieces: int | None,
        host_memory: int | None,
        disk: Sequence[str],
        disk_memory: int | None,
        gpu_direct: bool,
    ) -> None:
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.train = train
        self.chunks = partition(model, blocks, kept)
        if not train:
            for chunk in self.chunks:
                for entry in chunk.entries:
                    entry.trainable = False
        lay_out(self.chunks)
        # A slot for each block is all that could be used.
        window = min(window, max(2, sum(chunk.kind == "block" for chunk in self.chunks)))
        self._kept_bytes, trained_bytes = kept_bytes(kept.values())
        kept_needs = self._kept_bytes + (trained_bytes if train else 0)
        beside = (kept_needs, backend.workspace_bytes())
        self.needs = device_needs(self.chunks, compute_dtype, window, train, GRADIENT_BUFFERS, *beside)
        if device_memory is not None:
            smallest = device_needs(self.chunks, compute_dtype, 2, train, GRADIENT_BUFFERS, *beside)
            check_device_budget(self.needs, device_memory, window, smallest)
        else:
            available = backend.available_memory()
            if available is not None:
                check_device_budget(self.needs, available, window, self.needs)
                # The rest is for what other libraries allocate, and for the allocator's rounding.
                device_memory = int(available * 0.88)
        self.device_memory = device_memory
        fused = not backend.is_host and kernels.INSTALLED
        head = head_costs(self.chunks, compute_dtype, fused)
        if device_memory is not None:
            self.needs = replace(self.needs, head_tile=head.tile_bytes(head.smallest))
        self.activations = Activations(
            self,
            budget=device_memory,
            needs=self.needs,
            head=head,
            blocks=[c for c in self.chunks if c.kind == "block"],
            micro_batch=micro_batch,
            keep_graphs=keep_graphs,
        )
        self.window = window

        item = compute_dtype.itemsize
        largest_gradient = max((c.trainable_numel for c in self.chunks), default=0) * item
        largest = largest_gradient if train else max(c.numel for c in self.chunks) * item
        piece_bytes = max(4096, min(piece_bytes, -(-largest // 4096) * 4096))
        if ring_pieces is None:
            gradients = sum(c.trainable_numel for c in self.chunks) * item
            ring_pieces = max(LEAST_RING_PIECES, int(gradients * RING_SHARE[moments]) // piece_bytes)
        self.ring_bytes = piece_bytes * ring_pieces if train else 0
        self.tiers = Tiers(
            self.chunks,
            parts_of(self.chunks, compute_dtype, train, moments),
            host_memory=host_memory,
            disk=disk,
            disk_memory=disk_memory,
            ring_bytes=self.ring_bytes,
            piece_bytes=piece_bytes,
            compute_dtype=compute_dtype,
            train=train,
            gpu_direct=backend.core if gpu_direct else None,
        )
        try:
            # The model's own weights are freed one at a time as they move into their plane.
            moving = [e.parameter for c in self.chunks for e in c.entries if e.parameter.device.type == "cpu"]
            host_pressure.warn_if_short(self.tiers.planned_bytes() - sum(p.nbytes for p in moving))
            self._build(model, kept, moments, threads, piece_bytes, ring_pieces)
        except BaseException:
            self.tiers.close()
            raise
        engines.add(self)

    def _build(
        self,
        model: nn.Module,
        kept: Mapping[int, tuple[str, nn.Parameter]],
        moments: Moments,
        threads: int,
        piece_bytes: int,
        ring_pieces: int,
    ) -> None:
        """Planes, slots and lanes, as they were planned."""
        backend, compute_dtype, train, window = self.backend, self.compute_dtype, self.train, self.window
        self.pool = _core.ThreadPool(threads)
        self.planes = Planes(backend.core, self.pool, self.chunks, compute_dtype, train, moments, self.tiers.is_on_disk)
        if self.tiers.store is not None:
            self.planes.fetch, self.planes.store = self.tiers.fetch, self.tiers.put
        for _, parameter in kept.values():
            parameter.data = parameter.data.to(backend.torch_device)
        backend.hold(self._kept_bytes)
        self.entries: dict[int, tuple[Chunk, Entry]] = {}
        self._stray_hooks: list[Any] = []
        self._fill_planes()

        item = compute_dtype.itemsize
        block_numel, edge_numel = self.needs.slots // window // item, self.needs.edge_slot // item
        resident_numel = self.needs.resident // item
        self._slots: dict[int, torch.Tensor] = {}
        windows: list[tuple[list[int], int]] = []
        window_of: dict[str, int] = {}
        for kind, numel, count in (
            ("block", block_numel, window),
            ("edge", edge_numel, 1),
            ("resident", resident_numel, 1),
        ):
            if numel == 0:
                continue
            addresses = []
            for _ in range(count):
                slot = backend.empty(numel, compute_dtype)
                self._slots[slot.data_ptr()] = slot
                addresses.append(slot.data_ptr())
            window_of[kind] = len(windows)
            windows.append((addresses, numel * item))
        self.sink = _core.AdamWSink(self.pool) if train else None
        if self.sink is not None:
            for chunk in self.chunks:
                self.sink.add_chunk(n=chunk.trainable_numel, gradient_float32=compute_dtype == torch.float32)
        self.slot_addresses = self._slots.keys()
        self.tiers.prepare(self.sink, backend.core)
        disk = self.tiers.store
        self.scheduler = _core.Scheduler(
            backend.core,
            [(c.name, 0, c.numel * item, window_of[c.kind]) for c in self.chunks],
            windows,
            self.sink,
            piece_bytes=piece_bytes,
            ring_pieces=ring_pieces,
            transfers=disk.transfers if disk is not None else None,
            disk_pieces=DISK_PIECES,
            gpu_direct=disk.gpu_direct if disk is not None else None,
        )
        self.saved_inputs = SavedInputs(backend, self.scheduler, self.tiers)
        self.tiers.connect(self)
        if disk is not None:
            logger.info("%s", self.tiers.describe())
        self.gradient_buffers = GradientBuffers(backend, GRADIENT_BUFFERS)
        self.visits = Visits(self)

        self.overlap, self.deferred = OverlapUpdates(self), DeferredUpdates(self)
        self.updates: Updates = self.overlap
        self._held_back = 0  # depth of no_sync()
        self._passes = 0  # backward passes since the last step
        self._passes_to_step = 1  # how many the last step had
        self.optimizer: weakref.ref[AdamW] | None = None
        self._trains = any(chunk.trainable_numel for chunk in self.chunks)
        self.state = "idle"
        self.edited_in_update: list[str] = []  # parameters that users changed between backward and step()
        self.generation = 0  # of the weights: passes that updated them
        self._sums: dict[Chunk, GradientSum] = {}
        self._pending: Counter[Chunk] = Counter()
        self._sequence: list[ScheduledVisit] = []
        self._last_recomputed: weakref.ref[Record] | None = None
        self._live: weakref.WeakSet[Record | HeadRecord] = weakref.WeakSet()
        self._resident_depth = 0
        self._visitor: int | None = None  # the thread that is in a visit
        self.other_draws = OtherDraws()
        self.in_root = False  # a forward that began at a module with blocks is under way
        self._inferred: list[ScheduledVisit] = []  # visits of this forward without gradients
        self._own_forwards: dict[nn.Module, Any] = {}  # what modules had in their __dict__ before
        self.uses: list[Use] = []
        self._mode = ""
        self._schedules = {"train": self._first_schedule(), "infer": []}
        self._schedules["infer"] = [v for v in self._schedules["train"] if v[1] == FORWARD]
        self._schedules["accumulate"] = _without_updates(self._schedules["train"])
        self.detach: list[Callable[[], object]] = []  # undoes what was hooked into the model
        self._process = os.getpid()
        self.closed = False

    # --- set-up

    def _fill_planes(self) -> None:
        """Moves every parameter into its plane."""

        def adopt(chunk: Chunk, entry: Entry) -> None:
            self.entries[id(entry.parameter)] = (chunk, entry)
            note_version(entry)
            if entry.trainable:
                hook = entry.parameter.register_post_accumulate_grad_hook(_stray_gradient(entry.name))
                self._stray_hooks.append(hook)

        for chunk in self.chunks:
            move_into_planes(self.planes, chunk, functools.partial(adopt, chunk))

    def _first_schedule(self) -> list[ScheduledVisit]:
        """The schedule as the structure suggests it; the first step's real one replaces it."""
        order = [c for c in self.chunks if c.kind == "resident"] + [c for c in self.chunks if c.kind != "resident"]
        forward = [(c.index, FORWARD, True, False) for c in order]
        return forward + [(c.index, BACKWARD, True, c.trainable_numel > 0) for c in reversed(order)]

    def wrap(self) -> None:
        """Replaces the forward of every chunk's modules."""
        for chunk in self.chunks:
            for name, module in chunk.uses:
                if chunk.kind == "resident":
                    self.replace_forward(module, self._scoped(chunk, module.forward))
                    continue
                use = Use(name, module, chunk, module.forward)
                self.uses.append(use)
                self.replace_forward(module, self._visiting(use))

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Until `unwrap`."""
        self._own_forwards.setdefault(module, module.__dict__.get("forward"))
        module.forward = uncompiled(forward)  # type: ignore[method-assign]

    def unwrap(self) -> None:
        for module, forward in self._own_forwards.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.refuse_copy()

    def __del__(self) -> None:
        # Before anything that this object holds goes: lanes write to planes and slots.
        if not getattr(self, "closed", True) and os.getpid() == self._process:
            self.scheduler.close()

    def refuse_copy(self, protocol: Any = None) -> NoReturn:
        """Stands for `__reduce_ex__` of the offloaded modules: a copy would go on to compute with the original."""
        raise UsageError(
            "an offloaded model, or a part of one, cannot be copied or pickled: its weights are planes that lanes work "
            "on. Save model.state_dict(), or call slidecore.close(model) first"
        )

    def _visiting(self, use: Use) -> Callable[..., Any]:
        @functools.wraps(use.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.backend.current():
                return self.visits.call(use, args, kwargs)

        return forward

    def _scoped(self, chunk: Chunk, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Modules around the blocks run with the parameters that they hold themselves on the device."""

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._resident_depth:
                return inner(*args, **kwargs)
            self._resident_depth += 1
            try:
                graph = torch.is_grad_enabled() and chunk.trainable_numel > 0
                if graph:
                    self.begin_forward()
                with self.backend.current(), self.holding(chunk, backward=False) as slot:
                    leaves = leaves_of(chunk, slot, graph)
                    for entry, leaf in leaves.items():
                        if leaf.requires_grad:
                            leaf.register_post_accumulate_grad_hook(self._resident_hook(chunk, entry))
                    with swapped(chunk, leaves):
                        return inner(*args, **kwargs)
            finally:
                self._resident_depth -= 1

        return forward

    def _resident_hook(self, chunk: Chunk, entry: Entry) -> Callable[[torch.Tensor], None]:
        def hook(leaf: torch.Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            self.begin_backward(None)
            self.gradient_of(chunk).add(entry, gradient)

        return hook

    # --- visits

    def refuse_other_threads(self) -> None:
        """Raises UsageError while another thread is in a visit: both would swap weights into the same modules."""
        if self._visitor not in (None, threading.get_ident()):
            raise UsageError(
                "another thread is computing with this offloaded model. One at a time may: hold a lock from forward to "
                "the end of backward, or give each thread a model"
            )

    @contextlib.contextmanager
    def holding(self, chunk: Chunk, *, backward: bool) -> Iterator[torch.Tensor]:
        """The slot that holds the chunk's weights, for work enqueued on the current stream inside the context.

        Raises:
            UsageError: another thread is in a visit. Of a backward this cannot be said, which autograd runs on threads
                of its own.
        """
        if not backward:
            self.refuse_other_threads()
        visitor, self._visitor = self._visitor, threading.get_ident()
        try:
            with self._acquired(chunk, BACKWARD if backward else FORWARD) as slot:
                yield slot
        finally:
            self._visitor = visitor

    @contextlib.contextmanager
    def _acquired(self, chunk: Chunk, phase: int) -> Iterator[torch.Tensor]:
        if self.in_root and self._mode == "infer":
            self._inferred.append((chunk.index, phase, True, False))
        address = self.scheduler.acquire(chunk.index, phase, self.backend.stream())
        spoiled = False
        try:
            yield self._slots[address]
        except ChangedWeightError:
            spoiled = True
            raise
        finally:
            self.scheduler.release(chunk.index, phase, self.backend.stream())
            if spoiled:
                self.scheduler.invalidate(chunk.index)

    def set_mode(self, mode: str) -> None:
        """Tells the scheduler which visits come: of training steps ("train"), of passes that no update follows
        ("accumulate"), or of forwards alone ("infer").
        """
        if mode != self._mode:
            self._mode = mode
            self.scheduler.set_schedule(self._schedules[mode])

    def begin_forward(self) -> None:
        """Called at every forward visit that builds a graph."""
        if not self.train:
            raise UsageError("this model was offloaded with train=False; run it under torch.no_grad()")
        if torch._C._current_graph_task_id() == -1:
            self._recover()
        if self.state in ("idle", "updated"):
            if self.state == "idle":
                self.state = "forward"
            if not self._pending:
                self._reset_pass()
        self.set_mode(self._training_mode())

    def _training_mode(self) -> str:
        more = self._held_back > 0 or self._passes + 1 < self._passes_to_step
        return "accumulate" if more else "train"

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside the context only add to the gradients that the step after it uses, as in DDP.

        Raises:
            UsageError: the optimizer was made with update="overlap".
        """
        optimizer = self.current_optimizer()
        if optimizer is not None and optimizer.update == "overlap":
            raise UsageError(
                "no_sync() adds up the gradients of several backward passes, but slidecore.AdamW was made with "
                "update='overlap', which updates in each; use update='auto' or update='deferred'"
            )
        if self._trains:
            self.deferred.announce_addition()
        self._held_back += 1
        try:
            yield
        finally:
            self._held_back -= 1

    def current_optimizer(self) -> AdamW | None:
        return self.optimizer() if self.optimizer is not None else None

    def _recover(self) -> None:
        """Called outside of backward passes: one that has begun and not ended failed."""
        if self.state == "backward":
            self._give_up_backward()

    def _give_up_backward(self) -> None:
        if self.updates is self.deferred:
            what = "its gradients, and those of earlier passes to the same step, are dropped: nothing was updated"
        else:
            what = "the blocks that it had reached are updated, the others are not, and training goes on from there"
        warnings.warn(f"the last backward pass did not finish; {what}", stacklevel=5)
        self.updates.forget()
        self.state = "idle"
        self._reset_pass()

    def _reset_pass(self) -> None:
        self._sums.clear()
        self._pending.clear()
        self._sequence.clear()
        self._last_recomputed = None
        self.activations.position = 0

    def begin_root_forward(self) -> None:
        """Called when the offloaded model, or a part of it that holds blocks, is called."""
        self.scheduler.check()
        check_held(entry for _, entry in self.entries.values())
        for chunk in self.chunks:
            check_pointing(self.planes, chunk)
        self.take_over_edits()
        self.activations.position = 0
        self._inferred = []
        if not torch.is_grad_enabled() or not self.train:
            self.set_mode("infer")
            return
        check_trainable(entry for _, entry in self.entries.values())
        self._recover()
        if self.state == "forward" and not self._live:
            # The graphs of earlier forwards were dropped without a backward.
            self._reset_pass()
        if not self._live:
            self.tiers.relieve()
        self.saved_inputs.begin_forward()
        self.other_draws.begin_forward(self.uses[0].module.training)

    def between_steps(self) -> bool:
        """Whether nothing of a forward or a backward pass is left: what was dropped or has failed counts as ended."""
        if self.in_root or torch._C._current_graph_task_id() != -1:
            return False
        self._recover()
        if self.state == "forward" and not self._live:
            self._reset_pass()
            self.state = "idle"
        return self.state != "forward"

    def end_root_forward(self) -> None:
        """Called after a forward: the next one without gradients is expected to make the visits that this one made."""
        if self.other_draws.end_forward() and any(isinstance(r, Record) and not r.keep_graph for r in self._live):
            warnings.warn(
                "this forward, or another thread, has drawn random numbers of Python's or NumPy's, and no forward "
                "before did: if a block has, its recomputation in this step's backward draws others. From the next "
                "forward on they are repeated",
                stacklevel=3,
            )
        if self._mode == "infer" and self._inferred and self._inferred != self._schedules["infer"]:
            self._schedules["infer"] = self._inferred
            self.scheduler.set_schedule(self._inferred)

    def forward_visited(self, record: Record | HeadRecord) -> None:
        """A forward visit with a graph was made: its backward is expected."""
        chunk = record.use.chunk
        self._pending[chunk] += 1
        self._sequence.append((chunk.index, FORWARD, True, False))
        self._live.add(record)
        if isinstance(record, Record) and not record.keep_graph:
            record.previous = self._last_recomputed
            self._last_recomputed = weakref.ref(record)
        if chunk.kind == "block":
            self.activations.position += 1
        elif self.activations.position:
            self.saved_inputs.end_of_forward()

    def begin_backward(self, record: Record | HeadRecord | None) -> None:
        """Called at every backward visit; at the first one of a pass it fixes the update's settings."""
        if self.state not in ("backward", "updated"):
            self.take_over_edits()
        if record is not None and record.generation != self.generation and self.state != "updated":
            raise UsageError(
                "the weights were updated after this forward (or changed in place), so its backward would be wrong; "
                "call the model again after each optimizer.step() or change"
            )
        if self.state == "updated":
            raise UsageError(
                "backward was called twice without optimizer.step() in between: the first backward has already "
                "updated the weights. Call optimizer.step() after each backward; for a larger batch give it in one "
                "call (it runs in micro-batches inside the window), or add up gradients: `with model.no_sync():` "
                "around all backward passes but the last, or slidecore.AdamW(..., update='deferred')"
            )
        if self.state == "backward":
            return
        self.scheduler.check()  # gradients that nobody takes would be lost, where no visit waits for its weights
        optimizer = self.current_optimizer()
        if optimizer is None and self._trains:
            raise UsageError(
                "backward on an offloaded model updates its weights, but it has no optimizer; create "
                "slidecore.AdamW(model.parameters(), ...) before calling backward"
            )
        updates = self.deferred if self.deferred.waiting() or self.defers(optimizer) else self.overlap
        updates.begin(optimizer)
        self.updates = updates
        self.state = "backward"
        self._last_recomputed = None
        # Of the graphs that are alive, those that this pass reaches: a chunk's gradient goes down after its last visit.
        self._pending = Counter(r.use.chunk for r in self._live if r is record or (not r.consumed and r.is_reached()))
        torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def defers(self, optimizer: AdamW | None) -> bool:
        """Whether updates come at the step."""
        if optimizer is None or optimizer.update == "overlap":
            return False
        clips = optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        return optimizer.update == "deferred" or clips or self.deferred.adds_up or accelerated()

    def gradient_of(self, chunk: Chunk) -> GradientSum:
        """The sum that this step's gradient of `chunk` goes to."""
        if chunk not in self._sums:
            self._sums[chunk] = self.new_sum(chunk)
        return self._sums[chunk]

    def new_sum(self, chunk: Chunk) -> GradientSum:
        def take() -> torch.Tensor:
            return self.gradient_buffers.take(self.scheduler, chunk.trainable_numel, self.compute_dtype)

        return GradientSum(chunk, self.backend, take, self.compute_dtype)

    def adopt(self, chunk: Chunk, gradient: GradientSum) -> None:
        """Adds a sum that was made during forward (the head's) to this step's gradient."""
        if chunk in self._sums:
            self._sums[chunk].add_all(gradient)
        else:
            self._sums[chunk] = gradient

    def backward_visited(self, record: Record) -> None:
        self.count_backward(record.use.chunk, record.use.backward_reads_weights or not record.keep_graph)

    def count_backward(self, chunk: Chunk, read_weights: bool) -> None:
        """A backward visit was made; after the last one the chunk's gradient goes down."""
        self._sequence.append((chunk.index, BACKWARD, read_weights, False))
        self._pending[chunk] -= 1
        if self._pending[chunk] <= 0:
            self._submit(chunk)

    def _submit(self, chunk: Chunk) -> None:
        gradient = self._sums.pop(chunk, None)
        if gradient is None or not gradient.contributed or self.sink is None:
            return
        if not self.updates.submit(chunk, gradient) or self._training_mode() == "accumulate":
            return
        for i in range(len(self._sequence) - 1, -1, -1):
            index, phase, weights, _ = self._sequence[i]
            if index == chunk.index and phase == BACKWARD:
                self._sequence[i] = (index, phase, weights, True)
                return
        self._sequence.append((chunk.index, BACKWARD, False, True))

    def _end_of_backward(self) -> None:
        for chunk in list(self._sums):
            self._submit(chunk)
        self.updates.end_of_backward()
        if self._trains and self.updates is self.overlap:
            self.state = "updated"
            self.generation += 1
        else:
            self.state = "idle"
        sequence = list(self._sequence)
        self._reset_pass()
        mode = self._training_mode()
        self._passes += 1
        if not any(phase == FORWARD for _, phase, _, _ in sequence):
            return  # its forwards were seen with an earlier pass, or none was of this model's blocks
        resident = [(c.index, FORWARD, True, False) for c in self.chunks if c.kind == "resident"]
        sequence = resident + sequence
        if sequence != self._schedules[mode]:
            self._schedules[mode] = sequence
            self._schedules["infer"] = [v for v in sequence if v[1] == FORWARD]
            self._mode = ""
            self.set_mode(mode)

    def expect_no_updates(self) -> None:
        """The gradients that wait are dropped: the weights stay, and may be prefetched again."""
        self._passes = 0
        self._mode = ""

    def forward_order(self) -> list[int]:
        """Chunks by index, in the order of the forward visits of a step."""
        return [index for index, phase, _, _ in self._schedules["train"] if phase == FORWARD]

    def interrupted(self, use: Use) -> None:
        """A backward visit failed: nothing of this pass is kept, chunks already updated stay so."""
        logger.warning("backward of %s failed; the rest of this step's updates is dropped", use.name)
        self._sums.clear()

    def step(self, optimizer: AdamW) -> None:
        """optimizer.step()."""
        self.scheduler.check()
        if self.state == "backward":
            self._give_up_backward()
        self.take_over_edits()
        edited, self.edited_in_update = self.edited_in_update, []
        self.state = "idle"
        self.updates.step(optimizer)
        if self._passes:
            self._passes_to_step, self._passes = self._passes, 0
        if edited:
            raise UsageError(
                f"{edited[0]} was changed in place between backward and step(), while backward was updating it "
                f"(overlap updates). Change parameters after step() and slidecore.synchronize(model), or use "
                f"slidecore.AdamW(..., update='deferred')"
            )

    def zero_grad(self) -> None:
        """optimizer.zero_grad()."""
        if self.state == "updated":
            raise UsageError(
                "zero_grad() between backward and step() would drop gradients that backward has used already (overlap "
                "updates). Call it after step(), or use slidecore.AdamW(..., update='deferred'), with which a step's "
                "gradients can be dropped"
            )
        if self.updates.waiting():
            self.expect_no_updates()
        self.updates.forget()

    # --- what others ask for

    def point_parameters(self, chunk: Chunk) -> None:
        """Called when the chunk's weights have moved: makes its parameters views of where they are now.

        Where they are not in memory, parameters keep their form, and reading or changing their values is an error.
        """
        point_parameters(self.planes, chunk)

    def has_trained(self) -> bool:
        """Whether any parameter was updated."""
        return any(entry.step > 0 for _, entry in self.entries.values())

    def forget_moments(self) -> None:
        """For an optimizer that takes over from one that is gone: as in torch.optim, a new one starts from nothing."""
        for chunk in self.chunks:
            updated = [entry for entry in chunk.entries if entry.step > 0]
            if updated:
                self.scheduler.synchronize()
                self.planes.clear_moments(chunk, updated)
                for entry in updated:
                    entry.step = 0

    def take_over_edits(self) -> None:
        """Makes count what users have changed in parameters. See `edits`."""
        take_over(self, self.entries.values())

    def drain(self) -> None:
        """Waits until planes and lanes are at rest; errors of lanes are raised."""
        self.scheduler.synchronize()
        self.gradient_buffers.drain(self.scheduler)

    def close(self) -> None:
        """Waits for updates, restores the modules' own forward and ends the lanes. Weights stay in host memory.

        In a child of fork(), which has neither lanes nor planes, it does nothing.
        """
        if self.closed:
            return
        self.closed = True
        if os.getpid() != self._process:
            return
        self.updates.forget()
        self.unwrap()
        for hook in self._stray_hooks:
            hook.remove()
        self.scheduler.close()
        # Its stages hold the transfers, and these their threads and files, however long this object is referred to.
        self.sink = None
        self.saved_inputs.forget_regions()
        self.tiers.close()
        self.backend.drop(self._kept_bytes)
        self._slots.clear()
