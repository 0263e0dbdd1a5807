"""The whole run against a plain PyTorch loop, and what it leaves behind when it stops on its way."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import transformers
from safetensors.torch import load_file, save_file
from slidecore.errors import BudgetError, CheckpointError, InputError, InterruptedRunError, TrainingError
from slidecore.finetune import compute, loop, output
from slidecore.finetune.data import find_files, pack
from slidecore.finetune.options import Options
from slidecore.finetune.plots import plot_loss, plot_timeline
from slidecore.finetune.report import Progress, summary_lines
from slidecore.finetune.training import Training


@pytest.fixture
def options(model_dir: Path, text_file: Path, tmp_path: Path) -> Options:
    return Options(
        model=model_dir,
        data=text_file,
        out=tmp_path / "out",
        sequence_length=17,
        batch_size=3,
        steps=3,
        lr=1e-2,
        warmup=1,
        weight_decay=0.1,
        device="cpu",
        compute_dtype="float32",
        seed=4,
        trace_step=2,
    )


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / output.METRICS).read_text().splitlines()]


def _plain(options: Options, steps: int, tmp_path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same run in plain PyTorch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    (tmp_path / "plain").mkdir()
    data = pack(
        find_files(options.data), tokenizer, sequence_length=options.sequence_length, cache_dir=tmp_path / "plain"
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr,
    )
    losses = []
    for step in range(steps):
        share = 0.5 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * share
        loss = model(**data.batch(step, options.batch_size, options.seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_a_run_trains_as_plain_pytorch_and_writes_a_model(options: Options, tmp_path: Path) -> None:
    summary = loop.run(options)
    losses, weights = _plain(options, 3, tmp_path)

    metrics = _lines(options.out)
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    assert [entry["loss"] for entry in metrics] == pytest.approx(losses, abs=1e-4)
    assert [entry["lr"] for entry in metrics] == pytest.approx([0.5e-2, 1e-2, 0.5e-2])
    for entry in metrics:
        assert entry["tokens_per_second"] == pytest.approx(3 * 17 / entry["seconds"])
        assert entry["device_memory"] > 0
        assert entry["host_memory"] > 0

    trained = transformers.AutoModelForCausalLM.from_pretrained(options.out)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5, msg=name)
    assert transformers.AutoTokenizer.from_pretrained(options.out)("ab")["input_ids"] == [97, 98]

    assert summary.first_loss == pytest.approx(losses[0], abs=1e-4)
    assert summary.last_loss == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert summary.parameters == sum(p.numel() for p in trained.parameters())
    assert summary.ordinary_training_bytes > 0
    for name in (output.LOSS_PLOT, output.TIMELINE_PLOT):
        assert (options.out / name).read_bytes().startswith(b"\x89PNG")
    json.loads((options.out / output.TRACE).read_text())
    assert not [path for path in options.out.iterdir() if path.name.startswith(".")]


def test_bfloat16_keeps_the_dtype_in_what_is_written(options: Options) -> None:
    loop.run(dataclasses.replace(options, compute_dtype="bfloat16", trace_step=0))
    assert {tensor.dtype for tensor in load_file(options.out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((options.out / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (options.out / output.TRACE).exists()


def test_clipping_makes_the_steps_of_a_small_norm(options: Options) -> None:
    """AdamW's first step does not depend on the gradient's length, but the second moment of later ones does."""
    loop.run(dataclasses.replace(options, max_grad_norm=1e-3))
    clipped = _lines(options.out)
    assert all(entry["grad_norm"] > 1e-3 for entry in clipped)
    loop.run(dataclasses.replace(options, max_grad_norm=1e9, overwrite=True))
    free = _lines(options.out)
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-6)
    assert clipped[-1]["loss"] != free[-1]["loss"]
    loop.run(dataclasses.replace(options, overwrite=True))
    plain = _lines(options.out)
    assert [entry["loss"] for entry in plain] == [entry["loss"] for entry in free]
    assert {entry["grad_norm"] for entry in plain} == {None}


def _spoil_gradients(monkeypatch: pytest.MonkeyPatch, bad_steps: Any) -> None:
    """Makes the norm of these steps' gradients infinite; their losses stay finite."""
    update = loop.Training._update

    def spoilt(training: Any, number: int) -> tuple[float, float]:
        huge = math.inf if number in bad_steps else 1.0
        handle = training.model.model.norm.register_forward_hook(
            lambda _module, _inputs, out: out.register_hook(lambda g: g * huge) and None
        )
        try:
            return update(training, number)
        finally:
            handle.remove()

    monkeypatch.setattr(loop.Training, "_update", spoilt)


def test_skipped_steps_are_counted_and_said(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_gradients(monkeypatch, {2, 3})
    summary = loop.run(dataclasses.replace(options, max_grad_norm=1.0, steps=4))
    assert summary.skipped == 2
    assert "WARNING        2 of 4 steps were skipped" in summary_lines(summary)[-1]
    entries = [
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        for line in (options.out / output.METRICS).read_text().splitlines()
    ]
    assert [entry["skipped"] for entry in entries] == [False, True, True, False]
    assert [entry["grad_norm"] is None for entry in entries] == [False, True, True, False]


def test_a_run_that_skips_every_step_stops(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_gradients(monkeypatch, range(3, 100))
    with pytest.raises(TrainingError, match="10 steps in a row, the last of them step 12, were not finite") as error:
        loop.run(dataclasses.replace(options, max_grad_norm=1.0, steps=50, save_every=5, trace_step=0))
    assert "step-000010, another --out and a lower --lr" in error.value.hint
    assert [entry["skipped"] for entry in _lines(options.out)] == [False] * 2 + [True] * 10
    assert not (options.out / "config.json").exists()


def test_metrics_that_cannot_be_written_do_not_stop_the_run(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        calls = 0

        def write(self, data: Any) -> int:
            Full.calls += 1
            if Full.calls == 2:
                return super().write(bytes(data)[:5])  # the last bytes that there is room for
            if Full.calls in (3, 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr("slidecore.finetune.report.io.FileIO", Full)
    summary = loop.run(dataclasses.replace(options, steps=5))
    assert [entry["step"] for entry in _lines(options.out)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("No space left") == 1
    assert "metrics.jsonl: No space left" in summary_lines(summary)[-1]


def test_moments_in_8_bits_take_less_memory_and_learn_alike(options: Options) -> None:
    wide = loop.run(options)
    wide_losses = [entry["loss"] for entry in _lines(options.out)]
    narrow = loop.run(dataclasses.replace(options, moments="8bit", overwrite=True))
    # 12 bytes a parameter become 6.0625, but each of a small chunk's planes is padded to whole pages.
    assert wide.planes_bytes - narrow.planes_bytes > 4.5 * narrow.parameters
    losses = [entry["loss"] for entry in _lines(options.out)]
    assert losses != wide_losses
    assert losses == pytest.approx(wide_losses, abs=0.05)


def test_a_run_with_its_state_on_disk_is_the_same_run(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.run(options)
    expected, losses = load_file(options.out / "model.safetensors"), [e["loss"] for e in _lines(options.out)]
    disk = tmp_path / "disk"
    disk.mkdir()
    on_disk = dataclasses.replace(options, disk=(disk,), host_memory=1, overwrite=True)
    with pytest.raises(InputError, match=r"host_memory.* at least \d+ bytes") as error:
        loop.run(on_disk)
    least = re.search(r"at least (\d+) bytes", str(error.value))
    assert least is not None
    loop.run(dataclasses.replace(on_disk, host_memory=int(least[1])))
    assert re.search(r"on disk: a step reads .* and writes .* written in 1000 steps", capsys.readouterr().out)
    assert [e["loss"] for e in _lines(options.out)] == losses
    saved = load_file(options.out / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert list(disk.iterdir()) == []
    with pytest.raises(InputError, match="--disk-memory is given without --disk"):
        dataclasses.replace(options, disk_memory="1GiB").check()


def test_figures_of_an_earlier_run_do_not_stay(options: Options) -> None:
    loop.run(options)
    loop.run(dataclasses.replace(options, overwrite=True, trace_step=0))
    assert (options.out / output.LOSS_PLOT).exists()
    assert not (options.out / output.TIMELINE_PLOT).exists()
    assert not (options.out / output.TRACE).exists()


def test_epochs_set_the_number_of_steps(options: Options) -> None:
    tokens = len(options.data.read_bytes()) + 1
    per_epoch = tokens // 17 // 3
    loop.run(dataclasses.replace(options, steps=None, epochs=0.1, trace_step=0))
    assert len(_lines(options.out)) == round(0.1 * per_epoch)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(options: Options) -> None:
    weights = load_file(options.model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, options.model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="nan at step 1"):
        loop.run(options)
    assert not (options.out / "config.json").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_the_last_update_ruined_are_not_saved(
    options: Options, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    def ruinous(training: loop.Training, number: int) -> tuple[float, float]:
        next(training.model.parameters()).data.view(-1)[3] = bad
        return 2.0, 1e-3

    monkeypatch.setattr(loop.Training, "_update", ruinous)
    with pytest.raises(TrainingError, match="no longer finite after step"):
        loop.run(options)
    assert not (options.out / "config.json").exists()


def test_a_budget_refused_in_the_first_step_leaves_the_directory_for_the_next_run(options: Options) -> None:
    with pytest.raises(BudgetError, match="too small for this batch"):
        loop.run(dataclasses.replace(options, device_memory="180KiB", batch_size=16))
    assert not list(options.out.iterdir())
    loop.run(options)


def test_a_run_refused_in_its_first_step_leaves_the_earlier_one(options: Options) -> None:
    loop.run(dataclasses.replace(options, save_every=1))
    before = {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()}
    assert any(output.CHECKPOINTS in path.parts for path in before)
    with pytest.raises(BudgetError, match="too small for this batch"):
        loop.run(dataclasses.replace(options, device_memory="180KiB", batch_size=16, overwrite=True))
    assert {path: path.read_bytes() for path in options.out.rglob("*") if path.is_file()} == before
    # A run that begins takes its place, with the figures of its own first step.
    loop.run(dataclasses.replace(options, overwrite=True, trace_step=1, steps=1))
    assert not (options.out / output.CHECKPOINTS).exists()
    assert len(_lines(options.out)) == 1
    assert (options.out / output.TRACE).read_bytes() != before[options.out / output.TRACE]


def test_the_traced_steps_time_is_without_its_picture(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def slow(*_: Any, **__: Any) -> None:
        drawn.append(True)
        time.sleep(2)

    monkeypatch.setattr("slidecore.finetune.training.plot_timeline", slow)
    loop.run(options)
    assert drawn == [True]
    assert _lines(options.out)[1]["seconds"] < 2


def test_an_interrupt_says_what_is_lost_and_leaves_no_half_model(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.Training.step

    def interrupted(self: Any, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(loop.Training, "step", interrupted)
    with pytest.raises(InterruptedRunError, match="the updates of 2 steps are lost") as error:
        loop.run(options)
    assert error.value.exit_code == 130
    assert len(_lines(options.out)) == 2
    assert not (options.out / "config.json").exists()
    assert not [path for path in options.out.iterdir() if path.name.startswith(".")]


def test_a_save_that_fails_leaves_the_earlier_model(
    options: Options, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, offload: Any
) -> None:
    model = offload(transformers.AutoModelForCausalLM.from_pretrained(options.model))
    out = output.OutputDirectory(tmp_path / "out")
    out.save_model(model, tokenizer)
    before = {path.name: path.read_bytes() for path in out.path.iterdir()}

    def fail(directory: Path, **_: Any) -> None:
        (directory / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        out.save_model(model, tokenizer)
    assert {path.name: path.read_bytes() for path in out.path.iterdir()} == before


def test_overwriting_leaves_nothing_of_the_earlier_model(
    options: Options, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, offload: Any
) -> None:
    model = offload(transformers.AutoModelForCausalLM.from_pretrained(options.model))
    monkeypatch.setattr(output, "SHARD_SIZE", "10KB")
    output.OutputDirectory(tmp_path / "out").save_model(model, tokenizer)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    (tmp_path / "out" / ".saving-abc").mkdir()  # of a killed run
    monkeypatch.setattr(output, "SHARD_SIZE", "1GB")
    output.OutputDirectory(tmp_path / "out", overwrite=True).save_model(model, tokenizer)
    assert [path.name for path in (tmp_path / "out").glob("*model*")] == ["model.safetensors"]
    assert not (tmp_path / "out" / ".saving-abc").exists()


def test_a_directory_is_one_runs_at_a_time(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Training.step

    def another(self: Any, number: int) -> Any:
        before = sorted(path.name for path in options.out.iterdir())
        with pytest.raises(InputError, match="another run is writing"):
            output.OutputDirectory(options.out, overwrite=True)
        assert sorted(path.name for path in options.out.iterdir()) == before
        return step(self, number)

    monkeypatch.setattr(loop.Training, "step", another)
    loop.run(options)
    # Free again afterwards, and after a refusal.
    with pytest.raises(InputError, match="is not empty"):
        output.OutputDirectory(options.out)
    output.OutputDirectory(options.out, overwrite=True)


@pytest.mark.parametrize("where", ["pack", "save"])
def test_a_full_disk_is_a_clear_error(where: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("as libraries wrap it") from error

    if where == "pack":
        monkeypatch.setattr(loop, "pack", full)
    else:
        monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(TrainingError, match="is full; the model was not written"):
        loop.run(options)
    assert not [path for path in options.out.iterdir() if path.name.startswith(".")]


def test_too_little_space_is_found_before_training(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="GiB free"):
        loop.run(options)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (4, 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (4, 2, [1 / 3, 2 / 3, 1, 0.5]),
        (2, 2, [1 / 3, 2 / 3]),
        (1, 0, [1]),
    ],
)
def test_the_schedule_warms_up_and_falls_as_a_cosine(steps: int, warmup: int, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = loop.cosine_schedule(optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * rate for rate in expected])


def test_warmup_is_a_share_or_a_number() -> None:
    base = {"model": Path(), "data": Path(), "out": Path()}
    assert Options(**base, warmup=0.1).warmup_steps(50) == 5
    assert Options(**base, warmup=7).warmup_steps(50) == 7
    assert Options(**base, warmup=100).warmup_steps(50) == 50


def test_weight_decay_leaves_norms_and_biases_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    decayed, others = loop.parameter_groups(model, 0.3)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert len(others["params"]) == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16", torch.bfloat16),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16", torch.float32),
        ("flags\t\t: fpu amx_bf16 amx_tile", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f", torch.float32),
        ("no such line", torch.float32),
    ],
)
def test_auto_computes_in_what_this_cpu_has_units_for(
    line: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    monkeypatch.setattr(compute, "_CPU_INFO", tmp_path / "cpuinfo")
    assert compute.choose_compute_dtype("auto", "cpu") == expected
    assert compute.choose_compute_dtype("float32", "cuda") == torch.float32
    assert compute.choose_compute_dtype("auto", "cuda:1") == torch.bfloat16
    monkeypatch.setattr(compute, "_CPU_INFO", tmp_path / "none")
    assert compute.choose_compute_dtype("auto", "cpu") == torch.float32


def test_a_run_says_first_where_it_computes(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.run(options)
    assert capsys.readouterr().out.splitlines()[0] == "computing on the CPU in float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.describe_compute("auto", torch.bfloat16).endswith(
        f"in bfloat16: PyTorch {torch.__version__} sees no card"
    )


def test_pictures_of_little_or_nothing_are_still_pictures(tmp_path: Path) -> None:
    plot_loss(tmp_path / "one.png", [1.0])
    plot_timeline(tmp_path / "none.png", [])
    plot_timeline(tmp_path / "new.png", [("new lane", "new kind", -1, 5, 5, 0)])
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_terminal_gets_a_bar_with_the_figures(options: Options) -> None:
    from rich.console import Console

    text = io.StringIO()
    loop.run(
        dataclasses.replace(options, trace_step=0),
        Progress(Console(file=text, force_terminal=True, width=160)),
    )
    assert "3/3" in text.getvalue()
    assert "tokens/s" in text.getvalue()


def test_a_narrow_terminal_shows_step_time_left_and_loss(options: Options) -> None:
    from rich.console import Console

    text = io.StringIO()
    loop.run(
        dataclasses.replace(options, trace_step=7),
        Progress(Console(file=text, force_terminal=True, width=80, color_system=None)),
    )
    assert re.search(r"3/3 \S+ left [\d:]+ loss \d+\.\d{3}  [\d,]+ tokens/s", text.getvalue())
    assert "no step is traced: --trace-step is 7, and there are 3" in text.getvalue()


@pytest.mark.parametrize(
    "kind", [OSError, torch.OutOfMemoryError, slidecore._core.IoError, slidecore._core.DeviceError]
)
def test_what_fails_around_it_ends_a_run_in_one_sentence(
    options: Options, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Training._update

    def fail(self: Training, number: int) -> Any:
        if number == 3:
            raise kind("reading swap-0.bin failed")
        return update(self, number)

    monkeypatch.setattr(Training, "_update", fail)
    with pytest.raises(TrainingError, match=r"stopped at step 3: reading swap-0\.bin failed") as error:
        loop.run(dataclasses.replace(options, save_every=2))
    assert "--resume goes on after step 2" in error.value.hint


def test_the_device_holds_less_than_the_planes(options: Options) -> None:
    summary = loop.run(dataclasses.replace(options, batch_size=1, micro_batch=1, trace_step=0))
    assert summary.device_memory_peak < summary.ordinary_training_bytes
    assert slidecore is not None
