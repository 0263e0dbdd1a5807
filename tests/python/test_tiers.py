"""Planes and saved inputs on disk: the same numbers wherever they lie, budgets that hold, errors that say enough."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _disk import SMALL, assert_same, smallest, state
from _models import language_model, token_batches
from _runs import Run
from _threads import assert_no_more_threads, native_threads
from slidecore import _core, calibration, host_pressure, tiers
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]

MODES: dict[str, dict[str, Any]] = {
    "overlap": {},
    "clipped": {"optimizer": {"max_grad_norm": 0.5}},
    "accumulated": {"accumulate": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_places_do_not_change_numbers(
    offload: Offload, tmp_path: Path, dtype: torch.dtype, moments: str, mode: str
) -> None:
    """All in memory, all on disk, half of it, and budgets that change every other step: the same bits."""

    def build() -> nn.Module:
        return language_model("llama", layers=5, seed=3)

    common = {"compute_dtype": dtype, "moments": moments, **SMALL}
    batches = token_batches(8, batch=3, length=11)
    plain = Run(build(), offload, **common, **MODES[mode])
    losses = plain.train(batches)
    expected = state(plain.model)
    least = smallest(build, tmp_path, compute_dtype=dtype, moments=moments)
    # What the optimizer adds later: gradients that wait, in float32 where they are added up.
    gradients = sum(c.trainable_numel for c in engine_of(plain.model).chunks)
    planes = sum(value.nbytes for value in expected.values())
    widened = 4 if dtype == torch.bfloat16 else 0
    least += {"overlap": 0, "clipped": dtype.itemsize, "accumulated": dtype.itemsize + widened}[mode] * gradients
    least += 1 << 16
    everything = least + planes + (1 << 20)

    for budgets in ([least], [least + planes // 4], [least, everything, least + planes // 8]):
        run = Run(build(), offload, host_memory=budgets[0], disk=tmp_path, **common, **MODES[mode])
        seen = []
        for i in range(0, len(batches), 2):
            if len(budgets) > 1:
                slidecore.set_budget(run.model, host_memory=budgets[i // 2 % len(budgets)])
            limit = engine_of(run.model).tiers.host_memory
            seen += run.train(batches[i : i + 2])
            stats = slidecore.stats(run.model)
            assert limit is not None
            assert stats.host_memory <= limit
            assert (stats.disk_memory > 0) == (limit != everything)
        assert seen == losses
        assert_same(state(run.model), expected)
        slidecore.close(run.model)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("disk_only", [False, True])
def test_saved_inputs_on_disk(offload: Offload, tmp_path: Path, disk_only: bool) -> None:
    """Inputs of blocks go to disk where memory has no room, the first ones first, and come back as they were."""

    def build() -> nn.Module:
        return language_model("llama", layers=9, seed=4)

    # A device budget that sends inputs away; micro-batches stay the same.
    common = {"compute_dtype": torch.float32, "device_memory": 2_300_000, "micro_batch": 4, **SMALL}
    batches = token_batches(5, batch=8, length=60)
    plain = Run(build(), offload, **common)
    losses, expected = plain.train(batches), state(plain.model)
    inputs = slidecore.stats(plain.model).saved_inputs_bytes
    assert inputs > 4 * 8 * 60 * 48 * 4

    stats = slidecore.stats(plain.model)
    unlimited = offload(build(), disk=tmp_path, **common)
    fixed = slidecore.stats(unlimited).host_memory
    slidecore.close(unlimited)
    budget = fixed + (0 if disk_only else inputs // 2)
    run = Run(build(), offload, host_memory=budget, disk=tmp_path, **common)
    assert engine_of(run.model).tiers.on_disk == frozenset()
    assert run.train(batches) == losses
    assert_same(state(run.model), expected)
    mine = slidecore.stats(run.model)
    assert mine.host_memory <= budget
    assert (mine.saved_inputs_bytes == 0) == disk_only
    assert mine.disk_memory >= inputs // 2
    assert mine.planes_bytes == stats.planes_bytes


def test_inputs_without_a_disk_are_held_to_the_budget(offload: Offload) -> None:
    options = {"compute_dtype": torch.float32, "device_memory": 2_300_000, "micro_batch": 4, **SMALL}
    fixed = slidecore.stats(offload(language_model("llama", layers=9), **options)).host_memory
    run = Run(language_model("llama", layers=9), offload, host_memory=fixed, **options)
    with pytest.raises(slidecore.BudgetError, match=r"saved for backward.*Raise host_memory"):
        run.train(token_batches(1, batch=8, length=60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_inference_from_disk(offload: Offload, tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights that memory has no room for are read as they are needed."""

    def build() -> nn.Module:
        return language_model("llama", layers=5, seed=6).to(dtype).eval()

    options = {"train": False, "compute_dtype": dtype}
    prompt = torch.randint(3, 101, (2, 5))
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = offload(build(), **options)
    expected = plain.generate(prompt, **arguments)
    least = smallest(build, tmp_path, **options)
    model = offload(build(), host_memory=least, disk=tmp_path, **options, **SMALL)
    assert slidecore.stats(model).planes_bytes < slidecore.stats(plain).planes_bytes // 4
    assert torch.equal(model.generate(prompt, **arguments), expected)
    traffic = slidecore.stats(model).disk_traffic
    on_disk = sum(part.nbytes for part in engine_of(model).tiers.on_disk)
    assert (traffic.read_bytes, traffic.written_bytes) == (on_disk, 0)
    assert "a forward reads" in traffic.describe()
    counters = slidecore.stats(model).disk_counters
    weights = sum(p.numel() * dtype.itemsize for p in model.parameters())
    assert counters["read_bytes"] >= 6 * (weights - slidecore.stats(model).planes_bytes - 2 * 48 * dtype.itemsize * 101)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(slidecore.master_parameter(model, name), dict(build().named_parameters())[name].float())


def test_checkpoints_of_what_lies_on_disk(offload: Offload, tmp_path: Path) -> None:
    """Saved from disk and from memory alike, and resumed with another budget: as if it had never stopped."""

    def build() -> nn.Module:
        return language_model("llama", layers=5, seed=7)

    disk = tmp_path / "disk"
    disk.mkdir()
    batches = token_batches(6, batch=2, length=9)
    common = {"compute_dtype": torch.bfloat16, **SMALL}
    plain = Run(build(), offload, **common)
    plain.train(batches)
    least = smallest(build, disk, compute_dtype=torch.bfloat16)
    run = Run(build(), offload, host_memory=least, disk=disk, **common)
    run.train(batches[:3])
    slidecore.save_checkpoint(run.model, run.optimizer, tmp_path / "saved")
    slidecore.close(run.model)
    again = Run(language_model("llama", layers=5, seed=8), offload, host_memory=least * 2, disk=disk, **common)
    slidecore.load_checkpoint(again.model, again.optimizer, tmp_path / "saved")
    again.train(batches[3:])
    assert_same(state(again.model), state(plain.model))
    slidecore.close(again.model)
    # Closing brings the weights back.
    for mine, theirs in zip(again.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_traffic_is_what_was_foretold(offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads and writes what the report says; weights in memory, so that nothing depends on the window."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no calibration
    plain = offload(language_model("llama", layers=5), compute_dtype=torch.bfloat16, **SMALL)
    weights = sum(engine_of(plain).planes.weight.of(c).nbytes for c in engine_of(plain).chunks)
    least = smallest(lambda: language_model("llama", layers=5), tmp_path, compute_dtype=torch.bfloat16)
    run = Run(
        language_model("llama", layers=5), offload, host_memory=least + weights + 100_000, disk=tmp_path,
        compute_dtype=torch.bfloat16, **SMALL,
    )  # fmt: skip
    run.train(token_batches(1))
    slidecore.synchronize(run.model)
    before = slidecore.stats(run.model).disk_counters
    run.train(token_batches(3))
    slidecore.synchronize(run.model)
    after = slidecore.stats(run.model).disk_counters
    traffic = slidecore.stats(run.model).disk_traffic
    assert {p.name for p in engine_of(run.model).tiers.on_disk} >= {"exp_avg", "exp_avg_sq", "residual"}
    assert "weight" not in {p.name for p in engine_of(run.model).tiers.on_disk}
    assert after["read_bytes"] - before["read_bytes"] == 3 * traffic.read_bytes > 0
    assert after["written_bytes"] - before["written_bytes"] == 3 * traffic.written_bytes > 0
    assert traffic.terabytes_per_1000_steps == traffic.written_bytes / 1e9
    assert traffic.seconds is None
    assert traffic.terabytes_per_day is None
    assert f"{traffic.terabytes_per_1000_steps:.3g} TB written in 1000 steps" in traffic.describe()
    assert "saved inputs come on top" in traffic.describe()
    assert slidecore.stats(plain).disk_traffic.written_bytes == 0


def test_a_machine_short_of_memory(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Planes go down by themselves, with a warning; the numbers stay, and a budget brings the planes back."""
    batches = token_batches(6)
    plain = Run(language_model("llama"), offload, compute_dtype=torch.float32)
    losses = plain.train(batches)
    run = Run(language_model("llama"), offload, compute_dtype=torch.float32, disk=tmp_path, **SMALL)
    seen = run.train(batches[:2])
    monkeypatch.setattr(tiers, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(host_pressure, "low_water", lambda: 300_000)
    monkeypatch.setattr(host_pressure, "available_memory", lambda: 200_000)
    before = slidecore.stats(run.model).host_memory
    with caplog.at_level("WARNING", "slidecore"):
        seen += run.train(batches[2:3])
    assert "short of memory" in caplog.text
    assert "set_budget" in caplog.text
    assert slidecore.stats(run.model).host_memory <= before - 400_000
    monkeypatch.setattr(host_pressure, "available_memory", lambda: 1 << 40)
    seen += run.train(batches[3:4])
    assert slidecore.stats(run.model).disk_memory > 0
    slidecore.set_budget(run.model, host_memory="1GiB")
    seen += run.train(batches[4:])
    assert slidecore.stats(run.model).disk_memory == 0
    assert seen == losses
    assert_same(state(run.model), state(plain.model))


def test_a_model_that_memory_has_no_room_for_is_told(
    offload: Offload, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "slidecore"):
        offload(language_model("llama"), compute_dtype=torch.float32, **SMALL)
        assert "kernel may end" not in caplog.text
        monkeypatch.setattr(host_pressure, "available_memory", lambda: 200_000)
        offload(language_model("llama"), compute_dtype=torch.float32, **SMALL)
    assert "machine has 195 KiB left" in caplog.text
    assert "disk=" in caplog.text


def test_pressure_is_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = host_pressure.low_water()
    assert 0 < low < host_pressure.available_memory()
    told = tmp_path / "memory"
    monkeypatch.setattr(host_pressure, "_PRESSURE", told)
    assert host_pressure.stalled_share() == 0
    quiet = host_pressure.low_water()
    told.write_text("some avg10=55.00 avg60=1.00 avg300=0 total=9\nfull avg10=12.50 avg60=0.00 avg300=0 total=7\n")
    assert host_pressure.stalled_share() == 0.125
    assert host_pressure.low_water() == 2 * quiet


def test_a_calibration_is_used(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SLIDECORE_IO", raising=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    point = calibration.Point("threads", 1 << 19, 3, 2.0, 1.0, 0.1, 0.1)
    made = calibration.Calibration(point, [point], [], "", "", 1)
    calibration.save(made, [str(disk)])
    least = smallest(lambda: language_model("llama"), disk)
    with caplog.at_level("INFO", "slidecore"):
        model = offload(language_model("llama"), host_memory=least, disk=disk, **SMALL)
    assert re.search(r"disk tier: .*\. Transfers by threads \(asked for\)", caplog.text)
    assert ".;" not in caplog.text
    store = engine_of(model).tiers.store
    assert store is not None
    assert (store.transfers.backend, store.transfers.block_bytes, store.transfers.queue_depth) == (
        "threads",
        1 << 19,
        3,
    )
    traffic = slidecore.stats(model).disk_traffic
    assert traffic.terabytes_per_day is not None
    assert f"at most {traffic.terabytes_per_day:.3g} TB" in traffic.describe()
    assert traffic.seconds is not None
    assert traffic.terabytes_per_day == pytest.approx(traffic.written_bytes / traffic.seconds * 86400 / 1e12)
    assert traffic.seconds == pytest.approx(traffic.read_bytes / 2e9 + traffic.written_bytes / 1e9)
    assert "the disk needs" in traffic.describe()


def test_a_file_truncated_under_us(offload: Offload, tmp_path: Path) -> None:
    """The next call says which file, and where in it."""
    least = smallest(lambda: language_model("llama"), tmp_path)
    run = Run(language_model("llama"), offload, host_memory=least, disk=tmp_path, **SMALL)
    batches = token_batches(3)
    run.train(batches[:1])
    slidecore.synchronize(run.model)
    (swap,) = tmp_path.glob("slidecore-swap*.bin")
    os.truncate(swap, 4096)
    with pytest.raises(_core.Error, match=rf"offset \d+ of {re.escape(str(swap))}.*truncated"):
        run.train(batches[1:])
    with pytest.raises(_core.Error):
        run.train(batches[2:])
    with pytest.raises(_core.Error):  # its weights are lost
        slidecore.close(run.model)
    assert list(tmp_path.iterdir()) == []


def test_bad_budgets_and_directories(offload: Offload, tmp_path: Path) -> None:
    model = language_model("llama")
    with pytest.raises(slidecore.BudgetError, match=r"host_memory=.*at least \d+ bytes.*disk="):
        offload(model, host_memory="100KB")
    with pytest.raises(slidecore.BudgetError, match=r"disk_memory=.*have to lie on disk"):
        offload(model, host_memory=smallest(lambda: model, tmp_path), disk=tmp_path, disk_memory=4096, **SMALL)
    with pytest.raises(_core.Error, match="missing"):
        offload(model, disk=tmp_path / "missing")
    with pytest.raises(ValueError, match="disk_memory= needs disk="):
        offload(model, disk_memory="1GiB")
    for wrong in (5, b"/tmp", [tmp_path, 5], [b"/tmp"]):
        with pytest.raises(TypeError, match=r"disk=.* must be a directory, or a list of directories"):
            offload(model, disk=wrong)
    with pytest.raises(ValueError, match="host_memory='many'"):
        offload(model, host_memory="many")
    assert list(tmp_path.iterdir()) == []
    first = offload(model, disk=tmp_path, **SMALL)  # nothing was changed by the failures
    with pytest.raises(_core.Error, match=str(os.getpid())):
        offload(language_model("llama"), disk=tmp_path)
    with pytest.raises(slidecore.BudgetError):
        slidecore.set_budget(first, host_memory=1)
    with pytest.raises(slidecore.UsageError, match="disk=\\[directory"):
        slidecore.set_budget(offload(language_model("llama")), disk_memory=1)
    loss = first(**token_batches(1)[0]).loss
    with pytest.raises(slidecore.UsageError, match="between steps"):
        slidecore.set_budget(first, host_memory="1GiB")
    del loss


def test_the_disk_budget_that_an_error_names_is_enough(offload: Offload, tmp_path: Path) -> None:
    """Parts take whole blocks of a file, and a budget that is too small for them changes nothing."""

    def build() -> nn.Module:
        return language_model("llama", layers=5)

    common = {"compute_dtype": torch.bfloat16, **SMALL}
    least = smallest(build, tmp_path, compute_dtype=torch.bfloat16)
    with pytest.raises(slidecore.BudgetError, match="have to lie on disk") as error:
        offload(build(), host_memory=least, disk=tmp_path, disk_memory=1, **common)
    found = re.search(r"(\d+) bytes \([^)]*\) have to lie on disk", str(error.value))
    assert found is not None
    enough = int(found[1])
    assert enough % 4096 == 0
    model = offload(build(), disk=tmp_path, **common)
    with pytest.raises(slidecore.BudgetError, match=f"{enough} bytes .* have to lie on disk"):
        slidecore.set_budget(model, host_memory=least, disk_memory=enough - 1)
    assert engine_of(model).tiers.on_disk == frozenset()
    slidecore.set_budget(model, host_memory=least, disk_memory=enough)
    assert slidecore.stats(model).disk_memory == enough
    slidecore.close(model)
    offload(build(), host_memory=least, disk=tmp_path, disk_memory=enough, **common)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_error_of_a_budget_says_what_deferred_updates_add(
    offload: Offload, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Both minima, of a step with one backward and of one with several, are enough, and the least that is."""

    def build() -> nn.Module:
        return language_model("llama")

    def train(host_memory: int, accumulate: int) -> None:
        directory = tmp_path / f"{host_memory} {accumulate}"
        directory.mkdir()
        options = {"compute_dtype": dtype, "disk": directory, "optimizer": {"update": "deferred"}, **SMALL}
        Run(build(), offload, host_memory=host_memory, accumulate=accumulate, **options).train(token_batches(1))

    with pytest.raises(slidecore.BudgetError, match="Deferred updates") as error:
        train(1, 1)
    least = re.search(r"at least (\d+) bytes", str(error.value))
    added = re.search(r"need (\d+) bytes .* more, for gradients that wait(?:, or (\d+) bytes)?", str(error.value))
    assert least is not None
    assert added is not None
    assert (added[2] is None) == (dtype == torch.float32)
    for nbytes, accumulate in ((int(added[1]), 1), (int(added[2] or added[1]), 2)):
        enough = int(least[1]) + nbytes
        train(enough, accumulate)
        with pytest.raises(slidecore.BudgetError, match=rf"at least {enough} bytes") as error:
            train(enough - 1, accumulate)
        assert "Deferred" not in str(error.value)  # they are counted by now


def test_inputs_in_use_count_when_a_budget_changes(offload: Offload, tmp_path: Path) -> None:
    """Between two backward passes to one step, planes go down to make room for what the second one's graph holds."""
    run = Run(
        language_model("llama", layers=9), offload, optimizer={"update": "deferred"}, compute_dtype=torch.float32,
        device_memory=2_300_000, micro_batch=4, disk=tmp_path, **SMALL,
    )  # fmt: skip
    first, second = (run.loss(batch) for batch in token_batches(2, batch=8, length=60))
    first.backward()
    held = engine_of(run.model).saved_inputs.held_bytes()
    assert held > 0
    budget = slidecore.stats(run.model).host_memory
    slidecore.set_budget(run.model, host_memory=budget - held)
    assert slidecore.stats(run.model).host_memory <= budget - held
    second.backward()
    run.optimizer.step()


def test_sums_of_gradients_that_do_not_fit(offload: Offload, tmp_path: Path) -> None:
    """Where no_sync() is refused for its float32 gradients, training goes on without it."""

    def build() -> nn.Module:
        return language_model("llama")

    least = smallest(build, tmp_path, compute_dtype=torch.bfloat16)
    common = {"compute_dtype": torch.bfloat16, "disk": tmp_path, "optimizer": {"update": "deferred"}, **SMALL}
    sizes = offload(build(), compute_dtype=torch.bfloat16)
    gradients = engine_of(sizes).planes.gradient_bytes(torch.bfloat16)
    run = Run(build(), offload, host_memory=least + gradients, **common)
    batches = token_batches(2)
    run.train(batches[:1])
    with pytest.raises(slidecore.BudgetError), run.model.no_sync():  # type: ignore[operator]
        pass
    run.train(batches[1:])


def test_float32_gradients_do_not_keep_room_for_those_before(offload: Offload, tmp_path: Path) -> None:
    """Where no_sync() widens an empty `grad` plane, no more goes to disk than the wide one needs."""

    def build() -> nn.Module:
        return language_model("llama")

    least = smallest(build, tmp_path, compute_dtype=torch.bfloat16)
    wide = engine_of(offload(build(), compute_dtype=torch.bfloat16)).planes.gradient_bytes(torch.float32)
    budget = {"compute_dtype": torch.bfloat16, "disk": tmp_path, "host_memory": least + wide, **SMALL}
    run = Run(build(), offload, optimizer={"update": "deferred"}, accumulate=2, **budget)
    run.train(token_batches(1))
    assert slidecore.stats(run.model).host_memory <= least + wide


def test_a_machine_short_of_memory_with_full_drives(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Planes stay where they are, with a warning that says why; training goes on."""
    run = Run(language_model("llama"), offload, compute_dtype=torch.float32, disk=tmp_path, **SMALL)
    store = engine_of(run.model).tiers.store
    assert store is not None
    monkeypatch.setattr(tiers, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(host_pressure, "low_water", lambda: 300_000)
    monkeypatch.setattr(host_pressure, "available_memory", lambda: 200_000)
    reserve = store.reserve
    monkeypatch.setattr(store, "reserve", lambda nbytes: reserve(nbytes + (1 << 60)))  # more than any drive has
    with caplog.at_level("WARNING", "slidecore"):
        run.train(token_batches(1))
    assert re.search("short of memory.*but: not enough space", caplog.text)
    assert engine_of(run.model).tiers.on_disk == frozenset()


def test_shorter_buffers_make_room_for_longer_inputs(offload: Offload) -> None:
    """Without a disk: buffers that nobody uses do not count against the inputs that take their place."""
    options = {
        "compute_dtype": torch.float32, "device_memory": 2_300_000, "micro_batch": 4, "keep_graphs": 0, **SMALL
    }  # fmt: skip

    def build() -> nn.Module:
        return language_model("llama", layers=9)

    fixed = slidecore.stats(offload(build(), **options)).host_memory
    probe = Run(build(), offload, **options)
    probe.train(token_batches(1, batch=8, length=60))
    needed = slidecore.stats(probe.model).saved_inputs_bytes
    run = Run(build(), offload, host_memory=fixed + needed, **options)
    run.train(token_batches(1, batch=8, length=59))
    run.train(token_batches(1, batch=8, length=60))
    assert slidecore.stats(run.model).host_memory <= fixed + needed


def test_close_leaves_no_thread_and_no_file(offload: Offload, tmp_path: Path) -> None:
    """Also while the optimizer, and whatever else knows the engine, is still there."""
    least = smallest(lambda: language_model("llama"), tmp_path)
    before = native_threads()
    run = Run(language_model("llama"), offload, host_memory=least, disk=tmp_path, **SMALL)
    run.train(token_batches(2))
    engine = engine_of(run.model)
    assert native_threads() - before
    slidecore.close(run.model)
    assert_no_more_threads(before)
    links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert not [link for link in links if str(tmp_path) in link]
    assert engine.closed


FORKED = """
import gc, os, sys
sys.path.insert(0, sys.argv[2])
import slidecore
from _models import language_model
model = slidecore.offload(
    language_model("llama"), device="cpu", disk=sys.argv[1], host_memory=int(sys.argv[3]), piece_bytes=4096,
    ring_pieces=4,
)
if os.fork() == 0:
    if sys.argv[4] == "collects":
        del model
        gc.collect()
        os._exit(0)
    sys.exit(0)  # and so calls what is registered for the exit
assert os.wait()[1] == 0, "the child did not end well"
assert len(os.listdir(sys.argv[1])) == 2, "the child has removed files"
slidecore.close(model)
assert not os.listdir(sys.argv[1])
"""


@pytest.mark.parametrize("child", ["exits", "collects"])
def test_a_forked_child_leaves_lanes_and_files_alone(tmp_path: Path, child: str) -> None:
    swap = tmp_path / "swap"
    swap.mkdir()
    least = smallest(lambda: language_model("llama"), swap)
    arguments = [str(swap), str(Path(__file__).parent), str(least), child]
    subprocess.run([sys.executable, "-c", FORKED, *arguments], check=True, timeout=60)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import slidecore
from _models import language_model
slidecore.offload(
    language_model("llama"), device="cpu", disk=sys.argv[1], host_memory=int(sys.argv[3]), piece_bytes=4096,
    ring_pieces=4,
)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_a_killed_process_go(offload: Offload, tmp_path: Path) -> None:
    least = smallest(lambda: language_model("llama"), tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent), str(least)], check=False, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.glob("*.bin")}
    assert left
    offload(language_model("llama"), disk=tmp_path)
    assert not left & {path.name for path in tmp_path.glob("*.bin")}
