"""Models whose blocks lie in unusual places."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from _models import Residual, Stack, distance, feature_batches, train_offloaded, train_plain, weights, worst
from slidecore.engine import Engine
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


class Grid(nn.Module):
    """Blocks in lists of lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(7, 13)
        self.stages = nn.ModuleList(nn.ModuleList(Residual(13, 29) for _ in range(2)) for _ in range(3))
        self.leave = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for stage in self.stages:
            for block in stage:
                h = block(h)
        return self.leave(h)


class Named(nn.ModuleDict):
    """A container that is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self["second"](self["first"](x))


class NamedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(7, 13)
        self.stages = nn.ModuleList(Named({"first": Residual(13, 29), "second": Residual(13, 17)}) for _ in range(3))
        self.leave = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for stage in self.stages:
            h = stage(h)
        return self.leave(h)


class TwoWays(nn.Module):
    """A trunk that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        trunk = Stack()
        self.a, self.b = nn.ModuleDict({"trunk": trunk}), nn.ModuleDict({"trunk": trunk})
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a["trunk"](x) * self.scale + 0.1 * self.b["trunk"](-x)


@pytest.mark.parametrize(("build", "blocks"), [(Grid, 6), (NamedModel, 3), (TwoWays, 5)])
def test_unusual_structures_train_like_pytorch(offload: Offload, build: Callable[[], nn.Module], blocks: int) -> None:
    plain = build()
    model = offload(copy.deepcopy(plain))
    engine: Engine = engine_of(model)
    names = [chunk.name for chunk in engine.chunks]
    assert len(names) == len(set(names))
    assert [chunk.kind for chunk in engine.chunks].count("block") == blocks
    batches = feature_batches(3)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
