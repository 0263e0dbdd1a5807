"""Cross-entropy of a tile of logits and its gradient in two passes over the row.

For a row x with label y, lse = log(sum(exp(x))), smoothing e and vocabulary size V:

    loss = ((1 - e) * (lse - x[y]) + e / V * sum(lse - x)) / divisor
    grad = (exp(x - lse) - e / V - (1 - e) * [i == y]) / divisor

lse by the online softmax (Milakov & Gimelshein, arXiv 1805.02867), in float32. The divisor stays on the device, so
that counting labels needs no synchronization.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits,
    gradient,
    labels,
    losses,
    divisor,
    logits_stride,
    gradient_stride,
    vocabulary,
    ignore_index,
    smoothing,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    x_row = logits + row * logits_stride
    g_row = gradient + row * gradient_stride
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            at = start + columns
            tl.store(g_row + at, tl.zeros([BLOCK], dtype=tl.float32), mask=at < vocabulary)
        return
    largest = -3.0e38  # finite: a block of logits that are all -inf must not give -inf - -inf
    total = 0.0
    plain_sum = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        x = tl.load(x_row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), axis=0)
        largest = new_largest
        plain_sum += tl.sum(tl.where(at < vocabulary, x, 0.0), axis=0)
    # lse = largest + log_total; the two stay apart, so that large logits cancel exactly.
    log_total = tl.log(total)
    count = tl.load(divisor)
    # Read before the second pass: the gradient may overwrite the logits.
    at_label = tl.load(x_row + label).to(tl.float32)
    each = smoothing / vocabulary
    loss = (1 - smoothing) * (log_total - (at_label - largest))
    if smoothing > 0:  # otherwise logits of -inf count for nothing
        loss += each * (vocabulary * (log_total + largest) - plain_sum)
    tl.store(losses + row, loss / count)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        x = tl.load(x_row + at, mask=at < vocabulary, other=0.0).to(tl.float32)
        g = tl.exp(x - largest - log_total) - each - tl.where(at == label, 1 - smoothing, 0.0)
        tl.store(g_row + at, g / count, mask=at < vocabulary)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    divisor: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one tile.

    Args:
        logits: (tokens, vocabulary), any float dtype, last dimension contiguous.
        labels: (tokens,) integers, each in [0, vocabulary) or `ignore_index`.
        divisor: float32 scalar that the sum of losses is divided by.
        in_place: write the gradient over the logits.

    Returns:
        The loss (float32 scalar) and d loss / d logits, of the logits' shape and dtype.
    """
    tokens, vocabulary = logits.shape
    gradient = logits if in_place else torch.empty_like(logits)
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        block = min(8192, triton.next_power_of_2(vocabulary))
        _cross_entropy_kernel[(tokens,)](
            logits,
            gradient,
            labels,
            losses,
            divisor,
            logits.stride(0),
            gradient.stride(0),
            vocabulary,
            ignore_index,
            label_smoothing,
            BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
        )
    return losses.sum(), gradient
