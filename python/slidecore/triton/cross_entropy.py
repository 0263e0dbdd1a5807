"""Cross-entropy of a tile of logits and its gradient.

With x the logits of a row after scaling and soft-capping, y its label, lse = log(sum(exp(x))), smoothing e, vocabulary
size V, z-loss weight z and the row's weight w:

    x    = outer * tanh(inner * logit), or inner * logit
    loss = w ((1 - e) (lse - x[y]) + e / V sum(lse - x) + z lse^2) / divisor
    grad = w ((1 + 2 z lse) exp(x - lse) - e / V - (1 - e) [i == y]) / divisor * dx / dlogit

lse by the online softmax (Milakov & Gimelshein, arXiv 1805.02867), in float32; z-loss as in PaLM (arXiv 2204.02311).
The divisor stays on the device, so that counting labels needs no synchronization. A label that is neither ignored nor
in the vocabulary makes its loss and gradients NaN.

`cross_entropy` takes whole rows. Where a row comes in pieces of the vocabulary, `add_statistics` sees each once,
`finish` makes the losses, and `gradient_of_piece` sees each again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from slidecore.triton._launch import launch, on_card, wrap_triton

_LOWEST = tl.constexpr(-3.0e38)  # finite: a block of logits that are all -inf must not give -inf - -inf
# Logits of one thread that lie side by side, 16 bytes in bf16. Their maximum is taken before anything crosses threads.
_LANE = tl.constexpr(8)


@dataclass(frozen=True)
class LossOptions:
    """What the loss is, besides logits and labels."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    inner: float = 1.0
    outer: float | None = None

    @staticmethod
    def of(
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> LossOptions:
        """`softcap`: logits are softcap * tanh(scale * logits / softcap).

        Raises:
            ValueError: an option is out of its range.
        """
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1]")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap} must be positive, or None")
        if not z_loss >= 0:
            raise ValueError(f"z_loss={z_loss} must be 0 or more")
        return LossOptions(ignore_index, label_smoothing, z_loss, scale / softcap if softcap else scale, softcap)


@triton.jit
def _tanh(u):  # type: ignore[no-untyped-def]
    e = tl.exp(-2.0 * tl.abs(u))
    t = (1.0 - e) / (1.0 + e)
    # 1 - e cancels near 0, where five terms of the series are exact to float32 (the sixth is below 1e-8 of the sum).
    w = u * u
    series = u * (1.0 + w * (-1.0 / 3.0 + w * (2.0 / 15.0 + w * (-17.0 / 315.0 + w * (62.0 / 2835.0)))))
    return tl.where(tl.abs(u) < 0.25, series, tl.where(u < 0, -t, t))


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    x_row, size, inner, outer, TANH: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """(maximum, sum of exp(x - maximum), sum of x) of a row. Each thread keeps its own until the end."""
    lanes: tl.constexpr = BLOCK // _LANE
    within = tl.arange(0, lanes)[:, None] * _LANE + tl.arange(0, _LANE)[None, :]
    largest = tl.full([lanes], _LOWEST, tl.float32)
    total = tl.zeros([lanes], tl.float32)
    plain = tl.zeros([lanes], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + within < size
        x = tl.load(x_row + start + within, mask=inside, other=0.0).to(tl.float32) * inner
        if TANH:
            x = outer * _tanh(x)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
        largest = new
        if SMOOTH:
            plain += tl.sum(tl.where(inside, x, 0.0), axis=1)
    highest = tl.max(largest, axis=0)
    return highest, tl.sum(total * tl.exp(largest - highest), axis=0), tl.sum(plain, axis=0)


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]
    x_row,
    g_row,
    size,
    label,
    largest,
    log_total,
    weight,
    smoothing,
    each,
    z_loss,
    inner,
    outer,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`label` counts from the row's start. x - largest first, so that large logits cancel exactly."""
    of_softmax = weight * (1 + 2 * z_loss * (largest + log_total))
    of_label = weight * (1 - smoothing)
    of_all = weight * each
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + at, mask=at < size, other=0.0).to(tl.float32) * inner
        if TANH:
            t = _tanh(x)
            x = outer * t
            slope = (outer * inner) * (1 - t * t)
        else:
            slope = inner
        g = of_softmax * tl.exp(x - largest - log_total) - of_all - tl.where(at == label, of_label, 0.0)
        tl.store(g_row + at, g * slope, mask=at < size)


@triton.jit
def _loss(  # type: ignore[no-untyped-def]
    largest, log_total, at_label, plain, vocabulary, smoothing, z_loss, SMOOTH: tl.constexpr
):
    loss = (1 - smoothing) * (log_total - (at_label - largest))
    lse = largest + log_total
    if SMOOTH:  # otherwise logits of -inf count for nothing
        loss += smoothing * (lse - plain / vocabulary)
    return loss + z_loss * lse * lse


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits,
    gradient,
    labels,
    weights,
    losses,
    log_probabilities,
    divisor,
    logits_stride,
    gradient_stride,
    vocabulary,
    ignore_index,
    smoothing,
    z_loss,
    inner,
    outer,
    TANH: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    x_row = logits + row * logits_stride
    g_row = gradient + row * gradient_stride
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(log_probabilities + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(g_row + at, tl.zeros([BLOCK], dtype=tl.float32), mask=at < vocabulary)
        return
    # The gradient may overwrite the logits: the label's is read before the reductions of the statistics, which all
    # warps wait for, so that none can be at the second pass yet.
    valid = (label >= 0) & (label < vocabulary)
    at_label = tl.load(x_row + label, mask=valid, other=float("nan")).to(tl.float32) * inner
    if TANH:
        at_label = outer * _tanh(at_label)
    largest, total, plain = _row_statistics(x_row, vocabulary, inner, outer, TANH, SMOOTH, BLOCK)
    log_total = tl.log(total)
    weight = 1.0 / tl.load(divisor)
    if WEIGHTED:
        weight *= tl.load(weights + row)
    loss = _loss(largest, log_total, at_label, plain, vocabulary, smoothing, z_loss, SMOOTH)
    tl.store(losses + row, loss * weight)
    tl.store(log_probabilities + row, (at_label - largest) - log_total)
    if GRADIENT:
        weight = tl.where(valid, weight, float("nan"))
        _write_gradient(
            x_row, g_row, vocabulary, label, largest, log_total, weight, smoothing, smoothing / vocabulary, z_loss,
            inner, outer, TANH, BLOCK,
        )  # fmt: skip


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    statistics,
    logits_stride,
    statistics_stride,
    first,
    size,
    inner,
    outer,
    TANH: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`statistics`: rows maximum, sum of exponentials, logit at the label, sum of logits; a column for each token."""
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * logits_stride
    label = tl.load(labels + row) - first
    largest, total, plain = _row_statistics(x_row, size, inner, outer, TANH, SMOOTH, BLOCK)
    mine = statistics + row
    before = tl.load(mine)
    new = tl.maximum(before, largest)
    summed = tl.load(mine + statistics_stride)
    tl.store(mine, new)
    tl.store(mine + statistics_stride, summed * tl.exp(before - new) + total * tl.exp(largest - new))
    if (label >= 0) & (label < size):
        at_label = tl.load(x_row + label).to(tl.float32) * inner
        if TANH:
            at_label = outer * _tanh(at_label)
        tl.store(mine + 2 * statistics_stride, at_label)
    if SMOOTH:
        tl.store(mine + 3 * statistics_stride, tl.load(mine + 3 * statistics_stride) + plain)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    weights,
    statistics,
    divisor,
    logits_stride,
    statistics_stride,
    first,
    size,
    vocabulary,
    ignore_index,
    smoothing,
    z_loss,
    inner,
    outer,
    TANH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    x_row = logits + row * logits_stride
    if label == ignore_index:
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(x_row + at, tl.zeros([BLOCK], dtype=tl.float32), mask=at < size)
        return
    largest = tl.load(statistics + row)
    log_total = tl.log(tl.load(statistics + statistics_stride + row))
    weight = 1.0 / tl.load(divisor)
    if WEIGHTED:
        weight *= tl.load(weights + row)
    weight = tl.where((label >= 0) & (label < vocabulary), weight, float("nan"))
    _write_gradient(
        x_row, x_row, size, label - first, largest, log_total, weight, smoothing, smoothing / vocabulary, z_loss,
        inner, outer, TANH, BLOCK,
    )  # fmt: skip


def _launch_size(size: int) -> dict[str, int]:
    block = max(_LANE.value, min(8192, triton.next_power_of_2(size)))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def _transformed(logits: torch.Tensor, inner: float, outer: float | None) -> torch.Tensor:
    x = logits.float() * inner
    return x if outer is None else outer * torch.tanh(x)


def _slope(logits: torch.Tensor, inner: float, outer: float | None) -> torch.Tensor | float:
    return inner if outer is None else outer * inner * (1 - torch.tanh(logits.float() * inner).square())


def _gradient_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    lse: torch.Tensor,
    divisor: torch.Tensor,
    first: int,
    vocabulary: int,
    options: LossOptions,
) -> torch.Tensor:
    smoothing, counts = options.label_smoothing, labels != options.ignore_index
    weight = 1 / divisor if weights is None else weights / divisor
    weight = torch.where((labels >= 0) & (labels < vocabulary), weight, torch.nan)
    p = (_transformed(logits, options.inner, options.outer) - lse[:, None]).exp()
    at_label = torch.arange(first, first + logits.shape[1], device=labels.device) == labels[:, None]
    g = (1 + 2 * options.z_loss * lse[:, None]) * p - smoothing / vocabulary - (1 - smoothing) * at_label
    g = g * weight[:, None] * _slope(logits, options.inner, options.outer)
    return torch.where(counts[:, None], g, 0.0).to(logits.dtype)


def _cross_entropy_into(
    logits: torch.Tensor,
    gradient: torch.Tensor | None,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-probabilities of whole rows; the gradient goes to `gradient`, which may be `logits`."""
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    log_probabilities = torch.empty_like(losses)
    if not on_card(logits):
        options = LossOptions(ignore_index, label_smoothing, z_loss, inner, outer)
        statistics = new_statistics(tokens, logits.device)
        add_statistics(statistics, logits, labels, 0, options)
        finished = finish(statistics, labels, weights, divisor, vocabulary, options)
        losses.copy_(finished[0])
        log_probabilities.copy_(finished[1])
        if gradient is not None:
            lse = statistics[0] + statistics[1].log()
            gradient.copy_(_gradient_reference(logits, labels, weights, lse, divisor, 0, vocabulary, options))
    elif tokens:
        target = logits if gradient is None else gradient
        launch(
            wrap_triton(_cross_entropy_kernel),
            tokens,
            logits,
            logits,
            target,
            labels,
            labels if weights is None else weights,
            losses,
            log_probabilities,
            divisor,
            logits.stride(0),
            target.stride(0),
            vocabulary,
            ignore_index,
            label_smoothing,
            z_loss,
            inner,
            1.0 if outer is None else outer,
            TANH=outer is not None,
            SMOOTH=label_smoothing > 0,
            WEIGHTED=weights is not None,
            GRADIENT=gradient is not None,
            **_launch_size(vocabulary),
        )
    return losses, log_probabilities


@torch.library.triton_op("slidecore::cross_entropy", mutates_args={})
def _cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient = torch.empty_like(logits)
    losses, log_probabilities = _cross_entropy_into(
        logits, gradient, labels, weights, divisor, ignore_index, label_smoothing, z_loss, inner, outer
    )
    return losses, log_probabilities, gradient


@torch.library.triton_op("slidecore::cross_entropy_", mutates_args={"logits"})
def _cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    inner: float,
    outer: float | None,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cross_entropy_into(
        logits, logits if wants_gradient else None, labels, weights, divisor, ignore_index, label_smoothing, z_loss,
        inner, outer,
    )  # fmt: skip


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
    options = (ignore_index, label_smoothing, 0.0, 1.0, None)
    labels = labels.contiguous()
    if in_place:
        losses, _ = torch.ops.slidecore.cross_entropy_(logits, labels, None, divisor, *options, True)
        return losses.sum(), logits
    losses, _, gradient = torch.ops.slidecore.cross_entropy(logits, labels, None, divisor, *options)
    return losses.sum(), gradient


def new_statistics(tokens: int, device: torch.device) -> torch.Tensor:
    """float32 (4, tokens): maximum, sum of exponentials, logit at the label, sum of logits; of no logits yet."""
    statistics = torch.zeros(4, tokens, dtype=torch.float32, device=device)
    statistics[0] = _LOWEST.value
    statistics[2] = torch.nan  # until the label's piece comes
    return statistics


def add_statistics(
    statistics: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, first: int, options: LossOptions
) -> None:
    """Adds a piece of the vocabulary.

    Args:
        statistics: columns of `new_statistics`, one for each row of logits; changed.
        logits: (tokens, piece), last dimension contiguous.
        labels: (tokens,) in the whole vocabulary.
        first: of the vocabulary, the piece's first.
    """
    tokens, size = logits.shape
    if not tokens or not size:
        return
    if on_card(logits):
        launch(
            _statistics_kernel,
            tokens,
            logits,
            logits,
            labels,
            statistics,
            logits.stride(0),
            statistics.stride(0),
            first,
            size,
            options.inner,
            1.0 if options.outer is None else options.outer,
            TANH=options.outer is not None,
            SMOOTH=options.label_smoothing > 0,
            **_launch_size(size),
        )
        return
    x = _transformed(logits, options.inner, options.outer)
    new = torch.maximum(statistics[0], x.amax(1))
    statistics[1] = statistics[1] * (statistics[0] - new).exp() + (x - new[:, None]).exp().sum(1)
    statistics[0] = new
    here = (labels >= first) & (labels < first + size)
    at_label = x.gather(1, (labels - first).clamp(0, size - 1)[:, None])[:, 0]
    statistics[2] = torch.where(here, at_label, statistics[2])
    statistics[3] += x.sum(1)


def finish(
    statistics: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    vocabulary: int,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens' losses, weighted and divided, and log-probabilities; 0 where the label is ignored."""
    largest, total, at_label, plain = statistics
    log_total, counts, smoothing = total.log(), labels != options.ignore_index, options.label_smoothing
    lse = largest + log_total
    log_probabilities = (at_label - largest) - log_total
    loss = (1 - smoothing) * -log_probabilities + options.z_loss * lse * lse
    if smoothing > 0:
        loss = loss + smoothing * (lse - plain / vocabulary)
    loss = loss / divisor if weights is None else loss * (weights / divisor)
    zero = torch.zeros((), device=loss.device)
    return torch.where(counts, loss, zero), torch.where(counts, log_probabilities, zero)


def gradient_of_piece(
    statistics: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    first: int,
    vocabulary: int,
    options: LossOptions,
) -> None:
    """Overwrites a piece's logits (as in `add_statistics`, all pieces of which have been added) by their gradient."""
    tokens, size = logits.shape
    if not tokens or not size:
        return
    if on_card(logits):
        launch(
            _gradient_kernel,
            tokens,
            logits,
            logits,
            labels,
            labels if weights is None else weights,
            statistics,
            divisor,
            logits.stride(0),
            statistics.stride(0),
            first,
            size,
            vocabulary,
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.inner,
            1.0 if options.outer is None else options.outer,
            TANH=options.outer is not None,
            WEIGHTED=weights is not None,
            **_launch_size(size),
        )
        return
    lse = statistics[0] + statistics[1].log()
    logits.copy_(_gradient_reference(logits, labels, weights, lse, divisor, first, vocabulary, options))
