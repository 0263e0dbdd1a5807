"""Visits: a chunk's module runs with its weights in a slot, forward without a graph, backward by recomputation.

A forward visit that will be followed by a backward one either keeps its inputs and recomputes (blocks), or keeps what
its graph saves (edges, and as many blocks as the plan affords); see `graphs`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from slidecore.calls import Call, Output
from slidecore.captures import Capture, Captured, unnoticed
from slidecore.edits import take_over
from slidecore.errors import UsageError
from slidecore.graphs import VisitGraph, is_in, outliving
from slidecore.integrations.transformers_caches import refuse_cache
from slidecore.kept import KeptParameter, replaced, trained
from slidecore.micro_batches import input_gradients, join, output_gradients, part, same
from slidecore.parameters import check_pointing
from slidecore.partition import Chunk, Entry
from slidecore.refusals import check_held, check_trainable
from slidecore.repeating import Buffers, RandomState, in_modes, unchanged_buffers
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
    repeats: bool = False  # its recomputation has been seen to give the outputs of its forward
    saves_unwritten: bool = False  # its graph may save a tensor before the operation writes it


@dataclass(eq=False)
class Record:
    """A forward visit whose backward is to come."""

    engine: Engine
    use: Use
    call: Call
    modules: list[nn.Module]  # the use's module and those below it
    kept: list[KeptParameter]  # inputs of the visit, behind the call's tensors
    micro_batches: int
    keep_graph: bool
    requires_grad: list[bool] = field(default_factory=list)
    saved: list[SavedInput] = field(default_factory=list)
    split: list[bool] = field(default_factory=list)
    random: list[RandomState] = field(default_factory=list)
    buffers: list[Buffers] = field(default_factory=list)  # those that each micro-batch changed, as it found them
    graphs: list[VisitGraph] = field(default_factory=list)
    output: Output | None = None
    input_sizes: list[list[torch.Size]] = field(default_factory=list)  # of each micro-batch
    batched: list[bool] = field(default_factory=list)  # outputs that are concatenated from those of the micro-batches
    output_sizes: list[list[int]] = field(default_factory=list)  # of each micro-batch, along dimension 0
    previous: weakref.ref[Record] | None = None  # the visit whose inputs backward needs next
    generation: int = 0  # of the weights that the forward read
    modes: list[bool] = field(default_factory=list)  # `training` of each of `modules` at forward
    written: list[int] = field(default_factory=list)  # inputs whose graph the module changed, by writing to them
    same_versions: contextlib.AbstractContextManager[None] = field(default_factory=contextlib.nullcontext)
    consumed: bool = False
    held: int = 0  # bytes of kept graphs
    node: weakref.ref[Any] | None = None  # of autograd; it owns this record

    def is_reached(self) -> bool:
        """Whether the backward pass that is going on will differentiate this visit, as far as its graph tells."""
        return is_reached(self.node)

    def __del__(self) -> None:
        # The graph was dropped without a backward.
        self.free()

    def free(self) -> None:
        self.consumed = True
        for saved in self.saved:
            saved.free()
        self.saved, self.graphs, self.random, self.buffers = [], [], [], []
        self.engine.backend.drop(self.held)
        self.held = 0
        self.previous = None


@contextlib.contextmanager
def swapped(chunk: Chunk, leaves: dict[Entry, torch.Tensor]) -> Iterator[None]:
    """Puts `leaves` where the chunk's modules hold their parameters, and the parameters back afterwards.

    Raises:
        ChangedWeightError: a leaf was changed in place.
    """
    versions = [leaf._version for leaf in leaves.values()]
    for entry, leaf in leaves.items():
        for module, attribute in entry.owners:
            module._parameters[attribute] = leaf  # type: ignore[assignment]
    try:
        yield
    finally:
        for entry in leaves:
            for module, attribute in entry.owners:
                module._parameters[attribute] = entry.parameter
    for (entry, leaf), version in zip(leaves.items(), versions, strict=True):
        if leaf._version != version:
            raise ChangedWeightError(_changed_in_forward(chunk, entry))


class ChangedWeightError(UsageError):
    """A module changed a weight in its slot, which is the next chunk's soon: the change would be lost."""


def _changed_in_forward(chunk: Chunk, entry: Entry) -> str:
    keep = "" if chunk.kind == "block" else f", or keep the parameter on the device: keep=[{entry.name!r}]"
    return (
        f"the forward of a {type(entry.owners[0][0]).__name__} changed its parameter {entry.name} in place (as "
        f"nn.Embedding(max_norm=...) does), which would be lost: visits compute with a copy of offloaded weights. "
        f"Compute with a changed value instead (`F.linear(x, self.weight / norm)`), or change the parameter between "
        f"steps, after slidecore.synchronize(model){keep}"
    )


def leaves_of(chunk: Chunk, slot: torch.Tensor, graph: bool) -> dict[Entry, torch.Tensor]:
    """Parameters over the slot's memory, one for each entry of the chunk, each with a version of its own."""
    return {
        entry: nn.Parameter(
            slot[entry.offset : entry.offset + entry.numel].view(entry.shape).data,
            requires_grad=graph and entry.trainable,
        )
        for entry in chunk.entries
    }


def run_again(
    use: Use,
    slot: torch.Tensor,
    call: Call,
    inputs: Sequence[torch.Tensor],
    kept: Sequence[KeptParameter],
) -> list[torch.Tensor]:
    """Output tensors of a run with leaves of its own; `inputs` are those of the call and those of `kept`."""
    with swapped(use.chunk, leaves_of(use.chunk, slot, graph=True)):
        return run_captured(use, list(use.module.modules()), call, inputs, kept)[1]


def run_captured(
    use: Use, modules: Sequence[nn.Module], call: Call, inputs: Sequence[torch.Tensor], kept: Sequence[KeptParameter]
) -> tuple[Output, list[torch.Tensor]]:
    """Runs the use's own forward; its outputs are its value and all that is captured beside it."""
    tensors, weights = inputs[: len(inputs) - len(kept)], inputs[len(inputs) - len(kept) :]
    args, kwargs, mappings, within = call.put(tensors)
    capture = Capture(modules, mappings)
    with replaced(kept, weights), capture.watching():
        value = use.forward(*args, **kwargs)
        output = Output.take((value, *capture.taken().flat()))
    for container in within:
        if container.has_changed():
            raise UsageError(
                f"{use.name} ({type(use.module).__name__}) changed a {type(container.given).__name__} that it was "
                f"given (argument {container.place!r}), which would be lost in training. Return what it adds, or set "
                f"it in a dict that is an argument itself"
            )
    return output


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


class VisitFunction(torch.autograd.Function):
    """The autograd node of a visit. `anchor` makes a visit without differentiable inputs part of the graph."""

    @staticmethod
    def forward(ctx: Any, record: Record, anchor: torch.Tensor | None, *tensors: torch.Tensor) -> Any:
        ctx.record = record
        record.node = weakref.ref(ctx)
        ctx.set_materialize_grads(False)
        record.requires_grad = [t.requires_grad for t in tensors]
        outputs = record.engine.visits.run_forward(record, [t.detach() for t in tensors])
        if record.written:
            # As outputs, behind the module's own: what uses them from now on is differentiated through the visit.
            _check_writable(record, tensors)
            outputs += [tensors[i] for i in record.written]
            ctx.mark_dirty(*(tensors[i] for i in record.written))
            # Autograd counts one more change of them, which would be none that the visit's graph has to complain about.
            record.same_versions = torch.autograd._unsafe_preserve_version_counter(  # type: ignore[attr-defined]
                tuple(tensors[i] for i in record.written)
            )
        constant = [not any(g.differentiable(i) for g in record.graphs) for i in range(len(outputs))]
        ctx.mark_non_differentiable(*[t for t, c in zip(outputs, constant, strict=True) if c])
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


def _check_writable(record: Record, tensors: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError where autograd could not take over what the module wrote to its inputs."""
    if record.micro_batches > 1 or any(tensors[i]._is_view() for i in record.written):
        raise RuntimeError(_modified_input(record.use, "whose gradient would be lost"))


def _modified_input(use: Use, consequence: str) -> str:
    return (
        f"{use.name} ({type(use.module).__name__}) modified its input in place, {consequence}. Replace the in-place "
        f"operation (for example `x += y` by `x = x + y`)"
    )


def is_reached(reference: weakref.ref[Any] | None) -> bool:
    """Whether the backward pass that is going on will run the node, unless the pass began with it."""
    node = reference() if reference is not None else None
    return node is not None and torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined, no-any-return]


def check_whole_backward(engine: Engine, chunk: Chunk) -> None:
    """Raises UsageError in a backward that is to be differentiated again (gradients have no graph here), and in one for
    some gradients only: it would update the weights all the same.
    """
    if torch.is_grad_enabled():  # as the engine has it for create_graph=True
        raise UsageError(
            "second derivatives (create_graph=True) do not pass an offloaded model: they would count as zero. Take the "
            "penalty through a part that is not offloaded"
        )
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
        engine.refuse_other_threads()
        engine.scheduler.check()
        if not engine.in_root:  # which has looked already
            check_held(use.chunk.entries)
            check_pointing(engine.planes, use.chunk)
            if engine.train and torch.is_grad_enabled():
                check_trainable(use.chunk.entries)
            take_over(engine, [(use.chunk, entry) for entry in use.chunk.entries])
        if not torch.is_grad_enabled():
            return self._inference(use, args, kwargs)
        modules = list(use.module.modules())
        kept = self._kept_of(use, modules)
        call, tensors = Call.take(args, kwargs)
        trains = any(e.trainable for e in use.chunk.entries)
        if not trains and not kept and not any(t.requires_grad for t in tensors):
            return self._inference(use, args, kwargs)
        refuse_cache(use.name, [*args, *kwargs.values()])
        engine.begin_forward()
        views = self._cached_views(modules)
        count, split = engine.activations.plan_micro_batches(use, call, tensors, kept)
        record = Record(
            engine,
            use,
            call,
            modules,
            kept,
            count,
            keep_graph=engine.activations.keeps_graph(use),
            split=split + [False] * len(kept),
            generation=engine.generation,
        )
        outputs = VisitFunction.apply(
            record, self.anchor if trains else None, *tensors, *(each.parameter for each in kept)
        )
        record.same_versions.__exit__(None, None, None)
        record.same_versions = contextlib.nullcontext()  # it holds the inputs
        engine.forward_visited(record)
        assert record.output is not None
        value, *captured = record.output.put(outputs[: len(outputs) - len(record.written)])
        Captured(*captured).deliver(modules, args, kwargs)
        self._check_cached(use, views)
        return value

    def _cached_views(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """Attributes that are views of a slot, from earlier visits: another chunk's weights are there by now."""
        slots = self._engine.slot_addresses
        return [
            (module, name, value)
            for module in modules
            for name, value in module.__dict__.items()
            if isinstance(value, torch.Tensor) and is_in(slots, value)
        ]

    def _check_cached(self, use: Use, views: Sequence[tuple[nn.Module, str, torch.Tensor]]) -> None:
        """Raises UsageError where the module has not made these anew, but used what it had kept."""
        for module, name, value in views:
            if module.__dict__.get(name) is value:
                raise UsageError(
                    f"the forward of {use.name} kept a view of a weight as {type(module).__name__}.{name}, where "
                    f"another layer's weights are by now. Keep a copy (`.clone()`), or make the view anew in each "
                    f"forward"
                )

    def _kept_of(self, use: Use, modules: Sequence[nn.Module]) -> list[KeptParameter]:
        kept = trained(modules, self._engine.entries)
        device = self._engine.backend.torch_device
        for each in kept:
            if each.parameter.device != device:
                module, attribute = each.owners[0]
                raise UsageError(
                    f"{use.name}: parameter {attribute!r} of a {type(module).__name__} was added after offload() and "
                    f"is on {each.parameter.device}; add modules before offload(), or move them to {device}"
                )
        return kept

    def _inference(self, use: Use, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine, chunk = self._engine, use.chunk
        with engine.holding(chunk, backward=False) as slot, swapped(chunk, leaves_of(chunk, slot, graph=False)):
            views = self._cached_views(use.module.modules())
            output = use.forward(*args, **kwargs)
            self._check_cached(use, views)
            return pytree.tree_map_only(torch.Tensor, lambda t: outliving(slot, t), output)

    def run_forward(self, record: Record, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        engine, use = self._engine, record.use
        before = RandomState.capture(engine.backend.torch_device, others=engine.other_draws.expected())
        versions = [t._version for t in tensors]
        with engine.holding(use.chunk, backward=False) as slot:
            parts = self._forward_parts(record, slot, tensors)
            if not parts:
                engine.activations.refuse_micro_batches(use)
                # Start over with the whole batch, from the same random state.
                before.set(engine.backend.torch_device)
                engine.backend.drop(record.held)
                record.micro_batches, record.held = 1, 0
                for buffers in reversed(record.buffers):
                    buffers.put_back()
                record.random, record.buffers, record.graphs, record.input_sizes = [], [], [], []
                parts = self._forward_parts(record, slot, tensors)
        if record.micro_batches > 1:
            record.output_sizes = [[t.shape[0] if t.dim() else 0 for t in part] for part in parts]
        if not record.keep_graph:
            if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
                raise RuntimeError(
                    _modified_input(use, "so its recomputation in backward would start from other values")
                )
            inputs = len(tensors) - len(record.kept)
            record.saved = [
                engine.saved_inputs.save(
                    t,
                    use.chunk.index,
                    on_device=i >= inputs or engine.activations.stays_on_device(use, t, needs_grad),
                    shared=i >= inputs or not needs_grad,
                )
                for i, (t, needs_grad) in enumerate(zip(tensors, record.requires_grad, strict=True))
            ]
        return join(parts, record.batched)

    def _forward_parts(
        self, record: Record, slot: torch.Tensor, tensors: list[torch.Tensor]
    ) -> list[list[torch.Tensor]]:
        """Each micro-batch's outputs; none if they cannot be joined."""
        parts = [self._forward_part(record, slot, tensors, 0)]
        if record.micro_batches == 1:
            return parts
        split = {i for i, was_split in enumerate(record.split) if was_split}
        n = len(tensors) - len(record.kept)
        record.batched = self._engine.activations.batched_outputs(
            record.use, record.call, tensors[:n], record.requires_grad[:n], record.split[:n], record.kept, len(parts[0])
        )
        if self._engine.activations.numbers_vary(record.use, len(parts[0])):
            return []
        once = [i for i, batched in enumerate(record.batched) if not batched]
        if any(record.graphs[0].may_depend(i, split) for i in once):
            return []
        first = record.output
        assert first is not None
        for i in range(1, record.micro_batches):
            parts.append(self._forward_part(record, slot, tensors, i))
            assert record.output is not None
            if not record.output.says_the_same(first):  # a number that was computed from the samples
                return []
        return parts if all(same([part[i] for part in parts]) for i in once) else []

    def _forward_part(
        self, record: Record, slot: torch.Tensor, tensors: list[torch.Tensor], index: int
    ) -> list[torch.Tensor]:
        engine, use = self._engine, record.use
        inputs = [part(t, s, index, record.micro_batches) for t, s in zip(tensors, record.split, strict=True)]
        graph = VisitGraph(
            keep=record.keep_graph,
            known=[each.parameter for each in record.kept],
            compare="" if use.repeats or record.keep_graph else f"{use.name} ({type(use.module).__name__})",
            to_end=use.saves_unwritten,
        )
        if not record.keep_graph:
            device = engine.backend.torch_device
            record.random.append(RandomState.capture(device, others=engine.other_draws.expected()))
            record.modes = [m.training for m in record.modules]
        again = not record.keep_graph or record.micro_batches > 1
        before = Buffers.capture(use.module) if again else Buffers()
        leaves = self._leaves(use, slot, graph)

        def module(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with swapped(use.chunk, leaves):
                record.output, outputs = run_captured(use, record.modules, record.call, own, record.kept)
            return outputs

        outputs = graph.run(slot, inputs, record.requires_grad, self.anchor, module)
        record.buffers.append(before.changed())
        record.graphs.append(graph)
        record.written = graph.written
        record.input_sizes.append([t.shape for t in inputs])
        record.held += graph.nbytes
        engine.backend.hold(graph.nbytes)
        use.backward_reads_weights = graph.reads_weights
        use.saves_unwritten |= graph.saves_unwritten
        return outputs

    def _leaves(self, use: Use, slot: torch.Tensor, graph: VisitGraph) -> dict[Entry, torch.Tensor]:
        """Parameters over the slot's memory whose gradients go to this step's sum."""
        leaves = leaves_of(use.chunk, slot, graph=True)
        add = graph.guarded(lambda entry, gradient: self._engine.gradient_of(use.chunk).add(entry, gradient))
        collect(leaves, add)
        return leaves

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
                        wanted = output_gradients(gradients, record.output_sizes, record.batched, i)
                        graph.backward(slot, wanted)
                finally:
                    if recompute:
                        engine.backend.drop(graph.nbytes)
                parts.append(graph.input_gradients(len(record.input_sizes[i])))
        return input_gradients(parts, record.split, record.input_sizes)

    def _refill(
        self, record: Record, graph: VisitGraph, slot: torch.Tensor, tensors: list[torch.Tensor], index: int
    ) -> None:
        engine, use = self._engine, record.use
        inputs = [part(t, s, index, record.micro_batches) for t, s in zip(tensors, record.split, strict=True)]

        def module(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return run_again(use, slot, record.call, own, record.kept)

        with (
            record.random[index].restored(engine.backend.torch_device),
            in_modes(record.modules, record.modes),
            unnoticed(record.modules),
            unchanged_buffers(use.module),
        ):
            record.buffers[index].put_back()
            views = [] if use.repeats else self._cached_views(record.modules)
            graph.refill(slot, inputs, module)
            self._check_cached(use, views)
        use.repeats = True
        engine.backend.hold(graph.nbytes)
