"""x *= factor, with the factor on the device, at no cost where it is 1.

A loss makes its gradients in the forward pass, for a factor that only backward knows and that is nearly always 1. The
kernel looks first, so that neither the host waits for the factor nor the memory is read in vain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slidecore.triton._launch import launch, on_card, wrap_triton


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor).to(tl.float32)
    if by == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    for step in range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * by
        tl.store(x + at, value, mask=at < n)


@torch.library.triton_op("slidecore::scale_", mutates_args={"x"})
def _scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    if not on_card(x) or x.dtype == torch.float64:  # the kernel multiplies in float32
        x.mul_(factor)
    elif x.numel():
        block, steps = 2048, 16  # few programs, which is what the case of 1 costs
        launch(
            wrap_triton(_scale_kernel), triton.cdiv(x.numel(), block * steps), x,
            x, factor, x.numel(), BLOCK=block, STEPS=steps, num_warps=8,
        )  # fmt: skip


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies `x` in place.

    Args:
        x: any contiguous float tensor; the product is rounded to its dtype once.
        factor: one element on the device of `x`.

    Raises:
        ValueError: `x` is not contiguous, or `factor` has more than one element.
    """
    if not x.is_contiguous() or factor.numel() != 1:
        raise ValueError("scale_ takes a contiguous tensor and one factor")
    torch.ops.slidecore.scale_(x, factor)
    return x
