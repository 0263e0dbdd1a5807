"""Layers on Liger-Kernel, where it is installed and there is a card."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import pytest
import slidecore
import torch
from _models import clone, distance, language_model, token_batches, train_offloaded, weights, worst
from slidecore.integrations import liger
from torch import nn

Offload = Callable[..., nn.Module]
INSTALLED = importlib.util.find_spec("liger_kernel") is not None
needs_liger = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger-Kernel's kernels need a card"),
    pytest.mark.skipif(not INSTALLED, reason="Liger-Kernel is not installed: pip install 'slidecore[liger]'"),
]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_without_a_card_layers_are_left_alone(offload: Offload, kernels: str) -> None:
    model = language_model("llama")
    forwards = {name: type(module).forward for name, module in model.named_modules()}
    offload(model, kernels=kernels)
    for name, module in model.named_modules():
        assert type(module).forward is forwards[name]


def test_asked_for_in_vain() -> None:
    model = language_model("llama")
    assert liger.apply(model, "auto", on_card=False) is None
    with pytest.raises(slidecore.UsageError, match="need a card"):
        liger.apply(model, "liger", on_card=False)


@pytest.mark.skipif(INSTALLED, reason="Liger-Kernel is installed")
def test_not_installed() -> None:
    with pytest.raises(slidecore.UsageError, match="not installed; pip install"):
        liger.apply(language_model("llama"), "liger", on_card=True)
    assert liger.apply(language_model("llama"), "auto", on_card=True) is None


@pytest.mark.skipif(not INSTALLED, reason="Liger-Kernel is not installed: pip install 'slidecore[liger]'")
def test_model_without_kernels() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(slidecore.UsageError, match="no kernels for Sequential"):
        liger.apply(model, "liger", on_card=True)
    assert liger.apply(model, "auto", on_card=True) is None


@pytest.mark.skipif(not INSTALLED, reason="Liger-Kernel is not installed: pip install 'slidecore[liger]'")
def test_undone() -> None:
    """Neither the model nor others of its architecture keep anything."""
    model, other = language_model("llama"), language_model("llama", seed=1)
    source = sys.modules[type(model).__module__]
    before = dict(vars(source))
    own = {name: dict(module.__dict__) for name, module in other.named_modules()}
    undo = liger.apply(model, "liger", on_card=True)
    assert undo is not None
    assert any("forward" in module.__dict__ for module in model.modules())
    undo()
    assert vars(source) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert {name: set(module.__dict__) for name, module in other.named_modules()} == {n: set(d) for n, d in own.items()}


class TestOnCard:
    pytestmark = needs_liger

    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    @pytest.mark.parametrize("micro_batch", ["auto", 1])
    def test_training_equals_plain_layers(self, offload: Offload, kind: str, micro_batch: int | str) -> None:
        plain = language_model(kind).train()
        batches = token_batches(10)
        results = []
        for kernels in ("liger", "torch"):
            model = offload(
                clone(plain),
                device="cuda",
                kernels=kernels,
                compute_dtype=torch.float32,
                micro_batch=micro_batch,
            )
            losses = train_offloaded(model, batches)
            results.append((losses, weights(model)))
            slidecore.close(model)
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
        value, name = worst(distance(results[0][1], results[1][1]))
        assert value < 1e-2, name
