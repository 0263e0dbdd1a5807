"""float32 sums of gradients in a chunk's plane layout: many tensors, one launch.

    accumulator += gradient                      for each micro-batch but the last; the first only stores
    out = bfloat16(accumulator + gradient)       for the last one, together with the sum of out * out

The last form does not write the accumulator, whose contents are then of no use: 8 bytes per element and a bf16 gradient
instead of 10. Each element is one float32 addition and, with `out`, one rounding to nearest, halves to even: the same
bits as PyTorch's. The sum of squares is float32 within a program and float64 across programs, always in the same order:
no atomics.

It is an opaque operator (`custom_op`, not `triton_op`): the kernel reads the tensors' addresses from a table, which
tracing cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from slidecore.triton import tuning
from slidecore.triton._bits import rounded_to_bfloat16, widened
from slidecore.triton._launch import UNIT, check_plane, launch, on_card, upload, work_table

CANDIDATES = tuple(
    tuning.Config(block, steps, warps)
    for block, warps in ((1024, 4), (1024, 8), (2048, 4), (2048, 8))
    for steps in (1, 2, 4)
)
DEFAULT = tuning.Config(1024, 2, 8)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    accumulator,
    source,
    out,
    begin,
    count,
    fresh,
    FULL: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds `count` elements of `source` to those from `begin` on; the squares of what was stored, if ROUND."""
    within = tl.arange(0, BLOCK)
    inside = within < count
    summed = tl.zeros([BLOCK], tl.int32) + fresh.to(tl.int32) == 0
    # -0 + x is x for every x, -0 included. The accumulator is not read where this is the first contribution.
    if FULL:
        g = widened(tl.load(source + within))
        old = tl.load(accumulator + begin + within, mask=summed, other=-0.0)
    else:
        g = widened(tl.load(source + within, mask=inside, other=0))
        old = tl.load(accumulator + begin + within, mask=inside & summed, other=-0.0)
    new = old + g
    squares = tl.zeros([BLOCK], tl.float32)
    if ROUND:
        rounded = rounded_to_bfloat16(new)
        value = widened(rounded)
        squares = value * value
        if FULL:
            tl.store(out + begin + within, rounded)
        else:
            tl.store(out + begin + within, rounded, mask=inside)
            squares = tl.where(inside, squares, 0.0)
    elif FULL:
        tl.store(accumulator + begin + within, new)
    else:
        tl.store(accumulator + begin + within, new, mask=inside)
    return squares


@triton.jit
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    accumulator,
    sources,
    out,
    partials,
    table,
    SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = table + tl.program_id(0) * 4
    begin = tl.load(row).to(tl.int64) * 128
    count = tl.load(row + 1)
    index = tl.load(row + 2)
    source = tl.load(sources + 2 * index).to(tl.pointer_type(SOURCE))
    if ALIGNED:
        source = tl.multiple_of(source, 16)
    source += tl.load(row + 3).to(tl.int64) * 128
    fresh = tl.load(sources + 2 * index + 1)
    squares = tl.zeros([BLOCK], tl.float32)
    if count == BLOCK * STEPS:
        for step in tl.static_range(STEPS):
            at = step * BLOCK
            squares += _block(accumulator, source + at, out, begin + at, BLOCK, fresh, True, ROUND, BLOCK)
    else:
        for at in range(0, count, BLOCK):
            squares += _block(accumulator, source + at, out, begin + at, count - at, fresh, False, ROUND, BLOCK)
    if ROUND:
        tl.store(partials + tl.program_id(0), tl.sum(squares, axis=0))


def _reference(
    accumulator: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    offsets: Sequence[int],
    fresh: Sequence[bool],
    out: torch.Tensor | None,
    square_sum: torch.Tensor | None,
) -> None:
    for gradient, offset, first in zip(gradients, offsets, fresh, strict=True):
        at = slice(offset, offset + gradient.numel())
        flat = gradient.reshape(-1)
        if out is None:
            if first:
                accumulator[at] = flat
            else:
                accumulator[at] += flat
            continue
        out[at] = flat if first else accumulator[at] + flat
        if square_sum is not None:
            square_sum += out[at].double().square().sum()


@torch.library.custom_op("slidecore::accumulate", mutates_args={"accumulator", "out", "square_sum"})
def _accumulate(
    accumulator: torch.Tensor,
    gradients: list[torch.Tensor],
    offsets: list[int],
    fresh: list[bool],
    out: torch.Tensor | None,
    square_sum: torch.Tensor | None,
    block: int,
    steps: int,
    warps: int,
) -> None:
    if not on_card(accumulator):
        _reference(accumulator, gradients, offsets, fresh, out, square_sum)
        return
    device = accumulator.device
    segments = tuple((offset, g.numel()) for offset, g in zip(offsets, gradients, strict=True))
    table = work_table(segments, block * steps, device)
    if not len(table):
        return
    flat = [g.contiguous() for g in gradients]
    addresses = np.array([(g.data_ptr(), int(first)) for g, first in zip(flat, fresh, strict=True)], dtype=np.int64)
    partials = torch.empty(len(table) if out is not None else 0, dtype=torch.float32, device=device)
    launch(
        _accumulate_kernel,
        len(table),
        accumulator,
        accumulator,
        upload(addresses, device),
        None if out is None else out.view(torch.int16),
        partials,
        table,
        SOURCE=tl.int16 if flat[0].dtype == torch.bfloat16 else tl.float32,
        ALIGNED=bool((addresses[:, 0] % 16 == 0).all()),
        ROUND=out is not None,
        BLOCK=block,
        STEPS=steps,
        num_warps=warps,
    )
    if square_sum is not None:
        square_sum += partials.sum(dtype=torch.float64)


@_accumulate.register_fake
def _(*_: object) -> None:
    return None


def accumulate(
    accumulator: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    offsets: Sequence[int],
    *,
    fresh: Sequence[bool] | None = None,
    out: torch.Tensor | None = None,
    square_sum: torch.Tensor | None = None,
    config: tuning.Config | None = None,
) -> None:
    """Adds gradients to their places in a chunk's flat sum.

    Args:
        accumulator: flat float32.
        gradients: tensors of any shape, all bfloat16 or all float32, on the accumulator's device.
        offsets: where each begins in the accumulator, in elements, multiples of 128.
        fresh: for each, whether it is the first contribution, which is stored instead of added. None: none is.
        out: flat bfloat16 of the accumulator's length that gets the sums instead of the accumulator, rounded once.
        square_sum: one float32 or float64 that the sum of the squares of what `out` got is added to.
        config: how to launch; what was stored for this card, or the default, if None.

    Raises:
        ValueError: a tensor has another dtype, layout, length or device.
    """
    check_plane("accumulator", accumulator, [torch.float32])
    if fresh is None:
        fresh = [False] * len(gradients)
    if not len(gradients) == len(offsets) == len(fresh):
        raise ValueError(f"{len(gradients)} gradients with {len(offsets)} offsets and {len(fresh)} marks")
    if not gradients:
        return
    dtypes = {g.dtype for g in gradients}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float32}:
        raise ValueError(f"gradients are {', '.join(map(str, dtypes))}, must be all bfloat16 or all float32")
    for gradient, offset in zip(gradients, offsets, strict=True):
        if gradient.device != accumulator.device:
            raise ValueError(f"a gradient is on {gradient.device}, the accumulator on {accumulator.device}")
        if offset % UNIT or not 0 <= offset <= len(accumulator) - gradient.numel():
            raise ValueError(f"{gradient.numel()} elements from {offset} on of {len(accumulator)}; offsets are "
                             f"multiples of {UNIT}")  # fmt: skip
    if out is not None:
        check_plane("out", out, [torch.bfloat16], accumulator)
        if len(out) != len(accumulator):
            raise ValueError(f"out has {len(out)} elements, the accumulator {len(accumulator)}")
    if square_sum is not None:
        if out is None:
            raise ValueError("square_sum is of what is written to out: give out, too")
        if square_sum.numel() != 1 or square_sum.dtype not in (torch.float32, torch.float64):
            raise ValueError("square_sum must be one float32 or float64")
    name = "accumulate" if out is None else "accumulate last"
    config = config or tuning.lookup(name, len(accumulator), accumulator.device, DEFAULT)
    present = [i for i, g in enumerate(gradients) if g.numel()]
    torch.ops.slidecore.accumulate(
        accumulator, [gradients[i] for i in present], [offsets[i] for i in present], [fresh[i] for i in present],
        out, square_sum, config.block, config.steps, config.warps,
    )  # fmt: skip
