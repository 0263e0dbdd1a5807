"""Linear layer and cross-entropy without the logits of a batch: hidden states and the head's weight to the loss,
per-token log-probabilities and both gradients.

logits = hidden @ weight.T, in tiles of tokens; the loss and its gradient in the logits are `cross_entropy`'s. With G
the gradient of a tile's logits, which takes their place, d hidden = G @ weight and d weight += G.T @ hidden. Gradients
are made in the forward pass (as in Liger-Kernel, arXiv 2410.10989): each tile's logits exist once, three matrix
products in all, by PyTorch's library (cuBLAS, hipBLASLt).

With the vocabulary in pieces, too, a first pass over the pieces makes each token's logsumexp and a second one the
gradients: four products, but no gradient of the whole weight need exist, and the weight itself may arrive piece by
piece, twice (`linear_cross_entropy_of_pieces`). A piece's gradient is then one product over all tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import triton

from slidecore.triton.cross_entropy import (
    LossOptions,
    add_statistics,
    finish,
    gradient_of_piece,
    new_statistics,
)
from slidecore.triton.scale import scale_

Prefer = Literal["memory", "speed"]


class LinearCrossEntropy(NamedTuple):
    """`loss`: float32 scalar. `log_probabilities`: float32 (tokens,), of the labels, 0 where ignored; no gradient."""

    loss: torch.Tensor
    log_probabilities: torch.Tensor


def choose_tile(
    tokens: int, hidden: int, vocabulary: int, accumulate: torch.dtype | None, prefer: Prefer = "memory"
) -> int:
    """Tokens of a tile.

    Every tile reads and writes the whole sum of the weight's gradient, in float32 twice the bytes, so small tiles cost
    time and large ones their logits' memory. "memory" gives logits about as many bytes as the hidden states have, but
    no tile so small that products wait for that sum, and none larger than what still gains time. "speed" takes few
    tiles, an eighth of the tokens (a quarter with float32 sums) each; of 4096 tokens and fewer, float32 sums make one
    tile and so no sum.
    """
    wide = accumulate == torch.float32
    if prefer == "speed":
        tile = max(4096, tokens // 4) if wide else max(2048, tokens // 8)
    else:
        pieces = -(-vocabulary // hidden)
        share = triton.next_power_of_2(max(1, -(-tokens // pieces)))
        tile = max(1024, share * 5 // 4) if wide else min(1536, max(192, share))
    return max(1, min(tokens, tile // 64 * 64))


def _logits_buffer(tile: int, vocabulary: int, like: torch.Tensor) -> torch.Tensor:
    """Rows that begin at multiples of 128 bytes or more, for the matrix product and the kernel's loads."""
    return torch.empty(tile, -(-vocabulary // 64) * 64, dtype=like.dtype, device=like.device)


def _adds_in_float32(out: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether the library adds a product of narrow factors to a float32 sum by itself."""
    return (
        out.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(out.device)[0] >= 8
        and out.dtype == torch.float32
        and factor.dtype in (torch.bfloat16, torch.float16)
        and "dtype_out" in torch.ops.aten.addmm.overloads()
    )


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, fresh: bool) -> None:
    """Out += left @ right, or out = left @ right if `fresh`; what was in `out` then is not read.

    Where the library cannot add to a float32 sum (AMD, CPU), slices of rows are multiplied in float32 on the CPU and in
    the factors' dtype on a card, which rounds each tile's product once more.
    """
    if out.dtype == left.dtype:
        if fresh:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(out, left, right, out=out)
    elif _adds_in_float32(out, left):
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=0 if fresh else 1, out=out)  # type: ignore[call-overload]
    else:
        for rows in range(0, len(left), 8192):
            part, at = left[rows : rows + 8192], slice(rows, rows + 8192)
            product = part @ right if out.is_cuda else part.float() @ right.float()
            if fresh:
                out[at] = product
            else:
                out[at] += product


def linear_cross_entropy_into(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    divisor: torch.Tensor,
    options: LossOptions,
    *,
    tile: int,
    hidden_gradient: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
    fresh: bool = True,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens' losses and log-probabilities; gradients go where the caller says. Outside autograd.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width), of the hidden states' dtype.
        labels: (tokens,) int64.
        divisor: float32 scalar on the device.
        tile: tokens whose logits exist at once.
        hidden_gradient: (tokens, width) of the hidden states' dtype, written; None if it is not wanted.
        weight_gradient: (vocabulary, width), contiguous, float32 or of the weight's dtype; None if it is not wanted.
        fresh: write the weight's gradient instead of adding to it.
        weights: float32 (tokens,) that the tokens' losses are multiplied by.
    """
    tokens, vocabulary = len(hidden), len(weight)
    labels, weights = labels.contiguous(), None if weights is None else weights.contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    log_probabilities = torch.empty_like(losses)
    wants_gradient = hidden_gradient is not None or weight_gradient is not None
    buffer = _logits_buffer(min(tile, tokens), vocabulary, hidden)
    for start in range(0, tokens, tile):
        at = slice(start, start + tile)
        part = hidden[at]
        logits = buffer[: len(part), :vocabulary]
        torch.mm(part, weight.t(), out=logits)
        losses[at], log_probabilities[at] = torch.ops.slidecore.cross_entropy_(
            logits, labels[at], None if weights is None else weights[at], divisor, options.ignore_index,
            options.label_smoothing, options.z_loss, options.inner, options.outer, wants_gradient,
        )  # fmt: skip
        if hidden_gradient is not None:
            torch.mm(logits, weight, out=hidden_gradient[at])
        if weight_gradient is not None:
            add_product(weight_gradient, logits.t(), part, fresh=fresh)
            fresh = False
    if weight_gradient is not None and fresh:
        weight_gradient.zero_()  # no tokens
    return losses, log_probabilities


def linear_cross_entropy_of_pieces(
    hidden: torch.Tensor,
    pieces: Callable[[], Iterable[torch.Tensor]],
    labels: torch.Tensor,
    divisor: torch.Tensor,
    options: LossOptions,
    *,
    vocabulary: int,
    tile: int,
    hidden_gradient: torch.Tensor | None = None,
    take: Callable[[int], torch.Tensor] | None = None,
    took: Callable[[int], None] | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_cross_entropy_into`, with the weight in pieces that need not exist at the same time.

    Args:
        pieces: called once, and a second time if a gradient is wanted; yields consecutive rows of the weight. A piece
            is not used any more when the next one is asked for.
        vocabulary: rows of all pieces.
        hidden_gradient: (tokens, width), float32 unless there is only one piece: it is summed over pieces.
        take: where the gradient of the piece that begins at this row goes: a contiguous tensor of the piece's shape,
            float32 or its dtype, that is written. None if the weight's gradient is not wanted.
        took: called when the gradient of the piece that begins at this row is complete (in the stream's order).

    Raises:
        ValueError: the pieces do not have `vocabulary` rows.
    """
    tokens = len(hidden)
    labels, weights = labels.contiguous(), None if weights is None else weights.contiguous()
    statistics = new_statistics(tokens, hidden.device)

    def tiles(piece: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, tokens, tile):
            at = slice(start, start + tile)
            logits = buffer.view(-1)[: min(tile, tokens) * _padded(len(piece))].view(-1, _padded(len(piece)))
            logits = logits[: len(hidden[at]), : len(piece)]
            torch.mm(hidden[at], piece.t(), out=logits)
            yield at, logits

    buffer = hidden.new_empty(0)
    first = 0
    for piece in pieces():
        if buffer.numel() < min(tile, tokens) * _padded(len(piece)):
            buffer = _logits_buffer(min(tile, tokens), len(piece), hidden)
        for at, logits in tiles(piece):
            add_statistics(statistics[:, at], logits, labels[at], first, options)
        first += len(piece)
    if first != vocabulary:
        raise ValueError(f"the pieces have {first} rows, not {vocabulary}")
    result = finish(statistics, labels, weights, divisor, vocabulary, options)
    if hidden_gradient is None and take is None:
        return result
    first = 0
    for piece in pieces():
        gradient = take(first) if take is not None else None
        for at, logits in tiles(piece):
            own = None if weights is None else weights[at]
            gradient_of_piece(statistics[:, at], logits, labels[at], own, divisor, first, vocabulary, options)
            if hidden_gradient is not None:
                add_product(hidden_gradient[at], logits, piece, fresh=first == 0)
            if gradient is not None:
                add_product(gradient, logits.t(), hidden[at], fresh=at.start == 0)
        if gradient is not None and not tokens:
            gradient.zero_()
        if took is not None:
            took(first)
        first += len(piece)
    return result


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _narrowed(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor in half its own memory: a view of its first half, with no second buffer of its size."""
    flat, n = wide.view(-1), wide.numel()
    narrow = flat.view(dtype)[:n]
    begin = 0
    while begin < n:
        # What is written, bytes [2 begin, 2 end), lies before what is still to be read as long as end <= 2 begin.
        end = min(n, 2 * begin) if begin else min(n, 1 << 20)
        narrow[begin:end] = flat[begin:end] if begin else flat[:end].to(dtype)
        begin = end
    return narrow.view(wide.shape)


@torch.library.custom_op("slidecore::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    divisor: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float | None,
    accumulate: torch.dtype,
    tile: int,
    piece: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = LossOptions(ignore_index, label_smoothing, z_loss, inner, outer)
    if piece < len(weight):
        whole = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants_weight else weight.new_empty(0)
        # Of more than one tile of tokens the sum is over tiles, too.
        single = tile >= len(hidden) or accumulate == weight.dtype
        rows = 0 if single or not wants_weight else piece
        wide = weight.new_empty(rows, weight.shape[1], dtype=accumulate)

        def take(first: int) -> torch.Tensor:
            rows = min(piece, len(weight) - first)
            return whole[first : first + rows] if single else wide[:rows]

        def took(first: int) -> None:
            if not single:
                rows = min(piece, len(weight) - first)
                whole[first : first + rows] = wide[:rows]

        hidden_gradient = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants_hidden else None
        losses, log_probabilities = linear_cross_entropy_of_pieces(
            hidden, lambda: weight.split(piece), labels, divisor, options, vocabulary=len(weight), tile=tile,
            hidden_gradient=hidden_gradient, take=take if wants_weight else None, took=took if wants_weight else None,
            weights=weights,
        )  # fmt: skip
        narrow = hidden.new_empty(0) if hidden_gradient is None else hidden_gradient.to(hidden.dtype)
        return losses.sum(), log_probabilities, narrow, whole
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
    dtype = weight.dtype if tile >= len(hidden) else accumulate
    weight_gradient = weight.new_empty(weight.shape, dtype=dtype) if wants_weight else None
    losses, log_probabilities = linear_cross_entropy_into(
        hidden, weight, labels, divisor, options, tile=tile, hidden_gradient=hidden_gradient,
        weight_gradient=weight_gradient, weights=weights,
    )  # fmt: skip
    if weight_gradient is not None and weight_gradient.dtype != weight.dtype:
        weight_gradient = _narrowed(weight_gradient, weight.dtype)
    return (
        losses.sum(),
        log_probabilities,
        hidden.new_empty(0) if hidden_gradient is None else hidden_gradient,
        weight.new_empty(0) if weight_gradient is None else weight_gradient,
    )


@_linear_cross_entropy.register_fake
def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wants_hidden, wants_weight = rest[-2:]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(len(hidden), dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape if wants_weight else 0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.count = len(inputs)


def _backward(ctx: Any, gradient: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    result: list[torch.Tensor | None] = [None] * ctx.count
    if gradient is not None:
        for i, own in enumerate(ctx.saved_tensors):
            if own.numel():
                # In place: a second backward through the same graph is refused, for what it needs was modified.
                result[i] = scale_(own, gradient)
    return tuple(result)


_linear_cross_entropy.register_autograd(_backward, setup_context=_keep)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
    accumulate: torch.dtype | None = torch.float32,
    prefer: Prefer = "memory",
    tile: int | None = None,
    piece: int | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of `hidden @ weight.T` against `labels`; differentiable once in `hidden` and `weight`.

    Args:
        hidden: (..., width), bfloat16, float16 or float32.
        weight: (vocabulary, width) of the same dtype.
        labels: integers of the leading shape, in [0, vocabulary) or `ignore_index`. Any other makes the loss NaN.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        softcap: logits are softcap * tanh(scale * logits / softcap).
        scale: what logits are multiplied by before anything else.
        z_loss: weight of logsumexp squared, added to each token's loss.
        num_items: what the sum is divided by; None for the number of tokens that count.
        weights: float32 of the labels' shape that each token's loss is multiplied by; not differentiated.
        accumulate: dtype that the weight's gradient is summed in over tiles of tokens. float32 takes 4 bytes per weight
            until backward is over; None sums in the weight's own dtype, which rounds at each tile.
        prefer: what `choose_tile` makes the tile for: little "memory", at a time near that of larger tiles, or "speed",
            at a small part of the memory that whole logits take.
        tile: tokens whose logits exist at once; None for the choice by size and `prefer`.
        piece: rows of the vocabulary at once; None for all. Fewer cost a fourth matrix product and save memory: the
            logits of a tile, and the float32 sum of the weight's gradient, are then of a piece.

    Raises:
        ValueError: shapes or dtypes do not fit, or an option is out of its range.
    """
    options = LossOptions.of(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, scale=scale
    )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: they must "
            f"be (..., width), (vocabulary, width) and (...)"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: one floating-point dtype is needed")
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(device=hidden.device, dtype=torch.int64)
    if prefer not in ("memory", "speed"):
        raise ValueError(f'prefer={prefer!r} must be "memory" or "speed"')
    if num_items is None:
        divisor = (ids != ignore_index).sum().to(torch.float32)
    else:
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
    if weights is not None:
        weights = weights.detach().reshape(-1).to(torch.float32).contiguous()
        if weights.numel() != ids.numel():
            raise ValueError(f"{weights.numel()} weights for {ids.numel()} tokens")
    accumulate = accumulate or weight.dtype
    if accumulate not in (torch.float32, weight.dtype):
        raise ValueError(f"accumulate={accumulate} must be torch.float32, or None for the weight's {weight.dtype}")
    if tile is None:
        sums = accumulate if weight.dtype != accumulate else None
        tile = choose_tile(len(flat), flat.shape[1], len(weight), sums, prefer)
    grad = torch.is_grad_enabled()
    loss, log_probabilities, _, _ = torch.ops.slidecore.linear_cross_entropy(
        flat.contiguous(), weight.contiguous(), ids.contiguous(), divisor, weights, options.ignore_index,
        options.label_smoothing, options.z_loss, options.inner, options.outer, accumulate, max(1, tile),
        len(weight) if piece is None else max(1, piece), grad and hidden.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return LinearCrossEntropy(loss, log_probabilities)
