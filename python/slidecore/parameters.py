"""What the model's parameters are while it is offloaded: views of the weight plane, where that is in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from slidecore.absent_parameters import make_absent, make_present
from slidecore.errors import UsageError
from slidecore.plane import entry_view
from slidecore.planes import Planes

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.partition import Chunk, Entry


def point_parameters(planes: Planes, chunk: Chunk) -> None:
    """Makes the chunk's parameters views of its weights where these are now; see `AbsentParameter` for nowhere."""
    for entry in chunk.entries:
        _point(planes, chunk, entry)


def _point(planes: Planes, chunk: Chunk, entry: Entry) -> None:
    if planes.weight.present(chunk):
        make_present(entry.parameter, planes.weight.view(chunk, entry))
    else:
        make_absent(entry.parameter, entry.name, entry.shape, planes.weight.dtype)


def check_pointing(planes: Planes, chunk: Chunk) -> None:
    """Raises UsageError where `.data` of a parameter was replaced: what is in it then would not be computed with."""
    if not planes.weight.present(chunk):
        return
    begin, item = planes.weight.address(chunk), planes.weight.itemsize
    for entry in chunk.entries:
        if entry.numel and entry.parameter.data_ptr() != begin + entry.offset * item:
            raise UsageError(
                f"{entry.name}.data was replaced after offload() (assigned, or by .to() of a part of the model), but "
                f"an offloaded model computes with the planes that offload() made. Set its value with "
                f"slidecore.assign_parameter(model, {entry.name!r}, value)"
            )


def move_into_planes(planes: Planes, chunk: Chunk, adopt: Callable[[Entry], None]) -> None:
    """Moves a chunk's parameters into its weights, one at a time: their storage is freed as soon as it is copied.

    A parameter without storage (on "meta") is replaced in the modules that hold it; its value stays what the plane has.

    Args:
        planes: where to.
        chunk: whose parameters.
        adopt: called for every entry when its parameter is final.
    """
    empty = all(entry.parameter.is_meta for entry in chunk.entries)
    with nullcontext() if empty else planes.borrowed_masters(chunk, fresh=True):
        for entry in chunk.entries:
            parameter = entry.parameter
            if parameter.is_meta:
                memory = torch.empty(0, dtype=planes.weight.dtype)
                entry.parameter = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                for module, attribute in entry.owners:
                    module._parameters[attribute] = entry.parameter
            else:
                planes.write(chunk, entry, parameter.data)
                parameter.grad = None
            _point(planes, chunk, entry)
            adopt(entry)


def bring_back_weights(engine: Engine) -> None:
    """Makes all weights present, and the parameters views of them.

    Raises:
        Error: there is not enough memory, or a lane has failed.
    """
    absent = [chunk for chunk in engine.chunks if not engine.planes.weight.present(chunk)]
    if absent:
        engine.drain()
    for chunk in absent:
        engine.planes.bring(chunk, "weight")
        point_parameters(engine.planes, chunk)


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
