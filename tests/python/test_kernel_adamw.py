"""The AdamW kernel against the CPU's to the last bit, against float64, and its 8-bit moments against their formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from _kernels import CARD, DEVICE, any_bits, bits_of, check_operator, poisoned, reference_path
from slidecore import _core
from slidecore.triton import tuning
from slidecore.triton.adamw import Segment, adamw, scalars_of
from slidecore.triton.split import split

__all__ = ["reference_path"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy

Hyper = _core.AdamWHyper
HYPERS = [
    Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1),
    Hyper(lr=3e-2, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.0, step=1000, gradient_scale=0.37),
    Hyper(lr=1e-1, beta1=0.3, beta2=0.5, eps=0.0, weight_decay=0.5, step=7, maximize=True),
    Hyper(lr=0.0, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0, step=3),
]
CONFIGS = [None, tuning.Config(512, steps=3)]
# (offset, length): an entry shorter than a unit, one of whole programs, gaps, an end that is no unit's.
LAYOUT = [(0, 3), (128, 1024), (1280, 500), (1792, 128), (1920, 1601)]
LENGTH = 3600


def segments_of(hypers: list[Hyper]) -> list[Segment]:
    return [Segment(*at, hypers[i % len(hypers)]) for i, at in enumerate(LAYOUT)]


class State:
    """Planes on the CPU; `run` gives what an update makes of them."""

    def __init__(self, seed: int, gradient: torch.dtype, whole: bool, special: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(deviation: float) -> torch.Tensor:
            return torch.randn(LENGTH, generator=generator) * deviation

        master = normal(0.02)
        self.gradient = torch.ldexp(normal(1.0), torch.randint(-40, 8, (LENGTH,), generator=generator)).to(gradient)
        self.exp_avg, self.exp_avg_sq = normal(1e-3), normal(1e-3).square()
        if special:
            master, self.exp_avg = any_bits(LENGTH, seed), any_bits(LENGTH, seed + 1).roll(3)
            self.exp_avg_sq = any_bits(LENGTH, seed + 2).roll(5)
            self.gradient = any_bits(LENGTH, seed + 3).roll(11).to(gradient)
        self.master, self.residual = master, None
        self.weight = master
        if not whole:
            self.weight, self.residual = (
                torch.empty(LENGTH, dtype=torch.bfloat16),
                torch.empty(LENGTH, dtype=torch.int16),
            )
            pool = _core.ThreadPool(1)
            _core.split(pool, master.data_ptr(), self.weight.data_ptr(), self.residual.data_ptr(), LENGTH)

    def planes(self) -> dict[str, torch.Tensor]:
        named = {
            "weight": self.weight,
            "residual": self.residual,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }
        return {name: plane.clone() for name, plane in named.items() if plane is not None}

    def on_cpu(self, segments: list[Segment]) -> dict[str, torch.Tensor]:
        """By slidecore._core.adamw."""
        planes, pool = self.planes(), _core.ThreadPool(1)
        whole = "residual" not in planes
        for offset, numel, hyper in segments:
            address = {name: plane[offset:].data_ptr() for name, plane in planes.items()}
            if whole:
                address["weight32"] = address.pop("weight")
            _core.adamw(
                pool, hyper, n=numel, gradient=self.gradient[offset:].data_ptr(),
                gradient_float32=self.gradient.dtype == torch.float32, **address,
            )  # fmt: skip
        return planes

    def on_device(self, segments: list[Segment], **options: Any) -> dict[str, torch.Tensor]:
        planes = {name: plane.to(DEVICE) for name, plane in self.planes().items()}
        planes.setdefault("residual", None)  # type: ignore[arg-type]
        adamw(segments, gradient=self.gradient.to(DEVICE), **planes, **options)
        return {name: plane for name, plane in planes.items() if plane is not None}


def assert_same_bits(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, plane in expected.items():
        different = (bits_of(mine[name]) != bits_of(plane)).nonzero()[:, 0]
        assert len(different) == 0, f"{name}: {len(different)} elements, first {different[:5].tolist()}"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize("whole", [False, True], ids=["split", "float32"])
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=str)
def test_equals_the_cpu(gradient: torch.dtype, whole: bool, special: bool, config: tuning.Config | None) -> None:
    """Every plane to the last bit, elements outside the segments included; NaN is one pattern."""
    state = State(1, gradient, whole, special)
    segments = segments_of(HYPERS)
    assert_same_bits(state.on_device(segments, config=config), state.on_cpu(segments))


@pytest.mark.usefixtures("reference_path")
@pytest.mark.skipif(CARD, reason="a card has no reference path")
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize("whole", [False, True], ids=["split", "float32"])
def test_reference_equals_the_cpu(whole: bool, special: bool) -> None:
    state = State(2, torch.bfloat16, whole, special)
    segments = segments_of(HYPERS)
    assert_same_bits(state.on_device(segments), state.on_cpu(segments))


def test_clip_factor() -> None:
    """On the device it is what gradient_scale is on the CPU."""
    state, factor = State(3, torch.bfloat16, False, False), 0.1234567
    scaled = [
        Hyper(lr=1e-3, step=2, gradient_scale=factor),
        Hyper(lr=1e-2, step=2, maximize=True, gradient_scale=factor),
    ]
    plain = [Hyper(lr=1e-3, step=2), Hyper(lr=1e-2, step=2, maximize=True)]
    mine = state.on_device(segments_of(plain), factor=torch.tensor(factor, device=DEVICE))
    assert_same_bits(mine, state.on_cpu(segments_of(scaled)))


@pytest.mark.parametrize("hyper", HYPERS[:3], ids=["plain", "scaled", "maximize"])
def test_against_float64(hyper: Hyper) -> None:
    state = State(4, torch.float32, True, False)
    n = LENGTH
    mine = state.on_device([Segment(0, n, hyper)])
    g = state.gradient.double() * hyper.gradient_scale * (-1 if hyper.maximize else 1)
    p = state.master.double() * (1 - hyper.lr * hyper.weight_decay)
    m = hyper.beta1 * state.exp_avg.double() + (1 - hyper.beta1) * g
    v = hyper.beta2 * state.exp_avg_sq.double() + (1 - hyper.beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - hyper.beta2**hyper.step) + hyper.eps
    p = p - hyper.lr / (1 - hyper.beta1**hyper.step) * m / denominator
    assert torch.allclose(mine["exp_avg_sq"].double().cpu(), v, rtol=4e-7, atol=1e-45)
    assert ((mine["exp_avg"].double().cpu() - m).abs() <= 4e-7 * (state.exp_avg.double().abs() + g.abs())).all()
    assert torch.allclose(mine["weight"].double().cpu(), p, rtol=1e-6, atol=1e-6 * hyper.lr)


def test_parameters_without_gradient_are_skipped() -> None:
    """Also where their gradient would be NaN."""
    state = State(5, torch.bfloat16, False, False)
    state.gradient[:1900] = math.nan
    segments = segments_of(HYPERS)[-1:]
    mine = state.on_device(segments)
    for name, plane in state.planes().items():
        assert torch.equal(bits_of(mine[name])[:1920], bits_of(plane)[:1920])
        assert not torch.equal(bits_of(mine[name])[1920:], bits_of(plane)[1920:])
    assert_same_bits(state.on_device([]), state.planes())


# The 8-bit format, written once more with NumPy's float32.

F = np.float32


def quantised(m: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Codes and scales of one group."""
    with np.errstate(all="ignore"):
        a = np.max(np.abs(m))
        a = F(np.nan) if np.isnan(a) else F(0) if a < F(2.0**-126) else a
        x = m * (F(1) / a)
        y = (x + x) / (F(1) + np.abs(x))
        m_codes = np.where(np.isfinite(y) & (a > 0), np.rint(F(127) * y), F(0)).astype(np.int8)
        r = np.sqrt(v)
        s = np.max(r)
        s = F(np.nan) if np.isnan(s) else F(0) if s < F(2.0**-126) else s
        q = r * (F(255) / s)
        v_codes = np.minimum(F(255), np.maximum(np.rint(q), (r > 0).astype(F)))
        v_codes = np.where(np.isfinite(q) & (s > 0), v_codes, F(0)).astype(np.uint8)
    return m_codes, a, v_codes, s


def dequantised(m_codes: Any, a: Any, v_codes: Any, s: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    with np.errstate(all="ignore"):
        y = m_codes.astype(F) * (F(1) / F(127))
        m = y / (F(2) - np.abs(y)) * a
        r = v_codes.astype(F) * (s * (F(1) / F(255)))
        return m, r * r


def random_codes(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-LENGTH // 128)
    exponents = torch.randint(-130, 3, (2, groups), generator=generator)
    scales = torch.ldexp(torch.rand(2, groups, generator=generator) + 0.5, exponents)
    scales[0, 5], scales[1, 6], scales[0, 7], scales[1, 20] = 0, 0, math.nan, math.inf
    return {
        "exp_avg": torch.randint(-127, 128, (LENGTH,), generator=generator).to(torch.int8),
        "exp_avg_sq": torch.randint(0, 256, (LENGTH,), generator=generator).to(torch.uint8),
        "exp_avg_scale": scales[0].contiguous(),
        "exp_avg_sq_scale": scales[1].contiguous(),
    }


def expected_8_bit(state: State, codes: dict[str, torch.Tensor], segments: list[Segment]) -> dict[str, torch.Tensor]:
    """Dequantised, updated by the CPU's kernel, quantised again, a group at a time."""
    planes = {name: plane.clone().numpy() for name, plane in codes.items()}
    weight, residual = state.planes()["weight"], state.planes().get("residual")
    pool = _core.ThreadPool(1)
    for offset, numel, hyper in segments:
        for begin in range(offset, offset + numel, 128):
            at, group = slice(begin, min(begin + 128, offset + numel)), begin // 128
            m, v = dequantised(
                planes["exp_avg"][at], planes["exp_avg_scale"][group], planes["exp_avg_sq"][at],
                planes["exp_avg_sq_scale"][group],
            )  # fmt: skip
            address = {"weight": weight[begin:].data_ptr()}
            if residual is None:
                address = {"weight32": weight[begin:].data_ptr()}
            else:
                address["residual"] = residual[begin:].data_ptr()
            _core.adamw(
                pool, hyper, n=at.stop - at.start, gradient=state.gradient[begin:].data_ptr(),
                gradient_float32=state.gradient.dtype == torch.float32, exp_avg=m.ctypes.data, exp_avg_sq=v.ctypes.data,
                **address,
            )  # fmt: skip
            (
                planes["exp_avg"][at], planes["exp_avg_scale"][group], planes["exp_avg_sq"][at],
                planes["exp_avg_sq_scale"][group],
            ) = quantised(m, v)  # fmt: skip
    result = {name: torch.from_numpy(plane) for name, plane in planes.items()}
    result["weight"] = weight
    if residual is not None:
        result["residual"] = residual
    return result


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize("whole", [False, True], ids=["split", "float32"])
def test_8_bit_moments(
    whole: bool, special: bool, config: tuning.Config | None, path: str, request: pytest.FixtureRequest
) -> None:
    """Two steps, to the last bit; partial groups at the ends of entries, zero, NaN and infinite scales."""
    if path == "reference":
        if CARD or config is not None:
            pytest.skip("one reference, on the CPU")
        request.getfixturevalue("reference_path")
    state, codes = State(6, torch.bfloat16, whole, special), random_codes(7)
    if special:  # without the special values every group would be NaN at once
        state.gradient[1000:] = State(6, torch.bfloat16, whole, False).gradient[1000:]
        state.gradient[1300:1400] = 0.0
    for step in (1, 2):
        hypers = [Hyper(lr=1e-2, step=step), Hyper(lr=1e-3, beta1=0.4, weight_decay=0.3, step=step)]
        segments = segments_of(hypers)
        expected = expected_8_bit(state, codes, segments)
        planes = {**state.planes(), **codes}
        planes = {name: plane.clone().to(DEVICE) for name, plane in planes.items()}
        planes.setdefault("residual", None)  # type: ignore[arg-type]
        adamw(segments, gradient=state.gradient.to(DEVICE), **planes, config=config)
        mine = {name: plane for name, plane in planes.items() if name in codes or name == "weight" or plane is not None}
        assert_same_bits(mine, {name: expected[name] for name in mine})
        state.weight, state.residual = expected["weight"], expected.get("residual")
        codes = {name: expected[name] for name in codes}


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["split", "float32"])
def test_8_bit_equals_the_cpu(whole: bool, gradient: torch.dtype) -> None:
    state, codes, pool = State(9, gradient, whole, False), random_codes(9), _core.ThreadPool(1)
    segments = segments_of(HYPERS)
    expected = {**state.planes(), **{name: plane.clone() for name, plane in codes.items()}}
    for offset, numel, hyper in segments:
        begins = {name: offset // 128 if name.endswith("scale") else offset for name in expected}
        address = {name: plane[begins[name] :].data_ptr() for name, plane in expected.items()}
        if whole:
            address["weight32"] = address.pop("weight")
        _core.adamw(
            pool, hyper, n=numel, gradient=state.gradient[offset:].data_ptr(),
            gradient_float32=gradient == torch.float32, **address,
        )  # fmt: skip
    mine: dict[str, Any] = {name: plane.to(DEVICE) for name, plane in {**state.planes(), **codes}.items()}
    adamw(segments, gradient=state.gradient.to(DEVICE), **{"residual": None, **mine})
    assert_same_bits(mine, expected)


def test_8_bit_moments_are_close() -> None:
    """Against float32 moments over many steps: a check of the format, not of its bits."""
    n, generator = 512, torch.Generator().manual_seed(0)
    weight, residual = poisoned(n, dtype=torch.bfloat16), poisoned(n, dtype=torch.int16)
    start = torch.randn(n, generator=generator).to(DEVICE)
    split(start, weight, residual)
    exact = start.double().cpu().requires_grad_()
    optimizer = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1)
    codes = {
        "exp_avg": torch.zeros(n, dtype=torch.int8, device=DEVICE),
        "exp_avg_sq": torch.zeros(n, dtype=torch.uint8, device=DEVICE),
        "exp_avg_scale": torch.zeros(4, device=DEVICE),
        "exp_avg_sq_scale": torch.zeros(4, device=DEVICE),
    }
    for step in range(1, 31):
        gradient = torch.randn(n, generator=generator).to(torch.bfloat16)
        hyper = Hyper(lr=1e-2, weight_decay=0.1, step=step)
        adamw([Segment(0, n, hyper)], weight=weight, residual=residual, gradient=gradient.to(DEVICE), **codes)
        exact.grad = gradient.double()
        optimizer.step()
    moved = (exact.detach() - start.double().cpu()).norm()
    assert ((weight.double().cpu() - exact.detach()).norm() / moved).item() < 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("beta1", 1.0), ("beta2", -0.1), ("eps", -1e-9), ("weight_decay", -1.0), ("step", 0)],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"adamw: {name} is"):
        scalars_of(Hyper(**{name: value}))  # type: ignore[arg-type]


def test_refuses() -> None:
    state = State(8, torch.bfloat16, False, False)
    planes: dict[str, Any] = {name: plane.to(DEVICE) for name, plane in state.planes().items()}
    good: dict[str, Any] = {"gradient": state.gradient.to(DEVICE), **planes}
    one = [Segment(0, 10, HYPERS[0])]
    for change, message in (
        ({"gradient": good["gradient"].half()}, "gradient is torch.float16"),
        ({"residual": None}, "weight is torch.bfloat16"),
        ({"exp_avg": good["exp_avg"][:-1].contiguous()}, "different lengths"),
        ({"exp_avg_scale": torch.zeros(29, device=DEVICE)}, "exp_avg is torch.float32, must be torch.int8"),
        ({"factor": torch.ones(2, device=DEVICE)}, "factor must be one float32"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw(one, **{**good, **change})
    with pytest.raises(ValueError, match="multiples of 128"):
        adamw([Segment(5, 10, HYPERS[0])], **good)
    with pytest.raises(ValueError, match="ends behind"):
        adamw([Segment(0, LENGTH + 1, HYPERS[0])], **good)


@pytest.mark.usefixtures("reference_path")
def test_operator() -> None:
    n = 300
    planes = [
        torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int16), torch.randn(n), torch.zeros(n),
        torch.ones(n), None, None,
    ]  # fmt: skip
    planes = [plane if plane is None else plane.to(DEVICE) for plane in planes]
    table = torch.tensor([[0, n, 0, 0]], dtype=torch.int32, device=DEVICE)
    scalars = torch.tensor([scalars_of(HYPERS[0]) + [1.0] * 7], device=DEVICE)
    check_operator(torch.ops.slidecore.adamw, *planes, table, scalars, None, 512, 1, 4, "plain", 0)
