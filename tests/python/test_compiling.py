"""torch.compile of offloaded models, whole or in part: what is computed is the same, and nothing breaks on the way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import Stack, clone, distance, feature_batches, language_model, token_batches, train_plain, weights, worst
from torch import nn

Offload = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Exceptions that Python could only report: half-made records that the compiler's tracing had left."""
    found: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: found.append(args.exc_value))
    yield found
    gc.collect()
    assert not found
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["model", "around", "blocks"])
def test_training(offload: Offload, part: str) -> None:
    plain = Stack().train()
    model, batches = offload(clone(plain)), feature_batches(3)
    called: Callable[[torch.Tensor], torch.Tensor] = model
    if part == "model":
        called = torch.compile(model, backend="eager")
    elif part == "around":
        called = torch.compile(lambda x: model(x * 1.0) + 0.0, backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager")
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        loss = F.mse_loss(called(batch["x"]), batch["target"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    slidecore.synchronize(model)
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-6)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_language_model(offload: Offload) -> None:
    plain = language_model("llama").train()
    model, batch = offload(clone(plain)), token_batches(1)[0]
    compiled = torch.compile(model, backend="eager")
    optimizer = slidecore.AdamW(model.parameters())
    loss = compiled(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    assert loss.item() == pytest.approx(train_plain(plain, [batch])[0], abs=1e-5)
    with torch.no_grad():
        assert torch.isfinite(compiled(**batch).logits.float()).all()
