"""Mixtures of experts, hybrids, encoder-decoders and vision models of transformers, against plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _architectures import KINDS, batches_for, reference, train
from _models import distance, weights, worst
from slidecore.offloading import engine_of
from torch import nn

STEPS = 20
Offload = Callable[..., nn.Module]


def run(offload: Offload, kind: str, **options: Any) -> tuple[nn.Module, list[float]]:
    model = offload(KINDS[kind].build(), **options)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return model, train(model, optimizer, batches_for(KINDS[kind].task, STEPS))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_pytorch(offload: Offload, kind: str, window: int) -> None:
    before = weights(KINDS[kind].build())
    model, losses = run(offload, kind, window=window)
    reference(kind, STEPS).check(model, losses, same_order=True)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_as_exact_as_pytorch(
    offload: Offload, kind: str, micro_batch: int, recwarn: pytest.WarningsRecorder
) -> None:
    model, losses = run(offload, kind, micro_batch=micro_batch)
    reference(kind, STEPS).check(model, losses, same_order=False)
    assert not [w for w in recwarn if "micro-batches" in str(w.message)]
    plans = engine_of(model).activations._plans.values()
    assert {plan.micro_batches for plan in plans} == {-(-4 // micro_batch)}


@pytest.mark.parametrize("kind", KINDS)
def test_where_activations_lie_does_not_change_the_result(offload: Offload, kind: str) -> None:
    model, losses = run(offload, kind, device_memory="1GiB")
    reference(kind, STEPS).check(model, losses, same_order=True)
    assert engine_of(model).activations._plan.kept_graphs > 0


@pytest.mark.parametrize("kind", ["mixtral", "gemma4", "t5"])
def test_clipped_sums_of_two_backwards(offload: Offload, kind: str) -> None:
    """Updates that wait for the step, of gradients that are added up and clipped by their norm."""
    plain = KINDS[kind].build()
    model = offload(copy.deepcopy(plain))
    mine = slidecore.AdamW(model.parameters(), lr=1e-3, eps=1e-5, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-5)
    batches = batches_for(KINDS[kind].task, 8)
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for m, optimizer in ((model, mine), (plain, theirs)):
            for batch in pair:
                m(**batch).loss.backward()
            if m is plain:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    slidecore.synchronize(model)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name
