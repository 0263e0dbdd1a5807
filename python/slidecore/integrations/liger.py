"""Layers' kernels (RMSNorm, rotary embedding, SwiGLU) from Liger-Kernel, where it is installed and knows the model."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from slidecore.errors import UsageError
from slidecore.integrations.huggingface import pretrained_models

logger = logging.getLogger("slidecore")

Kernels = Literal["auto", "liger", "torch"]


def apply(model: nn.Module, kernels: Kernels, *, on_card: bool) -> Callable[[], None] | None:
    """Patches `model`'s layers with Liger-Kernel's; returns what undoes it, or None if nothing was done.

    The rotary embedding is a function of the model's own source module, so it changes for other models of that
    architecture in the process too, until undone. The loss is left alone: the head is slidecore's.

    Raises:
        UsageError: kernels="liger", but it is not installed, has no kernels for this model, or there is no card.
    """
    if kernels == "torch":
        return None
    model = next(iter(pretrained_models(model)), model)
    reason = _why_not(model, on_card)
    if reason is not None:
        if kernels == "liger":
            raise UsageError(f"kernels='liger': {reason}")
        if on_card:
            logger.info("layers run plain PyTorch: %s", reason)
        return None
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    source = sys.modules[type(model).__module__]
    before = {
        name: value for name, value in vars(source).items() if inspect.isfunction(value) or inspect.isclass(value)
    }
    forwards = {module: module.__dict__.get("forward") for module in model.modules()}
    function = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]  # type: ignore[union-attr]
    wanted: dict[str, Any] = {"cross_entropy": False, "fused_linear_cross_entropy": False, "model": model}
    known = inspect.signature(function).parameters
    function(**{name: value for name, value in wanted.items() if name in known})
    # Patching classes of the source module would only concern models that are built later.
    for name, value in before.items():
        if inspect.isclass(value):
            setattr(source, name, value)
    logger.info("layers run Liger-Kernel's kernels for %s", model.config.model_type)  # type: ignore[union-attr]

    def undo() -> None:
        for name, value in before.items():
            setattr(source, name, value)
        for module, forward in forwards.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward

    return undo


def _why_not(model: nn.Module, on_card: bool) -> str | None:
    if not on_card:
        return "Liger-Kernel's kernels need a card"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed; pip install 'slidecore[liger]' makes layers faster and smaller"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger-Kernel has no kernels for {kind or type(model).__name__}"
    return None
