"""Saving and loading take little memory beside the planes, whatever their size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from _runs import Run, differences
from slidecore.checkpoints.files import PIECE
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def own_memory() -> int:
    """Bytes of the process's own memory: neither files nor what is shared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def rise_during(action: Callable[[], object]) -> int:
    before = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        action()
    finally:
        done.set()
        watching.join()
    return peak - before


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1024, 2048)
        self.outer = nn.Linear(2048, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


def test_saving_and_loading_are_streams(offload: Offload, tmp_path: Path) -> None:
    run = Run(nn.Sequential(*(Wide() for _ in range(6))), offload, compute_dtype=torch.bfloat16)
    engine = engine_of(run.model)
    for chunk in engine.chunks:  # pages that were never written are not there
        for plane in engine.planes.of(chunk).values():
            plane.copy_(torch.randint(-100, 100, plane.shape, dtype=torch.int16).to(plane.dtype))
    for directory in ("warm-up", "measured"):
        saving = rise_during(lambda directory=directory: run.save(tmp_path / directory, threads=2))  # type: ignore[misc]
        state = run.state()
        loading = rise_during(lambda directory=directory: run.load(tmp_path / directory, threads=2))  # type: ignore[misc]
        assert differences(run.state(), state) == []
        del state
    assert engine.planes.nbytes > 12 * PIECE
    # A piece a thread where files are only checked; the planes are read into and written from where they lie.
    assert saving < PIECE, saving
    assert loading < 3 * PIECE, loading
