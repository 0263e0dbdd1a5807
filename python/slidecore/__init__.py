"""slidecore: fine-tune every parameter of models far larger than GPU memory, on one GPU."""

from slidecore.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from slidecore.errors import BudgetError, CheckpointError, ModelError, SlidecoreError, UsageError
from slidecore.loading import load_pretrained
from slidecore.offloading import (
    Stats,
    assign_parameter,
    clip_grad_norm_,
    close,
    master_parameter,
    offload,
    set_budget,
    stats,
    synchronize,
)
from slidecore.optimizer import AdamW
from slidecore.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "BudgetError",
    "CheckpointError",
    "ModelError",
    "SlidecoreError",
    "Stats",
    "UsageError",
    "assign_parameter",
    "clip_grad_norm_",
    "close",
    "latest_checkpoint",
    "load_checkpoint",
    "load_pretrained",
    "master_parameter",
    "offload",
    "save_checkpoint",
    "set_budget",
    "stats",
    "synchronize",
    "trace",
]
