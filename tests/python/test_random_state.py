"""Recomputation repeats the forward: same dropout masks, same autocast settings; random state is left as without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import (
    Batch,
    Stack,
    clone,
    consumed_gradients,
    distance,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    weights,
    worst,
)
from torch import nn

Offload = Callable[..., nn.Module]


class Noisy(nn.Module):
    """Dropout in edges and blocks, and noise from the generator itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = Stack(seed=seed, dropout=0.3, width=26)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.inner.enter(x))
        for block in self.inner.blocks:
            h = block(h) + 0.01 * torch.randn(())
        return self.inner.leave(self.dropout(self.inner.norm(h)))


def build(kind: str, seed: int = 0) -> nn.Module:
    return (Noisy(seed) if kind == "stack" else language_model(kind, seed=seed, dropout=0.2)).train()


def batches_of(kind: str, count: int) -> list[Batch]:
    return feature_batches(count) if kind == "stack" else token_batches(count)


def gradients_of(model: nn.Module, batch: Batch, seed: int) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients, and the generator's state afterwards."""
    optimizer = slidecore.AdamW(model.parameters(), betas=(0.0, 0.999), lr=0.0)
    torch.manual_seed(seed)
    loss = loss_of(model, batch)
    torch.rand(7)  # backward starts from another state than forward
    loss.backward()
    optimizer.step()
    return loss.item(), consumed_gradients(model), torch.get_rng_state()


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": 2, "window": 3}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "stack"])
def test_recomputation_equals_kept_graphs(offload: Offload, kind: str, options: dict[str, Any]) -> None:
    plain = build(kind)
    batch = batches_of(kind, 1)[0]
    results = {}
    for keep in (99, 0, 2):
        model = offload(clone(plain), keep_graphs=keep, **options)
        results[keep] = [gradients_of(model, batch, seed) for seed in (5, 6)]
        slidecore.close(model)
    # The seeds differ, so that the masks matter.
    assert results[99][0][0] != results[99][1][0]
    for keep in (0, 2):
        for mine, expected in zip(results[keep], results[99], strict=True):
            assert mine[0] == expected[0]
            for name, gradient in expected[1].items():
                assert torch.equal(mine[1][name], gradient), (keep, name)
            assert torch.equal(mine[2], expected[2])


@pytest.mark.parametrize("keep_graphs", [0, 2])
@pytest.mark.parametrize("kind", ["gpt2", "stack"])
def test_masks_are_those_of_pytorch(offload: Offload, kind: str, keep_graphs: int) -> None:
    """An unsplit batch draws in the order of plain PyTorch, step after step without seeding again."""
    plain = build(kind)
    model = offload(clone(plain), keep_graphs=keep_graphs)
    optimizers = slidecore.AdamW(model.parameters(), lr=1e-3), torch.optim.AdamW(plain.parameters(), lr=1e-3)
    runs = []
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        torch.manual_seed(11)
        losses = []
        for batch in batches_of(kind, 10):
            loss = loss_of(m, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, torch.get_rng_state()))
    slidecore.synchronize(model)
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    assert torch.equal(runs[0][1], runs[1][1])
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name


def test_probing_draws_nothing(offload: Offload) -> None:
    """With a budget, the size of a graph is found by running a block once more."""
    states = []
    for options in ({}, {"device_memory": "64MiB", "keep_graphs": 0}):
        model = offload(build("stack"), **options)
        torch.manual_seed(3)
        losses = [loss_of(model, batch).item() for batch in batches_of("stack", 2)]
        states.append((losses, torch.get_rng_state()))
        slidecore.close(model)
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])


def test_eval_draws_nothing(offload: Offload) -> None:
    model = offload(build("gpt2")).eval()
    batch = batches_of("gpt2", 1)[0]
    before = torch.get_rng_state()
    first = loss_of(model, batch).item()
    assert loss_of(model, batch).item() == first
    assert torch.equal(torch.get_rng_state(), before)


class Records(nn.Module):
    """Notes the dtype it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(13, 13)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.linear.weight, self.linear.bias)
        self.seen.append(out.dtype)
        return x + torch.tanh(out)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_settings_are_those_of_the_forward(offload: Offload, enabled: bool) -> None:
    results = []
    for keep in (99, 0):
        model = offload(Stack(block=Records), keep_graphs=keep)
        optimizer = slidecore.AdamW(model.parameters(), betas=(0.0, 0.999), lr=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(model, feature_batches(1)[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
            loss.backward()
        optimizer.step()
        seen = [dtype for block in model.blocks for dtype in block.seen]
        assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
        assert len(seen) == (5 if keep else 10)
        results.append((loss.item(), consumed_gradients(model)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name
