"""One AdamW step on a chunk in its plane layout: each plane is read once and written once, in place.

With g the gradient times the clip factor and p the float32 master weight (Loshchilov & Hutter, arXiv 1711.05101):

    p = p (1 - lr decay);  m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g g
    p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The order of operations is that of `slidecore._core.adamw`: the same float32 operations, each correctly rounded, none
contracted, so planes come out equal to the last bit (every NaN as 0x7fc00000). Only where both `factor` and a
`gradient_scale` are given is there one more rounding than on the CPU, which multiplies the two into one number.
8-bit moments are those of `_moments`; the weight moves by the new moments before they are quantised. On NVIDIA's cards
a block of them is first done by `_usual`, which is for values of usual size, and again by `_block` where it has others.

It is an opaque operator (`custom_op`, not `triton_op`): torch.compile would launch a traced kernel without
`enable_fp_fusion=False`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from slidecore import _core
from slidecore.triton import tuning
from slidecore.triton._bits import (
    bits_or_floats,
    high_part,
    joined,
    low_part,
    merge_reference,
    one_nan,
    split_reference,
    widened,
)
from slidecore.triton._launch import UNIT, check_plane, launch, on_card, upload, work_table
from slidecore.triton._moments import (
    GROUP,
    dequantise_momentum,
    dequantise_momentum_reference,
    dequantise_variance,
    dequantise_variance_reference,
    quantise_momentum,
    quantise_momentum_reference,
    quantise_variance,
    quantise_variance_reference,
    square_root,
)
from slidecore.triton._usual import usual_scalars, usual_step

CANDIDATES = tuple(tuning.Config(block, 1, warps) for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8)))
DEFAULT = tuning.Config(1024, 1, 8)
# Eight elements a thread: an int16 load of 16 bytes, half a warp for a group of 128. One warp needs no barrier.
# An SM of 65536 registers holds 24 warps at 80 a thread, 20 at 96 and 16 at 128. "ahead" needs 96, and holds a block
# more in them.
CANDIDATES_QUANTISED = (
    tuning.Config(256, 2, 1, "plain", 80),
    tuning.Config(256, 4, 1, "plain", 80),
    tuning.Config(512, 4, 2, "plain", 80),
    tuning.Config(256, 4, 1, "early", 80),
    tuning.Config(256, 8, 1, "early", 80),
    tuning.Config(256, 4, 1, "early", 96),
    tuning.Config(256, 8, 1, "early", 96),
    tuning.Config(512, 4, 2, "early", 80),
    tuning.Config(256, 8, 1, "ahead", 96),
    tuning.Config(256, 16, 1, "ahead", 96),
    tuning.Config(256, 8, 1, "ahead", 128),
    tuning.Config(512, 8, 2, "ahead", 96),
    tuning.Config(1024, 8, 4, "ahead", 96),
)
DEFAULT_QUANTISED = tuning.Config(256, 8, 1, "early", 80)  # the fastest of these on an H200
_SCALARS = tl.constexpr(16)  # float32 a segment, so that rows are aligned; 14 and 15 are unused


class Segment(NamedTuple):
    """Consecutive elements of a chunk with the same settings; `offset` is a multiple of 128."""

    offset: int
    numel: int
    hyper: _core.AdamWHyper


def scalars_of(hyper: _core.AdamWHyper) -> list[float]:
    """The settings as the loop wants them: computed in double, as csrc/optimizer/adamw.cpp does.

    Raises:
        ValueError: a value that torch.optim.AdamW would refuse.
    """
    for name, value, fine in (
        ("lr", hyper.lr, hyper.lr >= 0),
        ("beta1", hyper.beta1, 0 <= hyper.beta1 < 1),
        ("beta2", hyper.beta2, 0 <= hyper.beta2 < 1),
        ("eps", hyper.eps, hyper.eps >= 0),
        ("weight_decay", hyper.weight_decay, hyper.weight_decay >= 0),
        ("step", hyper.step, hyper.step >= 1),
    ):
        if not fine:
            raise ValueError(f"adamw: {name} is {value}")
    lerp_weight = np.float32(1 - hyper.beta1)
    # torch's lerp counts from the nearer end: m + w (g - m) for w < 1/2, else g - (g - m)(1 - w).
    from_gradient = bool(lerp_weight >= np.float32(0.5))
    return [
        -hyper.gradient_scale if hyper.maximize else hyper.gradient_scale,
        1 - hyper.lr * hyper.weight_decay,
        float(lerp_weight - np.float32(1) if from_gradient else lerp_weight),
        float(from_gradient),
        hyper.beta2,
        1 - hyper.beta2,
        math.sqrt(1 - hyper.beta2**hyper.step),
        hyper.eps,
        -(hyper.lr / (1 - hyper.beta1**hyper.step)),
    ]


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    weight,
    residual,
    gradient,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    begin,
    count,
    gradient_factor,
    decay,
    lerp_factor,
    from_gradient,
    beta2,
    one_minus_beta2,
    inverse_correction,
    eps,
    minus_step_size,
    FULL: tl.constexpr,
    SPLIT: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`count` elements from `begin` on, a multiple of 128. FULL: all of the block, which then needs no masks."""
    if QUANTISED:
        groups = tl.arange(0, BLOCK // 128)
        within = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
        at_scale = begin // 128 + groups
        inside_scale = groups * 128 < count
    else:
        within = tl.arange(0, BLOCK)
    at = begin + within
    inside = within < count
    if FULL:
        g = widened(tl.load(gradient + at))
        high = tl.load(weight + at)
        m_stored = tl.load(exp_avg + at)
        v_stored = tl.load(exp_avg_sq + at)
        if SPLIT:
            low = tl.load(residual + at)
        if QUANTISED:
            a = tl.load(exp_avg_scale + at_scale)
            s = tl.load(exp_avg_sq_scale + at_scale)
    else:
        g = widened(tl.load(gradient + at, mask=inside, other=0))
        high = tl.load(weight + at, mask=inside, other=0)
        m_stored = tl.load(exp_avg + at, mask=inside, other=0)
        v_stored = tl.load(exp_avg_sq + at, mask=inside, other=0)
        if SPLIT:
            low = tl.load(residual + at, mask=inside, other=0)
        if QUANTISED:
            a = tl.load(exp_avg_scale + at_scale, mask=inside_scale, other=0.0)
            s = tl.load(exp_avg_sq_scale + at_scale, mask=inside_scale, other=0.0)
    if SPLIT:
        p = joined(high, low)
    else:
        p = high
    if QUANTISED:
        m_old = dequantise_momentum(m_stored, a)
        v_old = dequantise_variance(v_stored, s)
    else:
        m_old = m_stored
        v_old = v_stored
    g = g * gradient_factor
    p = p * decay
    m = tl.where(from_gradient != 0, g, m_old) + lerp_factor * (g - m_old)
    v = v_old * beta2 + (one_minus_beta2 * g) * g
    root = tl.sqrt_rn(v)
    # As a float64 product with the reciprocal it is off by 2^-52 at most, and no quotient of two float32 comes within
    # 2^-49 of where rounding to float32 turns: the same bits as a division, for less.
    corrected = (root.to(tl.float64) * inverse_correction).to(tl.float32)
    denominator = corrected + eps
    p = one_nan(p + tl.div_rn(minus_step_size * m, denominator))
    if QUANTISED:
        if not FULL:  # zeros change no scale
            m = tl.where(inside, m, 0.0)
            root = tl.where(inside, root, 0.0)
        m, a = quantise_momentum(m)
        v, s = quantise_variance(root)
    else:
        m = one_nan(m)
        v = one_nan(v)
    if SPLIT:
        bits = p.to(tl.int32, bitcast=True)
        high = high_part(bits)
        low = low_part(bits)
    else:
        high = p
    if FULL:
        tl.store(weight + at, high)
        tl.store(exp_avg + at, m)
        tl.store(exp_avg_sq + at, v)
        if SPLIT:
            tl.store(residual + at, low)
        if QUANTISED:
            tl.store(exp_avg_scale + at_scale, a)
            tl.store(exp_avg_sq_scale + at_scale, s)
    else:
        tl.store(weight + at, high, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        if SPLIT:
            tl.store(residual + at, low, mask=inside)
        if QUANTISED:
            tl.store(exp_avg_scale + at_scale, a, mask=inside_scale)
            tl.store(exp_avg_sq_scale + at_scale, s, mask=inside_scale)


@triton.jit
def _loaded(  # type: ignore[no-untyped-def]
    weight,
    residual,
    gradient,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    begin,
    wanted,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A full block with 8-bit moments as it is stored; anything unless `wanted` (None: always).

    EARLY: ptxas otherwise moves the loads of `weight` and `residual`, half of what is read, below the first use of the
    momentum, for which the warp waits. It leaves volatile loads where they are.
    """
    groups = tl.arange(0, BLOCK // 128)
    at = begin + groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    at_scale = begin // 128 + groups
    high = tl.load(weight + at, mask=wanted, volatile=EARLY)
    low = high
    if SPLIT:
        low = tl.load(residual + at, mask=wanted, volatile=EARLY)
    return (
        tl.load(gradient + at, mask=wanted),
        high,
        low,
        tl.load(exp_avg + at, mask=wanted, volatile=EARLY),
        tl.load(exp_avg_scale + at_scale, mask=wanted),
        tl.load(exp_avg_sq + at, mask=wanted),
        tl.load(exp_avg_sq_scale + at_scale, mask=wanted),
    )


@triton.jit
def _stored(  # type: ignore[no-untyped-def]
    weight,
    residual,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    begin,
    p,
    m,
    a,
    v,
    s,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups = tl.arange(0, BLOCK // 128)
    at = begin + groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    at_scale = begin // 128 + groups
    if SPLIT:
        bits = p.to(tl.int32, bitcast=True)
        tl.store(weight + at, high_part(bits))
        tl.store(residual + at, low_part(bits))
    else:
        tl.store(weight + at, p)
    tl.store(exp_avg + at, m)
    tl.store(exp_avg_sq + at, v)
    tl.store(exp_avg_scale + at_scale, a)
    tl.store(exp_avg_sq_scale + at_scale, s)


@triton.jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    weight,
    residual,
    gradient,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    table,
    scalars,
    factor,
    SPLIT: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    USUAL: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = table + tl.program_id(0) * 4
    begin = tl.load(row).to(tl.int64) * 128
    count = tl.load(row + 1)
    s = scalars + tl.load(row + 2) * _SCALARS
    gradient_factor = tl.load(s)
    if HAS_FACTOR:
        gradient_factor = gradient_factor * tl.load(factor)
    decay = tl.load(s + 1)
    lerp_factor = tl.load(s + 2)
    from_gradient = tl.load(s + 3)
    beta2 = tl.load(s + 4)
    one_minus_beta2 = tl.load(s + 5)
    inverse_correction = tl.load((s + 10).to(tl.pointer_type(tl.float64)))  # of slot 6, in slots 10 and 11
    eps = tl.load(s + 7)
    minus_step_size = tl.load(s + 8)
    if count == BLOCK * STEPS:
        if USUAL:
            usual = tl.load(s + 9) != 0
            correction = tl.load(s + 6)
            inverse = tl.load(s + 12)
            inverse_rest = tl.load(s + 13)
            if AHEAD:
                g, high, low, m, a, v, v_scale = _loaded(
                    weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, begin, None,
                    SPLIT, EARLY, BLOCK,
                )  # fmt: skip
        for step in range(STEPS):
            done = False
            if USUAL:
                if not AHEAD:
                    g, high, low, m, a, v, v_scale = _loaded(
                        weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale,
                        begin + step * BLOCK, None, SPLIT, EARLY, BLOCK,
                    )  # fmt: skip
                if SPLIT:
                    p = joined(high, low)
                else:
                    p = high
                p, m_new, a_new, v_new, v_scale_new, done = usual_step(
                    widened(g), p, m, a, v, v_scale, gradient_factor, decay, lerp_factor, beta2, one_minus_beta2,
                    correction, inverse, inverse_rest, eps, minus_step_size,
                )  # fmt: skip
                done = done & usual
                if AHEAD:  # of the stores, which ptxas moves no load across
                    g, high, low, m, a, v, v_scale = _loaded(
                        weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale,
                        begin + (step + 1) * BLOCK, step + 1 < STEPS, SPLIT, EARLY, BLOCK,
                    )  # fmt: skip
                if done:
                    _stored(
                        weight, residual, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, begin + step * BLOCK,
                        p, m_new, a_new, v_new, v_scale_new, SPLIT, BLOCK,
                    )  # fmt: skip
            if not done:
                _block(
                    weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale,
                    begin + step * BLOCK, BLOCK, gradient_factor, decay, lerp_factor, from_gradient, beta2,
                    one_minus_beta2, inverse_correction, eps, minus_step_size, True, SPLIT, QUANTISED, BLOCK,
                )  # fmt: skip
    else:
        for step in range(0, count, BLOCK):
            _block(
                weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale,
                begin + step, count - step, gradient_factor, decay, lerp_factor, from_gradient, beta2, one_minus_beta2,
                inverse_correction, eps, minus_step_size, False, SPLIT, QUANTISED, BLOCK,
            )  # fmt: skip


def _reference(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    table: torch.Tensor,
    scalars: torch.Tensor,
    factor: torch.Tensor | None,
) -> None:
    """The same, operation by operation, for CPU tensors; a row of `table` is a whole segment or a piece of one."""
    nan = torch.tensor(math.nan)
    for begin, count, index, _ in table.tolist():
        at = slice(begin * UNIT, begin * UNIT + count)
        groups = slice(begin, begin + -(-count // GROUP))
        s = scalars[index]
        p = weight[at] if residual is None else merge_reference(weight[at], residual[at])
        if exp_avg_scale is None or exp_avg_sq_scale is None:
            m_old, v_old = exp_avg[at], exp_avg_sq[at]
        else:
            m_old = dequantise_momentum_reference(exp_avg[at], exp_avg_scale[groups])
            v_old = dequantise_variance_reference(exp_avg_sq[at], exp_avg_sq_scale[groups])
        g = gradient[at].float() * (s[0] if factor is None else s[0] * factor)
        p = p * s[1]
        m = (g if s[3] else m_old) + s[2] * (g - m_old)
        v = v_old * s[4] + s[5] * g * g
        p = p + s[8] * m / (square_root(v) / s[6] + s[7])
        p, m, v = (torch.where(x.isnan(), nan, x) for x in (p, m, v))
        if exp_avg_scale is None or exp_avg_sq_scale is None:
            exp_avg[at], exp_avg_sq[at] = m, v
        else:
            exp_avg[at], exp_avg_scale[groups] = quantise_momentum_reference(m)
            exp_avg_sq[at], exp_avg_sq_scale[groups] = quantise_variance_reference(v)
        if residual is None:
            weight[at] = p
        else:
            high, residual[at] = split_reference(p)
            weight[at] = high


@torch.library.custom_op(
    "slidecore::adamw",
    mutates_args={"weight", "residual", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"},
)
def _adamw(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    table: torch.Tensor,
    scalars: torch.Tensor,
    factor: torch.Tensor | None,
    block: int,
    steps: int,
    warps: int,
    loads: str,
    registers: int,
) -> None:
    if not on_card(weight):
        _reference(
            weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, table, scalars, factor
        )
        return
    if not len(table):
        return
    usual = exp_avg_scale is not None and torch.version.hip is None
    launch(
        _adamw_kernel,
        len(table),
        weight,
        weight if residual is None else weight.view(torch.int16),
        residual,
        bits_or_floats(gradient),
        exp_avg,
        exp_avg_sq,
        exp_avg_scale,
        exp_avg_sq_scale,
        table,
        scalars,
        factor,
        SPLIT=residual is not None,
        QUANTISED=exp_avg_scale is not None,
        HAS_FACTOR=factor is not None,
        USUAL=usual,
        EARLY=loads == "early",
        AHEAD=loads == "ahead",
        BLOCK=block,
        STEPS=steps,
        num_warps=warps,
        enable_fp_fusion=False,
        **({"maxnreg": registers} if registers and torch.version.hip is None else {}),
    )


@_adamw.register_fake
def _(*_: object) -> None:
    return None


def adamw(
    segments: Sequence[Segment],
    *,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    config: tuning.Config | None = None,
) -> None:
    """Updates the elements of `segments`; all others stay as they are. Planes are flat and of one length n.

    Args:
        segments: what to update, with which settings; a parameter without a gradient is in none of them.
        weight: bfloat16 with `residual` (int16), or float32 without.
        gradient: bfloat16 or float32.
        exp_avg, exp_avg_sq: float32; or int8 and uint8 codes, then with a float32 scale for each 128 elements in
            `exp_avg_scale` and `exp_avg_sq_scale`.
        factor: float32 scalar on the device that the gradient is multiplied by (the clip factor). None for 1.
        config: how to launch; what was stored for this card, or the default, if None.

    Raises:
        ValueError: a plane has another dtype, layout, length or device, or a setting is out of its range.
    """
    quantised = exp_avg_scale is not None
    check_plane("weight", weight, [torch.float32] if residual is None else [torch.bfloat16])
    check_plane("gradient", gradient, [torch.bfloat16, torch.float32], weight)
    check_plane("exp_avg", exp_avg, [torch.int8] if quantised else [torch.float32], weight)
    check_plane("exp_avg_sq", exp_avg_sq, [torch.uint8] if quantised else [torch.float32], weight)
    if (exp_avg_scale is None) != (exp_avg_sq_scale is None):
        raise ValueError("give both exp_avg_scale and exp_avg_sq_scale, or neither")
    if residual is not None:
        check_plane("residual", residual, [torch.int16], weight)
    for name, scale in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        if scale is not None:
            check_plane(name, scale, [torch.float32], weight)
            if len(scale) * GROUP < len(weight):
                raise ValueError(f"{name} has {len(scale)} groups of {GROUP} for {len(weight)} elements")
    planes = [weight, gradient, exp_avg, exp_avg_sq] + ([] if residual is None else [residual])
    if any(len(plane) != len(weight) for plane in planes):
        raise ValueError(f"planes have different lengths: {[len(plane) for plane in planes]}")
    if any(s.offset + s.numel > len(weight) for s in segments):
        raise ValueError(f"a segment ends behind the planes' {len(weight)} elements")
    if factor is not None and (factor.numel() != 1 or factor.dtype != torch.float32 or factor.device != weight.device):
        raise ValueError("factor must be one float32 on the planes' device")
    if config is None:
        name = "adamw 8-bit" if quantised else "adamw"
        config = tuning.lookup(name, len(weight), weight.device, DEFAULT_QUANTISED if quantised else DEFAULT)
    table = work_table(tuple((s.offset, s.numel) for s in segments), config.elements, weight.device)
    rows = np.zeros((len(segments), _SCALARS.value), dtype=np.float32)
    for row, segment in zip(rows, segments, strict=True):
        own = scalars_of(segment.hyper)
        row[: len(own)] = own
        inverse = 1 / row[6].astype(np.float64)
        row[9] = usual_scalars(*row[[2, 3, 6, 7, 8]].tolist())
        row[10:12] = np.array([inverse]).view(np.float32)
        row[12] = inverse
        row[13] = inverse - row[12].astype(np.float64)
    torch.ops.slidecore.adamw(
        weight, residual, gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, table,
        upload(rows, weight.device), factor, config.block, config.steps, config.warps, config.loads,
        config.registers,
    )  # fmt: skip
