"""Visits: a chunk's module runs with its weights in a slot, forward without a graph, backward by recomputation.

A forward visit that will be followed by a backward one either keeps its inputs and recomputes (blocks), or keeps what
its graph saves (edges, and as many blocks as the plan affords); see `graphs`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from slidecore.errors import UsageError
from slidecore.graphs import VisitGraph, outliving
from slidecore.partition import Chunk, Entry
from slidecore.saved_inputs import SavedInput

if TYPE_CHECKING:
    from slidecore.engine import Engine


@dataclass(eq=False)
class Use:
    """A module whose calls are visits of `chunk`."""

    name: str
    module: nn.Module
    chunk: Chunk
    forward: Callable[..., Any]
    # Whether backward needs the weights: an embedding's does not. Known after the first forward with a graph.
    backward_reads_weights: bool = True


@dataclass(eq=False)
class RandomState:
    """Generator states and autocast settings, so that recomputation repeats the forward exactly."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    autocast: tuple[bool, torch.dtype, bool]

    @staticmethod
    def capture(device: torch.device) -> RandomState:
        kind = device.type
        return RandomState(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if kind == "cuda" else None,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()),
        )

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        before = RandomState.capture(device)
        enabled, dtype, cache = self.autocast
        self.set(device)
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache):
                yield
        finally:
            before.set(device)

    def set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@dataclass
class Call:
    """A module call taken apart: tensor leaves of (args, kwargs) and what is needed to put it together again."""

    spec: pytree.TreeSpec
    leaves: list[Any]  # tensors replaced by None
    tensor_at: list[int]

    @staticmethod
    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in at]
        return Call(spec, [None if isinstance(x, torch.Tensor) else x for x in leaves], at), tensors

    def put(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensor_at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass
class Output:
    """A module's output taken apart."""

    spec: pytree.TreeSpec
    leaves: list[Any]
    tensor_at: list[int]

    @staticmethod
    def take(value: Any) -> tuple[Output, list[torch.Tensor]]:
        leaves, spec = pytree.tree_flatten(value)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in at]
        return Output(spec, [None if isinstance(x, torch.Tensor) else x for x in leaves], at), tensors

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensor_at, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(eq=False)
class Record:
    """A forward visit whose backward is to come."""

    engine: Engine
    use: Use
    call: Call
    micro_batches: int
    keep_graph: bool
    requires_grad: list[bool] = field(default_factory=list)
    saved: list[SavedInput] = field(default_factory=list)
    split: list[bool] = field(default_factory=list)
    random: list[RandomState] = field(default_factory=list)
    graphs: list[VisitGraph] = field(default_factory=list)
    output: Output | None = None
    input_sizes: list[list[torch.Size]] = field(default_factory=list)  # of each micro-batch
    output_sizes: list[list[int]] = field(default_factory=list)  # of each micro-batch, along dimension 0
    previous: weakref.ref[Record] | None = None  # the visit whose inputs backward needs next
    generation: int = 0  # of the weights that the forward read
    modes: list[bool] = field(default_factory=list)  # `training` of each of the module's modules at forward
    consumed: bool = False
    held: int = 0  # bytes of kept graphs
    node: weakref.ref[Any] | None = None  # of autograd; it owns this record

    def is_reached(self) -> bool:
        """Whether the backward pass that is going on will differentiate this visit, as far as its graph tells."""
        return is_reached(self.node)

    def __del__(self) -> None:
        # The graph was dropped without a backward.
        self.free()

    def output_gradients(self, gradients: Sequence[torch.Tensor | None], index: int) -> Sequence[torch.Tensor | None]:
        """The part of the outputs' gradients that belongs to micro-batch `index`."""
        if self.micro_batches == 1:
            return gradients
        sizes = self.output_sizes[index]
        starts = [sum(s[o] for s in self.output_sizes[:index]) for o in range(len(sizes))]
        return [
            None if g is None else g[start : start + size]
            for g, start, size in zip(gradients, starts, sizes, strict=True)
        ]

    def free(self) -> None:
        self.consumed = True
        for saved in self.saved:
            saved.free()
        self.saved, self.graphs, self.random = [], [], []
        self.engine.backend.drop(self.held)
        self.held = 0
        self.previous = None


@contextlib.contextmanager
def in_modes(module: nn.Module, modes: Sequence[bool]) -> Iterator[None]:
    """Puts the modules of `module` in the given training modes, and back afterwards."""
    modules = list(module.modules())
    before = [m.training for m in modules]
    for m, mode in zip(modules, modes, strict=True):
        m.training = mode
    try:
        yield
    finally:
        for m, mode in zip(modules, before, strict=True):
            m.training = mode


@contextlib.contextmanager
def swapped(chunk: Chunk, leaves: dict[Entry, torch.Tensor]) -> Iterator[None]:
    """Puts `leaves` where the chunk's modules hold their parameters, and the parameters back afterwards."""
    for entry, leaf in leaves.items():
        for module, attribute in entry.owners:
            module._parameters[attribute] = leaf  # type: ignore[assignment]
    try:
        yield
    finally:
        for entry in leaves:
            for module, attribute in entry.owners:
                module._parameters[attribute] = entry.parameter


@contextlib.contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Undoes what runs beside the training step's own forward do to buffers (the running statistics of BatchNorm)."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # not a modification that graphs should complain about


def leaves_of(chunk: Chunk, slot: torch.Tensor, graph: bool) -> dict[Entry, torch.Tensor]:
    """Parameters over the slot's memory, one for each entry of the chunk."""
    return {
        entry: nn.Parameter(
            slot[entry.offset : entry.offset + entry.numel].view(entry.shape), requires_grad=graph and entry.trainable
        )
        for entry in chunk.entries
    }


def collect(leaves: dict[Entry, torch.Tensor], add: Callable[[Entry, torch.Tensor], None]) -> None:
    """Hands each leaf's gradient to `add` as soon as it is complete, and frees it."""
    for entry, leaf in leaves.items():
        if not leaf.requires_grad:
            continue

        def hook(tensor: torch.Tensor, entry: Entry = entry) -> None:
            gradient, tensor.grad = tensor.grad, None
            assert gradient is not None
            add(entry, gradient)

        leaf.register_post_accumulate_grad_hook(hook)


def _part(tensor: torch.Tensor, split: bool, index: int, count: int) -> torch.Tensor:
    if not split or count == 1:
        return tensor
    size = tensor.shape[0]
    each = -(-size // count)
    return tensor[index * each : min(size, (index + 1) * each)]


class VisitFunction(torch.autograd.Function):
    """The autograd node of a visit. `anchor` makes a visit without differentiable inputs part of the graph."""

    @staticmethod
    def forward(ctx: Any, record: Record, anchor: torch.Tensor | None, *tensors: torch.Tensor) -> Any:
        ctx.record = record
        record.node = weakref.ref(ctx)
        ctx.set_materialize_grads(False)
        record.requires_grad = [t.requires_grad for t in tensors]
        outputs = record.engine.visits.run_forward(record, [t.detach() for t in tensors])
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        record: Record = ctx.record
        if record.consumed:
            raise RuntimeError(
                "backward through an offloaded model a second time: its gradients were consumed by the first one. Call "
                "the model again to get a new graph"
            )
        check_whole_backward(record.engine, record.use.chunk)
        return (None, None, *record.engine.visits.run_backward(record, gradients))


def is_reached(reference: weakref.ref[Any] | None) -> bool:
    """Whether the backward pass that is going on will run the node, unless the pass began with it."""
    node = reference() if reference is not None else None
    return node is not None and torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined, no-any-return]


def check_whole_backward(engine: Engine, chunk: Chunk) -> None:
    """Raises UsageError in a backward for some gradients only: it would update the weights all the same."""
    node = engine.visits.anchor_node
    if any(e.trainable for e in chunk.entries) and not torch._C._will_engine_execute_node(node):  # type: ignore[attr-defined]
        raise UsageError(
            "torch.autograd.grad, or backward(inputs=...), through an offloaded model with trainable parameters would "
            "update them. Use backward() and read .grad of the inputs, or freeze the model before offload()"
        )


class Visits:
    """Runs visits for an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.anchor = torch.zeros((), device=engine.backend.torch_device, requires_grad=True)
        self.anchor_node = torch.autograd.graph.get_gradient_edge(self.anchor).node

    def call(self, use: Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an offloaded module's forward does."""
        engine = self._engine
        engine.scheduler.check()
        if not torch.is_grad_enabled():
            return self._inference(use, args, kwargs)
        call, tensors = Call.take(args, kwargs)
        trains = any(e.trainable for e in use.chunk.entries)
        if not trains and not any(t.requires_grad for t in tensors):
            return self._inference(use, args, kwargs)
        engine.begin_forward()
        count, split = engine.activations.plan_micro_batches(use, call, tensors)
        record = Record(
            engine,
            use,
            call,
            count,
            keep_graph=engine.activations.keeps_graph(use),
            split=split,
            generation=engine.generation,
        )
        outputs = VisitFunction.apply(record, self.anchor if trains else None, *tensors)
        engine.forward_visited(record)
        assert record.output is not None
        return record.output.put(outputs)

    def _inference(self, use: Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine, chunk = self._engine, use.chunk
        with engine.holding(chunk, backward=False) as slot, swapped(chunk, leaves_of(chunk, slot, graph=False)):
            output = use.forward(*args, **kwargs)
            return pytree.tree_map_only(torch.Tensor, lambda t: outliving(slot, t), output)

    def run_forward(self, record: Record, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        engine, use = self._engine, record.use
        before = RandomState.capture(engine.backend.torch_device)
        versions = [t._version for t in tensors]
        with engine.holding(use.chunk, backward=False) as slot:
            parts = [self._forward_part(record, slot, tensors, 0)]
            if record.micro_batches > 1 and not self._joinable(record, tensors, parts[0]):
                engine.activations.refuse_micro_batches(use)
                # Start over with the whole batch, from the same random state.
                before.set(engine.backend.torch_device)
                record.micro_batches, record.random, record.graphs, record.input_sizes = 1, [], [], []
                parts = [self._forward_part(record, slot, tensors, 0)]
            parts += [self._forward_part(record, slot, tensors, i) for i in range(1, record.micro_batches)]
        if not record.keep_graph:
            if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
                raise RuntimeError(
                    f"{use.name} ({type(use.module).__name__}) modified its input in place, so its recomputation in "
                    f"backward would start from other values. Replace the in-place operation (for example `x += y` by "
                    f"`x = x + y`)"
                )
            record.saved = [
                engine.saved_inputs.save(
                    t,
                    use.chunk.index,
                    on_device=engine.activations.stays_on_device(use, t, needs_grad),
                    shared=not needs_grad,
                )
                for t, needs_grad in zip(tensors, record.requires_grad, strict=True)
            ]
        return self._join(record, parts)

    def _forward_part(
        self, record: Record, slot: torch.Tensor, tensors: list[torch.Tensor], index: int
    ) -> list[torch.Tensor]:
        engine, use = self._engine, record.use
        inputs = [_part(t, s, index, record.micro_batches) for t, s in zip(tensors, record.split, strict=True)]
        graph = VisitGraph(keep=record.keep_graph)
        if not record.keep_graph:
            record.random.append(RandomState.capture(engine.backend.torch_device))
            record.modes = [m.training for m in use.module.modules()]
        leaves = self._leaves(use, slot, graph)

        def module(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with swapped(use.chunk, leaves):
                args, kwargs = record.call.put(own)
                record.output, outputs = Output.take(use.forward(*args, **kwargs))
            return outputs

        outputs = graph.run(slot, inputs, record.requires_grad, self.anchor, module)
        record.graphs.append(graph)
        record.input_sizes.append([t.shape for t in inputs])
        record.held += graph.nbytes
        engine.backend.hold(graph.nbytes)
        use.backward_reads_weights = graph.reads_weights
        return outputs

    def _leaves(self, use: Use, slot: torch.Tensor, graph: VisitGraph) -> dict[Entry, torch.Tensor]:
        """Parameters over the slot's memory whose gradients go to this step's sum."""
        leaves = leaves_of(use.chunk, slot, graph=True)
        add = graph.guarded(lambda entry, gradient: self._engine.gradient_of(use.chunk).add(entry, gradient))
        collect(leaves, add)
        return leaves

    @staticmethod
    def _joinable(record: Record, tensors: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
        """Whether every output of a micro-batch has the batch as (a factor of) its first dimension."""
        batch = next(
            _part(t, True, 0, record.micro_batches).shape[0]
            for t, split in zip(tensors, record.split, strict=True)
            if split
        )
        return all(t.dim() > 0 and t.shape[0] > 0 and t.shape[0] % batch == 0 for t in outputs)

    def _join(self, record: Record, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if len(parts) == 1:
            return parts[0]
        record.output_sizes = [[t.shape[0] for t in part] for part in parts]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def run_backward(self, record: Record, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        engine, use = self._engine, record.use
        engine.begin_backward(record)
        try:
            previous = record.previous() if record.previous is not None else None
            if previous is not None:
                for saved in previous.saved:
                    saved.prefetch()
            if record.micro_batches > 1:
                engine.gradient_of(use.chunk).widen()
            result = self._backward(record, gradients)
        except BaseException:
            engine.interrupted(use)
            raise
        finally:
            record.free()
        engine.backward_visited(record)
        return result

    def _backward(self, record: Record, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        engine, use = self._engine, record.use
        recompute = not record.keep_graph
        tensors = [saved.get() for saved in record.saved]
        parts: list[list[torch.Tensor | None]] = []
        # A block may run a part of itself again in backward (torch.utils.checkpoint), with weights that no graph saved.
        is_block = use.chunk.kind == "block"
        needs_weights = recompute or is_block or any(g.reads_weights for g in record.graphs)
        holding = engine.holding(use.chunk, backward=True) if needs_weights else contextlib.nullcontext(None)
        with holding as slot:
            while record.graphs:
                # A micro-batch's graph goes when it has been differentiated.
                graph, i = record.graphs.pop(0), len(parts)
                if recompute and slot is not None:
                    self._refill(record, graph, slot, tensors, i)
                try:
                    with swapped(use.chunk, self._leaves(use, slot, graph) if slot is not None else {}):
                        graph.backward(slot, record.output_gradients(gradients, i))
                finally:
                    if recompute:
                        engine.backend.drop(graph.nbytes)
                parts.append(self._gradients_of(record, graph, i))
        return self._input_gradients(record, parts)

    def _refill(
        self, record: Record, graph: VisitGraph, slot: torch.Tensor, tensors: list[torch.Tensor], index: int
    ) -> None:
        engine, use = self._engine, record.use
        inputs = [_part(t, s, index, record.micro_batches) for t, s in zip(tensors, record.split, strict=True)]

        def module(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with swapped(use.chunk, leaves_of(use.chunk, slot, graph=True)):
                args, kwargs = record.call.put(own)
                return Output.take(use.forward(*args, **kwargs))[1]

        with (
            record.random[index].restored(engine.backend.torch_device),
            in_modes(use.module, record.modes),
            unchanged_buffers(use.module),
        ):
            graph.refill(slot, inputs, module)
        engine.backend.hold(graph.nbytes)

    def _gradients_of(self, record: Record, graph: VisitGraph, index: int) -> list[torch.Tensor | None]:
        sizes = record.input_sizes[index]
        gradients = graph.input_gradients(len(sizes))
        if record.micro_batches == 1:
            return gradients
        # In a split input, a micro-batch without a gradient stands for zeros.
        wanted = [s and r for s, r in zip(record.split, record.requires_grad, strict=True)]
        dtype, device = self._engine.compute_dtype, self._engine.backend.torch_device
        return [
            torch.zeros(size, dtype=dtype, device=device) if g is None and fill else g
            for g, size, fill in zip(gradients, sizes, wanted, strict=True)
        ]

    @staticmethod
    def _input_gradients(record: Record, parts: list[list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
        """Joins the micro-batches' input gradients: concatenated where the input was split, else summed in float32."""
        result: list[torch.Tensor | None] = []
        for split, pieces in zip(record.split, zip(*parts, strict=True), strict=True):
            present = [p for p in pieces if p is not None]
            if not present:
                result.append(None)
            elif len(pieces) == 1:
                result.append(present[0])
            elif split:
                result.append(torch.cat(present))
            else:
                total = present[0].float()
                for piece in present[1:]:
                    total = total + piece
                result.append(total.to(present[0].dtype))
        return result
