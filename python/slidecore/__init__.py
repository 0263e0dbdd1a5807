"""slidecore: fine-tune every parameter of models far larger than GPU memory, on one GPU."""

from slidecore.errors import BudgetError, ModelError, SlidecoreError, UsageError
from slidecore.loading import load_pretrained
from slidecore.offloading import (
    Stats,
    assign_parameter,
    clip_grad_norm_,
    close,
    master_parameter,
    offload,
    stats,
    synchronize,
)
from slidecore.optimizer import AdamW
from slidecore.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "BudgetError",
    "ModelError",
    "SlidecoreError",
    "Stats",
    "UsageError",
    "assign_parameter",
    "clip_grad_norm_",
    "close",
    "load_pretrained",
    "master_parameter",
    "offload",
    "stats",
    "synchronize",
    "trace",
]
