"""A visit's tensors in micro-batches: taken apart along dimension 0, and joined again.

An output either has the samples along dimension 0 (or a fixed number of rows for each) and is concatenated, or it is
the same for all micro-batches (a position bias made from weights) and is taken once. Nothing else can be joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Gradients = Sequence[torch.Tensor | None]


def part(tensor: torch.Tensor, split: bool, index: int, count: int) -> torch.Tensor:
    """Micro-batch `index` of `count`; the whole tensor if it is not `split`."""
    if not split or count == 1:
        return tensor
    size = tensor.shape[0]
    each = -(-size // count)
    return tensor[index * each : min(size, (index + 1) * each)]


def same(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are bit for bit the same."""
    first = tensors[0]
    return all(_is_alias(first, t) or (t.shape == first.shape and torch.equal(first, t)) for t in tensors[1:])


def _is_alias(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def join(parts: Sequence[Sequence[torch.Tensor]], batched: Sequence[bool]) -> list[torch.Tensor]:
    """One visit's outputs from those of its micro-batches."""
    if len(parts) == 1:
        return list(parts[0])
    return [
        torch.cat(pieces) if whole else pieces[0]
        for pieces, whole in zip(zip(*parts, strict=True), batched, strict=True)
    ]


def output_gradients(
    gradients: Gradients, sizes: Sequence[Sequence[int]], batched: Sequence[bool], index: int
) -> Gradients:
    """The part of the outputs' gradients that belongs to micro-batch `index`.

    Args:
        gradients: of the joined outputs.
        sizes: of each micro-batch's outputs along dimension 0; empty if there is one micro-batch.
        batched: which outputs were concatenated. The others are those of micro-batch 0.
    """
    if not sizes:
        return gradients
    result: list[torch.Tensor | None] = []
    for o, (gradient, whole) in enumerate(zip(gradients, batched, strict=True)):
        if gradient is None or not whole:
            result.append(gradient if index == 0 else None)
            continue
        start = sum(each[o] for each in sizes[:index])
        result.append(gradient[start : start + sizes[index][o]])
    return result


def input_gradients(
    parts: Sequence[Gradients], split: Sequence[bool], sizes: Sequence[Sequence[torch.Size]]
) -> list[torch.Tensor | None]:
    """Joins the micro-batches' input gradients: concatenated where the input was split, else summed in float32.

    A micro-batch without a gradient of what others have one of stands for zeros; without any, there is none.

    Args:
        parts: for each micro-batch, the gradient of each input.
        split: for each input, whether it was.
        sizes: for each micro-batch, the size of each input.
    """
    result: list[torch.Tensor | None] = []
    for i, (was_split, pieces) in enumerate(zip(split, zip(*parts, strict=True), strict=True)):
        present = [p for p in pieces if p is not None]
        if not present:
            result.append(None)
        elif len(pieces) == 1:
            result.append(present[0])
        elif was_split:
            some = present[0]
            filled = [some.new_zeros(own[i]) if p is None else p for p, own in zip(pieces, sizes, strict=True)]
            result.append(torch.cat(filled))
        else:
            dtype = present[0].dtype
            total = present[0].to(torch.promote_types(dtype, torch.float32))
            for piece in present[1:]:
                total = total + piece
            result.append(total.to(dtype))
    return result
