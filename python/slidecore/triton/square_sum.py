"""The sum of squares of a chunk's flat gradient, for clipping by the global norm: sum over segments of x * x.

Squares and their sum within a program are float32, the sum over programs float64; no atomics, so the same gradient
gives the same bits. What lies between the segments (padding, entries without a gradient) is not read.

For torch.compile it is an opaque operator (`custom_op`, not `triton_op`): the reference for CPU tensors reads the work
table. Eager calls go past the operator, whose dispatch takes longer than the launches: the sum of a block's gradients
takes a card about 150 microseconds, and the host must not take more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from slidecore.triton import tuning
from slidecore.triton._bits import bits_or_floats, widened
from slidecore.triton._launch import UNIT, check_plane, launch, on_card, work_table

CANDIDATES = tuple(tuning.Config(block, steps, warps) for block, warps in ((1024, 4), (2048, 8)) for steps in (1, 4, 8))
DEFAULT = tuning.Config(2048, 4, 8)


@triton.jit
def _square_sum_kernel(plane, table, partials, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + tl.program_id(0) * 4
    begin = plane + tl.load(row).to(tl.int64) * 128
    count = tl.load(row + 1)
    within = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    if count == BLOCK * STEPS:
        for step in tl.static_range(STEPS):
            x = widened(tl.load(begin + step * BLOCK + within))
            squares += x * x
    else:
        for at in range(0, count, BLOCK):
            x = widened(tl.load(begin + at + within, mask=at + within < count, other=0))
            squares += x * x
    tl.store(partials + tl.program_id(0), tl.sum(squares, axis=0))


def _run(plane: torch.Tensor, table: torch.Tensor, total: torch.Tensor, block: int, steps: int, warps: int) -> None:
    if not on_card(plane):
        for begin, count, _, _ in table.tolist():
            total += plane[begin * UNIT : begin * UNIT + count].double().square().sum()
    elif len(table):
        partials = torch.empty(len(table), dtype=torch.float32, device=plane.device)
        launch(
            _square_sum_kernel, len(table), plane, bits_or_floats(plane), table, partials,
            BLOCK=block, STEPS=steps, num_warps=warps,
        )  # fmt: skip
        total += partials.sum(dtype=torch.float64)


_square_sum = torch.library.custom_op("slidecore::square_sum", _run, mutates_args={"total"})


@_square_sum.register_fake
def _(*_: object) -> None:
    return None


def square_sum(
    plane: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    total: torch.Tensor,
    *,
    config: tuning.Config | None = None,
) -> None:
    """Adds the sum of squares of the segments to `total`, on the device and without waiting for it.

    Args:
        plane: flat bfloat16 or float32.
        segments: (offset, length) in elements; offsets are multiples of 128.
        total: one float32 or float64 on the plane's device.
        config: how to launch; what was stored for this card, or the default, if None.

    Raises:
        ValueError: a tensor has another dtype, layout or device, or a segment does not fit.
    """
    check_plane("plane", plane, [torch.bfloat16, torch.float32])
    if total.numel() != 1 or total.dtype not in (torch.float32, torch.float64) or total.device != plane.device:
        raise ValueError("total must be one float32 or float64 on the plane's device")
    if any(offset + length > len(plane) for offset, length in segments):
        raise ValueError(f"a segment ends behind the plane's {len(plane)} elements")
    config = config or tuning.lookup("square_sum", len(plane), plane.device, DEFAULT)
    table = work_table(tuple(segments), config.elements, plane.device)
    call = torch.ops.slidecore.square_sum if torch.compiler.is_compiling() else _run
    call(plane, table, total, config.block, config.steps, config.warps)
