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
from _disk import SMALL, smallest
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
