"""Fixtures of all Python tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import slidecore
import torch
from torch import nn

# Without a card kernels run in Triton's interpreter, which is chosen when triton is first imported, by whichever test.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _torch_defaults() -> Iterator[None]:
    # Operations on tiny tensors: a second OpenMP thread would only spin, on a core that the lanes need.
    torch.set_num_threads(1)
    torch.manual_seed(20)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def offload() -> Iterator[Callable[..., Any]]:
    """`slidecore.offload` to the host backend; what the test did not close is closed after it."""
    models: list[nn.Module] = []

    def offload_to_host(model: nn.Module, **options: Any) -> nn.Module:
        slidecore.offload(model, **{"device": "cpu", **options})
        models.append(model)
        return model

    yield offload_to_host
    for model in models:
        if "_slidecore_engine" in model.__dict__:
            slidecore.close(model)
