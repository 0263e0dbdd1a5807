"""A run that was stopped and taken up again against the run that was never stopped: the same in every bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slidecore
import torch
from _models import Residual, Stack, freeze_half, language_model
from _runs import Run, batches_for, differences, seed_all
from torch import nn

Offload = Callable[..., nn.Module]


def build(kind: str, seed: int) -> nn.Module:
    if kind == "stack":
        return Stack(seed=seed, dropout=0.2)
    if kind == "tied":
        return language_model("gpt2", seed=seed, dropout=0.2, tied=True)
    if kind == "frozen":
        model = language_model("gpt2", seed=seed, dropout=0.1, tied=True)
        freeze_half(model)
        return model
    return language_model(kind, seed=seed)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": parameters[::2], "lr": 3e-3},
        {"params": parameters[1::2], "weight_decay": 0.0, "betas": (0.8, 0.95)},
    ]


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)


def several(optimizer: torch.optim.Optimizer) -> Any:
    """Schedulers inside one another, and a Counter in the state of one of them."""
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    falling = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.3)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("stack", {}),
        ("stack", {"window": 3, "micro_batch": 2, "groups": groups, "schedule": cosine}),
        ("tied", {"window": 3}),
        ("frozen", {"micro_batch": 1, "groups": groups, "schedule": several}),
        ("llama", {"window": 1, "keep_graphs": 0, "device_memory": "64MiB"}),
        ("tied", {"optimizer": {"update": "deferred"}, "schedule": cosine}),
        ("frozen", {"optimizer": {"max_grad_norm": 0.05}, "groups": groups}),
        ("stack", {"optimizer": {"max_grad_norm": 0.1, "skip_nonfinite": True}, "accumulate": 3}),
        ("frozen", {"moments": "8bit"}),
    ],
    ids=["plain", "groups", "tied-window-3", "frozen", "untied-budget", "deferred", "clipped", "summed", "8bit"],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    kind: str, options: dict[str, Any], dtype: torch.dtype, offload: Offload, tmp_path: Path
) -> None:
    batches = batches_for(build(kind, 0), 7)
    whole = Run(build(kind, 0), offload, compute_dtype=dtype, **options)
    seed_all(5)
    expected = whole.train(batches)
    final = whole.state()
    whole.close()

    stopped = Run(build(kind, 0), offload, compute_dtype=dtype, **options)
    seed_all(5)
    before = stopped.train(batches[:3])
    # Saving changes nothing, and can be done again.
    stopped.save(tmp_path / "step-3", extra={"position": 3})
    before += stopped.train(batches[3:4])
    stopped.save(tmp_path / "step-4", extra={"position": 4})
    before += stopped.train(batches[4:])
    assert before == expected
    assert differences(stopped.state(), final) == []
    stopped.close()

    for step in (3, 4):
        seed_all(99)  # another life: other weights, other random states
        resumed = Run(build(kind, 1), offload, compute_dtype=dtype, **options)
        resumed.train(batches_for(resumed.model, 2))
        assert resumed.load(tmp_path / f"step-{step}") == {"position": step}
        assert resumed.train(batches[step:]) == expected[step:]
        assert differences(resumed.state(), final) == []
        resumed.close()


def test_a_model_without_weights_is_filled(offload: Offload, tmp_path: Path) -> None:
    batches = batches_for(build("llama", 0), 4)
    first = Run(build("llama", 0), offload)
    first.train(batches[:2])
    first.save(tmp_path / "c")
    first.train(batches[2:])

    buffers = dict(build("llama", 0).named_buffers())
    with torch.device("meta"):
        empty = build("llama", 0)
    for name, buffer in buffers.items():
        module, _, attribute = name.rpartition(".")
        empty.get_submodule(module)._buffers[attribute] = buffer
    second = Run(empty, offload, compute_dtype=torch.float32)
    second.load(tmp_path / "c")
    second.train(batches[2:])
    assert differences(second.state(), first.state()) == []


class Counting(nn.Module):
    """A block with buffers of every sort, and state of its own that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(13, 29)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(13, 2).t())  # not contiguous
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "shape": (1, 2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["shape"] == (1, 2)
        self.calls = state["calls"]


def test_buffers_and_states_of_modules_are_kept(offload: Offload, tmp_path: Path) -> None:
    first = Run(Stack(block=Counting), offload)
    first.train(batches_for(first.model, 1))
    block: Any = first.model.blocks[2]
    block.calls = 17
    block.mean.normal_()
    block.count.fill_(1 << 40)
    block.flags[1] = True
    block.scratch.fill_(3.0)
    first.save(tmp_path / "c")

    second = Run(Stack(block=Counting), offload)
    mean = second.model.blocks[2].mean
    second.load(tmp_path / "c")
    loaded: Any = second.model.blocks[2]
    assert loaded.mean is mean  # filled, not replaced
    assert torch.equal(mean, block.mean)
    assert loaded.count == 1 << 40
    assert loaded.flags.tolist() == [False, True, False]
    assert loaded.calls == 17
    assert loaded.scratch == 0


def test_the_random_states_of_all_generators_go_on(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    seed_all(3)
    run.train(batches_for(run.model, 1))
    np.random.standard_normal()  # leaves a second value waiting
    run.save(tmp_path / "c")

    def draw() -> list[float]:
        return [torch.rand(()).item(), float(np.random.standard_normal()), np.random.rand(), random.random()]

    expected = draw()
    seed_all(4)
    run.load(tmp_path / "c")
    assert draw() == expected
    seed_all(4)
    other = draw()
    seed_all(4)
    run.load(tmp_path / "c", random_state=False)
    assert draw() == other


def test_what_the_caller_gives_comes_back(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    extra = {
        "epoch": 3,
        "position": (1, 2, [None, True, "é", b"x", 1e-300, float("inf")]),
        "seen": {4, 5},
        7: {"order": torch.randperm(9), "mean": torch.tensor(0.1, dtype=torch.bfloat16)},
    }
    run.save(tmp_path / "c", extra=extra)
    back = run.load(tmp_path / "c")
    assert back.keys() == extra.keys()
    assert (back["epoch"], back["position"], back["seen"]) == (3, extra["position"], {4, 5})
    for name, tensor in extra[7].items():  # type: ignore[attr-defined]
        assert torch.equal(back[7][name], tensor)
    assert back[7]["mean"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": [1, np.float64(2)]}, r"extra\['a'\]\[1\] is a numpy.float64"),
        ({"a": np.zeros(2)}, r"extra\['a'\] is a numpy.ndarray"),
        (Path("x"), "extra is a pathlib"),
        ({Path("x"): 1}, "a key of extra is a pathlib"),
        ((1, lambda: 2), r"extra\[1\] is a builtins.function"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(
    extra: Any, message: str, offload: Offload, tmp_path: Path
) -> None:
    run = Run(Stack(), offload)
    with pytest.raises(slidecore.UsageError, match=message):
        run.save(tmp_path / "c", extra=extra)
    assert not list(tmp_path.iterdir())


def test_inside_a_step_nothing_is_saved_or_loaded(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    batch = batches_for(run.model, 1)[0]
    run.save(tmp_path / "before")
    loss = run.loss(batch)
    for action in (lambda: run.save(tmp_path / "c"), lambda: run.load(tmp_path / "before")):
        with pytest.raises(slidecore.UsageError, match="waits for its backward"):
            action()
    loss.backward()
    for action in (lambda: run.save(tmp_path / "c"), lambda: run.load(tmp_path / "before")):
        with pytest.raises(slidecore.UsageError, match=r"optimizer.step\(\) has not"):
            action()
    run.optimizer.step()
    run.save(tmp_path / "after")
    # A result that was dropped is no step.
    del loss
    run.loss(batch)
    run.save(tmp_path / "dropped")
    with torch.no_grad():
        kept = run.loss(batch)
    run.save(tmp_path / "evaluated")
    assert kept.isfinite()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before", "dropped", "evaluated"]


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")


def test_gradients_that_wait_are_not_lost_in_a_checkpoint(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload, optimizer={"update": "deferred"})
    batches = batches_for(run.model, 2)
    run.save(tmp_path / "before")
    run.loss(batches[0]).backward()
    for action in (lambda: run.save(tmp_path / "c"), lambda: run.load(tmp_path / "before")):
        with pytest.raises(slidecore.UsageError, match=r"gradients wait for optimizer\.step\(\)"):
            action()
    with run.model.no_sync():  # type: ignore[operator]
        run.loss(batches[1]).backward()
    with pytest.raises(slidecore.UsageError, match="gradients wait"):
        run.save(tmp_path / "c")
    run.optimizer.step()
    run.save(tmp_path / "c")  # waits for the updates that step() has started
    after = run.state()
    run.train(batches)
    run.load(tmp_path / "c")
    assert differences(run.state(), after) == []
    run.loss(batches[0]).backward()
    run.optimizer.zero_grad()
    run.save(tmp_path / "dropped")


def test_the_count_of_skipped_steps_goes_on(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload, optimizer={"skip_nonfinite": True})
    (batch,) = batches_for(run.model, 1)
    run.train([batch, {**batch, "x": batch["x"] * float("inf")}])
    assert run.optimizer.skipped_steps == 1
    run.save(tmp_path / "c")
    other = Run(Stack(seed=1), offload, optimizer={"skip_nonfinite": True})
    other.load(tmp_path / "c")
    assert other.optimizer.skipped_steps == 1
    assert differences(other.state(), run.state()) == []


def test_half_a_backward_is_not_saved(offload: Offload, tmp_path: Path) -> None:
    class Fails(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(Failing.apply(x) if self.fails else x)

        fails = False

    run = Run(Stack(block=lambda: Fails(13, 29)), offload)
    run.model.blocks[1].fails = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="on purpose"):
        run.loss(batches_for(run.model, 1)[0]).backward()
    with pytest.raises(slidecore.UsageError, match="backward pass has not finished"):
        run.save(tmp_path / "c")


def test_models_that_do_not_train_and_strange_optimizers_are_refused(offload: Offload, tmp_path: Path) -> None:
    first, second = Run(Stack(), offload), Run(Stack(), offload)
    with pytest.raises(slidecore.UsageError, match=r"not the slidecore\.AdamW of this model"):
        slidecore.save_checkpoint(first.model, second.optimizer, tmp_path / "c")
    first.save(tmp_path / "c")
    with pytest.raises(slidecore.UsageError, match=r"not the slidecore\.AdamW of this model"):
        slidecore.load_checkpoint(second.model, first.optimizer, tmp_path / "c")
    infers = offload(Stack(), train=False)
    with pytest.raises(slidecore.UsageError, match="train=False"):
        slidecore.save_checkpoint(infers, first.optimizer, tmp_path / "d")
    with pytest.raises(slidecore.UsageError, match="is not offloaded"):
        slidecore.save_checkpoint(Stack(), first.optimizer, tmp_path / "d")
    with pytest.raises(ValueError, match="keep=0"):
        first.save(tmp_path / "d", keep=0)
    with pytest.raises(ValueError, match="threads=-1"):
        first.save(tmp_path / "d", threads=-1)


def test_without_verification_the_state_is_the_same(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(dropout=0.1), offload, compute_dtype=torch.bfloat16)
    run.train(batches_for(run.model, 2))
    run.save(tmp_path / "c", threads=3)
    other = Run(Stack(seed=4, dropout=0.1), offload, compute_dtype=torch.bfloat16)
    other.load(tmp_path / "c", verify=False, threads=1)
    assert differences(other.state(), run.state()) == []
