"""`offload(..., gpu_direct=True)`: refusals, and saved inputs through a fake cuFile that takes host memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import language_model, token_batches
from _runs import Run, differences
from slidecore import _core, cufile, machine_checks
from torch import nn

Offload = Callable[..., nn.Module]
SMALL = {"piece_bytes": 4096, "ring_pieces": 4}
# A device budget that sends the inputs of blocks away; micro-batches stay the same.
INPUTS_LEAVE = {"compute_dtype": torch.float32, "device_memory": 2_300_000, "micro_batch": 4, **SMALL}
SOURCE = Path(__file__).parents[1] / "cpp" / "fake_cufile" / "fake_cufile.cpp"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the fake library."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler to make the fake cuFile with")
    built = tmp_path_factory.mktemp("cufile") / "libfake_cufile.so"
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", "-o", built, SOURCE], check=True)
    return str(built)


@pytest.fixture
def fake(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The fake library in cuFile's place, and its control."""
    facts = _core.inspect_directory(str(tmp_path))
    if not facts.direct:
        pytest.skip(f"direct transfers are needed: {facts.why_not_direct}")
    monkeypatch.setenv(cufile.VARIABLE, library)
    control = ctypes.CDLL(library)
    control.fake_cufile_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return control


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cufile.VARIABLE, raising=False)


def build() -> nn.Module:
    return language_model("llama", layers=9, seed=4)


def least_memory(offload: Offload, disk: Path, **options: Any) -> int:
    """A host budget that has no room for inputs."""
    model = offload(build(), disk=disk, **INPUTS_LEAVE, **options)
    fixed = slidecore.stats(model).host_memory
    slidecore.close(model)
    return fixed


@pytest.mark.usefixtures("without")
def test_refusals_say_what_to_do(offload: Offload, tmp_path: Path) -> None:
    model = build()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(slidecore.UsageError, match=r"NVIDIA card.*host backend\n.*pinned host memory") as error:
        offload(model, disk=tmp_path, gpu_direct=True)
    assert "Leave gpu_direct off" in error.value.hint
    with pytest.raises(ValueError, match=r"gpu_direct=True needs disk=\["):
        offload(model, gpu_direct=True)
    with pytest.raises(ValueError, match="train=False"):
        offload(model, disk=tmp_path, gpu_direct=True, train=False)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert list(tmp_path.iterdir()) == []
    offload(model)  # nothing was changed


def test_a_library_that_is_not_there_is_named(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cufile.VARIABLE, "/nowhere/libcufile.so.0")
    model = build()
    with pytest.raises(slidecore.UsageError, match=r"/nowhere/libcufile\.so\.0") as error:
        offload(model, disk=tmp_path, gpu_direct=True)
    assert "pip install nvidia-cufile" in error.value.hint
    assert "leave gpu_direct off" in error.value.hint
    assert list(tmp_path.iterdir()) == []
    offload(model, disk=tmp_path)


def test_a_driver_that_does_not_open_is_an_error(offload: Offload, tmp_path: Path, fake: ctypes.CDLL) -> None:
    fake.fake_cufile_fail(b"cuFileDriverOpen", 5001, 0, 0)
    with pytest.raises(slidecore.UsageError, match="CU_FILE_DRIVER_NOT_INITIALIZED, 5001"):
        offload(build(), disk=tmp_path, gpu_direct=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("forced", [False, True])
def test_a_refused_file_says_what_is_left_to_try(
    offload: Offload, tmp_path: Path, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    monkeypatch.setenv("CUFILE_LOGFILE_PATH", str(tmp_path / "why.log"))
    monkeypatch.delenv("CUFILE_FORCE_COMPAT_MODE", raising=False)
    if forced:
        monkeypatch.setenv("CUFILE_FORCE_COMPAT_MODE", "true")
    fake.fake_cufile_fail(b"cuFileHandleRegister", 5027, 0, 0)
    with pytest.raises(slidecore.UsageError, match="CU_FILE_HANDLE_NOT_REGISTERED") as error:
        offload(build(), disk=tmp_path, gpu_direct=True)
    said = f"{error.value} {error.value.hint}"
    assert f"{tmp_path / 'why.log'} has cuFile's reasons" in said
    assert ("CUFILE_FORCE_COMPAT_MODE" in said) != forced
    assert cufile.LEAVE_OFF in said


def test_training_through_cufile_is_the_same_bit_by_bit(
    offload: Offload, tmp_path: Path, fake: ctypes.CDLL, caplog: pytest.LogCaptureFixture
) -> None:
    """Inputs of an odd size, and short transfers on the way."""
    batches = token_batches(4, batch=8, length=59)
    plain = Run(build(), offload, **INPUTS_LEAVE)
    losses, expected = plain.train(batches), plain.state()
    budget = least_memory(offload, tmp_path)
    pieces = Run(build(), offload, host_memory=budget, disk=tmp_path, **INPUTS_LEAVE)
    assert pieces.train(batches) == losses
    through_host = slidecore.stats(pieces.model)
    pieces.close()

    with caplog.at_level("INFO", "slidecore"):
        run = Run(build(), offload, host_memory=budget, disk=tmp_path, gpu_direct=True, **INPUTS_LEAVE)
    assert "by cuFile 1.14" in caplog.text
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "compatibility mode" in warnings[0]
    assert "nvidia-fs" in warnings[0]
    fake.fake_cufile_fail(b"cuFileWrite", 5000, 0, 3)
    fake.fake_cufile_fail(b"cuFileRead", 4096, 0, 5)
    assert run.train(batches) == losses
    assert differences(run.state(), expected) == []
    mine = slidecore.stats(run.model)
    assert mine.saved_inputs_bytes == 0
    counters, others = mine.disk_counters, through_host.disk_counters
    assert counters["gpu_direct_bytes"] > 0
    assert counters["short_transfers"] >= 2
    # The buffers that inputs would pass through are not there, and planes or inputs have their room.
    assert counters["read_bytes"] <= others["read_bytes"]
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_drive_ends_the_run(offload: Offload, tmp_path: Path, fake: ctypes.CDLL) -> None:
    budget = least_memory(offload, tmp_path, gpu_direct=True)
    run = Run(build(), offload, host_memory=budget, disk=tmp_path, gpu_direct=True, **INPUTS_LEAVE)
    run.train(token_batches(1, batch=8, length=60))
    fake.fake_cufile_fail(b"cuFileRead", -1, 5, 2)
    with pytest.raises(_core.IoError, match=r"slidecore-swap.*at offset \d+.*errno 5"):
        run.train(token_batches(2, batch=8, length=60))


def test_compatibility_mode_is_not_warned_of_where_there_is_nvidia_fs(
    offload: Offload, tmp_path: Path, fake: ctypes.CDLL, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fake_cufile_properties(2, 0x10, 0)
    try:
        with caplog.at_level("INFO", "slidecore"):
            offload(build(), disk=tmp_path, gpu_direct=True, **INPUTS_LEAVE)
    finally:
        fake.fake_cufile_properties(0, 0, 0)
    assert "nvidia-fs 2.17" in caplog.text
    assert "compatibility mode" not in caplog.text


def test_doctor_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str) -> None:
    monkeypatch.delenv(cufile.VARIABLE, raising=False)
    (row,) = machine_checks.gpu_direct(None)
    assert (row.name, row.status) == ("cuFile", "ok")
    monkeypatch.setenv(cufile.VARIABLE, "/nowhere/libcufile.so.0")
    (row,) = machine_checks.gpu_direct(None)
    assert row.status == "note"
    assert "/nowhere/libcufile.so.0" in row.finding
    assert "nvidia-cufile" in row.advice
    monkeypatch.setenv(cufile.VARIABLE, library)
    monkeypatch.setattr(cufile, "_NVIDIA_FS", tmp_path / "none")
    (row,) = machine_checks.gpu_direct(None)
    assert row.status == "note"
    assert f"1.14 ({library})" in row.finding
    assert "no nvidia-fs" in row.finding
    (tmp_path / "version").write_text("version: 2.17\n")
    monkeypatch.setattr(cufile, "_NVIDIA_FS", tmp_path)
    (row,) = machine_checks.gpu_direct(None)
    assert row.status == "ok"
    assert "nvidia-fs 2.17" in row.finding


def test_libraries_of_python_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cufile", "cu13"):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
        (tmp_path / "nvidia" / package / "lib" / "libcufile.so.0").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    found = cufile.library_paths()
    assert [path for path in found if path.startswith(str(tmp_path))] == [
        str(tmp_path / "nvidia" / package / "lib" / "libcufile.so.0") for package in ("cu13", "cufile")
    ]
