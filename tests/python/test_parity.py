"""float32 training on the host backend against plain PyTorch with torch.optim.AdamW."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _models import (
    LANGUAGE_MODELS,
    Batch,
    Residual,
    Stack,
    clone,
    distance,
    feature_batches,
    freeze_half,
    language_model,
    spread,
    token_batches,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from slidecore.errors import UsageError
from torch import nn

STEPS = 20
Offload = Callable[..., nn.Module]


def build(kind: str, tied: bool, frozen: bool) -> nn.Module:
    model = Stack() if kind == "stack" else language_model(kind, tied=tied)
    if frozen:
        freeze_half(model)
    return model.train()


def batches_of(kind: str) -> list[Batch]:
    return feature_batches(STEPS) if kind == "stack" else token_batches(STEPS)


Order = tuple[tuple[int, ...], ...]


@functools.cache
def reference(
    kind: str, tied: bool, frozen: bool, order: Order | None = None, fused: bool = False
) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = build(kind, tied, frozen)
    losses = train_plain(model, batches_of(kind), order=order, fused=fused)
    return weights(model), losses


def assert_losses_agree(mine: list[float], theirs: list[float]) -> None:
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert len(set(theirs)) > 1


CASES = [(kind, tied) for kind in LANGUAGE_MODELS for tied in (False, True)] + [("stack", False)]


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "half-frozen"])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("kind", "tied"), CASES, ids=lambda v: {True: "tied", False: "untied"}.get(v, v))
def test_training_equals_pytorch(offload: Offload, kind: str, tied: bool, window: int, frozen: bool) -> None:
    expected, expected_losses = reference(kind, tied, frozen)
    model = build(kind, tied, frozen)
    before = weights(model)
    offload(model, window=window)
    losses = train_offloaded(model, batches_of(kind))
    assert_losses_agree(losses, expected_losses)
    value, name = worst(distance(weights(model), expected))
    assert value < 1e-5, name
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        assert parameter.grad is None


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(("kind", "tied"), CASES, ids=lambda v: {True: "tied", False: "untied"}.get(v, v))
def test_micro_batches_stay_within_the_spread_of_summation_orders(
    offload: Offload, kind: str, tied: bool, micro_batch: int
) -> None:
    batch = len(next(iter(batches_of(kind)[0].values())))
    ones = tuple((i,) for i in range(batch))
    pairs = tuple(tuple(range(i, min(i + 2, batch))) for i in range(0, batch, 2))
    expected, expected_losses = reference(kind, tied, False)
    orders = (ones, ones[::-1], pairs, pairs[::-1])
    runs = [reference(kind, tied, False, order)[0] for order in orders]
    allowed = 4 * spread([expected, reference(kind, tied, False, fused=True)[0], *runs]) + 1e-7
    model = offload(build(kind, tied, False), micro_batch=micro_batch)
    losses = train_offloaded(model, batches_of(kind))
    assert_losses_agree(losses, expected_losses)
    value, name = worst(distance(weights(model), expected))
    assert value <= allowed, name


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize(("batch", "length"), [(1, 9), (7, 5), (2, 33)])
def test_shapes_and_seeds(offload: Offload, batch: int, length: int, seed: int) -> None:
    plain = language_model("llama", seed=seed).train()
    model = offload(clone(plain))
    batches = token_batches(5, batch=batch, length=length, seed=seed)
    assert_losses_agree(train_offloaded(model, batches), train_plain(plain, batches))
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_shapes_that_change_between_steps(offload: Offload) -> None:
    plain = language_model("llama").train()
    model = offload(clone(plain), device_memory="64MiB")
    shapes = [(3, 17), (1, 5), (4, 33), (2, 17), (3, 17), (1, 64)]
    batches = [token_batches(1, batch=b, length=n, seed=i)[0] for i, (b, n) in enumerate(shapes)]
    assert_losses_agree(train_offloaded(model, batches), train_plain(plain, batches))
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stack"])
def test_where_activations_lie_does_not_change_the_result(offload: Offload, kind: str) -> None:
    # Long enough for saved inputs to be worth a trip to host memory.
    batches = feature_batches(6, shape=(9, 31)) if kind == "stack" else token_batches(6, length=33)
    plans: dict[str, dict[str, Any]] = {
        "recomputed, inputs on the host": {},
        "recomputed, inputs on the device": {"device_memory": "1GiB", "keep_graphs": 0},
        "two graphs kept": {"device_memory": "1GiB", "keep_graphs": 2},
        "all graphs kept": {"device_memory": "1GiB", "keep_graphs": 99},
        "kept without a budget": {"keep_graphs": 3},
        "as the budget allows": {"device_memory": "1GiB"},
    }
    results = {}
    for plan, options in plans.items():
        model = offload(build(kind, False, False), **options)
        losses = train_offloaded(model, batches)
        results[plan] = weights(model), losses
        on_host = slidecore.stats(model).saved_inputs_bytes
        assert (on_host > 0) == ("device_memory" not in options), plan
        slidecore.close(model)
    expected, expected_losses = results.pop("recomputed, inputs on the host")
    for plan, (mine, losses) in results.items():
        assert losses == expected_losses, plan
        for name, value in mine.items():
            assert torch.equal(value, expected[name]), (plan, name)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"keep_graphs": 2}], ids=str)
def test_groups_and_schedule(offload: Offload, options: dict[str, Any]) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        # Each block's parameters are in different groups, so the settings hold within a chunk.
        first = [p for p in model.parameters() if p.dim() >= 2]
        second = [p for n, p in model.named_parameters() if p.dim() < 2 and "norm" not in n]
        third = [p for n, p in model.named_parameters() if p.dim() < 2 and "norm" in n]
        return [
            {"params": first, "weight_decay": 0.3, "lr": 3e-3},
            {"params": second, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-4},
            {"params": third, "maximize": True, "lr": 1e-4},
        ]

    def schedule(step: int) -> float:
        return (step + 1) / 5 if step < 5 else 0.9 ** (step - 4)

    plain = Stack(seed=5).train()
    model = offload(clone(plain), **options)
    batches = feature_batches(STEPS, seed=6)
    mine = train_offloaded(model, batches, optimizer=lambda m: slidecore.AdamW(groups(m), lr=1e-2), schedule=schedule)
    theirs = train_plain(plain, batches, optimizer=lambda m: torch.optim.AdamW(groups(m), lr=1e-2), schedule=schedule)
    assert_losses_agree(mine, theirs)
    difference = distance(weights(model), weights(plain), least_dim=1)
    assert worst(difference)[0] < 1e-5, worst(difference)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 1.0])
def test_weight_decay(offload: Offload, weight_decay: float) -> None:
    plain = language_model("qwen3", seed=9).train()
    model = offload(clone(plain))
    batches = token_batches(STEPS, seed=9)
    options = {"lr": 1e-3, "weight_decay": weight_decay}
    assert_losses_agree(train_offloaded(model, batches, **options), train_plain(plain, batches, **options))
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_defaults_are_those_of_torch(offload: Offload) -> None:
    model = offload(Stack())
    mine = slidecore.AdamW(model.parameters()).defaults
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults
    assert mine == {name: theirs[name] for name in mine}


def test_parameters_that_no_group_names_stay(offload: Offload) -> None:
    plain = Stack().train()
    model = offload(clone(plain))
    before = weights(model)

    def half(m: nn.Module) -> list[nn.Parameter]:
        return [p for n, p in m.named_parameters() if "up" in n or "leave" in n]

    batches = feature_batches(5)
    mine = train_offloaded(model, batches, optimizer=lambda m: slidecore.AdamW(half(m), lr=1e-2))
    theirs = train_plain(plain, batches, optimizer=lambda m: torch.optim.AdamW(half(m), lr=1e-2))
    assert_losses_agree(mine, theirs)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("up" not in name and "leave" not in name)


def test_a_group_is_added_before_training_and_refused_after(offload: Offload) -> None:
    plain = Stack().train()
    model = offload(clone(plain))
    optimizers = []
    for kind, m in ((slidecore.AdamW, model), (torch.optim.AdamW, plain)):
        optimizer = kind([*m.norm.parameters(), *m.leave.parameters()], lr=1e-2)
        optimizer.add_param_group({"params": list(m.blocks[1].parameters()), "lr": 3e-3, "weight_decay": 0.5})
        optimizers.append(optimizer)
    batches = feature_batches(5)
    mine = train_offloaded(model, batches, optimizer=lambda _: optimizers[0])
    theirs = train_plain(plain, batches, optimizer=lambda _: optimizers[1])
    assert_losses_agree(mine, theirs)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    with pytest.raises(UsageError, match="after training began"):
        optimizers[0].add_param_group({"params": list(model.blocks[0].parameters())})
    assert len(optimizers[0].param_groups) == 2


class Experts(nn.Module):
    """Samples choose an expert by the sign of a feature: some steps, some experts get no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Residual(width, 17) for _ in range(3))

    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        out = x
        for i, expert in enumerate(self.experts):
            chosen = (choice == i).nonzero().flatten()
            if len(chosen):
                out = out.index_copy(0, chosen, expert(x[chosen]))
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList(Experts(13) for _ in range(4))
        self.leave = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, choice)
        return self.leave(x)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"keep_graphs": 4}], ids=str)
def test_experts_without_a_gradient_are_skipped_as_pytorch_skips_them(
    offload: Offload, options: dict[str, Any]
) -> None:
    plain = Mixture()
    model = offload(clone(plain), blocks=[f"blocks.{i}" for i in range(4)], **options)
    before = weights(model)
    mine, theirs = slidecore.AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    choices = [[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 1]]
    for choice in choices:
        x = torch.randn(3, 13)
        losses = []
        for m, optimizer in ((model, mine), (plain, theirs)):
            loss = m(x, torch.tensor(choice)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".experts.2." in name), name


class Wide(nn.Module):
    """Blocks that take and return several tensors, positional and by keyword, some shared by all blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter = nn.Linear(5, 9)
        self.blocks = nn.ModuleList(WideBlock() for _ in range(3))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 9))
        self.leave = nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        shared, side = h.mean(1, keepdim=True), torch.zeros_like(h)
        for i, block in enumerate(self.blocks):
            h, extra = block(h, shared, context={"side": side, "table": self.scale}, index=i)
            side = side + extra["side"]
        return self.leave(h + side)


class WideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(9, 9)
        self.b = nn.Parameter(torch.randn(9, 9) / 3)

    def forward(
        self, h: torch.Tensor, shared: torch.Tensor, *, context: dict[str, torch.Tensor], index: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = h + torch.tanh(self.a(h * context["table"]) + shared)
        return out, {"side": (context["side"] + index) @ self.b}


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 2}, {"keep_graphs": 2}, {"keep_graphs": 3, "window": 3}], ids=str
)
def test_blocks_with_several_inputs_and_outputs(offload: Offload, options: dict[str, Any]) -> None:
    plain = Wide()
    model = offload(clone(plain), **options)
    mine, theirs = slidecore.AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(8):
        x = torch.randn(5, 3, 5)
        losses = []
        for m, optimizer in ((model, mine), (plain, theirs)):
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    assert torch.allclose(model.scale, plain.scale, atol=1e-6)


def test_gradients_of_the_models_input(offload: Offload) -> None:
    plain = Stack().train()
    model = offload(clone(plain))
    x = torch.randn(3, 4, 7)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    plain(inputs[1]).square().mean().backward()
    optimizer = slidecore.AdamW(model.parameters())
    model(inputs[0]).square().mean().backward()
    optimizer.step()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-8)
