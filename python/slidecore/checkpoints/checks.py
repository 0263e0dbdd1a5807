"""When a model can be saved or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from slidecore.errors import UsageError
from slidecore.optimizer import AdamW

if TYPE_CHECKING:
    from slidecore.engine import Engine


def check_usable(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Raises UsageError unless the model trains and `optimizer` is what updates it."""
    if not engine.train:
        raise UsageError(
            "this model was offloaded with train=False and has no training state; save_pretrained or state_dict give "
            "its weights"
        )
    own = engine.current_optimizer()
    if own is not None or isinstance(optimizer, AdamW) or any(c.trainable_numel for c in engine.chunks):
        if own is None or own is not optimizer:
            raise UsageError(
                "the optimizer is not the slidecore.AdamW of this model (give the object itself, unwrapped)"
            )
    elif not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer= is a {type(optimizer).__name__}, not a torch.optim.Optimizer")


def check_at_rest(model: nn.Module, engine: Engine) -> None:
    """Raises UsageError inside a step: what a later backward or step() needs is in no plane.

    A forward whose graph nobody holds any more is no step.
    """
    for name, parameter in model.named_parameters():
        if id(parameter) not in engine.entries and parameter.grad is not None and bool(parameter.grad.any()):
            raise UsageError(
                f"a checkpoint holds a model between steps: {name}, which is kept on the device, has a gradient; call "
                f"its optimizer's step() and zero_grad() first"
            )
    state = "waiting" if engine.deferred.waiting() else engine.state
    if state == "idle" or (state == "forward" and not engine._live):
        return
    why = {
        "waiting": "gradients wait for optimizer.step(); call it first (or optimizer.zero_grad(), to drop them)",
        "forward": "a forward with a graph waits for its backward; call backward() and optimizer.step() first, or drop "
        "its result (evaluate under torch.no_grad())",
        "backward": "a backward pass has not finished, so some chunks are updated and others are not; load an earlier "
        "checkpoint, or complete a step first",
        "updated": "backward() has run and optimizer.step() has not; call it first",
    }.get(state, "a step is under way; call optimizer.step() first")
    raise UsageError(f"a checkpoint holds a model between steps: {why}")
