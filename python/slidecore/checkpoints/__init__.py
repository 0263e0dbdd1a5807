"""Checkpoints that a run goes on from, bit by bit."""

from slidecore.checkpoints.directories import latest_checkpoint
from slidecore.checkpoints.loading import load_checkpoint
from slidecore.checkpoints.saving import save_checkpoint

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]
