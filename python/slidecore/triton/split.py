"""float32 to the planes `weight` (bf16) and `residual` (int16), exactly, for all 2^32 patterns.

weight = (bits + 0x8000) >> 16; residual = int16(bits). The inverse is `merge`; slidecore._core.split is the CPU's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slidecore.triton import tuning
from slidecore.triton._bits import high_part, low_part, split_reference
from slidecore.triton._launch import check_plane, launch, on_card, wrap_triton

CANDIDATES = tuple(
    tuning.Config(block, warps=warps) for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8))
)
DEFAULT = tuning.Config(2048, warps=8)


@triton.jit
def _split_kernel(master, weight, residual, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    bits = tl.load(master + at, mask=inside, other=0)
    tl.store(weight + at, high_part(bits), mask=inside)
    tl.store(residual + at, low_part(bits), mask=inside)


@torch.library.triton_op("slidecore::split", mutates_args={"weight", "residual"})
def _split(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, block: int, warps: int) -> None:
    n = master.numel()
    if not on_card(master):
        high, low = split_reference(master)
        weight.copy_(high)
        residual.copy_(low)
    elif n:
        launch(
            wrap_triton(_split_kernel), triton.cdiv(n, block), master,
            master.view(torch.int32), weight.view(torch.int16), residual, n, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def split(
    master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *, config: tuning.Config | None = None
) -> None:
    """Writes the planes of `master`.

    Args:
        master: flat float32.
        weight: flat bfloat16 of the same length, written.
        residual: flat int16 of the same length, written.
        config: how to launch; what was stored for this card, or the default, if None.

    Raises:
        ValueError: a tensor has another dtype, layout, length or device.
    """
    check_plane("master", master, [torch.float32])
    check_plane("weight", weight, [torch.bfloat16], master)
    check_plane("residual", residual, [torch.int16], master)
    if not len(master) == len(weight) == len(residual):
        raise ValueError(f"split of {len(master)} elements into {len(weight)} weights and {len(residual)} residuals")
    config = config or tuning.lookup("split", len(master), master.device, DEFAULT)
    torch.ops.slidecore.split(master, weight, residual, config.block, config.warps)
