"""The planes `weight` (bf16) and `residual` (int16) to float32, exactly: bits = (weight << 16) + residual.

The inverse is `split`; slidecore._core.merge is the CPU's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slidecore.triton import tuning
from slidecore.triton._bits import joined, merge_reference
from slidecore.triton._launch import check_plane, launch, on_card, wrap_triton

CANDIDATES = tuple(
    tuning.Config(block, warps=warps) for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8))
)
# Four elements a thread: with eight, what is loaded would change threads before it is stored.
DEFAULT = tuning.Config(1024, warps=8)


@triton.jit
def _merge_kernel(weight, residual, master, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    high = tl.load(weight + at, mask=inside, other=0)
    low = tl.load(residual + at, mask=inside, other=0)
    # Stored as integers: a processor may quieten a NaN that passes as a float.
    tl.store(master + at, joined(high, low).to(tl.int32, bitcast=True), mask=inside)


@torch.library.triton_op("slidecore::merge", mutates_args={"master"})
def _merge(weight: torch.Tensor, residual: torch.Tensor, master: torch.Tensor, block: int, warps: int) -> None:
    n = master.numel()
    if not on_card(master):
        master.view(torch.int32).copy_(merge_reference(weight, residual).view(torch.int32))
    elif n:
        launch(
            wrap_triton(_merge_kernel), triton.cdiv(n, block), master,
            weight.view(torch.int16), residual, master.view(torch.int32), n, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def merge(
    weight: torch.Tensor, residual: torch.Tensor, master: torch.Tensor, *, config: tuning.Config | None = None
) -> None:
    """Writes the float32 master values of two planes.

    Args:
        weight: flat bfloat16.
        residual: flat int16 of the same length.
        master: flat float32 of the same length, written.
        config: how to launch; what was stored for this card, or the default, if None.

    Raises:
        ValueError: a tensor has another dtype, layout, length or device.
    """
    check_plane("weight", weight, [torch.bfloat16])
    check_plane("residual", residual, [torch.int16], weight)
    check_plane("master", master, [torch.float32], weight)
    if not len(master) == len(weight) == len(residual):
        raise ValueError(f"merge of {len(weight)} weights and {len(residual)} residuals into {len(master)} elements")
    config = config or tuning.lookup("merge", len(master), master.device, DEFAULT)
    torch.ops.slidecore.merge(weight, residual, master, config.block, config.warps)
