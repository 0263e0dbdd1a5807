"""Whether values that were computed beside others are those computed without them, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LEAST_RELATIVE = 1e-5  # sums of float32 in another order, over as many terms as come


def beside_another(two: Sequence[torch.Tensor], twins: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether each of two samples gives what it gives beside a copy of itself.

    The shapes are the same, so are the kernels that run and what they round: the rows of a product are equal, bit for
    bit. Only what is computed for a number of rows that goes by their values (the tokens of an expert) may differ.

    Args:
        two: outputs of samples 0 and 1, the samples along dimension 0.
        twins: outputs of sample 0 twice, and of sample 1 twice.
    """
    for sample, twin in enumerate(twins):
        for a, b in zip(two, twin, strict=True):
            if a.shape != b.shape:
                return False
            tolerance = max(4 * _rounding(a), _LEAST_RELATIVE)
            if not _distance(a.chunk(2)[sample], b.chunk(2)[sample]) <= tolerance:
                return False
    return True


def alone(two: Sequence[torch.Tensor], one: Sequence[torch.Tensor]) -> bool:
    """Whether the first of two samples gives what it gives alone: not where its values go by how many there are.

    Products of other shapes may be rounded otherwise all over, and a choice that is close (of an expert) may fall
    otherwise. So this is coarse; it needs runs without random numbers, which go by the shape.
    """
    pairs = zip(two, one, strict=True)
    return all(_distance(a[: len(b)], b) <= math.sqrt(_rounding(a)) for a, b in pairs)


def _rounding(tensor: torch.Tensor) -> float:
    """The relative spacing of the least precise numbers that the tensor may have been computed with."""
    kind = tensor.device.type
    spacing = torch.finfo(tensor.dtype).eps
    if torch.is_autocast_enabled(kind):
        spacing = max(spacing, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return spacing if kind == "cpu" else max(spacing, 2**-10)  # products in TF32


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the 2-norm; infinities and NaN are as far as can be from all but themselves."""
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    difference = (a - b).float().masked_fill(same, 0.0).norm().item()
    scale = b.float().masked_fill(~b.isfinite(), 0.0).norm().item()
    distance = difference / scale if scale else math.inf
    return distance if math.isfinite(distance) else math.inf
