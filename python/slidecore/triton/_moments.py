"""Adam's moments in 8 bits, in groups of 128 consecutive elements, each with a float32 scale.

Momentum (int8 codes): a = max|m|; y = 2x / (1 + |x|) with x = m / a; code = round(127 y). Back: y = code / 127,
x = y / (2 - |y|), m = x a.
Variance (uint8 codes): r = sqrt(v), s = max r; code = round(255 r / s), at least 1 where r > 0. Back: r = code s / 255,
v = r r.

A scale below 2^-126 becomes 0, and so do its codes; a NaN makes its group's scale NaN. Codes of what is not finite are
0. Halves round to even. Each operation is rounded to float32 by itself, so that every implementation agrees bit by bit.
The companding and the square root are those of FlashOptim (arXiv 2602.23349).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from slidecore.triton._bits import one_nan

GROUP = 128
# As float32 they are the quotients 1 / 127 and 1 / 255 rounded once.
_INVERSE_127 = tl.constexpr(1 / 127)
_INVERSE_255 = tl.constexpr(1 / 255)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# Adding 1.5 * 2^23 rounds |value| < 2^22 to an integer, halves to even, in the low bits of the sum.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _largest(magnitude):  # type: ignore[no-untyped-def]
    """Row-wise maximum of values >= 0; NaN if there is one. As integers, for their order is the same, NaN above all."""
    bits = magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return one_nan(tl.max(bits, axis=1).to(tl.float32, bitcast=True))


@triton.jit
def _low_byte(value):  # type: ignore[no-untyped-def]
    return value.to(tl.int32, bitcast=True) & 255


@triton.jit
def quantise_momentum(m):  # type: ignore[no-untyped-def]
    """(groups, 128) float32 -> int8 codes and (groups,) float32 scales."""
    a = _largest(m)
    a = tl.where(a < _SMALLEST_NORMAL, 0.0, a)
    x = m * tl.div_rn(tl.full(a.shape, 1.0, tl.float32), a)[:, None]
    y = tl.div_rn(x + x, 1.0 + tl.abs(x))
    # In a group with a usable scale y is finite; in one whose scale is infinite it is 0 or NaN.
    usable = (a > 0) & (a < float("inf"))
    return _low_byte(tl.where(usable[:, None], y * 127.0 + _ROUNDER, _ROUNDER)).to(tl.int8), a


@triton.jit
def dequantise_momentum(code, a):  # type: ignore[no-untyped-def]
    y = code.to(tl.float32) * _INVERSE_127
    return tl.div_rn(y, 2.0 - tl.abs(y)) * a[:, None]


@triton.jit
def quantise_variance(root):  # type: ignore[no-untyped-def]
    """(groups, 128) float32 square roots of v -> uint8 codes and (groups,) float32 scales."""
    s = _largest(root)
    s = tl.where(s < _SMALLEST_NORMAL, 0.0, s)
    scaled = root * tl.div_rn(tl.full(s.shape, 255.0, tl.float32), s)[:, None]  # 255 (1 + 2^-23) at most
    # False for NaN, and where the group's scale is NaN or 0.
    usable = (root > 0) & (root < float("inf")) & (s > 0)[:, None]
    rounded = tl.where(usable, tl.maximum(scaled + _ROUNDER, _ROUNDER + 1.0), _ROUNDER)
    return _low_byte(rounded).to(tl.uint8), s


@triton.jit
def dequantise_variance(code, s):  # type: ignore[no-untyped-def]
    r = code.to(tl.float32) * (s * _INVERSE_255)[:, None]
    return r * r


def square_root(value: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, which PyTorch's own on the CPU is not in every build."""
    return torch.from_numpy(np.sqrt(value.numpy()))


def _groups(value: torch.Tensor) -> torch.Tensor:
    """(groups, 128), filled up with zeros, which change no scale."""
    missing = -len(value) % GROUP
    return torch.nn.functional.pad(value, (0, missing)).view(-1, GROUP)


def quantise_momentum_reference(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat float32 -> int8 codes of its length and a float32 scale for each group."""
    grouped = _groups(m)
    a = grouped.abs().amax(1)  # NaN if there is one
    a = torch.where(a < 2.0**-126, 0.0, a)
    x = grouped * (1.0 / a)[:, None]
    y = (x + x) / (1.0 + x.abs())
    code = torch.where(y.isfinite() & (a > 0)[:, None], y * 127.0, 0.0).round()
    return code.to(torch.int8).view(-1)[: len(m)], a


def dequantise_momentum_reference(code: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    y = _groups(code).float() * torch.tensor(1 / 127, dtype=torch.float32)
    return (y / (2.0 - y.abs()) * a[:, None]).view(-1)[: len(code)]


def quantise_variance_reference(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat float32 -> uint8 codes of its length and a float32 scale for each group."""
    r = _groups(square_root(v))
    s = r.amax(1)
    s = torch.where(s < 2.0**-126, 0.0, s)
    scaled = r * (255.0 / s)[:, None]
    usable = scaled.isfinite() & (s > 0)[:, None]
    code = torch.where(usable, scaled, 0.0).round()
    code = torch.where(usable & (r > 0), code.clamp(1, 255), code)
    return code.to(torch.uint8).view(-1)[: len(v)], s


def dequantise_variance_reference(code: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    r = _groups(code).float() * (s * torch.tensor(1 / 255, dtype=torch.float32))[:, None]
    return (r * r).view(-1)[: len(code)]
