"""The branch-free path of AdamW with 8-bit moments: its quotients and roots, and which blocks it takes.

What the card computes by approximate reciprocals is emulated here, operation by operation, with reciprocals one unit
in the last place too small and too large.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _kernels import CARD, DEVICE, bits_of
from slidecore import _core
from slidecore.triton import _usual, tuning
from slidecore.triton.adamw import Segment, adamw, scalars_of

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy

F = np.float32
Floats = np.ndarray[Any, np.dtype[np.float32]]
Hyper = _core.AdamWHyper


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """One rounding: a product of two float32 is exact in float64, and a sum rounded to odd rounds on as the exact one.

    (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.)
    """
    x, y = a.astype(np.float64) * b.astype(np.float64), np.float64(1) * c
    total = x + y
    part = total - x
    rest = (x - (total - part)) + (y - part)
    even = (rest != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(even, np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total).astype(F)


def floats(seed: int, n: int, low: int, high: int) -> Floats:
    """Magnitudes in [2^low, 2^high), a quarter of them next to a power of two or with few bits."""
    generator = np.random.default_rng(seed)
    mantissa = generator.integers(0, 1 << 23, n)
    kind = generator.integers(0, 12, n)
    mantissa = np.where(kind == 0, mantissa & 7, np.where(kind == 1, 0x7FFFFF - (mantissa & 7), mantissa))
    mantissa = np.where(kind == 2, mantissa & 0x7FF000, mantissa)
    exponent = generator.integers(low + 127, high + 127, n)
    return ((exponent << 23) | mantissa).astype(np.uint32).view(F)


def beside(value: Floats, steps: int) -> Floats:
    return (value.view(np.int32) + np.int32(steps)).view(F)


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_quotient(error: int) -> None:
    """Of the ranges that the file names; -0 stays -0.

    A divisor with a mantissa of ones only needs the card's own reciprocal: ptxas divides by the same operations.
    """
    n, d = floats(1, 300_000, -99, 70), floats(2, 300_000, -40, 26)
    n[::3] *= F(-1)
    n[:2] = F(0), F(-0.0)
    d = np.where(d.view(np.uint32) & 0x7FFFFF == 0x7FFFFF, beside(d, -1), d) if error else d
    r = beside((1 / d.astype(np.float64)).astype(F), error)
    r = fma(r, fma(-d, r, np.ones_like(d)), r)
    q = n * r
    q = fma(-fma(d, q, -n), r, q)
    assert np.array_equal(q.view(np.uint32), (n / d).view(np.uint32))


@pytest.mark.parametrize("correction", [1.0, 2.0**-10, 0.03162277, 0.9999999, 0.7071068, 0.5000001, 1 - 2.0**-24])
def test_quotient_by_a_scalar(correction: float) -> None:
    root, d = floats(3, 100_000, -50, 15), F(correction)
    root[0] = F(0)
    inverse = F(1 / np.float64(d))
    rest = F(1 / np.float64(d) - np.float64(inverse))
    q = fma(root, np.full_like(root, inverse), root * rest)
    q = fma(fma(np.full_like(root, -d), q, root), np.full_like(root, inverse), q)
    assert np.array_equal(q.view(np.uint32), (root / d).view(np.uint32))


def test_square_root() -> None:
    v = floats(4, 300_000, -100, 30)
    v[0] = F(0)
    near = v + F(2.0**-126)
    assert np.array_equal(near[1:], v[1:])
    r = (1 / np.sqrt(near.astype(np.float64))).astype(F)
    q = v * r
    root = fma(fma(-q, q, v), r * F(0.5), q)
    assert np.array_equal(root.view(np.uint32), np.sqrt(v).view(np.uint32))


def planes(n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(n, generator=generator) * 0.02
    weight, residual = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    _core.split(_core.ThreadPool(1), master.data_ptr(), weight.data_ptr(), residual.data_ptr(), n)
    return {
        "weight": weight, "residual": residual,
        "exp_avg": torch.randint(-127, 128, (n,), generator=generator).to(torch.int8),
        "exp_avg_sq": torch.randint(0, 256, (n,), generator=generator).to(torch.uint8),
        "exp_avg_scale": torch.rand(n // 128, generator=generator) * 1e-3,
        "exp_avg_sq_scale": torch.rand(n // 128, generator=generator) * 1e-3,
    }  # fmt: skip


def update(hyper: Hyper, state: dict[str, torch.Tensor], gradient: torch.Tensor) -> None:
    """By slidecore._core.adamw, in place."""
    address = {name: plane.data_ptr() for name, plane in state.items()}
    _core.adamw(
        _core.ThreadPool(1), hyper, n=len(gradient), gradient=gradient.data_ptr(), gradient_float32=True, **address
    )


@pytest.mark.parametrize(
    ("steps", "loads", "registers"),
    [(1, "plain", 0), (3, "early", 96), (8, "ahead", 96)],
    ids=["plain", "early", "ahead"],
)
@pytest.mark.parametrize(
    "hyper", [Hyper(lr=1e-3, weight_decay=0.1, step=2), Hyper(lr=0.0, maximize=True), Hyper(lr=1e-3, eps=0.0)],
    ids=["plain", "maximize", "unusual"],
)  # fmt: skip
def test_each_block_takes_its_path(hyper: Hyper, steps: int, loads: tuning.Loads, registers: int) -> None:
    """One value of unusual size in each of many blocks, and blocks without one, to the last bit."""
    unusual = [0.0, 1e-14, 1e-17, 1e-20, 1e-25, 1e-38, 1e-45, 1e4, 1e8, 1e13, 1e19, 1e30, float("inf"), float("nan")]
    n = 256 * (len(unusual) + 6)
    state = planes(n, 10)
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(11)) * 1e-3
    for block, value in enumerate(unusual):
        state["exp_avg"][256 * block + 3] = state["exp_avg_sq"][256 * block + 3] = 0
        gradient[256 * block + 3] = -value
    rest = 256 * len(unusual)
    gradient[rest : rest + 256] = 0.0  # all of it zero, as in the row of a token that never came
    state["exp_avg_scale"][rest // 128 : rest // 128 + 2] = 0.0
    state["exp_avg_sq_scale"][rest // 128 : rest // 128 + 2] = 0.0
    state["weight"][rest : rest + 3] = torch.tensor([0.0, -0.0, 1.0])
    state["residual"][rest : rest + 3] = 0
    state["exp_avg_scale"][rest // 128 + 2] = 1e-30  # long ago
    state["weight"][rest + 600] = float("nan")
    state["weight"][rest + 900] = float("inf")
    expected = {name: plane.clone() for name, plane in state.items()}
    update(hyper, expected, gradient)
    mine = {name: plane.to(DEVICE) for name, plane in state.items()}
    config = tuning.Config(256, steps, 1, loads, registers)
    adamw([Segment(0, n, hyper)], gradient=gradient.to(DEVICE), config=config, **mine)
    for name, plane in expected.items():
        different = (bits_of(mine[name].cpu()) != bits_of(plane)).nonzero()[:, 0]
        assert len(different) == 0, f"{name}: {len(different)} elements, first {different[:5].tolist()}"


@pytest.mark.skipif(CARD, reason="looks into the interpreter")
def test_only_usual_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a test of blocks the general path would hide a path that is never taken."""
    from slidecore.triton import adamw as module

    taken: list[bool] = []
    original = module.usual_step

    def watched(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        taken.append(bool(result[-1]))
        return result

    monkeypatch.setattr(module, "usual_step", watched)
    n, hyper = 256 * 4, Hyper(lr=1e-3, step=2)
    state = {name: plane.to(DEVICE) for name, plane in planes(n, 12).items()}
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(13)) * 1e-3
    gradient[300] = 1e20
    module.adamw([Segment(0, n, hyper)], gradient=gradient, config=tuning.Config(256, 1, 1), **state)
    assert taken == [True, False, True, True]


def test_settings() -> None:
    def usual(**options: Any) -> bool:
        scalars = scalars_of(Hyper(**options))
        return _usual.usual_scalars(scalars[2], scalars[3], scalars[6], scalars[7], scalars[8])

    assert usual(lr=1e-5, step=1)
    assert usual(lr=0.0, beta2=0.95, eps=1e-6, step=100)
    assert usual(lr=1e-5, eps=1e-12, beta2=0.99999, step=1)
    for unusual in ({"eps": 0.0}, {"eps": 1e-13}, {"lr": 1e-20}, {"beta1": 0.3}, {"beta2": 0.99999999}):
        assert not usual(**{"lr": 1e-5, "step": 1, **unusual}), unusual
