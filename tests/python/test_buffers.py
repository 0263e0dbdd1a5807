"""Buffers that a block's forward changes: recomputation starts from what the forward found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import slidecore
import torch
from _models import Residual, Stack, clone, distance, feature_batches, train_offloaded, train_plain, weights, worst
from torch import nn

Offload = Callable[..., nn.Module]


class Counting(nn.Module):
    """Multiplies by a buffer that each forward in training changes, in place or by another tensor."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.inner = Residual(13, 29)
        self.replaces = replaces
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            if self.replaces:
                self.factor = self.factor * 1.25
            else:
                self.factor.mul_(1.25)
        return self.inner(x * self.factor.clone())


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(13, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"keep_graphs": 2}, {"device_memory": "1MiB"}])
@pytest.mark.parametrize("block", [Spectral, lambda: Counting(False), lambda: Counting(True)])
@pytest.mark.filterwarnings("ignore:.*not split into micro-batches")
def test_recomputation_starts_from_the_buffers_of_the_forward(
    offload: Offload, block: Callable[[], nn.Module], options: dict[str, object]
) -> None:
    plain = Stack(block=block).train()
    model, batches = offload(clone(plain), **options), feature_batches(5)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-6)
    assert worst(distance(weights(model), weights(plain)))[0] < 2e-6
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name


def test_two_forwards_before_a_backward(offload: Offload) -> None:
    plain, (a, b) = Stack(block=lambda: Counting(False)).train(), feature_batches(2)
    model = offload(clone(plain))
    for m, optimizer in ((plain, torch.optim.AdamW(plain.parameters())), (model, slidecore.AdamW(model.parameters()))):
        (m(a["x"]).square().mean() + m(b["x"]).square().mean()).backward()
        optimizer.step()
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-6
