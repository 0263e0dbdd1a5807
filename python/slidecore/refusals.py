"""What parameters must not be, or become, while they are offloaded: each found by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from slidecore.errors import ModelError, UsageError
from slidecore.partition import Entry

_NO_HOOKS = (
    "has a hook for its gradient (register_hook, register_post_accumulate_grad_hook), which would never run: visits "
    "differentiate copies of offloaded parameters. Remove the hook, and change the gradient in place between backward "
    "and optimizer.step(), with slidecore.AdamW(..., update='deferred') (`p.grad.mul_(mask)`, say); or keep the "
    "parameter on the device, for an optimizer of torch.optim: slidecore.offload(model, keep=[{name!r}])"
)


def check_model(model: nn.Module, kept: Collection[int], train: bool) -> None:
    """Before offload: raises ModelError for what training could not honour.

    Args:
        model: not changed.
        kept: ids of parameters that stay ordinary ones.
        train: whether gradients are wanted at all.
    """
    if not train:
        return
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept and parameter.requires_grad and _hooks(parameter):
            raise ModelError(f"parameter {name!r} {_NO_HOOKS.format(name=name)}")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if sparse and weight is not None and weight.requires_grad and id(weight) not in kept:
            raise ModelError(
                f"{name or 'the model'} is an {type(module).__name__}(sparse=True), but gradients of offloaded "
                f"parameters are dense. Set its `sparse` to False, or keep its weight on the device: "
                f"keep=[{f'{name}.weight'.lstrip('.')!r}]"
            )


def check_initialized(model: nn.Module) -> None:
    """Raises ModelError for a parameter or buffer of a lazy module that has no shape yet."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"{name!r} is not initialized, as its module is lazy: call the model once with a batch (under "
                f"torch.no_grad()) before offload()"
            )


def check_held(entries: Iterable[Entry]) -> None:
    """Raises UsageError where a module no longer holds its parameter: visits would put the old one back, unnoticed."""
    entries = list(entries)
    for entry in entries:
        for module, attribute in entry.owners:
            held = module._parameters.get(attribute)
            if held is entry.parameter:
                continue
            other = next((e.name for e in entries if e.parameter is held), None)
            if other is not None:
                raise UsageError(
                    f"{entry.name} was tied to {other} after offload(), but an offloaded model computes with the "
                    f"planes that offload() made. Call slidecore.close(model), tie them, and offload the model again"
                )
            raise UsageError(
                f"{entry.name} (attribute {attribute!r} of a {type(module).__name__}) was replaced, or removed, after "
                f"offload(), but an offloaded model computes with the planes that offload() made. Set its value with "
                f"slidecore.assign_parameter(model, {entry.name!r}, value), or change the model before offload() "
                f"(slidecore.close(model) undoes it)"
            )


def check_trainable(entries: Iterable[Entry]) -> None:
    """Raises UsageError where `requires_grad` was changed, or a hook was added, since offload()."""
    # Parameters that are not in memory answer through their class, at a price that a loop over thousands would notice.
    with torch._C.DisableTorchFunctionSubclass():
        for entry in entries:
            if entry.trainable != entry.parameter.requires_grad:
                raise UsageError(
                    f"{entry.name}.requires_grad was changed to {entry.parameter.requires_grad} after offload(); set "
                    f"it before, so that there are the planes it needs"
                )
            # One is slidecore's own, which reports gradients that would be lost.
            if entry.trainable and _hooks(entry.parameter) != 1:
                raise UsageError(f"{entry.name} {_NO_HOOKS.format(name=entry.name)}")


def _hooks(parameter: torch.Tensor) -> int:
    return len(parameter._backward_hooks or ()) + len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
