"""One AdamW step with 8-bit moments for values of usual size, without a branch: the same bits as `adamw`'s operations.

ptxas makes of each correctly rounded division and root a test, a branch and a call for what is very large or small, one
element after the other. Here one test serves a block (`usual`, below), so that the elements' chains overlap, and the
sequences themselves are those that ptxas takes where its tests pass, for NVIDIA's approximate reciprocals. A block that
fails the test has to be done again by the general operations.

The test passes if for the whole block
    v is 0 or in [2^-100, 2^30);  |m| is 0 or in [2^-69, 2^40);  the new weight is finite;
and `usual_scalars` says of the segment that 2^-10 <= c = sqrt(1 - beta2^t), 2^-40 <= eps <= 2^20, that the step size
is 0 or in [2^-30, 2^30], and that beta1 > 1/2. Then the denominator is in [2^-40, 2^26], the numerator 0 or in
[2^-99, 2^70], and their quotient 0 or in [2^-125, 2^110], so that nothing overflows, nothing that is rounded is
denormal, and the remainders of quotients, multiples of 2^-147, are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slidecore.triton._launch import INTERPRETED
from slidecore.triton._moments import _INVERSE_127, _INVERSE_255, _ROUNDER, _ROUNDER_BITS

_APPROXIMATE = tl.constexpr(not INTERPRETED)
_TINY = tl.constexpr(2.0**-126)
_LEAST_V = tl.constexpr(0x0D800000)  # the bits of 2^-100
_LEAST_M = tl.constexpr(0x1D000000)  # of 2^-69
_END_V = tl.constexpr(0x4E800000)  # of 2^30
_END_M = tl.constexpr(0x53800000)  # of 2^40
_INFINITY = tl.constexpr(0x7F800000)


def usual_scalars(lerp_factor: float, from_gradient: float, correction: float, eps: float, step_size: float) -> bool:
    """Whether a segment's settings are in the range that this file is about."""
    return (
        not from_gradient
        and 0 <= lerp_factor < 0.5
        and 2.0**-10 <= correction <= 1
        and 2.0**-40 <= eps <= 2.0**20
        and (step_size == 0 or 2.0**-30 <= abs(step_size) <= 2.0**30)
    )


@triton.jit
def _minus(value):  # type: ignore[no-untyped-def]
    """Free as part of an fma, where Triton's own negation is a subtraction from 0."""
    return value * -1.0


@triton.jit
def _reciprocal(d):  # type: ignore[no-untyped-def]
    """Within one unit in the last place; infinite for 0."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _corrected(n, d, r):  # type: ignore[no-untyped-def]
    """The quotient n / d by an approximate reciprocal r of d. The remainder is negated so that -0 / d stays -0."""
    q = n * r
    return tl.fma(_minus(tl.fma(d, q, _minus(n))), r, q)


@triton.jit
def quotient(n, d):  # type: ignore[no-untyped-def]
    """The quotient n / d, correctly rounded."""
    if _APPROXIMATE:
        r = _reciprocal(d)
        result = _corrected(n, d, tl.fma(r, tl.fma(_minus(d), r, 1.0), r))
    else:  # the interpreter's fma rounds twice
        result = tl.div_rn(n, d)
    return result


@triton.jit
def near_quotient(n, d):  # type: ignore[no-untyped-def]
    """The quotient n / d for 1 <= d <= 2, as good as `_moments._quotient`: the reciprocal is not refined."""
    if _APPROXIMATE:
        result = _corrected(n, d, _reciprocal(d))
    else:
        result = tl.div_rn(n, d)
    return result


@triton.jit
def square_root(v):  # type: ignore[no-untyped-def]
    """Correctly rounded, of 0 too."""
    if _APPROXIMATE:
        r = tl.rsqrt(v + _TINY)  # nothing to a v that is not 0
        q = v * r
        result = tl.fma(tl.fma(_minus(q), q, v), r * 0.5, q)
    else:
        result = tl.sqrt_rn(v)
    return result


@triton.jit
def quotient_by(n, d, inverse, inverse_rest):  # type: ignore[no-untyped-def]
    """The quotient n / d, correctly rounded, given 1 / d as the sum of two float32.

    The first quotient is one of the two float32 around the true one, and `inverse` is the float32 nearest to 1 / d, so
    that one correction is enough (Markstein 1990; his exception, a mantissa of ones, was gone through: it is right).
    """
    if _APPROXIMATE:
        q = tl.fma(n, inverse, n * inverse_rest)
        result = tl.fma(tl.fma(_minus(d), q, n), inverse, q)
    else:
        result = tl.div_rn(n, d)
    return result


@triton.jit
def _parts(value):  # type: ignore[no-untyped-def]
    """(groups, 16, 8): eight elements are of one thread, so that what is said of them costs no exchange."""
    return value.reshape(value.shape[0], 16, 8)


@triton.jit
def usual_step(  # type: ignore[no-untyped-def]
    g,
    p,
    m_code,
    a,
    v_code,
    s,
    gradient_factor,
    decay,
    lerp_factor,
    beta2,
    one_minus_beta2,
    correction,
    inverse_correction,
    inverse_correction_rest,
    eps,
    minus_step_size,
):
    """New p, codes and scales; and whether they are right: if not, nothing may be said of them.

    g, p float32 (groups, 128), codes int8 and uint8 of that shape, scales float32 (groups,), all else scalars.
    """
    y = m_code.to(tl.float32) * _INVERSE_127
    m_old = near_quotient(y, 2.0 - tl.abs(y)) * a[:, None]
    r_old = v_code.to(tl.float32) * (s * _INVERSE_255)[:, None]
    g = g * gradient_factor
    m = m_old + lerp_factor * (g - m_old)
    v = r_old * r_old * beta2 + (one_minus_beta2 * g) * g

    m_bits = m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    v_bits = v.to(tl.uint32, bitcast=True)
    m_parts, v_parts = _parts(m_bits), _parts(v_bits)
    m_most, v_most = tl.max(m_parts, axis=2), tl.max(v_parts, axis=2)
    a_bits, s_bits = tl.max(m_most, axis=1), tl.max(v_most, axis=1)
    root = square_root(v)
    denominator = quotient_by(root, correction, inverse_correction, inverse_correction_rest) + eps
    p = p * decay + quotient(minus_step_size * m, denominator)

    a = a_bits.to(tl.float32, bitcast=True)
    x = m * tl.where(a > 0, quotient(tl.full(a.shape, 1.0, tl.float32), a), 0.0)[:, None]
    half = near_quotient(x, 1.0 + tl.abs(x))
    m_code = (half * 254.0 + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    s = square_root(s_bits.to(tl.float32, bitcast=True))  # rounding keeps the order, so this is the largest root
    scaled = root * tl.where(s > 0, quotient(tl.full(s.shape, 255.0, tl.float32), s), 0.0)[:, None] + _ROUNDER
    least = tl.minimum(v_bits, 1).to(tl.int32) + _ROUNDER_BITS
    v_code = tl.maximum(scaled.to(tl.int32, bitcast=True), least).to(tl.uint8)

    # Zeros wrap to the largest numbers; what is not finite lies above all that is.
    p_parts = _parts(p.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
    usual = (
        (tl.min(m_parts - 1, axis=2) >= _LEAST_M - 1)
        & (tl.min(v_parts - 1, axis=2) >= _LEAST_V - 1)
        & (m_most < _END_M)
        & (v_most < _END_V)
        & (tl.max(p_parts, axis=2) < _INFINITY)
    )
    return p, m_code, a, v_code, s, tl.min(usual.to(tl.int32).reshape(usual.numel), axis=0) != 0
