"""What the tests of GPU kernels share. Import it before anything of slidecore.triton: it skips where there is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

CARD = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed")

from slidecore.triton import _launch  # noqa: E402

DEVICE = torch.device("cuda", torch.cuda.current_device()) if CARD else torch.device("cpu")

# Sizes around a program's, a unit's and a vector's.
SIZES = [1, 2, 7, 127, 128, 129, 1000, 2047, 2048, 2049, 5001, 20011]

# Values that go wrong where arithmetic is careless: zeros, denormals, the ends of the range, infinities, NaNs with and
# without a payload that rounding carries away.
SPECIAL_BITS = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F808000,
    0x3F818000, 0x3F80FFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001,
    0x7FC00000, 0xFFC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFFFFFFFF,
]  # fmt: skip


def any_bits(n: int, seed: int) -> torch.Tensor:
    """float32 of random bit patterns, special values first."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int64)
    special = torch.tensor(SPECIAL_BITS[:n])
    bits[: len(special)] = torch.where(special >= 2**31, special - 2**32, special)
    return bits.to(torch.int32).view(torch.float32)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, as integers, so that NaN equals itself and -0 does not equal 0."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    tensor = tensor.cpu()
    return tensor.view(kinds[tensor.dtype]) if tensor.dtype in kinds else tensor


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, filled with what no result should be."""
    return tensor.fill_(math.nan if tensor.is_floating_point() else 99)


def poisoned(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return poison(torch.zeros(*size, dtype=dtype, device=DEVICE))


@pytest.fixture
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the reference, as they do where the interpreter is not asked for."""
    monkeypatch.setattr(_launch, "INTERPRETED", False)


def check_operator(operator: Any, *arguments: Any) -> None:
    """Schema, fake implementation and tracing, as torch.library.opcheck sees them."""
    torch.library.opcheck(operator.default, arguments)
