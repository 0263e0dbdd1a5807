"""The head without its logits: linear layer and cross-entropy, a tile of tokens at a time.

In a causal language model with labels the logits of a whole batch are the largest tensor by far (16K tokens x 128K
words are 4 GiB in bf16, and more in the loss). Here the head's call returns `DeferredLogits`, which knows how to make
them; the loss runs over tiles, and each tile's gradients are computed at once, so one tile's logits exist at a time.
Anything else that looks at the logits gets real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from slidecore import kernels
from slidecore.gradients import GradientSum, scale
from slidecore.partition import Entry
from slidecore.planner import BYTES_PER_LOGIT_UNFUSED
from slidecore.visit import Use, check_whole_backward, collect, is_reached, leaves_of, swapped

if TYPE_CHECKING:
    from slidecore.engine import Engine

# What models do to logits between head and loss: elementwise, with scalars only.
_ELEMENTWISE = {
    torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.mul, torch.mul,
    torch.Tensor.__truediv__, torch.Tensor.div, torch.div,
    torch.Tensor.tanh, torch.tanh,
    torch.Tensor.float, torch.Tensor.to,
}  # fmt: skip


@dataclass(frozen=True)
class Elementwise:
    """One of those: `function(logits, *arguments, **options)`."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.function(logits, *self.arguments, **self.options)
        return out


_PRODUCTS = {torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.mul, torch.mul}
_QUOTIENTS = {torch.Tensor.__truediv__, torch.Tensor.div, torch.div}
_CASTS = {torch.Tensor.float, torch.Tensor.to}


def scale_and_cap(tail: Sequence[Elementwise]) -> tuple[float, float | None] | None:
    """(inner, outer) if the tail is inner * x, or outer * tanh(inner * x) (soft-capping); None if it is neither."""
    inner, outer = 1.0, None
    for step in tail:
        function, number = step.function, step.arguments[0] if step.arguments else None
        if function in (torch.Tensor.tanh, torch.tanh) and outer is None:
            outer = 1.0
        elif function in _PRODUCTS | _QUOTIENTS and isinstance(number, (int, float)) and not step.options:
            if function in _QUOTIENTS and number == 0:
                return None
            factor = 1 / number if function in _QUOTIENTS else float(number)
            inner, outer = (inner * factor, None) if outer is None else (inner, outer * factor)
        elif function not in _CASTS:
            return None
    return inner, outer


class DeferredLogits(torch.Tensor):
    """Logits of `hidden` that are computed when somebody looks at them. Shape and dtype are the real ones."""

    hidden: torch.Tensor
    use: Use
    engine: Engine
    tail: tuple[Elementwise, ...]

    @staticmethod
    def make(engine: Engine, use: Use, hidden: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> DeferredLogits:
        return DeferredLogits._of(engine, use, hidden, shape, dtype, ())

    @staticmethod
    def _of(
        engine: Engine,
        use: Use,
        hidden: torch.Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        tail: tuple[Elementwise, ...],
    ) -> DeferredLogits:
        made: DeferredLogits = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            DeferredLogits, shape, dtype=dtype, device=hidden.device
        )
        made.hidden, made.use, made.engine, made.tail = hidden, use, engine, tail
        made._generation = engine.generation
        return made

    _generation: int
    changed: torch.Tensor | None = None  # the logits, once they were modified in place

    def materialise(self) -> torch.Tensor:
        """The real logits, as the head would have returned them.

        Raises:
            RuntimeError: the weights have been updated since the forward.
        """
        if self.changed is not None:
            return self.changed
        if self._generation != self.engine.generation:
            raise RuntimeError(
                "the logits of this forward were not kept and the weights have been updated since; look at "
                "output.logits before backward"
            )
        logits = self.engine.visits.call(self.use, (self.hidden,), {})
        for function in self.tail:
            logits = function(logits)
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PROPERTIES or getattr(func, "__name__", "") in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if args and isinstance(args[0], DeferredLogits) and _in_place(func):
            args[0].changed = args[0].materialise()
        others = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        lazy = func in _ELEMENTWISE and len(others) == 1 and isinstance(args[0], DeferredLogits)
        if lazy and args[0].changed is None:
            me: DeferredLogits = args[0]
            rest = args[1:]
            dtype = func(torch.empty(0, dtype=me.dtype, device="meta"), *rest, **kwargs).dtype

            moves = func is torch.Tensor.to and any(
                isinstance(a, (str, torch.device)) for a in (*rest, *kwargs.values())
            )
            if not moves:
                return cls._of(
                    me.engine, me.use, me.hidden, me.shape, dtype, (*me.tail, Elementwise(func, rest, kwargs))
                )
        real = {id(a): a.materialise() for a in _deferred((args, kwargs))}
        return func(*_replace(args, real), **_replace(kwargs, real))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        real = {id(a): a.materialise() for a in _deferred((args, kwargs))}
        return func(*_replace(args, real), **_replace(kwargs, real))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


_METADATA = {"size", "dim", "numel", "__len__", "__repr__", "is_floating_point", "ndimension"}
_PROPERTIES = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_meta")
}


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):  # __setitem__, __iadd__ and the like
        return name == "__setitem__" or (name.startswith("__i") and f"__{name[3:]}" in _OPERATORS)
    return name.endswith("_")


_OPERATORS = {"__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"}


def _deferred(value: Any) -> Iterator[DeferredLogits]:
    if isinstance(value, DeferredLogits):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _deferred(item)
    elif isinstance(value, dict):
        yield from _deferred(list(value.values()))


def _replace(value: Any, real: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, DeferredLogits):
        return real[id(value)]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_replace(item, real) for item in value)
    if isinstance(value, list):
        return [_replace(item, real) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, real) for key, item in value.items()}
    return value


@dataclass(eq=False)
class HeadRecord:
    """What a head-and-loss visit leaves for its backward."""

    engine: Engine
    use: Use
    labels: torch.Tensor
    tail: tuple[Elementwise, ...]
    tile_tokens: int
    ignore_index: int
    divisor: torch.Tensor
    label_smoothing: float
    generation: int
    keep_graph: bool = True
    gradient: GradientSum | None = None
    hidden_gradient: torch.Tensor | None = None
    consumed: bool = field(default=False)
    node: weakref.ref[Any] | None = None  # of autograd; it owns this record

    def is_reached(self) -> bool:
        """Whether the backward pass that is going on will differentiate this visit, as far as its graph tells."""
        return is_reached(self.node)


class HeadLoss(torch.autograd.Function):
    """Sum of the tokens' cross-entropy over `divisor`. Gradients are made in forward (as in Liger-Kernel's fused
    linear cross-entropy, arXiv 2410.10989) and scaled in backward.
    """

    @staticmethod
    def forward(ctx: Any, record: HeadRecord, anchor: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        record.node = weakref.ref(ctx)
        return _run_tiles(record, hidden, wants_gradient=True, wants_hidden=hidden.requires_grad)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        record: HeadRecord = ctx.record
        engine = record.engine
        if record.consumed:
            raise RuntimeError("backward through an offloaded model a second time: its gradients were consumed")
        check_whole_backward(engine, record.use.chunk)
        engine.begin_backward(record)
        record.consumed = True
        factor = gradients[0]
        if record.gradient is not None:
            record.gradient.scale(factor)
            engine.adopt(record.use.chunk, record.gradient)
            record.gradient = None
        hidden_gradient, record.hidden_gradient = record.hidden_gradient, None
        engine.count_backward(record.use.chunk, read_weights=False)
        if hidden_gradient is not None:
            scale(hidden_gradient, factor)
        return None, None, hidden_gradient


def _fused_weight(record: HeadRecord, flat: torch.Tensor) -> Entry | None:
    """The weight, if the head is a linear layer and what follows it something that the fused operation can do."""
    use = record.use
    module: Any = use.module
    if (
        not kernels.run_for(flat)
        or type(module) is not torch.nn.Linear
        or module._parameters["bias"] is not None
        or getattr(use.forward, "__func__", None) is not torch.nn.Linear.forward
        or flat.dtype != record.engine.compute_dtype
        or torch.is_autocast_enabled(flat.device.type)
        or scale_and_cap(record.tail) is None
    ):
        return None
    return next((e for e in use.chunk.entries if (use.module, "weight") in e.owners), None)


@torch.no_grad()
def _run_fused(
    record: HeadRecord, entry: Entry, flat: torch.Tensor, gradient: GradientSum | None, wants_hidden: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss and the hidden states' gradient. Each tile's products go straight to where they are summed."""
    from slidecore.triton.cross_entropy import LossOptions
    from slidecore.triton.linear_cross_entropy import linear_cross_entropy_into

    engine, tile = record.engine, min(record.tile_tokens, max(1, len(flat)))
    cap = scale_and_cap(record.tail)
    assert cap is not None
    of_weight, fresh = None, True
    if gradient is not None and entry.trainable:
        if len(flat) > tile:
            of_weight, fresh = gradient.wide_view(entry)
        else:
            of_weight = gradient.only_view(entry)
    of_hidden = torch.empty_like(flat) if wants_hidden else None
    held = tile * entry.shape[0] * flat.element_size()
    engine.backend.hold(held)
    with engine.holding(record.use.chunk, backward=False) as slot:
        losses, _ = linear_cross_entropy_into(
            flat,
            slot[entry.offset : entry.offset + entry.numel].view(entry.shape),
            record.labels,
            record.divisor,
            LossOptions(record.ignore_index, record.label_smoothing, 0.0, *cap),
            tile=tile,
            hidden_gradient=of_hidden,
            weight_gradient=of_weight,
            fresh=fresh,
        )
    engine.backend.drop(held)
    return losses.sum(), of_hidden


def _run_tiles(record: HeadRecord, hidden: torch.Tensor, wants_gradient: bool, wants_hidden: bool) -> torch.Tensor:
    engine, chunk = record.engine, record.use.chunk
    flat, labels = hidden.detach().reshape(-1, hidden.shape[-1]), record.labels
    trains = wants_gradient and any(e.trainable for e in chunk.entries)
    # The last step's gradients have landed, as this forward's weights are their updates'; their memory is wanted now.
    engine.gradient_buffers.release(engine.scheduler)
    gradient = engine.new_sum(chunk) if trains else None
    entry = _fused_weight(record, flat)
    if entry is not None:
        total, of_hidden = _run_fused(record, entry, flat, gradient, wants_hidden)
        record.gradient = gradient
        record.hidden_gradient = None if of_hidden is None else of_hidden.view(hidden.shape)
        return total
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    hidden_gradient = torch.zeros_like(flat) if wants_hidden else None
    if gradient is not None and flat.shape[0] > record.tile_tokens:
        gradient.widen()
    with engine.holding(chunk, backward=False) as slot:
        leaves = leaves_of(chunk, slot, graph=trains)
        if gradient is not None:
            collect(leaves, gradient.add)
        with swapped(chunk, leaves), torch.set_grad_enabled(wants_gradient):
            for start in range(0, flat.shape[0], record.tile_tokens):
                tile = slice(start, start + record.tile_tokens)
                part = flat[tile].detach().requires_grad_(wants_hidden)
                logits = record.use.forward(part)
                for function in record.tail:
                    logits = function(logits)
                held = logits.numel() * BYTES_PER_LOGIT_UNFUSED
                engine.backend.hold(held)
                loss, logits_gradient = _loss_of_tile(record, logits, labels[tile], wants_gradient)
                total += loss
                if wants_gradient:
                    torch.autograd.backward(logits, logits_gradient)
                    if hidden_gradient is not None and part.grad is not None:
                        hidden_gradient[tile] = part.grad
                del logits, logits_gradient
                engine.backend.drop(held)
    record.gradient = gradient
    record.hidden_gradient = hidden_gradient.view(hidden.shape) if hidden_gradient is not None else None
    return total


@torch.no_grad()
def _loss_of_tile(
    record: HeadRecord, logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tile's share of the loss, and its gradient with respect to the logits, in their dtype."""
    ignore_index, label_smoothing = record.ignore_index, record.label_smoothing
    if not wants_gradient or not kernels.run_for(logits):
        with torch.set_grad_enabled(wants_gradient):
            leaf = logits.detach().requires_grad_(wants_gradient)
            loss = F.cross_entropy(
                leaf.float(), labels, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
            )
            loss = loss / record.divisor
        gradient = torch.autograd.grad(loss, leaf)[0] if wants_gradient else None
        return loss.detach(), gradient
    from slidecore.triton.cross_entropy import cross_entropy

    # A linear layer's backward does not read its output, so the gradient may take its place.
    plain = isinstance(record.use.module, torch.nn.Linear) and not record.tail
    return cross_entropy(
        logits.detach(),
        labels,
        record.divisor,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        in_place=plain,
    )


def linear_cross_entropy(
    logits: DeferredLogits,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of deferred logits, float32 scalar.

    Args:
        logits: (..., vocabulary), deferred.
        labels: integers of the leading shape, already shifted; `ignore_index` where a token does not count.
        num_items: what the sum is divided by; None for the number of tokens that count.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """
    engine, use, hidden = logits.engine, logits.use, logits.hidden
    labels = labels.reshape(-1).to(hidden.device).contiguous()
    if num_items is None:
        divisor = (labels != ignore_index).sum().to(torch.float32)
    else:
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
    record = HeadRecord(
        engine=engine,
        use=use,
        labels=labels,
        tail=logits.tail,
        tile_tokens=engine.activations.head_tile(logits.shape[-1]),
        ignore_index=ignore_index,
        divisor=divisor,
        label_smoothing=label_smoothing,
        generation=engine.generation,
    )
    trains = any(e.trainable for e in use.chunk.entries)
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):
        return _run_tiles(record, hidden, wants_gradient=False, wants_hidden=False)
    engine.begin_forward()
    loss: torch.Tensor = HeadLoss.apply(record, engine.visits.anchor if trains else None, hidden)
    engine.forward_visited(record)
    return loss
