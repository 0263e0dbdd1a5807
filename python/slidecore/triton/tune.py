"""Finds the fastest launch of each streaming kernel on this card and stores it (see `tuning`):

    python -m slidecore.triton.tune [--parameters N]

Nothing else in slidecore measures kernels, so no training step is spent on it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from slidecore import _core
from slidecore.triton import accumulate as _accumulate
from slidecore.triton import adamw as _adamw
from slidecore.triton import merge as _merge
from slidecore.triton import split as _split
from slidecore.triton import square_sum as _square_sum
from slidecore.triton import tuning
from slidecore.triton.adamw import Segment


@dataclass(frozen=True)
class Case:
    """One operation on data of a chunk's size. `run` may be called again and again; it works in place."""

    name: str
    operation: str  # as in tuning.lookup
    bytes: int  # that must move
    counted: str
    candidates: Sequence[tuning.Config]
    default: tuning.Config
    run: Callable[[tuning.Config | None], None]


def block_shapes(parameters: int) -> list[tuple[int, ...]]:
    """Tensors of a Transformer block of about this many parameters: Llama's proportions, its two norms included."""
    width = max(8, int((parameters / 12.75) ** 0.5) // 8 * 8)
    inner, kv = width * 7 // 2, width // 4
    return [
        (width, width), (kv, width), (kv, width), (width, width), (inner, width), (inner, width), (width, inner),
        (width,), (width,),
    ]  # fmt: skip


def layout(shapes: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, int]], int]:
    """(offset, length) of each tensor in a chunk, and the chunk's length: entries begin at multiples of 128."""
    segments, end = [], 0
    for shape in shapes:
        length = torch.Size(shape).numel()
        segments.append((end, length))
        end += -(-length // 128) * 128
    return segments, end


def cases(parameters: int, device: torch.device) -> Iterator[Case]:
    """The streaming kernels, one after the other; the data of each goes when the next one is asked for."""
    shapes = block_shapes(parameters)
    segments, n = layout(shapes)
    used = sum(length for _, length in segments)
    hyper = _core.AdamWHyper(lr=1e-5, weight_decay=0.1, step=10)
    whole = [Segment(offset, length, hyper) for offset, length in segments]

    def random(dtype: torch.dtype, scale: float = 1e-3) -> torch.Tensor:
        return (scale * torch.randn(n, device=device)).to(dtype)

    master = random(torch.float32, 0.02)
    weight = torch.empty(n, dtype=torch.bfloat16, device=device)
    residual = torch.empty(n, dtype=torch.int16, device=device)
    yield Case(
        "split", "split", 8 * n, "reads master 4; writes weight 2, residual 2", _split.CANDIDATES, _split.DEFAULT,
        lambda c: _split.split(master, weight, residual, config=c),
    )  # fmt: skip
    _split.split(master, weight, residual)
    yield Case(
        "merge", "merge", 8 * n, "reads weight 2, residual 2; writes master 4", _merge.CANDIDATES, _merge.DEFAULT,
        lambda c: _merge.merge(weight, residual, master, config=c),
    )  # fmt: skip
    gradient = random(torch.bfloat16)
    moments = {"exp_avg": random(torch.float32), "exp_avg_sq": random(torch.float32).square_()}
    yield Case(
        "adamw", "adamw", 26 * used,
        "reads gradient 2, weight 2, residual 2, moments 8; writes weight 2, residual 2, moments 8",
        _adamw.CANDIDATES, _adamw.DEFAULT,
        lambda c: _adamw.adamw(whole, weight=weight, residual=residual, gradient=gradient, config=c, **moments),
    )  # fmt: skip
    moments.clear()
    codes = {
        "exp_avg": torch.zeros(n, dtype=torch.int8, device=device),
        "exp_avg_sq": torch.zeros(n, dtype=torch.uint8, device=device),
        "exp_avg_scale": torch.zeros(n // 128, device=device),
        "exp_avg_sq_scale": torch.zeros(n // 128, device=device),
    }
    yield Case(
        "adamw, 8-bit moments", "adamw 8-bit", 14 * used + 16 * sum(-(-length // 128) for _, length in segments),
        "reads gradient 2, weight 2, residual 2, codes 2; writes weight 2, residual 2, codes 2; scales 16 for 128",
        _adamw.CANDIDATES_QUANTISED, _adamw.DEFAULT_QUANTISED,
        lambda c: _adamw.adamw(whole, weight=weight, residual=residual, gradient=gradient, config=c, **codes),
    )  # fmt: skip
    codes.clear()
    own = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
    offsets = [offset for offset, _ in segments]
    total, square = torch.zeros(n, device=device), torch.zeros(1, dtype=torch.float64, device=device)
    yield Case(
        "accumulate", "accumulate", 10 * used, "reads gradient 2, sum 4; writes sum 4",
        _accumulate.CANDIDATES, _accumulate.DEFAULT,
        lambda c: _accumulate.accumulate(total, own, offsets, config=c),
    )  # fmt: skip
    yield Case(
        "accumulate, last", "accumulate last", 8 * used, "reads gradient 2, sum 4; writes bf16 2; sums squares",
        _accumulate.CANDIDATES, _accumulate.DEFAULT,
        lambda c: _accumulate.accumulate(total, own, offsets, out=weight, square_sum=square, config=c),
    )  # fmt: skip
    yield Case(
        "square_sum", "square_sum", 2 * used, "reads gradient 2", _square_sum.CANDIDATES, _square_sum.DEFAULT,
        lambda c: _square_sum.square_sum(gradient, segments, square, config=c),
    )  # fmt: skip


def main() -> None:
    """Tunes every operation; prints what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=218_000_000, help="of a chunk (default: %(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no card")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    done = set()
    for case in cases(arguments.parameters, device):
        if case.operation not in done:
            done.add(case.operation)
            tuning.tune(case.operation, arguments.parameters, device, case.candidates, case.run)
    print(f"stored in {tuning.path()}")


if __name__ == "__main__":
    main()
