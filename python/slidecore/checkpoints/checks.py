"""When a model can be saved or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slidecore.errors import UsageError

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.optimizer import AdamW


def check_usable(engine: Engine, optimizer: AdamW) -> None:
    """Raises UsageError unless the model trains and `optimizer` is its own."""
    if not engine.train:
        raise UsageError(
            "this model was offloaded with train=False and has no training state; save_pretrained or state_dict give "
            "its weights"
        )
    if engine.optimizer is None or engine.optimizer() is not optimizer:
        raise UsageError("the optimizer is not the slidecore.AdamW of this model (give the object itself, unwrapped)")


def check_at_rest(engine: Engine) -> None:
    """Raises UsageError inside a step: what a later backward or step() needs is in no plane.

    A forward whose graph nobody holds any more is no step.
    """
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
