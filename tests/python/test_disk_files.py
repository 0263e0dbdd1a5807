"""Swap files under training: truncated, left by a process that goes elsewhere, given back, and without copies."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _disk import SMALL, assert_same, smallest, state
from _models import language_model, token_batches
from _runs import Run
from slidecore import _core
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


@pytest.mark.parametrize("backend", ["uring", "threads"])
def test_a_truncated_file_that_saved_inputs_make_longer_again(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Moments on disk were lost, and the next forward writes behind the cut: nothing is trained on the hole's zeros."""
    if backend == "uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(reason)
    monkeypatch.setenv("SLIDECORE_IO", backend)

    def build() -> nn.Module:
        return language_model("llama", layers=9, seed=4)

    # A device budget that sends inputs away, and a host budget that has room for the weights only.
    common: dict[str, Any] = {
        "compute_dtype": torch.float32, "device_memory": 2_400_000, "micro_batch": 4, **SMALL
    }  # fmt: skip
    weights = sum(p.numel() for p in build().parameters()) * 4
    least = smallest(build, tmp_path, **{k: v for k, v in common.items() if k not in SMALL})
    run = Run(build(), offload, host_memory=least + weights + 100_000, disk=tmp_path, **common)
    batches = token_batches(4, batch=8, length=64)
    run.train(batches[:2])
    slidecore.synchronize(run.model)
    tiers = engine_of(run.model).tiers
    assert {part.name for part in tiers.on_disk} == {"exp_avg", "exp_avg_sq"}
    assert slidecore.stats(run.model).disk_memory > sum(part.disk_bytes for part in tiers.on_disk)  # and inputs
    (swap,) = tmp_path.glob("slidecore-swap*.bin")
    os.truncate(swap, 4096)
    told = rf"at offset \d+ of {re.escape(str(swap))}.*truncated"
    with pytest.raises(_core.Error, match=told):
        run.train(batches[2:3])
    for again in (lambda: run.train(batches[3:]), lambda: slidecore.synchronize(run.model)):
        with pytest.raises(_core.Error, match=told):
            again()
    slidecore.close(run.model)  # the weights were in memory
    assert list(tmp_path.iterdir()) == []


def test_a_relative_directory_is_where_it_was(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that goes elsewhere leaves neither file nor lock behind."""
    (tmp_path / "swap").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = offload(language_model("llama"), disk="swap", **SMALL)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(list((tmp_path / "swap").iterdir())) == 2
    slidecore.close(model)
    assert list((tmp_path / "swap").iterdir()) == []


class _Block(nn.Module):
    """Parameters of whole pages, in every plane."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(64, 64, bias=False)
        self.blocks = nn.ModuleList(_Block() for _ in range(6))
        self.leave = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h)
        return self.leave(h)


@pytest.mark.parametrize("backend", ["uring", "threads"])
@pytest.mark.parametrize("update", ["overlap", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_is_copied_on_its_way_to_a_drive(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, update: str, backend: str
) -> None:
    """Planes, stages and saved inputs lie in pages of their own: of whole pages, no byte takes a detour."""
    if backend == "uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(reason)
    monkeypatch.setenv("SLIDECORE_IO", backend)
    options = {
        "compute_dtype": dtype,
        "device_memory": 1_220_000 if dtype == torch.float32 else 680_000,
        "micro_batch": 2,
        "keep_graphs": 0,
        **SMALL,
    }
    least = smallest(_Blocks, tmp_path, **{k: v for k, v in options.items() if k not in SMALL})
    if update == "deferred":
        least += sum(p.numel() for p in _Blocks().parameters()) * dtype.itemsize
    run = Run(_Blocks(), offload, host_memory=least, disk=tmp_path, optimizer={"update": update}, **options)
    batch = {"x": torch.randn(8, 64, 64), "target": torch.randn(8, 64, 64)}
    run.train([batch] * 3)
    slidecore.synchronize(run.model)
    assert {part.name for part in engine_of(run.model).tiers.on_disk} >= {"weight", "exp_avg", "exp_avg_sq"}
    assert engine_of(run.model).saved_inputs.disk_bytes > 0
    slidecore.set_budget(run.model, host_memory="1GiB")
    slidecore.set_budget(run.model, host_memory=least)
    counters = slidecore.stats(run.model).disk_counters
    assert counters["written_bytes"] > 0
    assert counters["bounced_bytes"] == 0


@pytest.mark.parametrize("backend", ["uring", "threads"])
def test_copies_hold_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """What is not aligned goes through memory that no budget counts: it is there while it is needed only."""
    if backend == "uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(reason)
    block, depth = 4 << 20, 16
    storage = _core.Storage([str(tmp_path)])
    transfers = _core.Transfers(storage, backend=backend, block_bytes=block, queue_depth=depth)
    region = storage.allocate("plane", block * depth)
    memory = _core.HostBuffer(_core.Device("host", 0), block * depth + 4096, False)
    memoryview(memory)[:] = bytes(len(memory))
    before = _resident()
    for _ in range(2):
        transfers.wait(transfers.write(region, 0, memory.address + 1, len(region)))
        transfers.wait(transfers.read(region, 0, memory.address + 1, len(region)))
    assert transfers.counters()["bounced_bytes"] == 4 * len(region)
    assert _resident() - before < block * depth // 2
    transfers.close()
    storage.close()


def _resident() -> int:
    """Bytes of anonymous memory that this process has."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_files_shrink_when_planes_come_back(offload: Offload, tmp_path: Path) -> None:
    """And when disk_memory is lowered: the drives get back what lies behind the last part that is still there."""

    def blocks() -> int:
        return sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.bin"))

    def build() -> nn.Module:
        # Its planes take some stripes of the file.
        return language_model("llama", layers=5, vocab_size=16001)

    common = {"compute_dtype": torch.bfloat16, **SMALL}
    batches = token_batches(6)
    plain = Run(build(), offload, **common)
    losses = plain.train(batches)
    least = smallest(build, tmp_path, compute_dtype=torch.bfloat16)
    run = Run(build(), offload, host_memory=least, disk=tmp_path, **common)
    seen = run.train(batches[:1])
    full = blocks()
    assert full >= slidecore.stats(run.model).disk_memory > 12 << 20
    slidecore.set_budget(run.model, host_memory="1GiB")
    assert slidecore.stats(run.model).disk_memory == 0
    assert blocks() <= 1 << 20
    seen += run.train(batches[1:3])
    slidecore.set_budget(run.model, host_memory=least)
    assert blocks() >= slidecore.stats(run.model).disk_memory
    seen += run.train(batches[3:5])
    # Some of it comes back; what stays lies in front, or keeps its place.
    slidecore.set_budget(run.model, host_memory=least + (8 << 20))
    assert blocks() >= slidecore.stats(run.model).disk_memory > 0
    seen += run.train(batches[5:])
    assert seen == losses
    assert_same(state(run.model), state(plain.model))
