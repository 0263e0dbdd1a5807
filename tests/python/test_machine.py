"""`slidecore doctor`, `slidecore calibrate`, and what they are made of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from slidecore import _core, calibration, host_pressure, machine_checks
from slidecore.calibration import Calibration, Point, choose
from slidecore.cli import main
from slidecore.drives import Drive, Rate, Workload, identify


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "swap").mkdir()
    return str(tmp_path / "swap")


def _point(**changes: object) -> Point:
    values: dict[str, object] = {
        "backend": "uring",
        "block_bytes": 1 << 20,
        "queue_depth": 8,
        "read_gb_per_s": 2.0,
        "write_gb_per_s": 1.0,
        "read_cpu_s_per_gb": 0.1,
        "write_cpu_s_per_gb": 0.1,
    }
    return Point(**{**values, **changes})  # type: ignore[arg-type]


def test_the_best_point_with_the_fewest_bytes_in_flight_is_chosen() -> None:
    deep, shallow = _point(queue_depth=32), _point(queue_depth=4)
    slow = _point(queue_depth=1, write_gb_per_s=0.5)
    threads = _point(queue_depth=4, backend="threads", read_gb_per_s=2.001)
    assert choose([deep, threads, shallow, slow]) is shallow
    faster = _point(queue_depth=32, read_gb_per_s=4.0)
    assert choose([deep, shallow, faster]) is faster


def test_a_calibration_is_kept_for_its_drives(
    directory: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibration.load([directory]) is None
    assert main(["calibrate", directory, "--size", "16MiB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    path = Path(document["path"])
    assert path.is_relative_to(cache)
    kept = calibration.load([directory])
    assert kept is not None
    assert kept.chosen in kept.points
    assert kept.chosen == choose(kept.points)
    assert kept.drives == [identify(_core.inspect_directory(directory)).to_json()]
    backends = {point.backend for point in kept.points}
    assert backends == ({"threads"} if _core.why_no_io_uring() else {"uring", "threads"})
    assert os.listdir(directory) == []
    # Another kernel or drive has another file; a broken one is none.
    monkeypatch.setattr("platform.release", lambda: "0.0")
    assert calibration.load([directory]) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path.write_text("{")
    assert calibration.load([directory]) is None
    path.write_text(json.dumps({**kept.to_json(), "version": 0}))
    assert calibration.load([directory]) is None


def test_a_saved_calibration_loads_as_it_was(directory: str) -> None:
    made = Calibration(_point(), [_point(), _point(queue_depth=2)], [], "kernel", "", 5)
    path = calibration.save(made, [directory])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert calibration.load([directory]) == made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere"], "/nowhere"),
        (["--size", "1KiB", "."], "too little"),
        (["--size", "much", "."], "is not a size"),
    ],
)
def test_calibrate_refuses_what_cannot_be(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_calibrate_looks_before_it_measures(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written, and memory that is not there, are told at once."""
    monkeypatch.setattr("slidecore.calibrate.measure", lambda *_: pytest.fail("it has measured"))
    monkeypatch.setattr(host_pressure, "available_memory", lambda: 100 << 20)
    assert main(["calibrate", directory, "--size", "100MiB"]) == 2
    assert "Give at most 80" in capsys.readouterr().err
    monkeypatch.setattr(host_pressure, "available_memory", lambda: 1 << 40)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["calibrate", directory]) == 2
    assert "XDG_CACHE_HOME" in capsys.readouterr().err


def test_calibrate_names_the_process_that_has_the_directory(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage = _core.Storage([directory])
    assert main(["calibrate", directory]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    storage.close()


def test_doctor_reports_in_json_and_in_words(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--quick", "--disk", directory])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert code == int(any(check["status"] == "problem" for check in checks))
    names = {check["name"] for check in checks}
    assert {"driver", "pinned memory", "memory lock limit", "memory nodes", "io_uring"} <= names
    assert {f"disk {directory}", f"disk {directory}: alignment", f"disk {directory}: space"} <= names
    for check in checks:
        assert check["status"] in ("ok", "note", "problem")
        assert check["finding"]
        assert check["advice"] or check["status"] != "note"
    assert main(["doctor", "--quick", "--disk", directory]) == code
    text = capsys.readouterr().out
    assert "io_uring" in text
    assert os.listdir(directory) == []


def test_doctor_goes_on_after_a_directory_that_cannot_be_used(
    directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--quick", "--disk", "/nowhere", "--disk", directory]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["disk /nowhere"]["status"] == "problem"
    assert f"disk {directory}: space" in checks


def test_doctor_takes_directories_as_arguments(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "--quick", directory, "/nowhere"])
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert {f"disk {directory}: space", "disk /nowhere"} <= set(names)
    assert "disk ." not in names


def test_doctor_says_what_to_do_about_each_failure(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[machine_checks.Check]:
        raise OSError("forbidden by a test")

    for name in ("pinned_memory", "memory_lock_limit", "memory_nodes", "io_uring", "gpu_direct"):
        monkeypatch.setattr(machine_checks, name, fail)
    assert main(["doctor", "--json", "--quick", "/proc", directory]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    problems = [check for check in checks if check["status"] == "problem"]
    assert {"disk /proc", "pinned memory", "io_uring"} <= {check["name"] for check in problems}
    assert all(check["advice"] for check in problems)


@pytest.mark.parametrize("why", ["a bogus backend", "in use"])
def test_rates_that_cannot_be_measured_drop_nothing_else(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    storage = _core.Storage([directory]) if why == "in use" else None
    if storage is None:
        monkeypatch.setenv("SLIDECORE_IO", "bogus")
    assert main(["doctor", "--json", directory]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {f"disk {directory}", f"disk {directory}: alignment", f"disk {directory}: space"} <= checks.keys()
    rates = checks[f"disk {directory}: rates"]
    assert rates["status"] == "problem"
    assert ("in use" if storage else "SLIDECORE_IO='bogus'") in rates["finding"]
    assert rates["advice"]
    if storage is not None:
        storage.close()
    assert os.listdir(directory) == []


def test_doctor_measures_rates(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_RATE_BYTES", 4 << 20)
    (rates,) = (check for check in machine_checks.disk(directory, True) if check.name.endswith("rates"))
    assert "GB/s" in rates.finding
    assert "calibrate" in rates.advice or _core.inspect_directory(directory).in_memory
    calibration.save(Calibration(_point(queue_depth=3), [], [], "", "", 1), [directory])
    (rates,) = (check for check in machine_checks.disk(directory, True) if check.name.endswith("rates"))
    assert "3 requests in flight" in rates.finding
    monkeypatch.delenv("SLIDECORE_IO", raising=False)
    calibration.save(Calibration(_point(backend="threads"), [], [], "", "", 1), [directory])
    (rates,) = (check for check in machine_checks.disk(directory, True) if check.name.endswith("rates"))
    assert "by threads" in rates.finding
    assert not rates.advice


def test_doctor_says_that_memory_is_no_drive() -> None:
    if not Path("/dev/shm").is_dir() or not _core.inspect_directory("/dev/shm").in_memory:
        pytest.skip("/dev/shm is no tmpfs here")
    first = machine_checks.disk("/dev/shm", False)[0]
    assert first.status == "note"
    assert "not a drive" in first.advice


def test_doctor_repeats_why_there_is_no_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "why_no_io_uring", lambda: "forbidden by a test")
    (check,) = machine_checks.io_uring()
    assert check.status == "note"
    assert check.finding == "forbidden by a test"


def test_a_workload_moves_all_of_its_bytes(directory: str) -> None:
    storage = _core.Storage([directory])
    work = Workload(storage, (40 << 20) + 5)
    transfers = _core.Transfers(storage)
    for mode, reads, writes in (("read", 3, 0), ("write", 0, 3), ("both", 2, 1)):
        before = transfers.counters()
        assert work.run(transfers, mode).nbytes == work.nbytes
        after = transfers.counters()
        assert (after["reads"] - before["reads"], after["writes"] - before["writes"]) == (reads, writes)
    transfers.close()
    storage.close()


def test_rates_are_per_gigabyte() -> None:
    rate = Rate(nbytes=2 * 10**9, seconds=4.0, cpu_seconds=1.0)
    assert (rate.gb_per_s, rate.cpu_s_per_gb) == (0.5, 0.5)


def test_a_drive_without_a_name_keeps_its_number(directory: str) -> None:
    class Facts:
        device_major, device_minor, filesystem = 0, 999_999, "overlay"

    assert identify(Facts()) == Drive("0:999999", "", "", None, None, "overlay")  # type: ignore[arg-type]


def test_cpu_lists() -> None:
    assert machine_checks._cpu_list("0-3,8") == {0, 1, 2, 3, 8}
    assert machine_checks._cpu_list("") == set()


def test_a_card_that_pytorch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (without,) = machine_checks.pytorch(None)
    assert without.status == "ok"
    assert "computes on the CPU" in without.finding
    (beside,) = machine_checks.pytorch(_core.Device("host", 0))
    assert beside.status == "problem"
    assert "sees no card, though there is one" in beside.finding
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (seen,) = machine_checks.pytorch(_core.Device("host", 0))
    assert (seen.status, seen.finding) == ("ok", f"{torch.__version__} sees 2 cards")
