"""Random models and options: gradients are those of plain PyTorch, and steps end where its steps end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import slidecore
import torch
from _models import Residual, clone, weights
from torch import nn

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'slidecore[test]'")
st = hypothesis.strategies


class Gated(nn.Module):
    """A parameter of its own, one that is a scalar, and one that nothing uses."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner)
        self.mix = nn.Parameter(torch.randn(inner, width) / inner**0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * (torch.sigmoid(self.gate(x)) * self.value(x)) @ self.mix


class Crossed(nn.Module):
    """Reads what an earlier module made, by keyword; returns a second tensor, and keeps a third for the loss."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.side = nn.Linear(width, inner), nn.Linear(inner, 2, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, *, context: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        inner = torch.tanh(self.up(x + context["state"]))
        self.penalty = inner.square().flatten(1).mean(1)
        return x + self.down(inner), self.side(inner)


class Switched(nn.Module):
    """Samples choose one of two parts by the sign of a feature: some parts get no gradient."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width), Residual(width, inner)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = x.flatten(1)[:, 0] > 0
        out = x
        for part, chosen in zip(self.parts, (positive, ~positive), strict=True):
            at = chosen.nonzero().flatten()
            if len(at):
                out = out.index_copy(0, at, part(x[at]))
        return out


BLOCKS = {
    "residual": Residual,
    "gated": Gated,
    "linear": lambda width, _: nn.Linear(width, width),
    "crossed": Crossed,
    "switched": Switched,
}


class RandomModel(nn.Module):
    """Blocks of several classes and sizes between two edges."""

    def __init__(self, draw: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(draw["seed"])
        width = draw["width"]
        self.shift = nn.Parameter(torch.randn(width) / 9) if draw["resident"] else None
        self.enter = nn.Linear(width, width)
        self.state = nn.Linear(width, width)
        self.blocks = nn.ModuleList(BLOCKS[kind](width, inner) for kind, inner in draw["blocks"])
        self.leave = nn.Linear(width, width)
        if draw["tied"]:
            self.leave.weight = self.enter.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        h = self.enter(x)
        context = {"state": self.state(x)}
        if self.shift is not None:
            h = h + self.shift
        sides = h.new_zeros(())
        for block in self.blocks:
            if isinstance(block, Crossed):
                h, side = block(h, context=context)
                sides = sides + side.square().mean() + block.penalty.mean()
            else:
                h = block(h)
            h = torch.tanh(h)
        return self.leave(h).square().mean() + 0.1 * sides


def dictionary(**strategies: Any) -> Any:
    return st.fixed_dictionaries(strategies)


MODELS = dictionary(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    blocks=st.lists(st.tuples(st.sampled_from(list(BLOCKS)), st.integers(1, 50)), min_size=2, max_size=6).filter(
        lambda blocks: len({kind for kind, _ in blocks}) < len(blocks)  # a class that repeats makes them a run
    ),
    tied=st.booleans(),
    resident=st.booleans(),
)
OPTIONS = dictionary(
    window=st.integers(1, 7),
    micro_batch=st.one_of(st.just("auto"), st.integers(1, 9)),
    keep_graphs=st.integers(0, 6),
    device_memory=st.sampled_from([None, "1GiB"]),
    piece_bytes=st.sampled_from([1, 4096, 8192, 1 << 20]),
    ring_pieces=st.integers(2, 5),
    threads=st.integers(1, 3),
)
BATCHES = st.tuples(st.integers(1, 9), st.sampled_from([(), (3,), (2, 5)]))
# Bits: which parameters are frozen, and which are kept on the device.
SUBSETS = st.one_of(st.just(0), st.integers(0, 2**32 - 1))
UPDATES = st.sampled_from(["overlap", "deferred"])


def has_bit(bits: int, i: int) -> bool:
    return bool(bits >> (i % 32) & 1)


def freeze(model: nn.Module, frozen: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not has_bit(frozen, i))


@contextlib.contextmanager
def offloaded(plain: nn.Module, kept: int, **options: Any) -> Iterator[tuple[nn.Module, list[str]]]:
    """A copy that is offloaded but for the parameters that `kept` says, whose names come with it."""
    names = [name for i, (name, _) in enumerate(plain.named_parameters()) if has_bit(kept, i)]
    rest = [name for name, _ in plain.named_parameters() if name not in names]
    model = clone(plain)
    left = [type(b) for b in model.blocks if any(p is model.get_parameter(n) for p in b.parameters() for n in rest)]
    hypothesis.assume(len(set(left)) < len(left))  # what is left of the blocks is a run
    slidecore.offload(model, device="cpu", keep=names, **options)
    try:
        yield model, names
    finally:
        slidecore.close(model)


def optimizers_of(model: nn.Module, names: list[str], update: str, **settings: Any) -> list[torch.optim.Optimizer]:
    """For what is kept and what is not, where there is something to train."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    made: list[torch.optim.Optimizer] = []
    if any(name not in names for name in trained):
        made.append(slidecore.AdamW([p for n, p in trained.items() if n not in names], update=update, **settings))
    if any(name in names for name in trained):
        made.append(torch.optim.AdamW([p for n, p in trained.items() if n in names], **settings))
    return made


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(model=MODELS, options=OPTIONS, batch=BATCHES, frozen=SUBSETS, kept=SUBSETS, update=UPDATES)
def test_two_steps_end_where_pytorch_ends(
    model: dict[str, Any],
    options: dict[str, Any],
    batch: tuple[int, tuple[int, ...]],
    frozen: int,
    kept: int,
    update: str,
) -> None:
    plain = RandomModel(model)
    freeze(plain, frozen)
    fresh = clone(plain)
    x = torch.randn(batch[0], *batch[1], model["width"])
    hypothesis.assume(clone(plain)(x).requires_grad)
    with offloaded(fresh, kept, **options) as (copied, names):
        # eps damps what Adam makes of rounding in gradients near zero.
        settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
        optimizers = optimizers_of(copied, names, update, **settings)
        theirs = [torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], **settings)]
        for _ in range(2):
            losses = []
            for m, steps in ((copied, optimizers), (plain, theirs)):
                loss = m(x)
                loss.backward()
                for optimizer in steps:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)
        slidecore.synchronize(copied)
        for name, value in weights(plain).items():
            assert torch.allclose(copied.get_parameter(name), value, rtol=1e-5, atol=2e-6), name


def relative_error(mine: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Of all gradients together; they must be of the same parameters."""
    assert mine.keys() == truth.keys()
    difference = torch.cat([(mine[name].double() - truth[name]).flatten() for name in truth]).norm()
    return (difference / torch.cat([value.flatten() for value in truth.values()]).norm().clamp_min(1e-30)).item()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    model=MODELS,
    options=OPTIONS,
    batch=BATCHES,
    frozen=SUBSETS,
    kept=SUBSETS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backwards=st.integers(1, 3),
)
def test_gradients_are_those_of_pytorch(
    model: dict[str, Any],
    options: dict[str, Any],
    batch: tuple[int, tuple[int, ...]],
    frozen: int,
    kept: int,
    dtype: torch.dtype,
    backwards: int,
) -> None:
    """Summed over one or several backwards, and as exact as PyTorch's own in the same dtype, seen from float64."""
    plain = RandomModel(model).to(dtype)
    # Which part of a block a sample chooses must not depend on rounding.
    hypothesis.assume(not any(isinstance(block, Switched) for block in plain.blocks) or dtype == torch.float32)
    freeze(plain, frozen)
    fresh, exact = clone(plain), clone(plain).double()
    inputs = [torch.randn(batch[0], *batch[1], model["width"], dtype=dtype) for _ in range(backwards)]
    hypothesis.assume(clone(plain)(inputs[0]).requires_grad)
    for m in (plain, exact):
        for x in inputs:
            m(x.to(next(m.parameters()).dtype)).backward()
    truth = gradients(exact)
    with offloaded(fresh, kept, compute_dtype=dtype, **options) as (copied, names):
        optimizers = optimizers_of(copied, names, "deferred")
        for x in inputs:
            copied(x).backward()
        mine = {name: gradient.clone() for name, gradient in gradients(copied).items()}
        assert optimizers
    assert mine.keys() == truth.keys()
    # A sum of one backward's gradient is rounded once more on its way down.
    assert relative_error(mine, truth) <= 3 * relative_error(gradients(plain), truth) + 4 * torch.finfo(dtype).eps


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=300), transposed=st.booleans())
def test_masters_hold_any_bits(bits: list[int], transposed: bool) -> None:
    value = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    if transposed:
        value = value.repeat(2).view(2, -1).t()
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(2)))
    model[0].table = nn.Parameter(torch.zeros_like(value))
    slidecore.offload(model, device="cpu", compute_dtype=torch.bfloat16)
    try:
        slidecore.assign_parameter(model, "0.table", value)
        master = slidecore.master_parameter(model, "0.table")
        assert torch.equal(master.view(torch.int32), value.contiguous().view(torch.int32))
    finally:
        slidecore.close(model)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    number=st.one_of(st.integers(0, 10**15), st.floats(0, 1e12).map(lambda x: float(f"{x:.5g}"))),
    unit=st.sampled_from(["", "B", "KB", "kib", "k", "MB", "MiB", "gb", "GiB", "G", "TB", "TiB", "T"]),
    space=st.sampled_from(["", " "]),
)
def test_sizes(number: float, unit: str, space: str) -> None:
    from fractions import Fraction

    from slidecore.sizes import format_size, parse_size

    letters = "KMGT"
    power = letters.index(unit[0].upper()) + 1 if unit[:1].upper() in letters and unit else 0
    base = 1024 if "i" in unit or len(unit) == 1 else 1000
    exact = Fraction(number) * base**power
    assert parse_size(f"{number}{space}{unit}") == pytest.approx(float(exact), rel=1e-9, abs=1)
    assert parse_size(number) == pytest.approx(float(number), abs=1)
    shown = format_size(float(exact))
    assert "e" not in shown or exact < 1
    assert parse_size(shown) == pytest.approx(float(exact), rel=6e-3, abs=1)
