"""Kept parameters: those that stay ordinary parameters on the device, beside a model whose others are offloaded.

A module that is called in a visit may hold kept parameters among its offloaded ones (adapters inside of a block). They
are inputs of the visit: autograd gives them their `.grad` as it does elsewhere, summed over micro-batches in float32,
and any optimizer may update them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slidecore.errors import ModelError

logger = logging.getLogger("slidecore")

# Names (of parameters, or of modules for all of theirs), modules, parameters; or a choice by name and parameter.
Keep = Sequence[str | nn.Module | nn.Parameter] | Callable[[str, nn.Parameter], bool]


def choose(model: nn.Module, keep: Keep | None) -> dict[int, tuple[str, nn.Parameter]]:
    """The parameters of `model` that `keep` names, by id; None names the adapters of a PEFT model.

    Raises:
        ModelError: a name, module or parameter is not the model's; or a kept parameter has no values ("meta").
    """
    named = list(model.named_parameters())
    if keep is None:
        chosen = _adapters(model)
    elif callable(keep) and not isinstance(keep, nn.Module):
        chosen = {id(p) for name, p in named if keep(name, p)}
    else:
        chosen = {id(p) for item in _listed(keep) for p in _found(model, item)}
    kept = {id(p): (name, p) for name, p in named if id(p) in chosen}
    for name, parameter in kept.values():
        if parameter.is_meta:
            raise ModelError(f"keep: parameter {name!r} is on the meta device; give it values before offload()")
    if kept and keep is None:
        logger.info("%d parameters of adapters are kept on the device, for an optimizer of torch.optim", len(kept))
    return kept


def _listed(keep: object) -> Sequence[str | nn.Module | nn.Parameter]:
    if isinstance(keep, (str, nn.Module, torch.Tensor)) or not isinstance(keep, Collection):
        raise ModelError(
            "keep must be a list of names, modules or parameters, or a function of (name, parameter) that says whether "
            "to keep it"
        )
    return list(keep)


def _found(model: nn.Module, item: str | nn.Module | nn.Parameter) -> list[nn.Parameter]:
    if isinstance(item, str):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if item in parameters:
            return [parameters[item]]
        try:
            found = list(model.get_submodule(item).parameters())
        except AttributeError as error:
            raise ModelError(f"keep: the model has no parameter and no module named {item!r}") from error
        if not found:
            raise ModelError(f"keep: {item!r} has no parameters")
        return found
    inside = any(item is m for m in model.modules()) if isinstance(item, nn.Module) else True
    parameters_of = list(item.parameters()) if isinstance(item, nn.Module) else [item]
    own = {id(p) for p in model.parameters()}
    if not inside or any(id(p) not in own for p in parameters_of):
        raise ModelError(f"keep: a {type(item).__name__} given there is not of this model")
    return parameters_of


def _adapters(model: nn.Module) -> set[int]:
    """Parameters that PEFT has added to `model` or set to be trained; none if it is not a PEFT model."""
    peft = sys.modules.get("peft")
    layers = [m for m in model.modules() if isinstance(getattr(m, "adapter_layer_names", None), tuple)]
    if peft is None or not (layers or isinstance(model, peft.PeftModel)):
        return set()
    # Adapters that are not active are frozen, until they are chosen.
    chosen = {id(p) for p in model.parameters() if p.requires_grad}
    for layer in layers:
        for name in layer.adapter_layer_names:  # type: ignore[union-attr]
            part = getattr(layer, name, None)
            if isinstance(part, nn.Module):
                chosen |= {id(p) for p in part.parameters()}
            elif isinstance(part, nn.Parameter):
                chosen.add(id(part))
    return chosen


@dataclass(eq=False)
class KeptParameter:
    """A kept parameter that a visit differentiates, and all places of the visit's module that hold it."""

    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]


def trained(modules: Sequence[nn.Module], offloaded: Collection[int]) -> list[KeptParameter]:
    """The kept parameters of `modules` that want a gradient now.

    Args:
        modules: of one visit.
        offloaded: ids of offloaded parameters; whatever else the modules hold is kept, added after offload() or not.
    """
    found: dict[int, KeptParameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in offloaded:
                found.setdefault(id(parameter), KeptParameter(parameter, [])).owners.append((module, name))
    return list(found.values())


@contextlib.contextmanager
def replaced(kept: Sequence[KeptParameter], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Puts `tensors` where modules hold the kept parameters, and the parameters back afterwards."""
    for each, tensor in zip(kept, tensors, strict=True):
        for module, name in each.owners:
            module._parameters[name] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for each in kept:
            for module, name in each.owners:
                module._parameters[name] = each.parameter


def detached(kept: Sequence[KeptParameter]) -> contextlib.AbstractContextManager[None]:
    """Runs inside give the kept parameters no gradient."""
    return replaced(kept, [each.parameter.detach() for each in kept])


def kept_bytes(kept: Collection[tuple[str, nn.Parameter]]) -> tuple[int, int]:
    """Device bytes of the values, and of what training them adds: gradients and two moments, in their dtypes."""
    values = sum(p.numel() * p.element_size() for _, p in kept)
    return values, 3 * sum(p.numel() * p.element_size() for _, p in kept if p.requires_grad)
