"""The main job: a model directory and a data file in, a fine-tuned model directory out."""

from slidecore.finetune.options import Options

__all__ = ["Options"]
