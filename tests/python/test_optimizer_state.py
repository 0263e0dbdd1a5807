"""The optimizer as PyTorch knows optimizers: groups, schedulers, state_dict() and load_state_dict()."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _deferred import SETTINGS, Offload, assert_alike, everything, same_bits, sides
from _models import Batch, Stack, clone, feature_batches, freeze_half, loss_of
from slidecore.offloading import engine_of
from torch import nn
from torch.optim import lr_scheduler

UPDATES = ["overlap", "deferred"]
PLANES: list[dict[str, Any]] = [
    {"compute_dtype": torch.float32},
    {"compute_dtype": torch.bfloat16},
    {"compute_dtype": torch.bfloat16, "moments": "8bit"},
]


def batches(count: int, dtype: torch.dtype, seed: int = 1) -> list[Batch]:
    return [{name: value.to(dtype) for name, value in batch.items()} for batch in feature_batches(count, seed=seed)]


def train(model: nn.Module, optimizer: Any, chosen: list[Batch]) -> None:
    for batch in chosen:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def without_blocks(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not name.startswith("blocks")]


# --- state_dict()


@pytest.mark.parametrize("update", UPDATES)
def test_the_state_is_that_of_pytorch(offload: Offload, update: str) -> None:
    mine, theirs = sides(offload, Stack(), update=update)
    for side in (mine, theirs):
        train(side.model, side.optimizer, feature_batches(4))
    a, b = mine.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for index, expected in b["state"].items():
        assert a["state"][index].keys() == expected.keys()
        for name, value in expected.items():
            assert a["state"][index][name].dtype == value.dtype
            assert torch.allclose(a["state"][index][name], value, rtol=1e-4, atol=1e-6), (index, name)
    for mine_group, theirs_group in zip(a["param_groups"], b["param_groups"], strict=True):
        assert {name: theirs_group[name] for name in mine_group} == mine_group


@pytest.mark.parametrize("update", UPDATES)
def test_the_state_waits_for_pending_updates(offload: Offload, update: str) -> None:
    """Asked for right after step(), while the update lane is at work."""
    model = offload(Stack(width=64, inner=256, depth=8), threads=1)
    optimizer = slidecore.AdamW(model.parameters(), update=update)  # type: ignore[arg-type]
    for batch in feature_batches(3):
        loss_of(model, batch).backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict()["state"])
        slidecore.synchronize(model)
        for index, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(values[name], state[index][name]) for name in values)


def test_only_updated_parameters_have_state(offload: Offload) -> None:
    plain = Stack()
    freeze_half(plain)
    mine, theirs = sides(offload, plain)
    assert mine.optimizer.state_dict()["state"] == {}
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
        side.model.leave.weight.grad = None
        side.step()
    assert mine.optimizer.state_dict()["state"].keys() == theirs.optimizer.state_dict()["state"].keys()


# --- load_state_dict()


@pytest.mark.parametrize(("update", "passes"), [("overlap", 1), ("deferred", 1), ("deferred", 2)])
@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(
    offload: Offload, planes: dict[str, Any], update: str, passes: int
) -> None:
    def some_steps(model: nn.Module, optimizer: Any, seed: int) -> None:
        for step in range(3):
            for batch in batches(passes, planes["compute_dtype"], seed=seed + step):
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    def make() -> tuple[nn.Module, Any, Any]:
        model = offload(Stack(seed=3), **planes)
        optimizer = slidecore.AdamW(
            [{"params": list(model.blocks.parameters()), "lr": 1e-2}, {"params": without_blocks(model)}],
            update=update,  # type: ignore[arg-type]
        )
        return model, optimizer, lr_scheduler.StepLR(optimizer, 2, 0.5)

    model, optimizer, schedule = make()
    some_steps(model, optimizer, seed=0)
    schedule.step()
    schedule.step()
    file = io.BytesIO()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(saved, file)
    some_steps(model, optimizer, seed=10)

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again, optimizer, schedule = make()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7)
    again.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    assert optimizer.param_groups[0]["lr"] == 5e-3
    some_steps(again, optimizer, seed=10)
    assert same_bits(everything(again), everything(model))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(13, 13), nn.Linear(13, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.used(x))


def test_masters_that_were_never_updated_are_resumed_too(offload: Offload) -> None:
    """A bfloat16 weight alone is not the whole of a float32 master."""
    found, saved = [], {}
    for resumed in (False, True):
        model = offload(Stack(block=Unused), compute_dtype=torch.bfloat16)
        optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
        if resumed:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        else:
            train(model, optimizer, batches(2, torch.bfloat16))
            saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        found.append(everything(model))
        for name, parameter in model.named_parameters():
            if ".unused." in name:
                assert not torch.equal(slidecore.master_parameter(model, name), parameter.float())
    assert same_bits(*found)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("planes", PLANES, ids=str)
def test_a_state_loaded_where_it_came_from_changes_nothing(
    offload: Offload, planes: dict[str, Any], copied: bool
) -> None:
    """As `accelerate` does with every optimizer. The state is made of views of the planes it is loaded into."""
    model = offload(Stack(), **planes)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, batches(3, planes["compute_dtype"]))
    before = everything(model)
    state = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(state) if copied else state)
    assert same_bits(everything(model), before)
    assert engine_of(model).has_trained()


def test_a_state_replaces_all_of_the_one_before(offload: Offload) -> None:
    """Parameters that the loaded state does not have begin anew."""
    mine, theirs = sides(offload, Stack())
    first, second, third = feature_batches(3)
    states = []
    for side in (mine, theirs):
        side.backward(first)
        side.model.blocks[1].up.weight.grad = None
        side.step()
        states.append(copy.deepcopy(side.optimizer.state_dict()))
        side.backward(second)
        side.step()
    for side, state in zip((mine, theirs), states, strict=True):
        side.optimizer.load_state_dict(state)
        side.backward(third)
        side.step()
    assert_alike(mine, theirs)


@pytest.mark.parametrize("update", UPDATES)
def test_the_state_of_torch_is_taken_over(offload: Offload, update: str) -> None:
    mine, theirs = sides(offload, Stack(), update=update)
    train(theirs.model, theirs.optimizer, feature_batches(3))
    theirs.optimizer.param_groups[0].update(lr=5e-3, betas=(0.8, 0.99))
    mine.model.load_state_dict(theirs.model.state_dict())
    mine.optimizer.load_state_dict(theirs.optimizer.state_dict())
    for side in (mine, theirs):
        train(side.model, side.optimizer, feature_batches(3, seed=9))
    assert mine.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert_alike(mine, theirs)


def test_the_state_of_torch_leaves_bfloat16_masters_alone(offload: Offload) -> None:
    """It has no residual: the masters stay what the model was offloaded with, float32 values included."""
    plain = Stack()
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs, feature_batches(2))
    model = offload(clone(plain), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    for name, parameter in plain.named_parameters():
        assert torch.equal(slidecore.master_parameter(model, name), parameter)
    state = optimizer.state_dict()["state"]
    for index, expected in theirs.state_dict()["state"].items():
        assert torch.equal(state[index]["exp_avg"], expected["exp_avg"])
        assert torch.equal(state[index]["exp_avg_sq"], expected["exp_avg_sq"])
        assert state[index]["step"] == 2


def test_torch_takes_over_the_state(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack())
    train(mine.model, mine.optimizer, feature_batches(3))
    theirs.model.load_state_dict(mine.model.state_dict())
    state = copy.deepcopy(mine.optimizer.state_dict())
    # What torch's own step() reads and slidecore's has no use for.
    for name, value in theirs.optimizer.param_groups[0].items():
        state["param_groups"][0].setdefault(name, value)
    theirs.optimizer.load_state_dict(state)
    for side in (mine, theirs):
        train(side.model, side.optimizer, feature_batches(3, seed=9))
    assert_alike(mine, theirs)


def spoil(state: dict[str, Any], how: str) -> None:
    group, first = state["param_groups"][0], state["state"][0]
    if how == "a moment less":
        del first["exp_avg"]
    elif how == "a shape":
        first["exp_avg_sq"] = torch.zeros(3)
    elif how == "a dtype":
        state["state"][5]["exp_avg"] = state["state"][5]["exp_avg"].to(torch.int8)
    elif how == "a group more":
        state["param_groups"].append({**group, "params": []})
    elif how == "a parameter less":
        group["params"] = group["params"][:-1]
    elif how == "an option less":
        del group["betas"]
    elif how == "an option out of range":
        group["lr"] = -1.0
    elif how == "amsgrad":
        group["amsgrad"] = True
    else:
        group["decoupled_weight_decay"] = False


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a moment less", r"enter.weight lacks 'exp_avg'"),
        ("a shape", r"exp_avg_sq of enter.weight"),
        ("a dtype", r"int8"),
        ("a group more", r"groups of \[25, 0\] parameters"),
        ("a parameter less", r"groups of \[24\] parameters.*\[25\]"),
        ("an option less", r"lack \['betas'\]"),
        ("an option out of range", r"lr=-1.0"),
        ("amsgrad", r"amsgrad"),
        ("coupled", r"coupled weight decay"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(offload: Offload, how: str, message: str) -> None:
    mine, theirs = sides(offload, Stack(depth=3, block=lambda: nn.Sequential(nn.Linear(13, 13), nn.Linear(13, 13))))
    for side in (mine, theirs):
        train(side.model, side.optimizer, feature_batches(2))
    count = len(list(mine.model.parameters()))
    state = copy.deepcopy(mine.optimizer.state_dict())
    spoil(state, how)
    before, groups = everything(mine.model), copy.deepcopy(mine.optimizer.state_dict()["param_groups"])
    message = message.replace("25", str(count)).replace("24", str(count - 1))
    with pytest.raises(ValueError, match=message):
        mine.optimizer.load_state_dict(state)
    assert same_bits(everything(mine.model), before)
    assert mine.optimizer.state_dict()["param_groups"] == groups
    for side in (mine, theirs):
        train(side.model, side.optimizer, feature_batches(2, seed=9))
    assert_alike(mine, theirs)


def test_moments_of_a_frozen_parameter_are_refused(offload: Offload) -> None:
    plain = Stack()
    theirs = torch.optim.AdamW(plain.parameters())
    train(plain, theirs, feature_batches(1))
    freeze_half(plain)
    model = offload(clone(plain))
    optimizer = slidecore.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"enter.bias, which is frozen"):
        optimizer.load_state_dict(theirs.state_dict())


def test_loading_between_backward_and_step(offload: Offload) -> None:
    """The gradients that wait stay."""
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
        side.step()
        state = copy.deepcopy(side.optimizer.state_dict())
        side.backward(feature_batches(1, seed=2)[0])
        side.optimizer.load_state_dict(state)
        side.step()
    assert_alike(mine, theirs)


# --- groups


def test_a_group_is_refused_after_a_state_with_steps_was_loaded(offload: Offload) -> None:
    def make() -> tuple[nn.Module, slidecore.AdamW]:
        model = offload(Stack())
        return model, slidecore.AdamW(model.blocks.parameters(), lr=1e-2)

    model, optimizer = make()
    train(model, optimizer, feature_batches(1))
    other, loading = make()
    loading.load_state_dict(optimizer.state_dict())
    with pytest.raises(slidecore.UsageError, match=r"after training began.*with lr=0"):
        loading.add_param_group({"params": list(other.leave.parameters())})


@pytest.mark.parametrize("update", UPDATES)
def test_a_group_whose_turn_comes_later(offload: Offload, update: str) -> None:
    """What the refusal of a late group says to write."""
    plain = Stack()
    pair = sides(offload, plain, update=update)
    for side in pair:
        side.optimizer.param_groups.clear()
        side.optimizer.add_param_group({"params": list(side.model.blocks.parameters()), **SETTINGS})
        side.optimizer.add_param_group({"params": list(side.model.enter.parameters()), **SETTINGS, "lr": 0.0})
        train(side.model, side.optimizer, feature_batches(2))
        side.optimizer.param_groups[1]["lr"] = 1e-2
        train(side.model, side.optimizer, feature_batches(2, seed=5))
    slidecore.synchronize(pair[0].model)
    for (name, a), (_, b) in zip(pair[0].model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6), name


# --- schedulers

Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=False),
    "CyclicLR, betas": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_all_schedulers_of_torch_are_tried() -> None:
    known = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= {name.partition(",")[0] for name in SCHEDULERS}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("update", UPDATES)
def test_schedulers(offload: Offload, update: str, kind: str) -> None:
    pair = sides(offload, Stack(depth=3), update=update)
    moved = []
    for side in pair:
        schedule = SCHEDULERS[kind](side.optimizer)
        rates = []
        for batch in feature_batches(8):
            loss = loss_of(side.model, batch)
            loss.backward()
            side.step()
            if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
                schedule.step(loss.item())
            else:
                schedule.step()
            group = side.optimizer.param_groups[0]
            rates.append((group["lr"], group["betas"]))
        moved.append(rates)
    for mine, theirs in zip(*moved, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-9)
        assert mine[1] == theirs[1]
    assert len(set(moved[0])) > 1
    if "betas" in kind or kind == "OneCycleLR":
        assert len({betas for _, betas in moved[0]}) > 2
    assert_alike(*pair)


def test_a_scheduler_that_steps_before_the_optimizer(offload: Offload) -> None:
    """PyTorch uses the new rate, with a warning; overlapping updates have used the old one, deferred ones have not."""
    for update in UPDATES:
        mine, theirs = sides(offload, Stack(), update=update)
        for side in (mine, theirs):
            schedule = lr_scheduler.LambdaLR(side.optimizer, lambda step: 0.5**step)
            side.backward(feature_batches(1)[0])
            with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before"):
                schedule.step()
            if update == "overlap" and side is mine:
                with pytest.raises(slidecore.UsageError, match=r"a scheduler's step\(\) comes after the optimizer's"):
                    side.optimizer.step()
            else:
                side.step()
        if update == "deferred":
            assert_alike(mine, theirs)


def test_a_loop_can_tell_skipped_steps_from_others(offload: Offload) -> None:
    model = offload(Stack())
    optimizer = slidecore.AdamW(model.parameters(), lr=1.0, skip_nonfinite=True)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for value in (1.0, math.nan, 1.0, math.inf):
        batch = feature_batches(1)[0]
        batch["x"][0] *= value
        loss_of(model, batch).backward()
        skipped = optimizer.skipped_steps
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.skipped_steps == skipped:
            schedule.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.param_groups[0]["lr"] == 0.25
