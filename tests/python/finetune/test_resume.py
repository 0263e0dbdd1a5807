"""A run that stops on its way and goes on with --resume: the run that was never stopped, in every bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import transformers
from safetensors.torch import load_file
from slidecore.cli import main
from slidecore.errors import CheckpointError, InputError, InterruptedRunError, TerminatedRunError, TrainingError
from slidecore.finetune import loop, output, resuming
from slidecore.finetune.data import find_files, pack
from slidecore.finetune.options import Options
from slidecore.finetune.report import StepMetrics, summary_lines


@pytest.fixture
def options(model_dir: Path, text_file: Path, tmp_path: Path) -> Options:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return Options(
        model=model_dir,
        data=text_file,
        out=tmp_path / "out",
        sequence_length=17,
        batch_size=3,
        steps=6,
        lr=1e-2,
        warmup=2,
        weight_decay=0.1,
        device="cpu",
        compute_dtype="bfloat16",
        seed=4,
        trace_step=0,
        save_every=2,
        eval_every=2,
        eval_fraction=0.1,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics, without what is of the clock and the machine."""
    metrics = [json.loads(line) for line in (out / output.METRICS).read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "lr", "eval_loss")} for line in metrics]


def model_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_models(left: Path, right: Path) -> bool:
    a, b = model_of(left), model_of(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def whole_run(options: Options) -> Path:
    out = options.out.parent / "whole"
    loop.run(dataclasses.replace(options, out=out))
    return out


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> Any:
    """Runs `action` inside a step, before its update; returns the context to undo it."""
    update = loop.Training._update

    def acting(training: Any, step: int) -> Any:
        if step == number:
            action()
        return update(training, step)

    monkeypatch.setattr(loop.Training, "_update", acting)
    return update


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGINT, InterruptedRunError, 130),
        (signal.SIGTERM, TerminatedRunError, 143),
        (signal.SIGHUP, TerminatedRunError, 143),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals,
    error: type[InterruptedRunError],
    code: int,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = whole_run(options)
    options = dataclasses.replace(options, save_every=0)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(
            error, match=r"interrupted after step 3 of 6; everything is saved in .*step-000003"
        ) as raised:
            loop.run(options)
    assert raised.value.exit_code == code
    assert "--resume" in raised.value.hint
    assert "finishing this step" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert names(options.out / output.CHECKPOINTS) == ["step-000003"]
    assert not (options.out / "config.json").exists()
    assert lines(options.out) == lines(whole)[:3]

    torch.manual_seed(123)
    summary = loop.run(dataclasses.replace(options, resume=True))
    assert lines(options.out) == lines(whole)
    assert same_models(options.out, whole)
    assert summary.steps == 6
    assert summary.first_loss == lines(whole)[0]["loss"]
    assert summary.eval_loss == lines(whole)[-1]["eval_loss"]
    assert (options.out / output.LOSS_PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_died_goes_on_from_its_last_checkpoint(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_run(options)
    assert names(whole / output.CHECKPOINTS) == ["step-000004", "step-000006"]

    def die() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, 6, die)
        with pytest.raises(RuntimeError, match="power cut"):
            loop.run(options)
    assert len(lines(options.out)) == 5
    capsys.readouterr()
    loop.run(dataclasses.replace(options, resume=True))
    assert "step 5/6" in capsys.readouterr().out
    assert lines(options.out) == lines(whole)
    assert same_models(options.out, whole)
    # Ended, it may be resumed again, as a machine that restarts jobs does: nothing is left to do.
    loop.run(dataclasses.replace(options, resume=True))
    assert lines(options.out) == lines(whole)
    assert same_models(options.out, whole)


def test_checkpoints_are_models_with_their_tokenizer(options: Options) -> None:
    loop.run(dataclasses.replace(options, keep=1))
    (path,) = (options.out / output.CHECKPOINTS).iterdir()
    assert path.name == "step-000006"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(t, model_of(options.out)[name]) for name, t in model.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(path)("ab")["input_ids"] == [97, 98]


@pytest.mark.parametrize("way", ["due", "interrupted"])
def test_ruined_weights_are_in_no_checkpoint_and_the_last_good_one_stays(
    way: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop.Training._update

    def ruinous(training: Any, step: int) -> Any:
        taken = update(training, step)
        if step == 4:
            slidecore.synchronize(training.model)
            next(training.model.parameters()).data.view(-1)[3] = math.nan
            if way == "interrupted":
                os.kill(os.getpid(), signal.SIGTERM)
        return taken

    options = dataclasses.replace(options, keep=1, save_every=2 if way == "due" else 3, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_update", ruinous)
        with pytest.raises(TrainingError, match=r"no longer finite after step 4; .* no checkpoint of it") as error:
            loop.run(options)
    (good,) = (options.out / output.CHECKPOINTS).iterdir()
    assert good.name == ("step-000002" if way == "due" else "step-000003")
    assert f"--model {good}, another --out and a lower --lr" in error.value.hint
    # Which can be done, but not into the directory that would lose it.
    again = dataclasses.replace(options, model=good, lr=1e-3, overwrite=True)
    with pytest.raises(InputError, match="--overwrite would remove"):
        loop.run(again)
    assert loop.run(dataclasses.replace(again, out=options.out.parent / "again")).steps == 6


def test_a_loss_that_is_not_finite_names_the_checkpoint_to_begin_from(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(training: Any) -> None:
        slidecore.synchronize(training.model)
        next(training.model.parameters()).data.fill_(math.nan)

    update = loop.Training._update
    monkeypatch.setattr(loop.Training, "_update", lambda t, step: (step == 3 and ruin(t), update(t, step))[1])
    # At the next one where the device holds these weights already.
    with pytest.raises(TrainingError, match=r"the loss became nan at step [34]") as error:
        loop.run(options)
    assert f"--model {options.out / output.CHECKPOINTS / 'step-000002'}," in error.value.hint


def test_a_second_signal_stops_at_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(TerminatedRunError, match="the updates of 1 steps after the last checkpoint are lost") as error:
        loop.run(options)
    assert "--resume goes on after step 2" in error.value.hint
    assert names(options.out / output.CHECKPOINTS) == ["step-000002"]
    assert not list(options.out.rglob(".*"))


def test_a_signal_before_training_stops_at_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "pack", signalled)
    with pytest.raises(TerminatedRunError, match="nothing was trained yet"):
        loop.run(options)
    assert not list(options.out.iterdir())


def test_a_signal_in_the_last_step_lets_the_run_end(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert loop.run(options).steps == 6
    assert (options.out / "config.json").exists()


def in_the_save(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Runs `action` when the first part of the model has been written."""
    save = output.write_model

    def acting(model: Any, directory: Path, **options: Any) -> None:
        (directory / "model.safetensors.part").write_bytes(b"half")
        action()
        (directory / "model.safetensors.part").unlink()
        save(model, directory, **options)

    monkeypatch.setattr(output, "write_model", acting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["save", "weights"])
def test_a_signal_while_the_model_is_saved_lets_the_run_end(
    where: str,
    number: signal.Signals,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sent(*_: Any) -> None:
        os.kill(os.getpid(), number)

    if where == "save":
        in_the_save(monkeypatch, sent)
    else:
        monkeypatch.setattr(loop, "_check_weights", sent)
    assert loop.run(dataclasses.replace(options, save_every=0)).steps == 6
    assert "saving the model; once more to stop at once" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(options.out).config.hidden_size == 32
    assert (options.out / output.LOSS_PLOT).exists()


@pytest.mark.parametrize(
    ("every", "message", "hint"),
    [
        (0, "interrupted; the updates of 6 steps are lost, and no model was written", "What was measured"),
        (4, "the updates of 2 steps after the last checkpoint are lost", "--resume goes on after step 4"),
        (2, "no model was written, but every update is in a checkpoint", "--resume goes on after step 6"),
    ],
)
def test_a_second_signal_while_the_model_is_saved_stops_at_once(
    every: int, message: str, hint: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    in_the_save(monkeypatch, twice)
    with pytest.raises(TerminatedRunError, match=message) as error:
        loop.run(dataclasses.replace(options, save_every=every))
    assert hint in error.value.hint
    assert not (options.out / "config.json").exists()
    assert not list(options.out.rglob(".*"))


def test_a_second_signal_after_the_save_says_that_there_is_a_model(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "plot_loss", twice)
    with pytest.raises(InterruptedRunError, match="interrupted; the model was written to"):
        loop.run(options)
    assert (options.out / "config.json").exists()


def test_the_command_returns_the_exit_code_of_the_signal(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", options.model, "--data", options.data, "--out", options.out, "--steps", 3]
    command += [
        "--sequence-length",
        16,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--keep",
        1,
        "--compute-dtype",
        "float32",
    ]
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([str(word) for word in command]) == 143
    assert "Go on with the same command and --resume" in capsys.readouterr().err
    assert main([str(word) for word in command]) == 2
    assert "or --resume to go on" in capsys.readouterr().err
    assert main([*(str(word) for word in command), "--resume"]) == 0
    assert [line["step"] for line in lines(options.out)] == [1, 2, 3]


@pytest.fixture
def stopped(options: Options, monkeypatch: pytest.MonkeyPatch) -> Options:
    """A run with a checkpoint after step 2, stopped in step 4."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: pytest.fail("on purpose"))
        with pytest.raises(pytest.fail.Exception):
            loop.run(options)
    return dataclasses.replace(options, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-2}, "--lr is 0.02, but the run saved in .*step-000002 has 0.01"),
        ({"batch_size": 4}, "--batch-size is 4"),
        ({"steps": 7}, "the number of steps is 7"),
        ({"warmup": 3}, "warm-up steps is 3"),
        ({"weight_decay": 0.0}, "--weight-decay is 0.0"),
        ({"seed": 5}, "--seed is 5"),
        ({"max_grad_norm": 0.5}, r"--max-grad-norm is 0\.5, but the run saved in .*step-000002 has None"),
        ({"moments": "8bit"}, "--moments is 8bit"),
        ({"sequence_length": 16}, "--sequence-length is 16"),
        ({"eval_fraction": 0.2}, "--eval-fraction is 0.2"),
        ({"compute_dtype": "float32"}, "--compute-dtype is float32"),
        ({"overwrite": True}, "Give one of the two"),
    ],
)
def test_another_run_is_not_gone_on_with(changes: dict[str, Any], message: str, stopped: Options) -> None:
    before = (stopped.out / output.METRICS).read_bytes()
    with pytest.raises(InputError, match=message):
        loop.run(dataclasses.replace(stopped, **changes))
    assert (stopped.out / output.METRICS).read_bytes() == before
    assert names(stopped.out / output.CHECKPOINTS) == ["step-000002"]


def test_other_data_are_noticed(stopped: Options) -> None:
    text = stopped.data.read_text()
    stopped.data.write_text(text.replace("line 7:", "line 8:"))
    with pytest.raises(InputError, match="the data is not that of the run"):
        loop.run(stopped)


def test_a_run_that_writes_below_its_data_does_not_read_itself(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.move(options.data, data / "a.txt")
    whole = whole_run(dataclasses.replace(options, data=data))
    # As a shell may give them: the same places by other ways.
    (tmp_path / "link").symlink_to(data, target_is_directory=True)
    inside = dataclasses.replace(options, data=tmp_path / "link", out=data / "runs" / ".." / "out")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: pytest.fail("on purpose"))
        with pytest.raises(pytest.fail.Exception):
            loop.run(inside)
    assert (data / "out" / output.METRICS).is_file()
    (data / "out2.txt").touch()  # whose name begins alike
    loop.run(dataclasses.replace(inside, resume=True))
    assert same_models(data / "out", whole)
    with pytest.raises(InputError, match="--out is the directory of --data"):
        loop.run(dataclasses.replace(options, data=data, out=data, overwrite=True))


def test_what_earlier_versions_did_not_write_down_is_not_compared(options: Options) -> None:
    identity = {"--lr": options.lr, "--max-grad-norm": 1.0}
    resumption = object.__new__(resuming.Resumption)
    resumption.path = Path("somewhere")
    resumption._identity = {"--lr": options.lr}
    resumption.check(identity)
    resumption._identity = {"--lr": options.lr, "--max-grad-norm": 2.0}
    with pytest.raises(InputError, match=r"--max-grad-norm is 1\.0, but .* has 2\.0"):
        resumption.check(identity)


def test_what_does_not_change_the_arithmetic_may_change(stopped: Options) -> None:
    auto = dataclasses.replace(stopped, compute_dtype="auto", window=3, keep=1, save_every=3, eval_every=0)
    loop.run(auto)
    assert names(stopped.out / output.CHECKPOINTS) == ["step-000006"]
    assert {tensor.dtype for tensor in model_of(stopped.out).values()} == {torch.bfloat16}
    whole = whole_run(dataclasses.replace(stopped, resume=False))
    assert same_models(whole, stopped.out)


def test_a_damaged_checkpoint_is_named_with_what_to_do(stopped: Options) -> None:
    newest = stopped.out / output.CHECKPOINTS / "step-000002"
    file = newest / "training" / "chunk-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot go on from .*chunk-00001.*damaged") as error:
        loop.run(stopped)
    assert "--model" in error.value.hint
    assert f"move {newest} away" in error.value.hint
    file.unlink()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=r"no checkpoint in .* is complete"),
    ):
        loop.run(stopped)
    assert newest.exists()


def test_without_a_checkpoint_a_run_begins_and_says_so(
    options: Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = dataclasses.replace(options, resume=True, steps=2)
    loop.run(fresh)
    assert "training begins with the first step" in capsys.readouterr().out
    shutil.rmtree(options.out / output.CHECKPOINTS)
    with pytest.raises(InputError, match="holds a model and no checkpoint to go on from"):
        loop.run(fresh)


def test_a_checkpoint_of_another_program_is_refused(options: Options, stopped: Options) -> None:
    from slidecore.loading import load_pretrained

    model = load_pretrained(options.model, device="cpu")
    optimizer = slidecore.AdamW(model.parameters())
    shutil.rmtree(stopped.out / output.CHECKPOINTS)
    slidecore.save_checkpoint(model, optimizer, stopped.out / output.CHECKPOINTS / "step-000001", extra={"step": 1})
    slidecore.close(model)
    with pytest.raises(InputError, match="not a checkpoint of `slidecore finetune`"):
        loop.run(stopped)


def test_overwriting_leaves_nothing_of_the_earlier_run(stopped: Options) -> None:
    loop.run(dataclasses.replace(stopped, resume=False, overwrite=True, save_every=0, steps=1))
    assert not (stopped.out / output.CHECKPOINTS).exists()
    assert [line["step"] for line in lines(stopped.out)] == [1]


def test_a_full_disk_at_a_checkpoint_says_where_to_go_on(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from slidecore.checkpoints import files

    real = os.pwritev

    def full(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(monkeypatch, 4, lambda: monkeypatch.setattr(files.os, "pwritev", full))
    with pytest.raises(TrainingError, match="is full; the model was not written") as error:
        loop.run(options)
    monkeypatch.setattr(files.os, "pwritev", real)
    assert "--resume goes on after step 2" in error.value.hint
    assert names(options.out / output.CHECKPOINTS) == ["step-000002"]


def test_a_checkpoint_that_fails_on_the_way_is_told_and_training_goes_on(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_run(options)
    save = resuming.save

    def failing(training: Any, *arguments: Any) -> Path:
        if training.done == 4:
            raise CheckpointError("cannot write somewhere: no space")
        return save(training, *arguments)

    monkeypatch.setattr(resuming, "save", failing)
    capsys.readouterr()
    summary = loop.run(options)
    text = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 4 could not be saved: cannot write somewhere: no space; training goes on" in text
    assert "step-000002: what stops the run before the next loses 2 steps" in text
    assert names(options.out / output.CHECKPOINTS) == ["step-000002", "step-000006"]
    assert summary_lines(summary)[-1] == "WARNING        1 checkpoints could not be saved (after step 4)"
    assert same_models(options.out, whole)
    # But not where the run ends with it.
    monkeypatch.setattr(resuming, "save", lambda *_: (_ for _ in ()).throw(CheckpointError("no space")))
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(CheckpointError, match="no space"):
        loop.run(dataclasses.replace(options, overwrite=True))


def test_an_ignored_hangup_stays_ignored(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert loop.run(options).steps == 6
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("there", "saves", "more"),
    [(0, 9, 3), (1, 9, 2), (2, 9, 1), (5, 9, 1), (0, 2, 2), (1, 1, 1), (2, 0, 0)],
)
def test_space_is_asked_for_what_is_not_there_yet(
    there: int, saves: int, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = output.OutputDirectory(tmp_path / "out", resume=True)
    out.newest = tmp_path / "out" / "checkpoints" / "step-000001"
    monkeypatch.setattr(output, "count_complete", lambda _: there)
    usage = type("Usage", (), {"free": 1000 + more * 12000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    out.check_space(1000, 12000, keep=2, saves=saves)
    usage.free -= 1
    with pytest.raises(InputError, match="GiB free"):
        out.check_space(1000, 12000, keep=2, saves=saves)


def test_space_of_a_run_that_is_replaced_counts(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.run(options)
    files = [path for path in (options.out / output.CHECKPOINTS).rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_blocks * 512 for path in files)
    assert nbytes > 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    out = output.OutputDirectory(options.out, overwrite=True)
    out.check_space(nbytes, 0, keep=2, saves=0)
    with pytest.raises(InputError, match="GiB free"):
        out.check_space(nbytes + (1 << 20), 0, keep=2, saves=0)
    # Not one that is gone on with: its two checkpoints are only places that need not be found again.
    out.release()
    resumed = output.OutputDirectory(options.out, resume=True)
    resumed.check_space(0, nbytes, keep=2, saves=0)
    with pytest.raises(InputError, match="and 1 checkpoints takes"):
        resumed.check_space(0, nbytes, keep=2, saves=9)
    resumed.release()


# --- evaluation


def test_the_loss_on_what_was_held_out(options: Options, tmp_path: Path) -> None:
    options = dataclasses.replace(options, compute_dtype="float32", save_every=0, eval_every=4)
    loop.run(options)
    taken = lines(options.out)
    assert [line["eval_loss"] is not None for line in taken] == [False, False, False, True, False, True]

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    (tmp_path / "cache").mkdir()
    data = pack(find_files(options.data), tokenizer, sequence_length=17, cache_dir=tmp_path / "cache")
    left, held = data.split(0.1, options.seed)
    assert len(held) == round(0.1 * len(data))
    assert len(left) + len(held) == len(data)
    rows = [tuple(row["input_ids"].tolist()) for part in (left, held) for row in part.sequences]
    assert sorted(rows) == sorted(tuple(row["input_ids"].tolist()) for row in data.sequences)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.out).eval()
    with torch.no_grad():
        expected = model(**held.rows(list(range(len(held))))).loss.item()
    assert taken[-1]["eval_loss"] == pytest.approx(expected, abs=1e-4)
    # The training batches are of what is left.
    seen = {tuple(r.tolist()) for step in range(6) for r in left.batch(step, 3, 4)["input_ids"]}
    assert seen <= {tuple(row["input_ids"].tolist()) for row in left.sequences}


def test_evaluation_does_not_change_the_training(options: Options) -> None:
    held = dataclasses.replace(options, save_every=0, eval_every=0, out=options.out.parent / "once")
    loop.run(held)
    loop.run(dataclasses.replace(options, save_every=0, eval_every=1))
    assert same_models(held.out, options.out)
    assert [line["loss"] for line in lines(held.out)] == [line["loss"] for line in lines(options.out)]


def in_the_evaluation(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Sends signals while the evaluation after `step` runs."""
    evaluate = loop.Training._evaluate

    def signalled(training: Any, number: int) -> float | None:
        for signal_number in numbers if number == step else ():
            os.kill(os.getpid(), signal_number)
        return evaluate(training, number)

    monkeypatch.setattr(loop.Training, "_evaluate", signalled)


def test_an_evaluation_that_a_signal_cut_short_is_made_up(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_run(options)
    with monkeypatch.context() as patch:
        in_the_evaluation(patch, 4, signal.SIGTERM)
        with pytest.raises(TerminatedRunError, match="after step 4 of 6; everything is saved") as error:
            loop.run(options)
        assert "The evaluation that was due is made up then" in error.value.hint
        assert lines(options.out)[-1]["eval_loss"] is None
        # Again while it is made up.
        with pytest.raises(TerminatedRunError, match=r"after step 4 of 6; everything is saved in .*step-000004"):
            loop.run(dataclasses.replace(options, resume=True))
    loop.run(dataclasses.replace(options, resume=True))
    assert lines(options.out) == lines(whole)
    assert same_models(options.out, whole)


def test_the_last_evaluation_is_finished(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_run(options)
    in_the_evaluation(monkeypatch, 6, signal.SIGINT)
    assert loop.run(options).eval_loss is not None
    assert lines(options.out) == lines(whole)


def test_evaluation_on_other_files(options: Options, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 20)
    mine = dataclasses.replace(options, eval_fraction=0.0, eval_data=other, save_every=0, eval_every=3)
    loop.run(mine)
    assert [line["eval_loss"] is not None for line in lines(mine.out)] == [False, False, True] * 2
    other.write_text("few")
    with pytest.raises(InputError, match="--eval-data: the data has 4 tokens"):
        loop.run(dataclasses.replace(mine, overwrite=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_fraction": 0.0}, "nothing to evaluate on"),
        ({"eval_data": Path("x")}, "both --eval-fraction and --eval-data"),
        ({"eval_fraction": 1.0}, "--eval-fraction is 1.0"),
        ({"eval_fraction": 0.9999}, "too few to hold out"),
        ({"save_every": -1}, "--save-every is -1"),
        ({"eval_every": -1}, "--eval-every is -1"),
        ({"keep": 0}, "--keep is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, options: Options) -> None:
    with pytest.raises(InputError, match=message):
        loop.run(dataclasses.replace(options, **changes))


def test_an_evaluation_that_is_not_finite_stops_the_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidecore.finetune.training.evaluate", lambda *_: math.nan)
    with pytest.raises(TrainingError, match="held-out data became nan after step 2"):
        loop.run(options)


def test_after_the_last_step_it_is_said_and_the_model_is_written(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidecore.finetune.training.evaluate", lambda *_: math.nan)
    summary = loop.run(dataclasses.replace(options, eval_every=0))
    assert same_models(options.out, options.out / output.CHECKPOINTS / "step-000006")
    assert summary.eval_loss is not None
    assert math.isnan(summary.eval_loss)
    assert "WARNING" in summary_lines(summary)[-1]
    assert "on held-out data is nan" in summary_lines(summary)[-1]
    assert "NaN" not in (options.out / output.METRICS).read_text()  # which is no JSON
    assert [line["eval_loss"] for line in lines(options.out)] == [None] * 6
    # As it was when the ended run is resumed.
    again = loop.run(dataclasses.replace(options, eval_every=0, resume=True))
    assert again.eval_loss is not None
    assert math.isnan(again.eval_loss)


def test_held_out_data_without_loss_is_refused_before_training(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    (options.model / "chat_template.jinja").write_text(template)
    user, assistant = ({"role": role, "content": text * 60} for role, text in (("user", "u"), ("assistant", "yes ")))
    for name, messages in (("train", [user, assistant]), ("held", [user])):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 5)
    chats = dataclasses.replace(
        options, data=tmp_path / "train.jsonl", assistant_only=True, eval_fraction=0.0, batch_size=1, steps=8
    )
    monkeypatch.setattr(loop, "_load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="--eval-data: no token of the data carries loss"):
        loop.run(dataclasses.replace(chats, eval_data=tmp_path / "held.jsonl"))
    monkeypatch.undo()
    capsys.readouterr()
    # Of the training data, what has none is left out: a batch of it alone would have no loss.
    loop.run(dataclasses.replace(chats, eval_data=tmp_path / "train.jsonl"))
    assert re.search(r"1\d of \d\d sequences have no token that carries loss", capsys.readouterr().out)
    assert all(math.isfinite(line["loss"]) for line in lines(chats.out))


def test_metrics_survive_their_way_through_a_checkpoint() -> None:
    history = [
        StepMetrics(1, 0.1, 1e-300, 3.3, 2**45 + 1, 7, 0.25, None),
        StepMetrics(2, float("inf"), 0.0, 1 / 3, 0, 2**40, 1e9, 0.7),
    ]
    assert resuming.decode_history(resuming.encode_history(history)) == history
    assert resuming.decode_history(resuming.encode_history([])) == []
    (ended,) = resuming.decode_history(resuming.encode_history([dataclasses.replace(history[0], eval_loss=math.nan)]))
    assert ended.eval_loss is not None
    assert math.isnan(ended.eval_loss)
    # Of earlier versions, which had NaN for None.
    earlier = {name: values for name, values in resuming.encode_history(history).items() if "is None" not in name}
    assert resuming.decode_history(earlier) == history
