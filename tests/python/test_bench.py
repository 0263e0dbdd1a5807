"""The programs in bench/ run, and their JSON has what bench/README.md says. Their figures are not judged here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def output_of(script: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    if not (BENCH / script).exists():
        pytest.skip(f"bench/{script} is not here: the tests run outside the repository")
    # The programs must find the slidecore that these tests import, wherever that is.
    slidecore = pytest.importorskip("slidecore")
    paths = [str(Path(path).parent) for path in slidecore.__path__] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    answer = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    assert answer.returncode == code, answer.stderr
    return json.loads(answer.stdout or "{}")  # type: ignore[no-any-return]


def run(script: str, *arguments: str, code: int = 0) -> dict[str, Any]:
    document = output_of(script, *arguments, code=code)
    assert document["machine"]["cpu"]
    assert document["machine"]["memory_bytes"] > 0
    assert document["machine"]["packages"]["torch"]
    assert document["command"] == list(arguments)
    return document


def require_engine() -> None:
    pytest.importorskip("slidecore._core", reason="slidecore's native module is not built")


def require_transformers() -> None:
    pytest.importorskip("transformers", reason="bench/train.py needs transformers")
    pytest.importorskip("accelerate", reason="bench/train.py needs accelerate")


def check_system(result: dict[str, Any], batches: list[int], losses: int) -> None:
    assert "error" not in result, result["error"]
    assert result["parameters"] > 0
    assert result["host_memory"]["baseline"]["now"]["rss_anon_shmem_bytes"] > 0
    assert result["host_memory"]["built"]["peak"]["vm_hwm_bytes"] > 0
    assert sorted(int(batch) for batch in result["batches"]) == batches
    for batch in result["batches"].values():
        seconds = batch["seconds_per_step"]
        assert 0 < seconds["min"] <= seconds["median"]
        assert len(seconds["all"]) == batch["steps"]
        # The window holds every interval, and what trails the last step.
        assert sum(seconds["all"]) <= seconds["window_s"] * 1.001
        assert batch["tokens_per_s"] == pytest.approx(batch["tokens_per_step"] / seconds["mean"])
        assert len(batch["losses"]) == losses
        assert all(math.isfinite(loss) for loss in batch["losses"])
        assert batch["losses"][-1] < batch["losses"][0], "one batch seen again and again: its loss must fall"
        assert batch["host_memory"]["peak"]["rss_anon_shmem_bytes"] > 0
        whole, above = (batch["host_bytes_per_parameter"][key] for key in ("whole", "above_baseline"))
        assert whole["rss_anon_shmem_bytes"] > above["rss_anon_shmem_bytes"]


def test_train_systems_compute_the_same(tmp_path: Path) -> None:
    require_engine()
    require_transformers()
    torch_distributed = pytest.importorskip("torch.distributed")
    if not torch_distributed.is_available() or not torch_distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo, which FSDP2 needs on a CPU")
    disk = json.dumps({"host_memory": 3_300_000, "disk": str(tmp_path)})
    document = run(
        "train.py", "--quick", "--device", "cpu", "--untied", "--lr", "1e-3", "--disk-options", disk,
        "--systems", "resident,fsdp2-offload,slidecore,slidecore-disk",
    )  # fmt: skip
    for result in document["systems"].values():
        check_system(result, [2, 4], losses=4)
    for name in ("fsdp2-offload", "slidecore"):
        for comparison in document["compared"][name].values():
            # The losses fall by some tenths here; gradients rounded to bfloat16 at other places move them by 1e-3.
            assert comparison["against resident"]["loss_max_difference"] < 5e-3
            assert comparison["against resident"]["speedup_mean"] > 0
    for batch, result in document["systems"]["slidecore-disk"]["batches"].items():
        assert result["losses"] == document["systems"]["slidecore"]["batches"][batch]["losses"]
        assert result["disk"]["read_bytes"] >= result["disk"]["written_bytes"] > 0
        assert result["disk"]["limit_over_step"] > 0


def test_train_records_a_failing_system_and_goes_on() -> None:
    require_engine()
    require_transformers()
    document = run(
        "train.py", "--quick", "--device", "cpu", "--tied", "--lr", "1e-3", "--batch", "2",
        "--fsdp2-options", '{"no_such_option": 1}', "--systems", "fsdp2-offload,slidecore", code=1,
    )  # fmt: skip
    assert "no_such_option" in document["systems"]["fsdp2-offload"]["error"]
    check_system(document["systems"]["slidecore"], [2], losses=4)


def test_adamw() -> None:
    require_engine()
    document = run("adamw.py", "--quick", "--parameters", "300000", "--repeats", "2", "--isa", "all")
    sets = document["core"]["instruction_sets"]
    assert sets
    for name, bytes_moved in [(f"{name}{kind}", n) for name in sets for kind, n in (("", 26), (" 8bit", 14))]:
        result = document["results"][f"slidecore {name}"]
        assert result["bytes"] == bytes_moved * 300000
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["seconds"]["median"] / 1e9)
        assert result["relative_error"] < 1e-6
        assert document["ratios"][f"slidecore {name}"]["gb_per_s over memcpy"] > 0
        if name.endswith("8bit"):
            faster = document["ratios"][f"slidecore {name}"][f"parameters_per_s over slidecore {name[:-5]}"]
            assert faster > 0
    assert document["results"]["torch fused"]["bytes"] == 28 * 300000
    deepspeed = document["results"]["deepspeed CPUAdam"]
    assert "skipped" in deepspeed or deepspeed["gb_per_s"] > 0


def test_overlap_on_the_host_backend() -> None:
    require_engine()
    document = run("overlap.py", "--quick", "--device", "host", "--seconds", "0.02")
    lanes = {"upload", "download", "compute", "update"}
    assert set(document["alone"]) == lanes
    assert all(entry["rate"] > 0 for entry in document["alone"].values())
    assert any(set(entry["lanes"]) == lanes for entry in document["together"])
    for entry in document["together"]:
        assert math.isfinite(entry["hidden"])
        assert all(lane["rate"] > 0 for lane in entry["lanes"].values())


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_engine()
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the references: the program is tested here, kernels are elsewhere
    pytest.importorskip("triton", reason="bench/kernels.py needs triton")
    picture = tmp_path / "kernels.png"
    document = run("kernels.py", "--quick", "--device", "cpu", "--picture", str(picture))
    for name, size in (("adamw", 26), ("split", 8), ("merge", 8), ("accumulate", 10), ("accumulate, last", 8)):
        result = document["streaming"][name]
        assert result["bytes"] == pytest.approx(size * document["parameters"], rel=0.2)
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["seconds"]["median"] / 1e9)
        assert result["of_copy"] > 0
        assert result["times_faster_than"]
    for row in document["linear_cross_entropy"]:
        losses = [system["loss"] for system in row["systems"].values()]
        assert "eager" in row["systems"]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    assert picture.stat().st_size > 1000


def test_checkpoint(tmp_path: Path) -> None:
    require_engine()
    require_transformers()
    document = run("checkpoint.py", "--quick", "--device", "cpu", "--dir", str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert document["save"]["bytes"] > 12 * document["parameters"]
    for part in (document["save"], document["load"], document["disk"]["write"], document["disk"]["read"]):
        assert part["gb_per_s"] == pytest.approx(part["bytes"] / part["seconds"]["median"] / 1e9)
    assert document["over_disk"]["save"] == pytest.approx(
        document["save"]["gb_per_s"] / document["disk"]["write"]["gb_per_s"]
    )
    assert document["checksum_gb_per_s"][document["checksum"]] > 0
    assert document["file_system"]["type"]


def test_moments(tmp_path: Path) -> None:
    require_engine()
    pytest.importorskip("datasets", reason="bench/moments.py needs the finetune extra")
    picture = tmp_path / "moments.png"
    document = run("moments.py", "--quick", "--plot", str(picture))
    runs = document["seeds"]["0"]
    for result in runs.values():
        assert len(result["losses"]) == document["steps"]
        assert all(math.isfinite(loss) for loss in result["losses"])
        assert result["mean_of_last"] == pytest.approx(sum(result["losses"]) / len(result["losses"]))
        # The first step's weights and gradients are the same; so is the update, which sees unquantised moments.
        assert result["losses"][0] == pytest.approx(runs["float32"]["losses"][0], abs=1e-2)
    assert runs["8bit"]["losses"][:2] == runs["float32"]["losses"][:2]
    assert runs["8bit"]["losses"] != runs["float32"]["losses"]
    assert runs["float32"]["planes_bytes"] - runs["8bit"]["planes_bytes"] > 5.9 * runs["8bit"]["parameters"]
    assert set(document["compared"]["0"]) == set(runs) - {"float32"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fits() -> None:
    require_engine()
    for row in output_of("fits.py")["rows"]:
        assert row["host_bytes_per_parameter"] == {
            "float32": pytest.approx(12, 1e-3),
            "8bit": pytest.approx(6.0625, 1e-3),
        }


@pytest.mark.parametrize("peer", ["auto", "none"])
def test_disk(tmp_path: Path, peer: str) -> None:
    require_engine()
    from slidecore import _core

    document = run("disk.py", "--quick", "--size", "4MiB", "--peer", peer, str(tmp_path))
    backends = {"threads"} if _core.why_no_io_uring() else {"uring", "threads"}
    assert {(point["backend"], point["mode"]) for point in document["results"]} == {
        (backend, mode) for backend in backends for mode in ("read", "write", "both")
    }
    for point in document["results"]:
        assert point["bytes"] == 4 << 20
        assert point["gb_per_s"]["min"] <= point["gb_per_s"]["median"] <= point["gb_per_s"]["max"]
        if "peer" in point:
            assert point["over_peer"] == point["gb_per_s"]["median"] / point["peer"]["gb_per_s"]["median"]
    assert document["counts"] != _core.inspect_directory(str(tmp_path)).in_memory
    assert ("peer" in document) != ("peer" in document["skipped"])
    assert list(tmp_path.iterdir()) == []


def test_card_measures_what_it_is_asked_and_records_how_it_ended(tmp_path: Path) -> None:
    require_engine()
    disk = tmp_path / "drive"
    out = tmp_path / "results"
    assert output_of("card.py", str(out), "--only", "adamw,disk", "--disk", str(disk), "--quick") == {}
    card = json.loads((out / "card.json").read_text())
    assert {name: entry["result"] for name, entry in card["measurements"].items()} == {"adamw": "ok", "disk": "ok"}
    assert json.loads((out / "adamw.json").read_text())["command"][:2] == ["--isa", "all"]
    measured = (out / "disk.json").read_text()
    assert json.loads(measured)["command"][0] == "DISK"
    assert str(tmp_path) not in measured

    (tmp_path / "file").touch()
    output_of("card.py", str(out), "--only", "disk", "--disk", str(tmp_path / "file"), "--quick", code=2)
    output_of("card.py", str(out), "--only", "adamw", "--quick", "--seconds", "1", code=1)
    card = json.loads((out / "card.json").read_text())
    assert card["measurements"]["adamw"]["result"].startswith("skipped")
