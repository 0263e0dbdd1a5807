"""The bits of float32 and of the planes `weight` (bf16) and `residual` (int16), in kernels and in PyTorch.

weight = (bits + 0x8000) >> 16; residual = int16(bits); bits = (weight << 16) + sign_extend(residual)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def joined(weight, residual):  # type: ignore[no-untyped-def]
    """float32 of int16 bit patterns."""
    return ((weight.to(tl.int32) << 16) + residual.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def high_part(bits):  # type: ignore[no-untyped-def]
    """The weight of int32 bits, as int16. The addition may wrap, which is what is wanted."""
    return ((bits + 0x8000) >> 16).to(tl.int16)


@triton.jit
def low_part(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.int16)


@triton.jit
def one_nan(value):  # type: ignore[no-untyped-def]
    """The same value, every NaN as 0x7fc00000: which NaN an operation returns depends on the machine."""
    nan = tl.full(value.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(value != value, nan, value)


@triton.jit
def widened(value):  # type: ignore[no-untyped-def]
    """float32 of float32, or of a bf16's bits as int16: Triton's interpreter gets bf16 denormals wrong."""
    if value.dtype == tl.int16:
        result = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value
    return result


@triton.jit
def rounded_to_bfloat16(value):  # type: ignore[no-untyped-def]
    """Bits of the nearest bf16, halves to even, as int16; NaN as 0x7fc0. Done in integers, since Triton's interpreter
    rounds towards zero.
    """
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)


def bits_or_floats(tensor: torch.Tensor) -> torch.Tensor:
    """What `widened` takes: a bf16 tensor's bits, others as they are."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def split_reference(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight as bf16, residual as int16) of a float32 tensor."""
    bits = master.contiguous().view(torch.int32)
    # int32 addition wraps in PyTorch as in C++'s unsigned arithmetic.
    weight = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, bits.to(torch.int16)


def merge_reference(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)
