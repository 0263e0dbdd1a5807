"""Modules that write to their inputs, which whoever called them goes on to use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import Batch, Residual, distance, feature_batches, train_offloaded, train_plain, weights, worst
from torch import nn

Offload = Callable[..., nn.Module]


class Doubling(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        return super().forward(x)


class Adding(Residual):
    """Adds what it returns to a tensor of the caller's."""

    def forward(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        total.add_(out)
        return out


class Model(nn.Module):
    """Uses what its blocks and its head have written to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        block = {"block": Doubling, "argument": Adding}.get(kind, Residual)
        self.enter = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(block(13, 29) for _ in range(3))
        self.leave = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(13, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        total = torch.zeros_like(h).detach()
        for block in self.blocks:
            h = h + block(h, total) if self.kind == "argument" else h + block(h)
        if self.kind == "view":
            h = h.view(-1, h.shape[-1])
        out = self.leave(h).view(*x.shape[:-1], 3)
        return out + 3 * (h + total)[..., :3] if self.kind != "view" else out


@pytest.mark.parametrize("kind", ["head", "block", "argument"])
def test_gradients_are_those_of_pytorch(offload: Offload, kind: str) -> None:
    plain = Model(kind)
    model = offload(copy.deepcopy(plain), keep_graphs=0 if kind == "head" else 3)
    batches: list[Batch] = feature_batches(3)
    options = {"lr": 3e-3, "eps": 1e-5}
    assert train_offloaded(model, batches, **options) == pytest.approx(train_plain(plain, batches, **options), rel=1e-5)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [("view", {}), ("block", {}), ("argument", {}), ("block", {"keep_graphs": 3, "micro_batch": 2})],
    ids=str,
)
def test_what_cannot_be_exact_is_refused(offload: Offload, kind: str, options: dict[str, Any]) -> None:
    model = offload(Model(kind), **options)
    slidecore.AdamW(model.parameters())
    batch = feature_batches(1)[0]
    with pytest.raises(RuntimeError, match="modified its input in place"):
        F.mse_loss(model(batch["x"]), batch["target"])
