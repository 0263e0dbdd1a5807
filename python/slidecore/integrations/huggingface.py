"""Hugging Face models: no key-value cache while training, the head without its logits, and saving as a stream.

Nothing here goes by a model's name: it looks at the methods that `transformers.PreTrainedModel` defines.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from slidecore.head import DeferredLogits, linear_cross_entropy
from slidecore.kept import trained

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.visit import Use


def accelerated() -> bool:
    """Whether an `accelerate.Accelerator` (such as transformers' Trainer makes) is there to run the training.

    It accumulates without announcing it on a single device, and its users clip, or ask for the norm, at every step.
    """
    state = sys.modules.get("accelerate.state")
    return state is not None and bool(state.is_initialized())


def pretrained_models(model: nn.Module) -> list[nn.Module]:
    """`model` if it is one of transformers', or else the outermost ones inside of it (PEFT's hold what they adapt)."""
    transformers = sys.modules.get("transformers")
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    if transformers is None:
        return found
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def attach(model: nn.Module, engine: Engine) -> None:
    """Adapts the models of transformers that `model` is or holds."""
    for part in pretrained_models(model):
        _attach(part, engine)
        if part is model:
            from slidecore.checkpoints import pretrained  # which imports this module

            pretrained.attach(model, engine)


def _attach(model: nn.Module, engine: Engine) -> None:
    import transformers

    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    handles = []
    for part in model.modules():  # whose own forward may be called, too: model.model(...)
        if isinstance(part, transformers.PreTrainedModel):
            parameters = inspect.signature(type(part).forward).parameters
            if "use_cache" in parameters or "kwargs" in parameters:
                handles.append(part.register_forward_pre_hook(_without_cache, with_kwargs=True))
    use = _head_of(model, engine)
    if use is not None:
        _defer_logits(model, engine, use)
    engine.detach += [handle.remove for handle in handles]


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would fight with the caller's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _without_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # A cache would be filled twice: by the forward and by its recomputation.
    if torch.is_grad_enabled() and kwargs.get("past_key_values") is None and getattr(model.config, "use_cache", False):
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _head_of(model: nn.Module, engine: Engine) -> Use | None:
    """The use of the output embedding, if the model's loss is the causal language model's."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((use for use in engine.uses if use.module is head), None) if head is not None else None


def _defer_logits(model: nn.Module, engine: Engine, use: Use) -> None:
    deferring = False
    head = use.module
    visiting, inner = head.forward, model.forward
    signature = inspect.signature(type(model).forward)

    # Not by hooks: PEFT's models call the forward of the model that they adapt.
    @functools.wraps(inner)
    def whole(*args: Any, **kwargs: Any) -> Any:
        nonlocal deferring
        deferring = signature.bind_partial(model, *args, **kwargs).arguments.get("labels") is not None
        try:
            return inner(*args, **kwargs)
        finally:
            deferring = False

    @functools.wraps(visiting)
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The loss makes gradients in forward, which those of kept parameters inside of the head must not be.
        if not deferring or args or kwargs or trained(list(head.modules()), engine.entries):
            return visiting(hidden, *args, **kwargs)  # type: ignore[no-any-return]
        vocabulary = int(head.weight.shape[0])  # type: ignore[index, union-attr, arg-type]
        return DeferredLogits.make(
            engine, use, hidden, torch.Size((*hidden.shape[:-1], vocabulary)), engine.compute_dtype
        )

    engine.replace_forward(head, forward)
    engine.replace_forward(model, whole)
    original = model.loss_function

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if isinstance(logits, DeferredLogits) and logits.changed is not None:
            logits = logits.changed
        if not isinstance(logits, DeferredLogits):
            return original(  # type: ignore[no-any-return, operator]
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return linear_cross_entropy(logits, shift_labels, ignore_index=ignore_index, num_items=num_items_in_batch)

    attributes = set(model.__dict__)
    model.loss_function = loss_function  # type: ignore[assignment]

    def restore() -> None:
        model.loss_function = original
        for name in set(model.__dict__) - attributes:  # transformers' property finds its function by the model's config
            if model.__dict__[name] is original:
                del model.__dict__[name]

    engine.detach.append(restore)
