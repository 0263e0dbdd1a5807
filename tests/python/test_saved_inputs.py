"""Inputs of blocks in host memory: what they hold, and how much of it there is."""

from __future__ import annotations

import random

import pytest
import slidecore
import torch
from slidecore.offloading import engine_of
from torch import nn


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


def _net(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, width), nn.Sequential(*(_Block(width) for _ in range(blocks))), nn.Linear(width, 3)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_of_varying_length_do_not_collect_buffers(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = random.Random(seed)
    blocks, width, longest = 6, 64, 40
    model = slidecore.offload(_net(width, blocks), device="cpu")
    optimizer = slidecore.AdamW(model.parameters())
    for _ in range(30):
        model(torch.randn(3, lengths.randint(9, longest), 5)).pow(2).mean().backward()
        optimizer.step()
    largest = 3 * longest * width * 4
    held = slidecore.stats(model).saved_inputs_bytes
    assert 0 < held <= blocks * (largest + max(4096, largest // 7))
    slidecore.close(model)


def test_what_went_to_the_host_comes_back_unchanged() -> None:
    torch.manual_seed(2)
    model = slidecore.offload(_net(33, 3), device="cpu")
    store = engine_of(model).saved_inputs
    tensors = [torch.randn(7, n, 33) for n in (31, 64, 5, 40)]
    copies = [t.clone() for t in tensors]
    saved = [store.save(t, 0, on_device=False, shared=False) for t in tensors]
    for item in saved[:2]:
        assert item.tensor is None, "only the last ones may still be on the device"
    for item, copy in zip(saved, copies, strict=True):
        item.prefetch()
        torch.testing.assert_close(item.get(), copy, rtol=0, atol=0)
        item.free()
    slidecore.close(model)
