"""Blocks whose samples depend on each other in ways that gradients do not show run their batch whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from _models import (
    LANGUAGE_MODELS,
    Residual,
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
from slidecore.offloading import engine_of
from slidecore.sample_values import alone, beside_another
from torch import nn

Offload = Callable[..., nn.Module]


class Mixing(nn.Module):
    """A residual block whose output is divided by what `how` makes of the detached batch."""

    def __init__(self, how: Callable[[torch.Tensor], torch.Tensor | float], dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = Residual(13, 29, dropout)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y / (1 + self.how(y.detach()))


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor | float]] = {
    "maximum": lambda y: y.abs().max(),
    "mean": lambda y: y.square().mean(),
    "deviation": lambda y: y.std(0, unbiased=False).mean(),
    "count": lambda y: float(len(y)),
}


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 2, "keep_graphs": 9}])
@pytest.mark.parametrize("how", WAYS)
def test_mixing_past_autograd(offload: Offload, how: str, options: dict[str, int]) -> None:
    plain = Stack(block=lambda: Mixing(WAYS[how])).train()
    model, batches = offload(clone(plain), **options), feature_batches(4)
    with pytest.warns(UserWarning, match="Mixing .*samples along dimension 0 that depend on each other"):
        losses = train_offloaded(model, batches)
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-6)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_mixing_beside_dropout_in_bf16(offload: Offload) -> None:
    model = offload(
        Stack(block=lambda: Mixing(WAYS["maximum"], 0.5)).train(), micro_batch=2, compute_dtype=torch.bfloat16
    )
    batches = [{k: v.bfloat16() for k, v in b.items()} for b in feature_batches(1)]
    with pytest.warns(UserWarning, match="Mixing .*samples along"):
        train_offloaded(model, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, "mixtral", "dropout"])
def test_independent_samples_are_split(offload: Offload, kind: str, dtype: torch.dtype) -> None:
    """Rounding that goes by the shape, random numbers and experts do not look like samples that mix."""
    if kind == "dropout":
        model, batches = Stack(dropout=0.5), feature_batches(2)
        batches = [{k: v.to(dtype) for k, v in b.items()} for b in batches]
    elif kind == "mixtral":
        transformers = pytest.importorskip("transformers")
        config = transformers.MixtralConfig(
            vocab_size=101, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, pad_token_id=0,
        )  # fmt: skip
        model, batches = transformers.MixtralForCausalLM(config), token_batches(2, batch=4, length=23)
    else:
        model, batches = language_model(kind), token_batches(2, batch=4, length=23)
    offload(model.train(), micro_batch=2, compute_dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_offloaded(model, batches)
    assert all(plan.micro_batches > 1 for plan in engine_of(model).activations._plans.values())


class Caching(Residual):
    """A residual block with a table that grows with the sequences it has seen."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.register_buffer("table", torch.ones(1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] > len(self.table):
            self.table = torch.ones(x.shape[-2], 1)
        return super().forward(x) * self.table[: x.shape[-2]]


def test_a_cache_that_grows_is_no_reason_to_run_a_batch_whole(offload: Offload) -> None:
    plain = Stack(block=Caching).train()
    model, batches = offload(clone(plain), micro_batch=2), feature_batches(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = train_offloaded(model, batches)
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-6)
    assert all(plan.micro_batches > 1 for plan in engine_of(model).activations._plans.values())


def test_values_that_are_compared() -> None:
    two = [torch.randn(2, 3, 5)]
    same = [two[0][:1].repeat(2, 1, 1)], [two[0][1:].repeat(2, 1, 1)]
    other = [two[0][1:].repeat(2, 1, 1) * 1.01]
    assert beside_another(two, same)
    assert not beside_another(two, (same[0], other))
    assert not beside_another(two, ([same[0][0][:, :2]], same[1]))
    assert alone(two, [two[0][:1] * (1 + 1e-6)])
    assert not alone(two, [two[0][:1] / 2])
    undefined = torch.full((2, 1), float("nan"))
    assert beside_another([undefined], ([undefined], [undefined]))
    assert not beside_another([torch.ones(2, 1)], ([undefined], [undefined]))
