"""Hugging Face's Trainer with an offloaded model: the same losses and weights as without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _deferred import Offload
from _models import VOCABULARY, clone, distance, language_model, weights, worst
from slidecore.offloading import engine_of
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'slidecore[hf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'slidecore[hf]'")

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _no_accelerator_of_other_tests() -> Any:
    # What `accelerate` knows is the process's; other tests' loops are not run by it.
    yield
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def samples(count: int = 36) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (13,), generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def arguments(out: Path, **options: Any) -> Any:
    defaults = {
        "output_dir": str(out), "use_cpu": True, "per_device_train_batch_size": 3, "num_train_epochs": 1,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 5,
        "learning_rate": SETTINGS["lr"], "weight_decay": SETTINGS["weight_decay"],
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


def run(model: nn.Module, out: Path, optimizer: Any = None, resume: str | None = None, **options: Any) -> Any:
    """Trains; `optimizer` is one, or (class, options) for Trainer to make it with its groups."""
    given: dict[str, Any] = {}
    if isinstance(optimizer, tuple):
        given["optimizer_cls_and_kwargs"] = optimizer
    elif optimizer is not None:
        given["optimizers"] = (optimizer, None)
    trainer = transformers.Trainer(
        model=model, args=arguments(out, **options), train_dataset=samples(), eval_dataset=samples(4), **given
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_training(mine: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    slidecore.synchronize(mine.model)
    assert history(mine, "loss") == pytest.approx(history(theirs, "loss"), abs=1e-4)
    assert len(set(history(theirs, "loss"))) > 2
    assert history(mine, "learning_rate") == history(theirs, "learning_rate")
    value, name = worst(distance(weights(mine.model), weights(theirs.model)))
    assert value < tolerance, name


def start() -> nn.Module:
    return language_model("llama", tied=True, layers=3).train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 5},  # the last step has fewer passes
        {"max_grad_norm": 0.5, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
        {"max_grad_norm": 0.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 4, "eval_strategy": "steps", "eval_steps": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("ours", [{}, {"update": "deferred"}, {"max_grad_norm": 1.0}], ids=str)
def test_training_equals_a_plain_run(
    offload: Offload, tmp_path: Path, options: dict[str, Any], ours: dict[str, Any]
) -> None:
    if "max_grad_norm" in ours and "max_grad_norm" in options:
        ours = {"max_grad_norm": options["max_grad_norm"] or 1e9}
    plain = start()
    model = offload(clone(plain))
    theirs = run(plain, tmp_path / "theirs", torch.optim.AdamW(plain.parameters(), **SETTINGS), **options)
    mine = run(model, tmp_path / "mine", slidecore.AdamW(model.parameters(), **SETTINGS, **ours), **options)
    assert_same_training(mine, theirs)
    assert history(mine, "grad_norm") == pytest.approx(history(theirs, "grad_norm"), rel=1e-3)
    assert len(history(theirs, "grad_norm")) > 2
    assert history(mine, "eval_loss") == pytest.approx(history(theirs, "eval_loss"), abs=1e-4)


@pytest.mark.parametrize("passes", [1, 3])
def test_trainer_makes_the_optimizer(offload: Offload, tmp_path: Path, passes: int) -> None:
    """With its own groups: no decay on norms and biases."""
    plain = start()
    model = offload(clone(plain))
    options = {"gradient_accumulation_steps": passes}
    theirs = run(plain, tmp_path / "theirs", (torch.optim.AdamW, {"lr": 1e-3}), **options)
    mine = run(model, tmp_path / "mine", (slidecore.AdamW, {"lr": 1e-3}), **options)
    assert [g["weight_decay"] for g in mine.optimizer.param_groups] == [0.1, 0.0]
    assert_same_training(mine, theirs)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [1, 3])
def test_resuming_from_a_checkpoint(offload: Offload, tmp_path: Path, passes: int, compute_dtype: torch.dtype) -> None:
    """To the bit, in bfloat16 too: the checkpoint has what masters have beyond the weights."""
    options = {"gradient_accumulation_steps": passes, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5}
    runs = []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-2")):
        model = offload(start(), compute_dtype=compute_dtype)
        optimizer = slidecore.AdamW(model.parameters(), **SETTINGS)
        runs.append(run(model, tmp_path / ("resumed" if resume else "whole"), optimizer, resume, **options))
    whole, resumed = runs
    assert whole.state.global_step == resumed.state.global_step > 2
    assert history(whole, "loss") == history(resumed, "loss")
    for name, _ in whole.model.named_parameters():
        a, b = (slidecore.master_parameter(trainer.model, name) for trainer in runs)
        assert torch.equal(a, b), name


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_overlapping_updates_say_what_to_write(offload: Offload, tmp_path: Path, max_grad_norm: float) -> None:
    model = offload(start())
    optimizer = slidecore.AdamW(model.parameters(), update="overlap")
    with pytest.raises(slidecore.UsageError, match=r"Trainer wants the norm at every step.*'auto'.*'deferred'"):
        run(model, tmp_path, optimizer, max_grad_norm=max_grad_norm)


def test_auto_defers_where_accelerate_runs_the_training(offload: Offload, tmp_path: Path) -> None:
    model = offload(start())
    optimizer = slidecore.AdamW(model.parameters())
    engine = engine_of(model)
    assert not engine.defers(optimizer)
    trainer = run(model, tmp_path, optimizer)
    assert engine.updates is engine.deferred
    assert trainer.optimizer.optimizer is optimizer


def test_an_accelerate_loop(offload: Offload) -> None:
    """prepare() takes the optimizer's state out and puts it back; clipping and accumulation go through accelerate."""
    from accelerate import Accelerator

    plain = start()
    found = []
    for model in (offload(clone(plain)), plain):
        kind = torch.optim.AdamW if model is plain else slidecore.AdamW
        optimizer = kind(model.parameters(), **SETTINGS)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        for _ in range(2):  # prepared again when it has a state
            model, prepared = accelerator.prepare(model, optimizer)
            for sample in samples(4):
                with accelerator.accumulate(model):
                    batch = {name: value[None] for name, value in sample.items()}
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    prepared.step()
                    prepared.zero_grad()
        if model is not plain:
            slidecore.synchronize(model)
        found.append((weights(model), copy.deepcopy(optimizer.state_dict()["state"])))
    assert worst(distance(found[0][0], found[1][0]))[0] < 1e-5
    for index, expected in found[1][1].items():
        assert found[0][1][index]["step"] == expected["step"] == 4
