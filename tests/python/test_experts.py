"""Mixtures of experts written as plain modules: experts without a token are skipped, auxiliary losses train routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _architectures import KINDS, Reference, batches_for, train
from _models import Batch, Residual, feature_batches, weights
from slidecore.offloading import engine_of
from torch import nn

STEPS = 20
Offload = Callable[..., nn.Module]


class Experts(nn.Module):
    """Each token goes to two of four experts. Beside its output: a z-loss for each sample, and how often each expert
    was chosen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList(Residual(width, 11 + i) for i in range(4))
        self.closed: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.router(x)
        penalty = logits.logsumexp(-1).square().mean(1)
        logits = logits.index_fill(-1, torch.tensor(self.closed, dtype=torch.long), -torch.inf)
        scores, chosen = logits.softmax(-1).topk(2)
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for i, expert in enumerate(self.experts):
            token, place = (chosen.flatten(0, 1) == i).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, expert(flat[token]) * scores.flatten(0, 1)[token, place, None])
        return x + out.view_as(x), penalty


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(7, 13)
        # Blocks of two classes in turn.
        self.blocks = nn.ModuleList(Experts(13) if i % 2 else Residual(13, 17) for i in range(5))
        self.leave = nn.Linear(13, 3)

    def close(self, *experts: int) -> None:
        for block in self.blocks:
            if isinstance(block, Experts):
                block.closed = experts

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, total = self.enter(x), x.new_zeros(())
        for block in self.blocks:
            if isinstance(block, Experts):
                x, penalty = block(x)
                total = total + penalty.mean()
            else:
                x = block(x)
        return self.leave(x), total


def scheduled() -> Callable[[nn.Module, Batch], torch.Tensor]:
    """A loss for the steps of one run: expert 1 gets no tokens but in steps 5 to 9, expert 3 none at all."""
    step = -1

    def loss_of(model: Mixture, batch: Batch) -> torch.Tensor:
        nonlocal step
        step += 1
        model.close(3) if 5 <= step < 10 else model.close(1, 3)
        output, penalty = model(batch["x"])
        return (output - batch["target"]).square().mean() + 0.1 * penalty

    return loss_of


SETTINGS = {"lr": 3e-3, "weight_decay": 0.3, "eps": 1e-5}
OPTIONS = [{"window": 2}, {"window": 3}, {"micro_batch": 1}, {"micro_batch": 3}, {"keep_graphs": 3}]
UPDATES = [{}, {"update": "deferred"}, {"max_grad_norm": 1e9}]


@pytest.mark.parametrize(
    ("options", "update"), [*((o, UPDATES[0]) for o in OPTIONS), *((OPTIONS[0], u) for u in UPDATES[1:])], ids=str
)
def test_experts_without_a_token_are_skipped(offload: Offload, options: dict[str, Any], update: dict[str, Any]) -> None:
    plain = Mixture()
    model = offload(copy.deepcopy(plain), **options)
    before = weights(model)
    batches = feature_batches(STEPS, shape=(4, 6))
    optimizer = slidecore.AdamW(model.parameters(), **SETTINGS, **update)
    losses = train(model, optimizer, batches, scheduled())
    reference = Reference.of(plain, batches, scheduled, **SETTINGS)
    reference.check(model, losses, same_order="micro_batch" not in options)
    # Neither weight decay nor moments moved what got no gradient, and its bias correction starts when it gets one.
    steps = {entry.name: entry.step for _, entry in engine_of(model).entries.values()}
    for name, value in weights(model).items():
        starved, late = ".experts.3." in name, ".experts.1." in name
        assert torch.equal(value, before[name]) == starved, name
        assert steps[name] == (0 if starved else 5 if late else STEPS), name
    masters = slidecore.master_parameter(model, "blocks.1.experts.3.up.weight")
    assert torch.equal(masters, before["blocks.1.experts.3.up.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starved_experts_stay_bit_for_bit(offload: Offload, dtype: torch.dtype) -> None:
    model = offload(Mixture(), compute_dtype=dtype)
    names = [n for n, _ in model.named_parameters() if ".experts.3." in n]
    before = {n: slidecore.master_parameter(model, n) for n in names}
    batches = [{n: v.to(dtype) for n, v in b.items()} for b in feature_batches(5, shape=(4, 6))]
    train(model, slidecore.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), batches, scheduled())
    for name in names:
        assert torch.equal(slidecore.master_parameter(model, name), before[name]), name


def test_the_auxiliary_loss_alone_trains_routers(offload: Offload) -> None:
    """With the gradient of the router logits that transformers records, and nothing else."""
    plain = KINDS["mixtral"].build()
    model = offload(copy.deepcopy(plain))
    batch = batches_for("language", 1)[0]

    def auxiliary(m: nn.Module, batch: Batch) -> torch.Tensor:
        return m(input_ids=batch["input_ids"]).aux_loss

    before = weights(model)
    mine = train(model, slidecore.AdamW(model.parameters(), lr=1e-2), [batch] * 5, auxiliary)
    theirs = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), [batch] * 5, auxiliary)
    assert mine == pytest.approx(theirs, abs=1e-5)
    slidecore.synchronize(model)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, plain.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)
        last = name == "model.layers.3.mlp.gate.weight"
        assert not last or not torch.equal(value, before[name])
    # Behind the last router nothing has a gradient, so nothing decays.
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.3.mlp.experts.down_proj"):
        assert torch.equal(model.get_parameter(name), before[name])
