"""Whether the GPU kernels of `slidecore.triton` run for a tensor. That package is imported only after a yes."""

from __future__ import annotations

import importlib.util

import torch

INSTALLED = importlib.util.find_spec("triton") is not None


def run_for(tensor: torch.Tensor) -> bool:
    """On a card, where Triton is installed; PyTorch's own operations do the work elsewhere."""
    return INSTALLED and tensor.is_cuda
