"""What blocks do besides computing with their inputs: other random numbers, counters, lists and numbers handed on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slidecore
import torch
from _models import (
    Residual,
    Stack,
    distance,
    feature_batches,
    loss_of,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from torch import nn

Offload = Callable[..., nn.Module]
Draw = Callable[[], float]
GENERATOR = torch.Generator()


def seed_all() -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)


# --- random numbers


class Scaled(Residual):
    """Its output is scaled by what `draw` gives."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(13, 29)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(torch.tanh(x * (0.5 + self.draw())))


# Functions, as deepcopy() makes bound methods draw from copies of their generators.
def python_draw() -> float:
    return random.gauss(0.0, 0.3)


def numpy_draw() -> float:
    return 0.3 * float(np.random.randn())


def numpy_at_times() -> float:
    return numpy_draw() if random.random() < 0.8 else 0.3


@pytest.mark.parametrize("options", [{"keep_graphs": 0}, {"keep_graphs": 2}, {"keep_graphs": 0, "window": 3}], ids=str)
@pytest.mark.parametrize("draw", [python_draw, numpy_draw, numpy_at_times], ids=["python", "numpy", "numpy at times"])
def test_python_and_numpy_draw_the_same_again(offload: Offload, draw: Draw, options: dict[str, Any]) -> None:
    plain = Stack(block=lambda: Scaled(draw), depth=6)
    model = offload(copy.deepcopy(plain), **options)
    batches = feature_batches(4)
    seed_all()
    theirs = train_plain(plain, batches)
    after = random.random(), np.random.rand()
    seed_all()
    assert train_offloaded(model, batches) == pytest.approx(theirs, abs=1e-5)
    assert (random.random(), np.random.rand()) == after
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


class EndsInRReLU(Residual):
    """Saves its noise for backward before the operation has written it, as the last of the block's saved tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rrelu(super().forward(x) - 0.5, training=self.training)


def test_what_is_written_after_it_was_saved(offload: Offload) -> None:
    plain = Stack(block=lambda: EndsInRReLU(13, 29), depth=6)
    model = offload(copy.deepcopy(plain), keep_graphs=0)
    batches = feature_batches(4)
    seed_all()
    theirs = train_plain(plain, batches)
    seed_all()
    assert train_offloaded(model, batches) == pytest.approx(theirs, abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_numbers_that_come_late_are_told(offload: Offload, recwarn: pytest.WarningsRecorder) -> None:
    drawn = [0.2]

    def late() -> float:
        return numpy_draw() if drawn[0] is None else drawn[0]

    plain = Stack(block=lambda: Scaled(late))
    model = offload(copy.deepcopy(plain), keep_graphs=0)
    batches = feature_batches(4)
    train_offloaded(model, batches[:2])
    assert not recwarn
    drawn[0] = None
    train_offloaded(model, batches[2:3])
    assert "random numbers of Python's or NumPy's" in str(recwarn.pop(UserWarning).message)
    now = slidecore.close(model) or copy.deepcopy(model)
    model = offload(model, keep_graphs=0)
    seed_all()
    theirs = train_plain(now, batches[3:])
    seed_all()
    assert train_offloaded(model, batches[3:]) == pytest.approx(theirs, abs=1e-5)
    assert not recwarn


def test_draws_outside_of_training_blocks_are_no_news(offload: Offload, recwarn: pytest.WarningsRecorder) -> None:
    """Augmentation that only training does, as of spectrograms; and an error of the model's own."""

    class Augmented(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * np.random.rand() if self.training else x)

    model = offload(Augmented(), keep_graphs=0)
    batch = feature_batches(1)[0]
    for mode in (False, True, True, False):
        model.train(mode)
        loss_of(model, batch)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(3, 4, 5))
    train_offloaded(model, [batch])
    assert not recwarn


class Counting:
    """Another number each time."""

    def __init__(self, factor: float = 1.4) -> None:
        self.number, self.factor = 1.0, factor

    def __call__(self) -> float:
        self.number *= self.factor
        return self.number


class OwnNoise(Residual):
    """Noise of a generator of its own."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.randn(x.shape, generator=self.generator).to(x.dtype))


class OwnMask(Residual):
    """Saves nothing else that would show it but a mask of truth values."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.where(torch.rand(x.shape, generator=self.generator) < 0.1, 0.0, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("block", [lambda: Scaled(Counting()), OwnNoise, OwnMask], ids=["counter", "generator", "mask"])
def test_what_does_not_repeat_is_an_error(
    offload: Offload, block: Callable[[], nn.Module], micro_batch: int | str, dtype: torch.dtype
) -> None:
    model = offload(Stack(block=block), keep_graphs=0, micro_batch=micro_batch, compute_dtype=dtype)
    optimizer = slidecore.AdamW(model.parameters())
    loss = loss_of(model, {name: value.to(dtype) for name, value in feature_batches(1)[0].items()})
    with pytest.raises(RuntimeError, match=r"blocks\.\d .*other outputs.*generator.*counter"):
        loss.backward()
    assert optimizer is not None


class Recurrent(nn.Module):
    """oneDNN saves a workspace of which parts are never written."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(13, 13, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)[0]


class SavesAnything(torch.autograd.Function):
    """Saves what was never written, as kernels do for seeds that they do not use; and a number on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.randint(0, 1 << 40, (), generator=GENERATOR), torch.rand(3, generator=GENERATOR))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Saving(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(SavesAnything.apply(x))


class LazyTable(Residual):
    """Makes what it needs in its first forward."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.0, 13)
        return super().forward(x * self.table)


@pytest.mark.parametrize("options", [{"keep_graphs": 0}, {"keep_graphs": 0, "micro_batch": 2}, {}], ids=str)
@pytest.mark.parametrize("block", [Recurrent, lambda: Saving(13, 29), LazyTable], ids=["lstm", "anything", "lazy"])
def test_what_repeats_well_enough_is_no_error(
    offload: Offload, block: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    plain = Stack(block=block)
    model = offload(copy.deepcopy(plain), **options)
    batches = feature_batches(3)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_kept_graphs_need_not_repeat(offload: Offload) -> None:
    plain = Stack(block=OwnNoise)
    model = offload(copy.deepcopy(plain), keep_graphs=5)
    for ours, theirs in zip(model.blocks, plain.blocks, strict=True):  # deepcopy takes generators along
        ours.generator.set_state(theirs.generator.get_state())
    batches = feature_batches(3)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_roundings_are_no_error(offload: Offload, seed: int) -> None:
    """Whatever is off by a unit of bfloat16 in each element."""
    GENERATOR.manual_seed(seed)

    class Off(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            signs = torch.randint(-1, 2, x.shape, generator=GENERATOR)
            return super().forward(x * (1 + signs * 2.0**-8))

    model = offload(Stack(block=lambda: Off(13, 29)), keep_graphs=0, compute_dtype=torch.float32)
    losses = train_offloaded(model, feature_batches(2, shape=(16, 40), seed=seed))
    assert all(loss > 0 for loss in losses)


# --- lists, dicts and numbers


class Appending(Residual):
    def __init__(self, how: str) -> None:
        super().__init__(13, 29)
        self.how = how

    def forward(self, x: torch.Tensor, seen: Any) -> torch.Tensor:
        h = super().forward(x)
        if self.how == "append":
            seen.append(h)
        elif self.how == "in a tuple":
            seen[0].append(h)
        elif self.how == "in a dict":
            seen["layers"].append(h)
        elif self.how == "replace":
            seen[0] = h
        elif self.how == "nested dict":
            seen["of"]["block"] = h
        elif self.how == "dict in a list":
            seen[0]["block"] = h
        return h


class AppendingModel(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Appending(how) for _ in range(3))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: Any = {
            "append": [],
            "in a tuple": ([],),
            "in a dict": {"layers": []},
            "replace": [x],
            "nested dict": {"of": {}},
            "dict in a list": [{}],
            "nothing": [x, {"a": x}],
        }[self.how]
        for block in self.blocks:
            x = block(x, seen)
        return x


@pytest.mark.parametrize("how", ["append", "in a tuple", "in a dict", "replace", "nested dict", "dict in a list"])
def test_what_blocks_add_to_lists_is_not_lost_silently(offload: Offload, how: str) -> None:
    model = offload(AppendingModel(how))
    x = torch.randn(3, 5, 13)
    with pytest.raises(slidecore.UsageError, match=r"blocks\.0 \(Appending\) changed a (list|dict).*argument 1"):
        model(x)
    with torch.no_grad():  # where a block gets what it was given, all of this works
        assert model(x).shape == x.shape


def test_lists_that_are_only_read(offload: Offload) -> None:
    model = offload(AppendingModel("nothing"))
    optimizer = slidecore.AdamW(model.parameters())
    model(torch.randn(3, 5, 13)).square().mean().backward()
    optimizer.step()


class Measuring(Residual):
    """Returns a number about its samples, by which the next block scales: their mean, or how many they are."""

    def __init__(self, counts: bool) -> None:
        super().__init__(13, 29)
        self.counts = counts

    def forward(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
        h = super().forward(x * scale)
        return h, 1.0 / (1.0 + (x.shape[0] if self.counts else h.detach().abs().mean().item()))


class MeasuringModel(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(Measuring(counts) for _ in range(4))
        self.leave = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, scale = self.enter(x), 1.0
        for block in self.blocks:
            h, scale = block(h, scale)
        return self.leave(h)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("keep_graphs", [0, 4])
def test_numbers_of_micro_batches_are_those_of_the_batch(
    offload: Offload, keep_graphs: int, counts: bool, recwarn: pytest.WarningsRecorder
) -> None:
    plain = MeasuringModel(counts)
    model = offload(copy.deepcopy(plain), micro_batch=2, keep_graphs=keep_graphs)
    batches = feature_batches(3, shape=(4, 11))
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    assert any("number that depends on the samples" in str(w.message) for w in recwarn)


# --- views of weights


class Caching(nn.Module):
    """Keeps a view of its weight, as if the weight stayed where it is, or makes it `anew` each time."""

    def __init__(self, anew: bool, detach: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(13, 13) / 9)
        self.anew, self.detach = anew, detach
        self.view: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.view is None or self.anew:
            self.view = (self.weight.detach() if self.detach else self.weight).t()
        return x + x @ self.view + x @ self.weight


@pytest.mark.parametrize("train", [False, True])
def test_cached_views_of_weights_are_an_error(offload: Offload, train: bool) -> None:
    model = offload(nn.Sequential(*(Caching(anew=False) for _ in range(4))), keep_graphs=0)
    optimizer = slidecore.AdamW(model.parameters())
    x = torch.randn(3, 13)

    def compute() -> None:
        if train:
            model(x).square().mean().backward()  # recomputes
        else:
            model(x)
            model(x)

    with torch.set_grad_enabled(train), pytest.raises(slidecore.UsageError, match=r"kept a view of a weight.*\.view"):
        compute()
    assert optimizer is not None


@pytest.mark.parametrize("detach", [False, True])
def test_views_of_weights_made_anew_are_none(offload: Offload, detach: bool) -> None:
    plain = nn.Sequential(nn.Linear(7, 13), *(Caching(anew=True, detach=detach) for _ in range(4)), nn.Linear(13, 3))
    model = offload(copy.deepcopy(plain), keep_graphs=0)
    batches = feature_batches(3, shape=(5,))
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(model(batches[0]["x"]), plain(batches[0]["x"]), atol=1e-5)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)


# --- gradients that are not there


class Half(Residual):
    """Has an input that nothing depends on."""

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class HalfModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Half(13, 29) for _ in range(3))

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, unused)
        return x


@pytest.mark.parametrize("micro_batch", ["auto", 1, 2])
def test_unused_inputs_get_no_gradient(offload: Offload, micro_batch: int | str) -> None:
    model = offload(HalfModel(), micro_batch=micro_batch, keep_graphs=0)
    optimizer = slidecore.AdamW(model.parameters())
    x, unused = torch.randn(5, 4, 13, requires_grad=True), torch.randn(5, 4, 13, requires_grad=True)
    model(x, unused).square().mean().backward()
    optimizer.step()
    assert x.grad is not None
    assert unused.grad is None
