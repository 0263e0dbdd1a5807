"""The command line: what it returns and what it says, above all for what a person gets wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slidecore.cli import main
from slidecore.finetune import demo, loop

Arguments = dict[str, Any]


@pytest.fixture
def arguments(model_dir: Path, text_file: Path, tmp_path: Path) -> Arguments:
    return {
        "model": model_dir,
        "data": text_file,
        "out": tmp_path / "out",
        "sequence-length": 16,
        "batch-size": 2,
        "steps": 2,
        "device": "cpu",
        "compute-dtype": "float32",
    }


def _run(arguments: Arguments, *flags: str) -> int:
    return main(
        ["finetune", *(part for name, value in arguments.items() for part in (f"--{name}", str(value))), *flags]
    )


def test_a_run_ends_with_its_figures_and_files(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(arguments) == 0
    text = capsys.readouterr().out
    for pattern in (
        r"step 2/2 +loss \d",
        r"tokens/s",
        "ordinary training would hold",
        re.escape(str(arguments["out"])),
    ):
        assert re.search(pattern, text), pattern
    assert (arguments["out"] / "config.json").is_file()
    # Twice into the same directory only on request.
    assert _run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert _run(arguments, "--overwrite") == 0


def test_nobody_who_reads_is_no_reason_to_stop(arguments: Arguments) -> None:
    arguments["steps"] = 5
    command = [sys.executable, "-m", "slidecore.cli", "finetune"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0, told
    assert "standard output cannot be written to (Broken pipe): going on" in told
    assert "Exception ignored" not in told
    assert (arguments["out"] / "config.json").is_file()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_run_without_any_output(arguments: Arguments, closed: str) -> None:
    """As some daemons start their children."""
    command = [sys.executable, "-m", "slidecore.cli", "finetune"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    assert subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", *command], check=False).returncode == 0
    assert (arguments["out"] / "config.json").is_file()


def _set(**values: Any) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update({name.replace("_", "-"): value for name, value in values.items()})


def _remove_tokenizer(arguments: Arguments) -> None:
    for file in arguments["model"].glob("tokenizer*"):
        file.unlink()


def _damage_tokenizer(arguments: Arguments) -> None:
    (arguments["model"] / "tokenizer.json").write_text("{")


def _truncate_weights(arguments: Arguments) -> None:
    file = arguments["model"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _remove_a_weight(arguments: Arguments) -> None:
    weights = load_file(arguments["model"] / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, arguments["model"] / "model.safetensors", metadata={"format": "pt"})


def _shrink_vocabulary(arguments: Arguments) -> None:
    file = arguments["model"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 100}))
    weights = load_file(arguments["model"] / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, arguments["model"] / "model.safetensors", metadata={"format": "pt"})


def _out_below_a_file(arguments: Arguments) -> None:
    arguments["out"] = arguments["data"] / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(model="/nowhere"), "/nowhere is not a model directory"),
        (lambda a: (a["model"] / "config.json").unlink(), "no config.json"),
        (_remove_tokenizer, "has no tokenizer"),
        (_damage_tokenizer, "cannot read the tokenizer"),
        (_truncate_weights, "cannot read"),
        (_remove_a_weight, "model.norm.weight"),
        (_shrink_vocabulary, "vocabulary has 100 entries"),
        (_set(data="/nowhere"), "no data at /nowhere"),
        (lambda a: a["data"].write_text(""), "is empty"),
        (lambda a: a["data"].write_text("short"), "fewer than one sequence"),
        (lambda a: a["data"].write_bytes(b"\0"), "unknown format"),
        (_set(batch_size=10000), "fewer than a batch"),
        (_set(sequence_length=65), "the model has 64 positions"),
        (_set(sequence_length=1), "--sequence-length is 1"),
        (_set(steps=0), "--steps is 0"),
        (_set(epochs="inf"), "--epochs is inf"),
        (_set(seed=-1), "--seed is -1"),
        (_set(seed=2**32), "--seed is 4294967296"),
        (_set(lr=-1), "--lr is -1"),
        (_set(lr="nan"), "--lr is nan"),
        (_set(window=0), "--window is 0"),
        (_set(micro_batch="many"), "--micro-batch is many"),
        (_set(micro_batch="²"), "--micro-batch is ²"),
        (_set(compute_dtype="float16"), "--compute-dtype is float16"),
        (_set(moments="4bit"), "--moments is 4bit"),
        (_set(device="abacus"), "--device: device='abacus' is not supported"),
        (_set(device="cuda:99"), "--device: device='cuda:99'"),
        (_set(device_memory="1KiB"), "cannot offload the model"),
        (_set(device_memory="lots"), "--device-memory='lots' is not a size"),
        (_set(host_memory="7Gi"), "--host-memory='7Gi' is not a size; units are"),
        (_set(disk="/nowhere"), "cannot write to --disk /nowhere: No such file"),
        (_out_below_a_file, "cannot write to"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(
    change: Callable[[Arguments], Any],
    message: str,
    arguments: Arguments,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(arguments)
    monkeypatch.setattr(loop.Training, "step", lambda *_: pytest.fail("training began"))
    assert _run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    # One line says what is wrong; where there is more, it says what to do.
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 2
    assert not (Path(arguments["out"]) / "config.json").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"device": "tpu"}, {"device-memory": "7Gi"}, {"host-memory": "x"}, {"disk": "/dev/null"},
        {"disk": "/nowhere"}, {"model": "/nowhere"}, {"data": "/nowhere"}, {"eval-data": "/nowhere"},
    ],
)  # fmt: skip
def test_what_needs_no_data_is_found_before_they_are_read(
    bad: Arguments, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "pack", lambda *_, **__: pytest.fail("the data were read"))
    assert _run({**arguments, **bad}) == 2
    assert not arguments["out"].exists()


@pytest.mark.parametrize("name", ["model", "data"])
def test_what_lies_in_a_closed_directory_is_named(
    name: str, arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def closed(path: Path, **options: Any) -> Any:  # permissions themselves would not stop root
        if path == arguments[name]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    for method in ("stat", "is_file", "is_dir"):
        monkeypatch.setattr(Path, method, closed)
    assert _run(arguments) == 2
    assert f"cannot read {arguments[name]}: Permission denied" in capsys.readouterr().err


def test_an_option_of_the_wrong_type_exits_with_2(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run({**arguments, "steps": "three"}) == 2
    assert "Usage: slidecore finetune" in capsys.readouterr().err


def test_a_run_that_fails_on_its_way_exits_with_1(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(arguments["model"] / "model.safetensors")
    weights["lm_head.weight"][:] = float("inf")
    save_file(weights, arguments["model"] / "model.safetensors", metadata={"format": "pt"})
    assert _run(arguments) == 1
    assert "nan at step 1" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "step", interrupted)
    assert _run(arguments) == 130
    assert "interrupted; nothing was trained yet" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slidecore ")
    assert main(["finetune", "--help"]) == 0
    assert "--model" in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert main(["no-such-command"]) == 2


def test_without_the_extra_the_message_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["finetune"]) == 2
    assert "pip install 'slidecore[finetune]'" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "accelerate", "datasets", "matplotlib", "rich"])
def test_a_package_that_is_missing_is_named_before_training(
    package: str, arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(loop.Training, "step", lambda *_: pytest.fail("training began"))
    assert _run(arguments) == 2
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'slidecore[finetune]'" in error


def test_the_command_imports_nothing_heavy_for_its_version() -> None:
    code = "import sys; from slidecore.cli import main; main(['--version']); print([m for m in sys.modules if m in %r])"
    heavy = ("transformers", "datasets", "matplotlib", "pyarrow")
    result = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_demo_makes_an_ordinary_model_and_trains_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert demo.main(["--out", str(tmp_path), "--steps", "12", "--device", "cpu"]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert 5 < metrics[0]["loss"] < 6.5
    assert metrics[-1]["loss"] < 4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    text = "def f(x):\n\treturn 'é€😀\x00'"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert model.config.vocab_size == 257
    with torch.no_grad():
        assert model(torch.tensor([list(b"import os\n")])).logits.shape == (1, 10, 257)
    assert "ordinary training would hold" in capsys.readouterr().out


def test_errors_of_the_engine_name_options(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    for budget in ("device-memory", "host-memory"):
        assert _run({**arguments, budget: "1K"}) == 2
        error = capsys.readouterr().err
        assert f"--{budget} 1 KiB (1024 bytes) is too small" in error
        assert f"Use --{budget} of at least" in error
        assert not re.search(r"\w_\w|=\[|'8bit'", error)
