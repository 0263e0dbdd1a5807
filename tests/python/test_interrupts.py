"""Ctrl-C while a lane is waited for: what was begun is given back, and the next call works."""

from __future__ import annotations

import signal
from types import FrameType

import pytest
import torch
from slidecore import _core
from slidecore.backend import Backend

FORWARD = _core.Scheduler.FORWARD


def test_a_visit_that_was_interrupted_holds_nothing() -> None:
    """A visit waits for updates; the signal comes then. The window's only slot is free for another chunk afterwards."""
    backend = Backend("cpu")
    numel, updates = 1 << 20, 100
    planes = {name: torch.zeros(numel) for name in ("weight32", "exp_avg", "exp_avg_sq")}
    other, gradient, slot = torch.ones(numel), torch.ones(numel), torch.zeros(numel)
    sink = _core.AdamWSink(_core.ThreadPool(1))
    for _ in range(2):
        sink.add_chunk(n=numel, gradient_float32=True)
    sink.place(0, memory={name: plane.data_ptr() for name, plane in planes.items()}, disk={})
    chunks = [("first", planes["weight32"].data_ptr(), slot.nbytes, 0), ("second", other.data_ptr(), slot.nbytes, 0)]
    scheduler = _core.Scheduler(backend.core, chunks, [([slot.data_ptr()], slot.nbytes)], sink)
    hyper = _core.AdamWHyper()
    for step in range(updates):
        hyper.step = step + 1
        sink.prepare(0, [(0, numel, hyper)], gradient_float32=True)
        scheduler.update(0, gradient.data_ptr(), gradient.nbytes, 0)

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # of the updates, most are still to come
        with pytest.raises(KeyboardInterrupt):
            scheduler.acquire(0, FORWARD, backend.stream())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    scheduler.acquire(1, FORWARD, backend.stream())
    scheduler.synchronize()
    assert torch.equal(slot, other)
    scheduler.release(1, FORWARD, backend.stream())
    scheduler.close()
