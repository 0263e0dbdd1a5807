"""Random models and options: two steps end where plain PyTorch ends."""

from __future__ import annotations

from typing import Any

import pytest
import slidecore
import torch
from _models import Residual, clone, weights
from torch import nn

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'slidecore[test]'")
st = hypothesis.strategies


class Gated(nn.Module):
    """Two outputs of one input, a parameter of its own, and one that only every other block uses."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner)
        self.mix = nn.Parameter(torch.randn(inner, width) / inner**0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * (torch.sigmoid(self.gate(x)) * self.value(x)) @ self.mix


class RandomModel(nn.Module):
    def __init__(self, draw: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(draw["seed"])
        width = draw["width"]
        block = {"residual": Residual, "gated": Gated, "linear": lambda w, _: nn.Linear(w, w)}[draw["block"]]
        self.shift = nn.Parameter(torch.randn(width) / 9) if draw["resident"] else None
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(block(width, draw["inner"]) for _ in range(draw["depth"]))
        self.leave = nn.Linear(width, width)
        if draw["tied"]:
            self.leave.weight = self.enter.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        if self.shift is not None:
            h = h + self.shift
        for block in self.blocks:
            h = torch.tanh(block(h))
        return self.leave(h)


def dictionary(**strategies: Any) -> Any:
    return st.fixed_dictionaries(strategies)


MODELS = dictionary(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    inner=st.integers(1, 50),
    depth=st.integers(2, 6),
    block=st.sampled_from(["residual", "gated", "linear"]),
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


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
@hypothesis.given(model=MODELS, options=OPTIONS, batch=BATCHES, frozen=st.integers(0, 2**32 - 1))
def test_two_steps_end_where_pytorch_ends(
    model: dict[str, Any], options: dict[str, Any], batch: tuple[int, tuple[int, ...]], frozen: int
) -> None:
    plain = RandomModel(model)
    for i, parameter in enumerate(plain.parameters()):
        parameter.requires_grad_(not frozen >> (i % 32) & 1)
    x = torch.randn(batch[0], *batch[1], model["width"])
    hypothesis.assume(plain(x).requires_grad)
    offloaded = slidecore.offload(clone(plain), device="cpu", **options)
    try:
        # eps damps what Adam makes of rounding in gradients near zero.
        settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
        optimizers = (
            slidecore.AdamW(offloaded.parameters(), **settings),
            torch.optim.AdamW(plain.parameters(), **settings),
        )
        for _ in range(2):
            losses = []
            for m, optimizer in zip((offloaded, plain), optimizers, strict=True):
                loss = m(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)
        slidecore.synchronize(offloaded)
        for name, value in weights(plain).items():
            assert torch.allclose(offloaded.get_parameter(name), value, rtol=1e-5, atol=2e-6), name
    finally:
        slidecore.close(offloaded)


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
    unit=st.sampled_from(["", "B", "KB", "kib", "MB", "MiB", "gb", "GiB", "TB", "TiB"]),
    space=st.sampled_from(["", " "]),
)
def test_sizes(number: float, unit: str, space: str) -> None:
    from fractions import Fraction

    from slidecore.sizes import format_size, parse_size

    letters = "KMGT"
    power = letters.index(unit[0].upper()) + 1 if unit[:1].upper() in letters and unit else 0
    base = 1024 if "i" in unit else 1000
    exact = Fraction(number) * base**power
    assert parse_size(f"{number}{space}{unit}") == pytest.approx(float(exact), rel=1e-9, abs=1)
    assert parse_size(number) == pytest.approx(float(number), abs=1)
    shown = format_size(float(exact))
    assert "e" not in shown or exact < 1
    assert parse_size(shown) == pytest.approx(float(exact), rel=6e-3, abs=1)
