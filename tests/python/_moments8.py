"""8-bit moments in NumPy, from the formulas of docs/numerics.md: one float32 operation at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 128
one, two = np.float32(1), np.float32(2)
Floats = NDArray[np.float32]


def largest(values: Floats) -> np.float32:
    """The magnitude that a group's scale is made of; NaN if there is one."""
    found = np.abs(values).max()  # NumPy's max propagates NaN
    return np.float32(0) if found < np.float32(2.0**-126) else np.float32(found)


def quantise(m: Floats) -> tuple[NDArray[np.int8], np.float32]:
    scale = largest(m)
    if scale == 0:
        return np.zeros(len(m), np.int8), scale
    x = m * (one / scale)
    y = (x + x) / (one + np.abs(x))
    codes = np.where(np.isfinite(y), np.rint(np.float32(127) * y), 0)
    return codes.astype(np.int8), scale


def dequantise(codes: NDArray[np.int8], scale: np.float32) -> Floats:
    y = codes.astype(np.float32) * (one / np.float32(127))
    return y / (two - np.abs(y)) * scale


def quantise_root(root: Floats) -> tuple[NDArray[np.uint8], np.float32]:
    scale = largest(root)
    if scale == 0:
        return np.zeros(len(root), np.uint8), scale
    wanted = root * (np.float32(255) / scale)
    codes = np.minimum(np.float32(255), np.maximum(np.rint(wanted), (root > 0).astype(np.float32)))
    return np.where(np.isfinite(wanted), codes, 0).astype(np.uint8), scale


def dequantise_root(codes: NDArray[np.uint8], scale: np.float32) -> Floats:
    return codes.astype(np.float32) * (scale * (one / np.float32(255)))


@dataclass
class Moments8:
    """The moments of one parameter of n elements."""

    n: int
    step: int = 0
    exp_avg: NDArray[np.int8] = field(init=False)
    exp_avg_sq: NDArray[np.uint8] = field(init=False)
    exp_avg_scale: Floats = field(init=False)
    exp_avg_sq_scale: Floats = field(init=False)

    def __post_init__(self) -> None:
        groups = -(-self.n // GROUP)
        self.exp_avg, self.exp_avg_sq = np.zeros(self.n, np.int8), np.zeros(self.n, np.uint8)
        self.exp_avg_scale, self.exp_avg_sq_scale = np.zeros(groups, np.float32), np.zeros(groups, np.float32)

    def update(self, master: Floats, gradient: Floats, group: dict[str, Any]) -> Floats:
        """The masters after one step of torch's AdamW with the options of a parameter group."""
        self.step += 1
        lr, (beta1, beta2), eps = group["lr"], group["betas"], np.float32(group["eps"])
        assert beta1 > 0.5, "torch interpolates from the other end then"
        decay = np.float32(1 - lr * group["weight_decay"])
        step_size = np.float32(-(lr / (1 - beta1**self.step)))
        correction = np.float32(np.sqrt(1 - beta2**self.step))
        g = -gradient if group["maximize"] else gradient
        updated = np.empty_like(master)
        with np.errstate(all="ignore"):
            for i in range(len(self.exp_avg_scale)):
                part = slice(i * GROUP, min((i + 1) * GROUP, self.n))
                old = dequantise(self.exp_avg[part], self.exp_avg_scale[i])
                old_root = dequantise_root(self.exp_avg_sq[part], self.exp_avg_sq_scale[i])
                m = old + np.float32(1 - beta1) * (g[part] - old)
                v = old_root * old_root * np.float32(beta2) + np.float32(1 - beta2) * g[part] * g[part]
                root = np.sqrt(v)
                updated[part] = master[part] * decay + step_size * m / (root / correction + eps)
                self.exp_avg[part], self.exp_avg_scale[i] = quantise(m)
                self.exp_avg_sq[part], self.exp_avg_sq_scale[i] = quantise_root(root)
        return updated
