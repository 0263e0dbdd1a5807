"""When budgets may change: between steps, however the last one ended."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import slidecore
import torch
from _disk import SMALL, assert_same, smallest, state
from _models import language_model, token_batches
from _runs import Run
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def test_a_forward_without_its_backward(offload: Offload, tmp_path: Path) -> None:
    """An evaluation with gradients, or a forward that failed, is over when its graph is gone; till then, it is told."""
    least = smallest(lambda: language_model("llama"), tmp_path)
    batches = token_batches(3)
    plain = Run(language_model("llama"), offload, **SMALL)
    losses = plain.train(batches)
    run = Run(language_model("llama"), offload, host_memory="1GiB", disk=tmp_path, **SMALL)
    seen = run.train(batches[:1])

    loss = run.loss(batches[0])
    with pytest.raises(slidecore.UsageError, match="del loss"):
        slidecore.set_budget(run.model, host_memory=least)
    assert engine_of(run.model).tiers.on_disk == frozenset()
    del loss
    gc.collect()
    slidecore.set_budget(run.model, host_memory=least)
    assert engine_of(run.model).tiers.on_disk
    seen += run.train(batches[1:2])

    with pytest.raises(IndexError):
        run.model(input_ids=torch.full((1, 4), 10**6))
    gc.collect()
    slidecore.set_budget(run.model, host_memory="1GiB")
    assert engine_of(run.model).tiers.on_disk == frozenset()
    seen += run.train(batches[2:])
    assert seen == losses
    assert_same(state(run.model), state(plain.model))


def test_a_backward_that_failed(offload: Offload, tmp_path: Path) -> None:
    """It is over; inside of one that has not ended no budget changes."""
    # The failed pass's inputs may still be there.
    least = smallest(lambda: language_model("llama"), tmp_path) + 100_000
    run = Run(language_model("llama"), offload, host_memory="1GiB", disk=tmp_path, **SMALL)
    told: list[BaseException] = []

    def hook(_: torch.Tensor) -> None:
        try:
            slidecore.set_budget(run.model, host_memory=least)
        except slidecore.UsageError as error:
            told.append(error)
        raise ZeroDivisionError

    def fail(module: nn.Module, _: object, output: torch.Tensor) -> None:
        output.register_hook(hook)

    handle = run.model.get_submodule("model.norm").register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run.loss(token_batches(1)[0]).backward()
    handle.remove()
    assert [type(error) for error in told] == [slidecore.UsageError]
    gc.collect()
    with pytest.warns(UserWarning, match="did not finish"):
        slidecore.set_budget(run.model, host_memory=least)
    assert engine_of(run.model).tiers.on_disk
    run.train(token_batches(2))
