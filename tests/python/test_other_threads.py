"""A model in several threads: at once, which is an error, and one after the other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import slidecore
import torch
from _models import Residual, Stack, distance, feature_batches, loss_of, train_offloaded, train_plain, weights, worst
from torch import nn

Offload = Callable[..., nn.Module]


class Halting(Residual):
    """Waits in its forward, where it is told to."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.gate: tuple[threading.Event, threading.Event] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            arrived, opened = self.gate
            arrived.set()
            assert opened.wait(60)
        return super().forward(x)


@pytest.mark.parametrize("inference", [False, True])
def test_forwards_at_once_are_an_error(offload: Offload, inference: bool) -> None:
    plain = Stack(block=Halting)
    model = offload(copy.deepcopy(plain))
    batches = feature_batches(3)
    gate = threading.Event(), threading.Event()
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    blocks[2].gate = gate  # type: ignore[assignment]
    losses: list[float] = []

    def measure() -> None:
        with torch.no_grad():
            losses.append(loss_of(model, batches[0]).item())

    other = threading.Thread(target=measure if inference else lambda: losses.append(loss_of(model, batches[0]).item()))
    other.start()
    try:
        assert gate[0].wait(60)
        with pytest.raises(slidecore.UsageError, match="another thread is computing"):
            loss_of(model, batches[1])
        with torch.no_grad(), pytest.raises(slidecore.UsageError, match="another thread is computing"):
            loss_of(model, batches[1])
    finally:
        gate[1].set()
        other.join()
    blocks[2].gate = None  # type: ignore[assignment]
    assert losses == pytest.approx([loss_of(plain, batches[0]).item()], abs=1e-6)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_threads_may_take_turns(offload: Offload) -> None:
    plain = Stack()
    model = offload(copy.deepcopy(plain))
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    batches = feature_batches(4)
    for batch in batches:
        thread = threading.Thread(target=step, args=(batch,))
        thread.start()
        thread.join()
    slidecore.synchronize(model)
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
