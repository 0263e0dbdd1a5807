"""Deferred updates against plain PyTorch over twenty steps: clipping, accumulation, bfloat16."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import slidecore
import torch
from _deferred import Offload, assert_alike, narrow, sides
from _models import (
    Batch,
    Stack,
    clone,
    distance,
    feature_batches,
    freeze_half,
    language_model,
    loss_of,
    samples,
    spread,
    token_batches,
    weights,
    worst,
)
from torch import nn

STEPS = 20
Order = tuple[tuple[int, ...], ...]


# --- twenty steps against PyTorch


def build(kind: str, frozen: bool) -> nn.Module:
    if kind == "stack":
        model: nn.Module = Stack()
    else:
        model = language_model(kind.removesuffix(" tied"), tied=kind.endswith("tied"))
    if frozen:
        freeze_half(model)
    return model.train()


@functools.cache
def batches_of(kind: str, passes: int) -> list[Batch]:
    return feature_batches(STEPS * passes, shape=(3, 11)) if kind == "stack" else token_batches(STEPS * passes)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """No decay on vectors, and another learning rate for half of the matrices."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return [
        {"params": matrices[::2], "weight_decay": 0.1},
        {"params": matrices[1::2], "lr": 3e-3},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


@functools.cache
def reference(
    kind: str, frozen: bool, passes: int, max_norm: float = math.inf, order: Order | None = None, divide: str = "loss"
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, losses and norms of plain training. A gradient is summed over the groups of samples in `order`; `divide`
    says whether the loss is divided by the number of passes, or its gradient.
    """
    model = build(kind, frozen)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    losses, norms = [], []
    for step in range(STEPS):
        for batch in batches_of(kind, passes)[step * passes : (step + 1) * passes]:
            parts = [batch] if order is None else [samples(batch, group) for group in order]
            total = 0.0
            for part, share in zip(parts, [len(g) / 3 for g in order] if order else [1.0], strict=True):
                loss = loss_of(model, part) * share
                (loss / passes if divide == "loss" else loss).backward()
                total += loss.item() / passes
            losses.append(total)
        if divide != "loss":
            for parameter in filter(lambda p: p.grad is not None, model.parameters()):
                parameter.grad /= passes
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), losses, norms


@functools.cache
def middling_norm(kind: str, frozen: bool, passes: int) -> float:
    """Clips about half of the steps."""
    norms = sorted(reference(kind, frozen, passes)[2])
    return norms[STEPS // 2]


def train_deferred(
    model: nn.Module, kind: str, passes: int, max_norm: float, way: str
) -> tuple[list[float], list[float]]:
    optimizer = slidecore.AdamW(
        groups(model), lr=1e-3, **({"max_grad_norm": max_norm} if way == "option" else {"update": "deferred"})
    )
    losses, norms = [], []
    for step in range(STEPS):
        chosen = batches_of(kind, passes)[step * passes : (step + 1) * passes]
        for batch in chosen[:-1]:
            with model.no_sync():
                loss = loss_of(model, batch) / passes
                loss.backward()
            losses.append(loss.item())
        loss = loss_of(model, chosen[-1]) / passes
        loss.backward()
        losses.append(loss.item())
        if way == "slidecore":
            norms.append(slidecore.clip_grad_norm_(model, max_norm).item())
        elif way == "torch":
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        if way == "option":
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm.item())
        optimizer.zero_grad()
    slidecore.synchronize(model)
    return losses, norms


KINDS = ["llama", "llama tied", "gpt2 tied", "stack"]
OPTIONS: list[dict[str, Any]] = [{"window": 3}, {"keep_graphs": 2}, {"window": 1, "piece_bytes": 4096}]
COMBINATIONS = [
    # kind, frozen, passes, options, how the norm is clipped
    *((kind, False, passes, {}, way) for kind in KINDS for passes, way in ((1, "option"), (3, "slidecore"))),
    *(("llama tied", passes == 1, passes, options, "torch") for passes in (1, 3) for options in OPTIONS),
    *(("stack", True, passes, {}, way) for passes in (1, 3) for way in ("option", "slidecore", "torch")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "frozen", "passes", "options", "way"), COMBINATIONS, ids=str)
def test_training_equals_pytorch(
    offload: Offload, kind: str, frozen: bool, passes: int, options: dict[str, Any], way: str
) -> None:
    max_norm = middling_norm(kind, frozen, passes)
    expected, expected_losses, expected_norms = reference(kind, frozen, passes, max_norm)
    assert min(expected_norms) < max_norm < max(expected_norms)
    model = offload(build(kind, frozen), **options)
    losses, norms = train_deferred(model, kind, passes, max_norm, way)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    allowed = 1e-5
    if passes > 1:
        # Where the division comes, before or after the gradient's products, is rounding; the head's loss divides after.
        allowed = max(allowed, 4 * spread([expected, reference(kind, frozen, passes, max_norm, divide="gradient")[0]]))
    value, name = worst(distance(weights(model), expected))
    assert value < allowed, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 2, "keep_graphs": 1}], ids=str)
@pytest.mark.parametrize(("kind", "passes"), [("llama tied", 3), ("stack", 1)])
def test_micro_batches_stay_within_the_spread_of_summation_orders(
    offload: Offload, kind: str, passes: int, options: dict[str, Any]
) -> None:
    max_norm = middling_norm(kind, False, passes)
    expected, expected_losses, _ = reference(kind, False, passes, max_norm)
    orders: list[Order] = [((0,), (1,), (2,)), ((2,), (1,), (0,)), ((0, 1), (2,)), ((2,), (0, 1))]
    runs = [reference(kind, False, passes, max_norm, order)[0] for order in orders]
    model = offload(build(kind, False), **options)
    losses, _ = train_deferred(model, kind, passes, max_norm, "option")
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    value, name = worst(distance(weights(model), expected))
    assert value <= 4 * spread([expected, *runs]) + 1e-7, name


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 3}], ids=str)
def test_dropout(offload: Offload, options: dict[str, Any]) -> None:
    mine, theirs = sides(offload, Stack(dropout=0.3).train(), Max_grad_norm=0.2, **options)
    for step in range(STEPS):
        for side in (mine, theirs):
            torch.manual_seed(step)
            for batch in feature_batches(2, seed=step)[:-1]:
                with side.no_sync():
                    side.backward(batch)
            side.backward(feature_batches(2, seed=step)[-1])
            if side is theirs:
                torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.2)
            side.step()
    assert_alike(mine, theirs)


# --- bfloat16


def gradients_by_hand(model: nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
    """float32 sums of bfloat16 gradients, one backward after the other."""
    computing = clone(model)
    for parameter in computing.parameters():
        parameter.data = parameter.data.bfloat16()
    sums: list[torch.Tensor] = [torch.zeros(p.shape) for p in computing.parameters()]
    for batch in batches:
        loss_of(computing, batch).backward()
        for total, parameter in zip(sums, computing.parameters(), strict=True):
            total += parameter.grad.float()
            parameter.grad = None
    return sums


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2 tied", "stack"])
def test_a_bfloat16_step_is_exact(offload: Offload, kind: str, passes: int) -> None:
    """bf16 gradients, their sum, the clipping and the update in float32: one rounding in all, on the way down."""
    plain = build(kind, False)
    for parameter in plain.parameters():  # no ties, which the planes round up and PyTorch to even
        parameter.data = parameter.data.bfloat16().float()
    batches = [narrow(batch) for batch in batches_of(kind, passes)[:passes]]
    model = offload(clone(plain), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2, update="deferred")
    for batch in batches[:-1]:
        with model.no_sync():
            loss_of(model, batch).backward()
    loss_of(model, batches[-1]).backward()
    masters = [p.detach().clone().requires_grad_() for p in plain.parameters()]
    for master, gradient in zip(masters, gradients_by_hand(plain, batches), strict=True):
        master.grad = gradient
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(parameter.grad.float(), master.grad)
    norm = torch.nn.utils.clip_grad_norm_(masters, 0.01)
    assert slidecore.clip_grad_norm_(model, 0.01).item() == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.01
    optimizer.step()
    torch.optim.AdamW(masters, lr=1e-2).step()
    for (name, _), master in zip(model.named_parameters(), masters, strict=True):
        # The factors differ by the order in which squares were added up.
        assert torch.allclose(slidecore.master_parameter(model, name), master, rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_sums_are_exact_to_float32_rounding(offload: Offload, compute_dtype: torch.dtype) -> None:
    model = offload(language_model("llama", tied=True).train(), compute_dtype=compute_dtype)
    optimizer = slidecore.AdamW(model.parameters(), update="deferred")
    batches = token_batches(4)
    expected = []
    for batch in batches:
        loss_of(model, batch).backward()
        expected.append([p.grad.clone().float() for p in model.parameters()])
        optimizer.zero_grad()
    for batch in batches:
        with model.no_sync():
            loss_of(model, batch).backward()
    for i, parameter in enumerate(model.parameters()):
        assert torch.equal(parameter.grad, functools.reduce(torch.add, [gradients[i] for gradients in expected]))


def test_bfloat16_training_stays_near_masters_in_float32(offload: Offload) -> None:
    """Twenty clipped steps of two passes: as near to a plain run as two of those are to each other."""
    batches = [narrow(batch) for batch in feature_batches(6, shape=(4, 9))]

    def plain_run(order: list[int]) -> list[torch.Tensor]:
        model = Stack(width=29)
        masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=2e-3)
        for step in range(STEPS):
            two = [samples(batches[(step + i) % 6], order) for i in range(2)]
            with torch.no_grad():
                for parameter, master in zip(model.parameters(), masters, strict=True):
                    parameter.copy_(master)
            for master, gradient in zip(masters, gradients_by_hand(model, two), strict=True):
                master.grad = gradient
            torch.nn.utils.clip_grad_norm_(masters, 2.0)
            optimizer.step()
        return [master.detach() for master in masters]

    start = [p.detach().clone() for p in Stack(width=29).parameters()]
    model = offload(Stack(width=29), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters(), lr=2e-3, max_grad_norm=2.0)
    clipped = []
    for step in range(STEPS):
        with model.no_sync():
            loss_of(model, batches[step % 6]).backward()
        loss_of(model, batches[(step + 1) % 6]).backward()
        optimizer.step()
        assert optimizer.grad_norm is not None
        clipped.append(optimizer.grad_norm.item() > 2.0)
    assert len(set(clipped)) == 2
    masters = [slidecore.master_parameter(model, name) for name, _ in model.named_parameters()]

    def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        moved = torch.stack([(y - s).norm() for y, s in zip(b, start, strict=True)]).norm()
        return (torch.stack([(x - y).norm() for x, y in zip(a, b, strict=True)]).norm() / moved).item()

    runs = [plain_run(order) for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 0, 1])]
    between = max(apart(a, b) for a, b in itertools.combinations(runs, 2))
    assert between < 0.5
    assert min(apart(masters, run) for run in runs) <= 1.5 * between
