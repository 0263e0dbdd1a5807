"""What the model's parameters are while it is offloaded: views of the weight plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidecore.plane import entry_view
from slidecore.planes import Planes

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.partition import Chunk, Entry


def move_into_planes(planes: Planes, chunk: Chunk, adopt: Callable[[Entry], None]) -> None:
    """Moves a chunk's parameters into its weights, one at a time: their storage is freed as soon as it is copied.

    A parameter without storage (on "meta") is replaced in the modules that hold it; its value stays what the plane has.

    Args:
        planes: where to.
        chunk: whose parameters.
        adopt: called for every entry when its parameter is final.
    """
    with planes.borrowed_masters(chunk, fresh=True):
        for entry in chunk.entries:
            parameter = entry.parameter
            view = planes.weight.view(chunk, entry)
            if parameter.is_meta:
                replacement = nn.Parameter(view, requires_grad=parameter.requires_grad)
                for module, attribute in entry.owners:
                    module._parameters[attribute] = replacement
                entry.parameter = replacement
            else:
                planes.write(chunk, entry, parameter.data)
                parameter.data = view
                parameter.grad = None
            adopt(entry)


def visit_weights(model: nn.Module, engine: Engine, visit: Callable[[str, torch.Tensor], None]) -> None:
    """Calls `visit` with every parameter's name and value, to read until it returns.

    Of weights that are not in memory one chunk's at a time is. Pending updates write to them: `drain()` first.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for chunk in engine.chunks:
        with engine.planes.borrowed(chunk, ("weight",)) as parts:
            for entry in chunk.entries:
                visit(names[id(entry.parameter)], entry_view(parts["weight"], entry))
    for name, parameter in model.named_parameters():
        if id(parameter) not in engine.entries:
            visit(name, parameter.detach())
