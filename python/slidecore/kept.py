"""Kept parameters: ordinary parameters on the device that a visit's module holds among its offloaded ones.

They are inputs of the visit: autograd gives them their `.grad` as it does elsewhere, summed over micro-batches in
float32, and any optimizer may update them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


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
