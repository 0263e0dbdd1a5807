"""The short quotient of the 8-bit moments leads to the codes and values of a division, wherever it is used.

Before its last rounding it is within 2^-41 of the quotient (derivation below), so it is enough that no quotient lies
that near to where rounding turns: exact rational arithmetic over all codes, and over all values around every turn.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from _kernels import CARD
from slidecore.triton import _moments

F = np.float32
# With r = (1 + e) / d the correction leaves of q's relative error (|e| + 2^-24) times (|e| + 2^-24); |e| is at most
# 2^-22.9 of the approximate reciprocal root and 2^-25 of the rounded square. 2^-21 leaves room for other cards.
NEAR = Fraction(1, 2**41)


def turns(low: np.float32) -> Fraction:
    """Between a float32 and the next."""
    return (Fraction(float(low)) + Fraction(float(np.nextafter(low, F(np.inf))))) / 2


def test_every_code_is_dequantised_as_by_division() -> None:
    for code in range(1, 128):
        y = F(code) * (F(1) / F(127))
        d = F(2) - y
        exact = Fraction(float(y)) / Fraction(float(d))
        nearest = y / d
        for low in (np.nextafter(nearest, F(0)), nearest):
            assert abs(exact / turns(low) - 1) > NEAR


def test_every_value_is_quantised_as_by_division() -> None:
    """From x > 0 to the code, which turns from one half quotient h to the next. Far from it no error matters."""
    for code in range(1, 128):
        h = F((code - 0.5) / 254)
        while np.rint(F(254) * h) >= code:
            h = np.nextafter(h, F(0))
        while np.rint(F(254) * np.nextafter(h, F(1))) < code:
            h = np.nextafter(h, F(1))
        turn = turns(h)
        # x / (1 + x) has x = turn / (1 - turn); rounding 1 + x moves it by 2^-24 at most.
        middle = F(float(turn / (1 - turn)))
        bits = int(middle.view(np.int32))
        reach = 64 + int(float(middle) * 2**-20 / float(np.spacing(middle)))
        x = np.arange(bits - reach, bits + reach + 1, dtype=np.int32).view(np.float32)
        distance = x.astype(np.float64) / (F(1) + x).astype(np.float64) / float(turn) - 1  # good to 2^-51
        assert distance[0] < -(2.0**-22)
        assert distance[-1] > 2.0**-22
        assert np.abs(distance).min() > float(NEAR)


@pytest.mark.skipif(CARD, reason="emulates the card on the CPU")
def test_short_quotient_with_a_bad_reciprocal() -> None:
    """Its five operations, each rounded, with reciprocals 2^-21 too large and too small, give the division's codes."""
    assert not _moments._SHORT.value  # the interpreter divides
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(400000, generator=generator), torch.ldexp(torch.ones(30), -torch.arange(30))]).numpy()
    d = F(1) + x
    wanted = np.rint(F(127) * ((x + x) / d))
    for wrong in (-(2.0**-21), 0.0, 2.0**-21):
        r = ((1 + wrong) / d.astype(np.float64)).astype(F)
        q = x * r
        rest = (x.astype(np.float64) - d.astype(np.float64) * q.astype(np.float64)).astype(F)
        half = (q.astype(np.float64) + rest.astype(np.float64) * r.astype(np.float64)).astype(F)
        assert np.array_equal(np.rint(F(254) * half), wanted)
