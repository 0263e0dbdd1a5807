"""Ctrl-C, wherever it comes: what was begun is given back, and the next call works."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import pytest
import slidecore
import torch
from _interrupts import interrupt, lines_of
from slidecore import _core
from slidecore.backend import Backend
from torch import nn

FORWARD = _core.Scheduler.FORWARD
MODES = {
    "overlap": ({"update": "overlap"}, 1),
    "deferred": ({"update": "deferred", "max_grad_norm": 1.0}, 1),
    "accumulated": ({"update": "deferred"}, 2),
}
# Where a gradient goes to a lane.
SENDING = ("updates.py", "deferred_updates.py", "gradients.py", "backend.py")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class _Model(nn.Module):
    """Edges, blocks, and a parameter around them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8))
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _Training:
    """A model that can be put back to where it started, as a checkpoint would put it."""

    def __init__(self, mode: str, keep_graphs: int) -> None:
        options, self._passes = MODES[mode]
        torch.manual_seed(0)
        self._batches = [torch.randn(4, 8) for _ in range(2)]
        model = _Model()
        self._start = copy.deepcopy(model.state_dict())
        self.model = slidecore.offload(model, device="cpu", keep_graphs=keep_graphs)
        self.optimizer = slidecore.AdamW(self.model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]
        self._options = copy.deepcopy(self.optimizer.state_dict())

    def step(self, batch: torch.Tensor) -> float:
        for left in range(self._passes - 1, -1, -1):
            with self.model.no_sync() if left else contextlib.nullcontext():  # type: ignore[operator]
                loss = self.model(batch).pow(2).mean()
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def one_step(self) -> None:
        self.step(self._batches[1])

    def from_the_start(self) -> list[Any]:
        self.model.load_state_dict(self._start)
        self.optimizer.load_state_dict(copy.deepcopy(self._options))
        losses: list[Any] = [self.step(batch) for batch in self._batches]
        slidecore.synchronize(self.model)
        return losses + [p.tolist() for p in self.model.parameters()]

    def give_up(self) -> None:
        """What a program does with a step that was interrupted."""
        if self.optimizer.update == "overlap":
            with contextlib.suppress(slidecore.UsageError):  # a step that was interrupted is over
                self.optimizer.step()
        else:
            self.optimizer.zero_grad()


def _check_interrupts(mode: str, keep_graphs: int, files: Sequence[str]) -> None:
    """After Ctrl-C before any line, and a return to the start, training is what it was."""
    training = _Training(mode, keep_graphs)
    want = training.from_the_start()
    training.one_step()  # which sees the schedule settle
    lines = lines_of(training.one_step, files)
    assert lines
    for line, count in sorted(lines.items()):
        for occurrence in sorted({1, count}):
            with _forgiven():
                interrupt(training.one_step, line, occurrence)
            training.give_up()
            assert training.from_the_start() == want, (line, occurrence)
            ordinary = torch.ones(2, requires_grad=True)
            ordinary.exp().sum().backward()  # the process itself is all right
    slidecore.close(training.model)


@contextlib.contextmanager
def _forgiven() -> Iterator[None]:
    """Autograd may turn an interrupt of a hook into an error of its own."""
    with contextlib.suppress(SystemError):
        yield


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
        scheduler.update(0, [(0, numel, hyper)], True, gradient.data_ptr(), gradient.nbytes, 0)

    def ctrl_c(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ctrl_c)
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


@pytest.mark.filterwarnings(
    "ignore:the last backward pass did not finish", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_submission_leaves_no_update_for_later(mode: str) -> None:
    """What is prepared for an update and not submitted would be the next one's: with its rate, steps and segments."""
    _check_interrupts(mode, 0, SENDING)


@pytest.mark.parametrize("submission", ["submit_gradient", "add_gradient", "update"])
def test_a_refused_submission_prepares_nothing(submission: str) -> None:
    """An earlier submission that has not begun stays."""
    backend = Backend("cpu")
    numel = 256
    planes = {name: torch.zeros(numel) for name in ("weight32", "exp_avg", "exp_avg_sq")}
    gradient, slot, total = torch.ones(numel), torch.zeros(numel), torch.full((numel,), 7.0)
    sink = _core.AdamWSink(_core.ThreadPool(1))
    sink.add_chunk(n=numel, gradient_float32=True)
    sink.place(0, memory={name: plane.data_ptr() for name, plane in planes.items()}, disk={})
    chunks = [("first", planes["weight32"].data_ptr(), slot.nbytes, 0)]
    scheduler = _core.Scheduler(backend.core, chunks, [([slot.data_ptr()], slot.nbytes)], sink)
    wrong, right = _core.AdamWHyper(), _core.AdamWHyper()
    wrong.lr, right.lr = 0.5, 0.25
    address, nbytes = gradient.data_ptr(), gradient.nbytes

    def submit(nbytes: int) -> None:
        if submission == "submit_gradient":
            scheduler.submit_gradient(0, [(0, numel, wrong)], True, address, nbytes, 0)
        elif submission == "add_gradient":
            scheduler.add_gradient(0, [(0, numel, True)], total.data_ptr(), True, address, nbytes, 0)
        else:
            scheduler.update(0, [(0, numel, wrong)], True, address, nbytes, 0)

    with pytest.raises(_core.Error):
        submit(0)
    scheduler.update(0, [(0, numel, right)], True, address, nbytes, 0)
    with pytest.raises(_core.Error):
        submit(0)
    scheduler.synchronize()
    assert torch.allclose(planes["weight32"], torch.full((numel,), -0.25))
    assert (total == 7.0).all()
    scheduler.close()
