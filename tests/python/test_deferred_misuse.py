"""What overlapping or deferred updates cannot do is an error that says what to write instead, and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slidecore
import torch
from _deferred import Offload, assert_alike, everything, same_bits, sides
from _models import (
    Stack,
    feature_batches,
    loss_of,
)


def test_a_second_backward_in_overlap_says_what_to_write(offload: Offload) -> None:
    mine, _ = sides(offload, Stack(), update="overlap")
    mine.backward(feature_batches(1)[0])
    with pytest.raises(slidecore.UsageError, match=r"no_sync\(\).*update='deferred'"):
        mine.backward(feature_batches(1)[0])
    with pytest.raises(slidecore.UsageError, match="update='auto' or update='deferred'"), mine.no_sync():
        pass


@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_clipping_after_overlapping_updates_says_what_to_write(offload: Offload, max_norm: float) -> None:
    mine, _ = sides(offload, Stack(), update="auto")
    mine.backward(feature_batches(1)[0])
    with pytest.raises(slidecore.UsageError, match=r"max_grad_norm=.*update='deferred'"):
        slidecore.clip_grad_norm_(mine.model, max_norm)
    with pytest.raises(slidecore.UsageError, match=r"max_grad_norm=.*update='deferred'"):
        torch.nn.utils.clip_grad_norm_(mine.model.parameters(), max_norm)
    mine.step()
    assert slidecore.clip_grad_norm_(mine.model, max_norm) == 0  # there are no gradients


def test_options_that_ask_for_what_overlap_cannot_do(offload: Offload) -> None:
    model = offload(Stack())
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match="update='deferred' or 'auto'"):
            slidecore.AdamW(model.parameters(), update="overlap", **options)  # type: ignore[arg-type]
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm"):
            slidecore.AdamW(model.parameters(), max_grad_norm=value)
    with pytest.raises(ValueError, match="'auto', 'overlap' or 'deferred'"):
        slidecore.AdamW(model.parameters(), update="later")  # type: ignore[arg-type]
    optimizer = slidecore.AdamW(model.parameters(), update="overlap")
    optimizer.max_grad_norm = 1.0  # afterwards
    before = everything(model)
    with pytest.raises(ValueError, match="update='deferred' or 'auto'"):
        loss_of(model, feature_batches(1)[0]).backward()
    assert same_bits(everything(model), before)


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "maximize", "max_grad_norm", "skip_nonfinite"])
def test_options_changed_between_backward_and_step(offload: Offload, name: str) -> None:
    values = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.3, "maximize": True}
    values |= {"max_grad_norm": 1.0, "skip_nonfinite": True}
    mine, _ = sides(offload, Stack(), update="auto")
    mine.backward(feature_batches(1)[0])
    if name in ("max_grad_norm", "skip_nonfinite"):
        setattr(mine.optimizer, name, values[name])
    else:
        mine.optimizer.param_groups[0][name] = values[name]
    with pytest.raises(
        slidecore.UsageError,
        match=f"{name}.*changed between backward and step.*update='deferred'" if name != "maximize" else "changed",
    ):
        mine.optimizer.step()
    mine.backward(feature_batches(1)[0])  # and goes on with the new options
    mine.optimizer.step()


def test_options_changed_between_backward_and_step_count_in_deferred(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
        side.optimizer.param_groups[0].update(lr=0.05, betas=(0.5, 0.6), eps=0.1, weight_decay=0.3, maximize=True)
        side.step()
    assert_alike(mine, theirs)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", math.nan), ("betas", (0.9, 1.0)), ("eps", -1e-8)])
@pytest.mark.parametrize("update", ["overlap", "deferred"])
def test_an_option_out_of_range_changes_nothing(offload: Offload, update: str, name: str, value: Any) -> None:
    mine, theirs = sides(offload, Stack(), update=update)
    before = everything(mine.model)
    good = mine.optimizer.param_groups[0][name]
    batch = feature_batches(1)[0]
    mine.optimizer.param_groups[0][name] = value
    if update == "overlap":
        with pytest.raises(ValueError, match=name):
            mine.backward(batch)
        mine.optimizer.param_groups[0][name] = good
        mine.backward(batch)
    else:
        mine.backward(batch)
        with pytest.raises(ValueError, match=name):
            mine.optimizer.step()
        assert same_bits(everything(mine.model), before)
        mine.optimizer.param_groups[0][name] = good
    mine.step()
    theirs.backward(batch)
    theirs.step()
    assert_alike(mine, theirs)


@pytest.mark.parametrize("drop", ["zero_grad", "model.zero_grad", "one"])
def test_gradients_that_overlap_has_used_cannot_be_dropped(offload: Offload, drop: str) -> None:
    mine, theirs = sides(offload, Stack(), update="overlap")
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
    if drop == "zero_grad":
        with pytest.raises(slidecore.UsageError, match=r"zero_grad\(\) between backward and step.*'deferred'"):
            mine.optimizer.zero_grad()
        mine.optimizer.step()
    else:
        if drop == "one":
            mine.model.blocks[1].up.bias.grad = None
        else:
            mine.model.zero_grad()
        with pytest.raises(slidecore.UsageError, match=r"\.grad was set to None .*update='deferred'"):
            mine.optimizer.step()
    theirs.step()
    mine.optimizer.zero_grad()
    for side in (mine, theirs):
        side.backward(feature_batches(1, seed=3)[0])
        side.step()
    assert_alike(mine, theirs)


def test_switching_back_waits_for_the_gradients_that_wait(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), update="auto", Max_grad_norm=1e9)
    first, second, third = feature_batches(3)
    for side in (mine, theirs):
        side.backward(first)
        if side is mine:
            side.optimizer.max_grad_norm = None
        side.backward(second)
        side.step()
        side.backward(third)
        side.step()
    assert_alike(mine, theirs)
