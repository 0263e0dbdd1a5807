"""Optimizer state and waiting gradients that are not in memory are the same as if they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _deferred import everything, same_bits
from _models import Stack, feature_batches, loss_of, train_offloaded
from _shelf import CHOICES, Shelf, choices, chunk_bytes, partly_frozen, raw, settings, shelve
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


@choices
@settings
def test_optimizer_state(offload: Offload, choice: str, options: dict[str, Any]) -> None:
    models = [offload(partly_frozen(), **options) for _ in range(2)]
    optimizers = [slidecore.AdamW(model.parameters(), lr=1e-2) for model in models]
    batches = [{n: t.to(options["compute_dtype"]) for n, t in batch.items()} for batch in feature_batches(2)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_offloaded(model, batches, optimizer=lambda _, optimizer=optimizer: optimizer)
    shelf = shelve(models[0], CHOICES[choice])
    moved = {part for part in shelf.bytes if part[1] != "weight"}
    with shelf.watched():
        state = optimizers[0].state_dict()
    assert shelf.fetched == dict.fromkeys(moved, 1)
    assert not shelf.stored
    expected = optimizers[1].state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert list(state["state"]) == list(expected["state"])
    for index, tensors in expected["state"].items():
        assert same_bits(state["state"][index], tensors)

    torch.manual_seed(7)
    for tensors in expected["state"].values():
        for name, tensor in tensors.items():
            if name != "step":
                tensors[name] = torch.randint(0, 100, tensor.shape).to(tensor.dtype)
        tensors["step"] = torch.tensor(9.0)
    dropped = list(expected["state"])[2]
    del expected["state"][dropped]
    with shelf.watched():
        for optimizer in optimizers:
            optimizer.load_state_dict(expected)
    assert shelf.stored == dict.fromkeys(moved, 1)
    assert shelf.most_memory <= chunk_bytes(engine_of(models[0]).chunks, shelf.planes)
    assert same_bits(everything(models[0]), everything(models[1]))
    expected["state"][next(iter(expected["state"]))]["exp_avg"] = torch.zeros(3)
    with shelf.watched(), pytest.raises(ValueError, match="expected"):
        optimizers[0].load_state_dict(expected)
    assert not shelf.fetched


def test_a_second_optimizer_starts_from_nothing(offload: Offload) -> None:
    models = [offload(partly_frozen()) for _ in range(2)]
    for model in models:
        train_offloaded(model, feature_batches(2))
    shelf = shelve(models[0], CHOICES["some"])
    with shelf.watched():
        again = [slidecore.AdamW(model.parameters()) for model in models]
    assert len(again) == 2
    assert max(shelf.stored.values()) == 1
    assert same_bits(everything(models[0]), everything(models[1]))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_waiting_gradients(offload: Offload, compute_dtype: torch.dtype, passes: int) -> None:
    models = [offload(Stack(), compute_dtype=compute_dtype) for _ in range(2)]
    optimizers = [slidecore.AdamW(model.parameters(), lr=1e-2, update="deferred") for model in models]
    batches = [{n: t.to(compute_dtype) for n, t in batch.items()} for batch in feature_batches(3)]
    seen: list[list[torch.Tensor]] = [[], []]
    for model, optimizer, notes in zip(models, optimizers, seen, strict=True):
        engine = engine_of(model)
        if passes > 1:
            engine.deferred.announce_addition()
        for batch in batches[:passes]:
            loss_of(model, batch).backward()
        engine.drain()
        shelf = Shelf(engine.planes)
        if model is models[0]:
            for chunk in engine.chunks:
                shelf.take(chunk, "grad")
        before = {name: raw(kept).clone() for name, kept in shelf.bytes.items()}
        first, second, third, fourth, fifth = [p for p in model.parameters() if p.grad is not None][:5]
        notes += [first.grad.norm(), second.grad.clone(), third.grad.abs().sum()]
        shown = second.grad.view(-1)
        assert all(torch.equal(shelf.bytes[part], kept) for part, kept in before.items())  # only read so far
        shown[::2] = 0.25
        third.grad.mul_(3.0)
        fourth.grad.add_(0.5)
        fifth.grad.div_(2.0)
        notes += [p.grad.clone() for p in (first, second, third, fourth, fifth)]
        notes += [p.grad.norm() for p in (second, third, fourth, fifth)]
        notes.append(slidecore.clip_grad_norm_(model, 0.1))
        if model is models[0]:
            assert shelf.fetched
            for chunk in engine.chunks:
                engine.planes.bring(chunk, "grad")
        optimizer.step()
    for absent, present in zip(*seen, strict=True):
        assert torch.equal(absent, present)
    assert same_bits(everything(models[0]), everything(models[1]))


def test_going_over_to_sums(offload: Offload) -> None:
    """A second backward that nobody announced: the gradients so far become float32, wherever they lie."""
    models = [offload(Stack(), compute_dtype=torch.bfloat16) for _ in range(2)]
    optimizers = [slidecore.AdamW(model.parameters(), lr=1e-2, update="deferred") for model in models]
    batches = [{n: t.bfloat16() for n, t in batch.items()} for batch in feature_batches(2)]
    for model, optimizer in zip(models, optimizers, strict=True):
        engine = engine_of(model)
        loss_of(model, batches[0]).backward()
        engine.drain()
        shelf = Shelf(engine.planes)
        if model is models[0]:
            for chunk in engine.chunks:
                shelf.take(chunk, "grad")
        loss_of(model, batches[1]).backward()
        if model is models[0]:
            assert shelf.fetched == shelf.once()
        optimizer.step()
    assert same_bits(everything(models[0]), everything(models[1]))
