"""Training on a card against plain PyTorch on the same card; what the host backend's tests cannot show."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import (
    Batch,
    Stack,
    clone,
    distance,
    feature_batches,
    language_model,
    token_batches,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from _runs import Run, differences
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these tests are about a card, and there is none"),
]

CARD = "cuda"
STEPS = 20
Offload = Callable[..., nn.Module]


@pytest.fixture
def offload() -> Iterator[Offload]:
    """`slidecore.offload` to the card, with PyTorch's own kernels for the layers."""
    models: list[nn.Module] = []

    def offload_to_card(model: nn.Module, **options: Any) -> nn.Module:
        models.append(slidecore.offload(model, **{"device": CARD, "kernels": "torch", **options}))
        return model

    yield offload_to_card
    for model in models:
        if "_slidecore_engine" in model.__dict__:
            slidecore.close(model)


def build(kind: str, tied: bool = False) -> nn.Module:
    return (Stack() if kind == "stack" else language_model(kind, tied=tied)).train()


def batches_of(kind: str, count: int = STEPS) -> list[Batch]:
    batches = feature_batches(count) if kind == "stack" else token_batches(count)
    return [{name: tensor.to(CARD) for name, tensor in batch.items()} for batch in batches]


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"micro_batch": 1}, {"keep_graphs": 2}], ids=str)
@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("gpt2", True), ("stack", False)]
)
def test_training_equals_pytorch(offload: Offload, kind: str, tied: bool, options: dict[str, Any]) -> None:
    plain = build(kind, tied).to(CARD)
    expected = train_plain(plain, batches_of(kind))
    model = offload(build(kind, tied), compute_dtype=torch.float32, **options)
    assert train_offloaded(model, batches_of(kind)) == pytest.approx(expected, abs=1e-4)
    # Products of other shapes are summed in another order, which Adam amplifies where a gradient is near zero.
    value, name = worst(distance(weights(model), {n: w.cpu() for n, w in weights(plain).items()}))
    assert value < 1e-4, name


def test_clipping_and_accumulation_equal_pytorch(offload: Offload) -> None:
    plain = build("llama").to(CARD)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    model = offload(build("llama"), compute_dtype=torch.float32)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3, update="deferred")
    norms = []
    batches = batches_of("llama", 12)
    for step in range(4):
        for batch in batches[3 * step : 3 * step + 3]:
            (plain(**batch).loss / 3).backward()
        for batch in batches[3 * step : 3 * step + 2]:
            with model.no_sync():  # type: ignore[operator]
                (model(**batch).loss / 3).backward()
        (model(**batches[3 * step + 2]).loss / 3).backward()
        theirs = nn.utils.clip_grad_norm_(plain.parameters(), 0.9).item()
        norms.append(theirs)
        assert slidecore.clip_grad_norm_(model, 0.9).item() == pytest.approx(theirs, rel=1e-5)
        for each in (plain_optimizer, optimizer):
            each.step()
            each.zero_grad()
    assert max(norms) > 0.9
    slidecore.synchronize(model)
    value, name = worst(distance(weights(model), {n: w.cpu() for n, w in weights(plain).items()}))
    assert value < 1e-4, name


@pytest.mark.parametrize("room", [1.0, 1.5])
def test_the_allocator_stays_below_the_budget(offload: Offload, room: float) -> None:
    def model_of_blocks() -> nn.Module:
        return Stack(width=1024, inner=4096, depth=12, features=64, outputs=64).train()

    batches = [
        {name: tensor.to(CARD, torch.bfloat16) for name, tensor in batch.items()}
        for batch in feature_batches(3, shape=(16, 64), features=64, outputs=64)
    ]

    def train_within(budget: int, batches: list[Batch]) -> tuple[nn.Module, list[float]]:
        model = offload(model_of_blocks(), device_memory=budget, compute_dtype=torch.bfloat16)
        return model, train_offloaded(model, batches)

    budget = 1
    for _ in range(2):  # first the error of offload(), then that of the batch
        with pytest.raises(slidecore.BudgetError) as refused:
            train_within(budget, batches[:1])
        found = re.search(r"at least (\d+) bytes", str(refused.value))
        assert found, str(refused.value)
        budget = int(found[1])
    budget = int(budget * room)
    gc.collect()  # the models that were refused
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model, losses = train_within(budget, batches)
    assert all(map(math.isfinite, losses))
    assert torch.cuda.max_memory_allocated() - before <= budget
    assert slidecore.stats(model).planes_bytes > 2 * budget


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_the_disk_tier_changes_no_bit(
    offload: Offload, tmp_path: Path, compute_dtype: torch.dtype, moments: str
) -> None:
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "moments": moments, "piece_bytes": 4096}
    options |= {"ring_pieces": 8, "micro_batch": 2}
    batches = batches_of("stack", 6)
    plain = Run(build("stack"), offload, **options)
    expected = plain.train(batches)
    with pytest.raises(slidecore.BudgetError) as refused:
        offload(build("stack"), host_memory=1, disk=tmp_path, **options)
    found = re.search(r"at least (\d+) bytes", str(refused.value))
    assert found, str(refused.value)
    run = Run(build("stack"), offload, host_memory=int(found[1]), disk=tmp_path, **options)
    assert slidecore.stats(run.model).disk_memory > 0
    losses = run.train(batches[:3])
    slidecore.set_budget(run.model, host_memory="1GiB")
    losses += run.train(batches[3:])
    assert losses == expected
    assert not differences(run.state(), plain.state())


def test_checkpoints_go_on_where_they_were(offload: Offload, tmp_path: Path) -> None:
    batches = batches_of("stack", 6)
    plain = Run(build("stack"), offload, compute_dtype=torch.bfloat16)
    expected = plain.train(batches)
    first = Run(build("stack"), offload, compute_dtype=torch.bfloat16)
    first.train(batches[:3])
    first.save(tmp_path / "checkpoint")
    second = Run(clone(build("stack")), offload, compute_dtype=torch.bfloat16)
    second.load(tmp_path / "checkpoint")
    assert second.train(batches[3:]) == expected[3:]
    assert not differences(second.state(), plain.state())
