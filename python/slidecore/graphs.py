"""The autograd graph of one visit, without the weights and, for recomputation, without its saved tensors.

A visit runs once with a graph, in forward. What autograd saves goes through hooks:

- views of the slot are replaced by their place in the chunk: a graph does not pin weights, and its backward reads them
  from whatever slot the chunk is in then;
- everything else is kept as it is, or replaced by an empty holder. Before backward a second run of the module fills the
  holders in the order in which the first run made them, and stops at the last: what comes after the last saved tensor
  (the block's final product, say) need not be computed again. As in torch.utils.checkpoint's non-reentrant form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch


class _Stop(Exception):
    """Ends the second run: every holder is filled."""


class _SlotReference:
    """Stands for a view of the chunk's weights."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._dtype, self._conj, self._neg = tensor.dtype, tensor.is_conj(), tensor.is_neg()

    def resolve(self, slot: torch.Tensor) -> torch.Tensor:
        if self._dtype == slot.dtype:
            view = slot.as_strided(self._size, self._stride, self._offset)
        else:  # torch.view_as_complex(weight), weight.view(dtype)
            view = torch.empty(0, dtype=self._dtype, device=slot.device)
            view.set_(slot.untyped_storage(), self._offset, self._size, self._stride)  # type: ignore[call-overload]
        view = view.conj() if self._conj else view
        return torch._neg_view(view) if self._neg else view


class _Kept:
    """A saved tensor. Autograd leaves the check of its version to whoever has hooks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> torch.Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that the backward of an offloaded module needs was "
                f"modified in place after the module had used it. Replace the in-place operation (for example "
                f"`h += x` by `h = h + x`)"
            )
        return self._tensor


class _Holder:
    """Stands for a tensor that recomputation brings back. Only the graph owns it, so it goes as autograd goes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._meta = (tensor.shape, tensor.dtype)
        self.kept: _Kept | None = None

    def fill(self, tensor: torch.Tensor) -> None:
        if (tensor.shape, tensor.dtype) != self._meta:
            raise RuntimeError(_NOT_REPEATABLE)
        self.kept = _Kept(tensor.detach())


def _mark_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Sum and Euclidean norm in float32, by which other values can be told; None for kinds that have no such.

    Nothing of the tensor's size is allocated: neither reduction copies elements to another type.
    """
    tensor = tensor.detach()
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in _MARKED:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return torch.stack([tensor.sum(dtype=torch.float32), torch.linalg.vector_norm(tensor, dtype=torch.float32)])


_MARKED = {torch.float32, torch.bfloat16, torch.float16, torch.complex64}
# Of the norm. Kernels that add up in any order differ by roundings: where every element of a block's input errs by a
# unit of bfloat16, sums of small outputs move by up to 0.02 of the norm, and norms by 0.003. Another draw of random
# numbers moves a sum by about the norm itself.
_ROUNDING_OF_SUM, _ROUNDING_OF_NORM = 0.04, 0.01


def _are_other_values(marks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether tensors differ by more than roundings, going by their marks before and after."""
    if not marks:
        return False
    before, after = zip(*marks, strict=True)
    (total, norm), (new_total, new_norm) = (torch.stack([m.cpu() for m in some]).unbind(1) for some in (before, after))
    sums = (new_total - total).abs() <= _ROUNDING_OF_SUM * norm
    near = sums & ((new_norm - norm).abs() <= _ROUNDING_OF_NORM * norm)
    infinite = ~torch.isfinite(total + norm) & ~torch.isfinite(new_total + new_norm)
    return not bool((near | infinite).all())


_NOT_REPEATABLE = (
    "recomputing an offloaded block saved other tensors than its forward did. Its forward must do the same when it is "
    "run again with the same inputs and random state; keep_graphs= avoids recomputation"
)


_OTHER_VALUES = (
    "recomputing this block in backward gave other outputs than its forward, so its gradients would be wrong. "
    "PyTorch's, Python's and NumPy's own random states are restored for it; random numbers of another generator, a "
    "counter, or a state that is no buffer are not. Make what it computes depend on its inputs and buffers alone, or "
    "give keep_graphs= the number of blocks, which avoids recomputation"
)

_OUTSIDE = (
    "an offloaded module's graph was used outside its backward visit. A tensor from inside the module (kept in a "
    "list, say, or by a hook on a submodule) was differentiated past the module's outputs: return it from the "
    "module's forward, set it as an attribute of the module, or detach it"
)


class _Phase:
    """Whether a graph is being differentiated by its visit; shared with its nodes, which must not own the graph."""

    backward = False


class _Boundary(torch.autograd.Function):
    """The inputs' end of a graph: takes their gradients without holding the inputs, as leaves would."""

    @staticmethod
    def forward(ctx: Any, graph: VisitGraph, anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.gradients, ctx.phase = graph._gradients, graph._phase
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if not ctx.phase.backward:
            raise RuntimeError(_OUTSIDE)
        ctx.gradients[:] = gradients
        return (None, None, *(None for _ in gradients))


_BOUNDARY = f"{_Boundary.__name__}Backward"
# Of operations that save a tensor which they write then (rrelu's noise): a second run must not stop where it is saved.
_SAVE_UNWRITTEN = {"RreluWithNoiseBackward0", "RreluWithNoiseBackward1"}


def _nodes(edges: Sequence[Any]) -> Iterator[Any]:
    """The nodes of a graph that ends in `edges` (None where there is none)."""
    todo = [edge.node for edge in edges if edge is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        todo += following


def is_in(slots: Collection[int], tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a view of a slot, of which the addresses are given."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return False
    try:
        return tensor.untyped_storage().data_ptr() in slots
    except RuntimeError:  # it has no memory of its own: a subclass of tensors that wraps others
        return False


def outliving(slot: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`output`, copied if it is a view of the weights: the slot is another chunk's as soon as the visit ends."""
    return output.clone() if is_in({slot.untyped_storage().data_ptr()}, output) else output


class VisitGraph:
    """The graph of one micro-batch of a visit."""

    def __init__(self, keep: bool, known: Sequence[torch.Tensor] = (), compare: str = "", to_end: bool = False) -> None:
        """`keep` keeps saved tensors; otherwise `refill` must run before `backward`.

        Args:
            known: tensors whose memory is counted elsewhere.
            compare: a name for errors; `refill` then runs `module` to its end, and compares its outputs with those of
                the first run.
            to_end: `refill` runs `module` to its end.
        """
        self._keep = keep
        self._compare = compare
        self._to_end = to_end or bool(compare)
        self._marks: list[torch.Tensor | None] = []  # of the outputs, if they are to be compared
        self._holders: list[weakref.ref[_Holder]] = []
        self._slot: torch.Tensor | None = None  # where the weights are
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._phase = _Phase()
        self._gradients: list[torch.Tensor | None] = []
        self._differentiable: list[int] = []
        self.written: list[int] = []  # inputs that the module wrote to, so that they got a graph; outputs, too
        self._edges: list[Any] = []
        self._rows: list[bool] = []  # whether an output has a dimension 0 of size one, and more
        self.reads_weights = False
        self.saves_unwritten = False  # a tensor that its operation writes after it was saved; looked for with `compare`
        self.nbytes = 0  # of distinct storages among the saved tensors, weights excluded

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        assert self._slot is not None
        return tensor.untyped_storage().data_ptr() == self._slot.untyped_storage().data_ptr()

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()

    def _hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        # The autograd graph holds the hooks: through a weak reference, lest the two keep each other alive for ever.
        myself = weakref.ref(self)

        def pack(tensor: torch.Tensor) -> _Kept | _SlotReference | _Holder:
            graph = myself()
            assert graph is not None
            if graph._is_weight(tensor):
                graph.reads_weights = True
                return _SlotReference(tensor)
            if graph._keep:
                graph._count(tensor)
                return _Kept(tensor)
            holder = _Holder(tensor)
            graph._holders.append(weakref.ref(holder))
            return holder

        def unpack(packed: _Kept | _SlotReference | _Holder) -> torch.Tensor:
            if isinstance(packed, _Kept):
                return packed.get()
            graph = myself()
            if isinstance(packed, _Holder) and packed.kept is not None:
                return packed.kept.get()
            if isinstance(packed, _Holder) or graph is None or graph._slot is None:
                raise RuntimeError(_OUTSIDE)
            return packed.resolve(graph._slot)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def run(
        self,
        slot: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        requires_grad: Sequence[bool],
        anchor: torch.Tensor,
        module: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Runs `module` on `inputs` with its weights in `slot`, and returns its outputs, detached.

        Args:
            inputs: detached tensors; those with `requires_grad` get a gradient in `backward`. The graphs of those that
                `module` writes to are ends of this one, behind its outputs.
            anchor: any tensor that requires a gradient; it gets none.
        """
        self._slot = slot
        self._differentiable = [i for i, wanted in enumerate(requires_grad) if wanted]
        with torch.enable_grad(), self._hooks():
            own = list(inputs)
            if self._differentiable:
                bound = _Boundary.apply(self, anchor, *(inputs[i] for i in self._differentiable))
                for i, tensor in zip(self._differentiable, bound, strict=True):
                    own[i] = tensor
            given = [(t._version, t.grad_fn) for t in own]
            outputs = module(own)
        self.written = [
            i
            for i, (t, (version, node)) in enumerate(zip(own, given, strict=True))
            if t._version != version and t.grad_fn is not node
        ]
        self._edges = [
            torch.autograd.graph.get_gradient_edge(t) if t.requires_grad else None
            for t in [*outputs, *(own[i] for i in self.written)]
        ]
        if self._compare:
            self._marks = [_mark_of(t) for t in outputs]
            self.saves_unwritten = any(node.name() in _SAVE_UNWRITTEN for node in _nodes(self._edges))
        self._rows = [t.dim() > 1 and t.shape[0] == 1 for t in outputs]
        self._slot = None
        return [outliving(slot, t.detach()) for t in outputs]

    def refill(
        self,
        slot: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        module: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
    ) -> None:
        """Runs `module` again, up to the last tensor that its graph needs; random state is the caller's to restore.

        Raises:
            RuntimeError: the second run saved other tensors than the first, or gave other outputs, where they are
                compared: by sums and norms, which finds other random numbers and counters, not every last bit.
        """
        if self._keep or not self._holders:
            return
        self._slot = slot
        filled = 0

        def pack(tensor: torch.Tensor) -> None:
            nonlocal filled
            if self._is_weight(tensor):
                return
            if filled == len(self._holders):
                raise RuntimeError(_NOT_REPEATABLE)
            holder = self._holders[filled]()
            filled += 1
            if holder is not None:
                holder.fill(tensor)
                self._count(tensor)
            if filled == len(self._holders) and not self._to_end:
                raise _Stop

        def unpack(_: None) -> torch.Tensor:
            raise RuntimeError("an offloaded block differentiates inside its own forward; use keep_graphs= for it")

        wanted = set(self._differentiable)
        own = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                outputs = module(own)
        except _Stop:
            return
        if filled < len(self._holders):
            raise RuntimeError(_NOT_REPEATABLE)
        pairs = zip(self._marks, map(_mark_of, outputs), strict=len(outputs) == len(self._marks))
        if _are_other_values([(a, b) for a, b in pairs if a is not None and b is not None]):
            raise RuntimeError(f"{self._compare}: {_OTHER_VALUES}")

    def backward(self, slot: torch.Tensor | None, gradients: Sequence[torch.Tensor | None]) -> None:
        """Differentiates: leaves of the weights get theirs through their hooks, inputs through `input_gradients`."""
        self._slot = slot
        pairs = [(e, g) for e, g in zip(self._edges, gradients, strict=True) if e is not None and g is not None]
        self._phase.backward = True
        try:
            if pairs:
                torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
        finally:
            self._phase.backward = False
            self._slot = None

    def differentiable(self, output: int) -> bool:
        """Whether output number `output` depends, differentiably, on weights or inputs."""
        return self._edges[output] is not None

    def may_depend(self, output: int, inputs: set[int]) -> bool:
        """Whether output number `output` may depend on the `inputs`, going by the graph.

        Where nothing can be seen there, only a row that broadcasts over the batch passes.
        """
        if self._edges[output] is None or not inputs & set(self._differentiable):
            return not self._rows[output]
        return any(
            following is not None and following.name() == _BOUNDARY and self._differentiable[number] in inputs
            for node in _nodes([self._edges[output]])
            for following, number in node.next_functions
        )

    def guarded(self, add: Callable[..., None]) -> Callable[..., None]:
        """`add`, for the gradients of the graph's weights: an error outside `backward`."""
        phase = self._phase

        def guarded(*args: Any) -> None:
            if not phase.backward:
                raise RuntimeError(_OUTSIDE)
            add(*args)

        return guarded

    def input_gradients(self, inputs: int) -> list[torch.Tensor | None]:
        """One entry for each of the `inputs` of `run`; None where there is no gradient."""
        result: list[torch.Tensor | None] = [None] * inputs
        for i, gradient in zip(self._differentiable, self._gradients, strict=False):
            result[i] = gradient
        return result
