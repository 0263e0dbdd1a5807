"""Roots: calls of modules that hold blocks, from outside of all others.

A root is where a forward begins and ends: the offloaded model itself, or a part of it that is called by itself (an
inner model, the encoder that generation runs once, a model inside a wrapper that adds adapters). There the engine
learns what comes next, and arguments are moved to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from slidecore.engine import Engine


def wrap(model: nn.Module, engine: Engine) -> None:
    """Makes every module of `model` that holds blocks, and has a forward, a root."""
    blocks = {id(use.module) for use in engine.uses if use.chunk.kind == "block"}
    unimplemented = nn.Module.forward
    for module in model.modules():
        holds = id(module) not in blocks and any(id(m) in blocks for m in module.modules())
        if holds and getattr(type(module), "forward", unimplemented) is not unimplemented:
            engine.replace_forward(module, _root(engine, module.forward))


def _root(engine: Engine, inner: Callable[..., Any]) -> Callable[..., Any]:
    device = engine.backend.torch_device

    def to_device(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if engine.in_root:
            return inner(*args, **kwargs)
        engine.begin_root_forward()
        engine.in_root = True
        try:
            if device.type != "cpu":
                args, kwargs = pytree.tree_map(to_device, args), pytree.tree_map(to_device, kwargs)
            output = inner(*args, **kwargs)
        except BaseException:
            engine.other_draws.forget_forward()
            raise
        finally:
            engine.in_root = False
        engine.end_root_forward()
        return output

    return forward
