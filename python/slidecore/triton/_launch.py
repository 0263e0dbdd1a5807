"""What all kernels share: the choice between kernel and reference, launching, work tables, small uploads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton

# Entries of a chunk begin at multiples of this many elements (planes.ENTRY_ALIGNMENT); tables count in it.
UNIT = 128

INTERPRETED: bool = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False


def on_card(tensor: torch.Tensor) -> bool:
    """Whether the kernel runs for this tensor, rather than the reference."""
    return tensor.is_cuda or INTERPRETED


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, for interpreted kernels too (which nothing can trace)."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def current_card(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's card the current one, on which Triton launches whatever card its arguments are on."""
    if tensor.is_cuda and torch.cuda.is_initialized() and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def launch(kernel: Any, programs: int, like: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """Runs `programs` programs of a kernel, or of what `wrap_triton` made of it, on the card of `like`."""
    with current_card(like):
        kernel[(programs,)](*arguments, **options)


def upload(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A small array on `device`, in the order of the current stream and without waiting for it."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def work_table(segments: tuple[tuple[int, int], ...], block: int, device: torch.device) -> torch.Tensor:
    """Which elements each program of a launch handles, so that no kernel searches for its segment.

    Args:
        segments: (offset, length) in elements; offsets are multiples of 128.
        block: elements of one program at most, a multiple of 128.

    Returns:
        int32 (programs, 4): offset / 128, elements, index of the segment, offset within the segment / 128.

    Raises:
        ValueError: an offset is not a multiple of 128, or a length is not positive.
    """
    # A fake tensor, where tensors made now are fakes, must not be kept for a real call.
    traced = type(torch.empty(0)) is not torch.Tensor
    return _made(segments, block, device) if traced else _kept(segments, block, device)


@lru_cache(maxsize=256)
def _kept(segments: tuple[tuple[int, int], ...], block: int, device: torch.device) -> torch.Tensor:
    return _made(segments, block, device)


def _made(segments: tuple[tuple[int, int], ...], block: int, device: torch.device) -> torch.Tensor:
    rows = []
    for index, (offset, length) in enumerate(segments):
        if length < 1:
            raise ValueError(f"segment {index} has {length} elements: leave it out")
        if offset % UNIT or offset < 0:
            raise ValueError(f"segment {index} begins at {offset}: offsets are multiples of {UNIT}")
        within = np.arange(0, length, block, dtype=np.int64)
        row = np.empty((len(within), 4), dtype=np.int64)
        row[:, 0] = (offset + within) // UNIT
        row[:, 1] = np.minimum(block, length - within)
        row[:, 2] = index
        row[:, 3] = within // UNIT
        rows.append(row)
    table = np.concatenate(rows) if rows else np.empty((0, 4), dtype=np.int64)
    return torch.from_numpy(table.astype(np.int32)).to(device)


def check_plane(
    name: str, plane: torch.Tensor, dtypes: Sequence[torch.dtype], like: torch.Tensor | None = None
) -> None:
    """Raises ValueError unless `plane` is flat, contiguous, of one of `dtypes` and on the device of `like`."""
    if plane.dim() != 1 or not plane.is_contiguous():
        raise ValueError(f"{name} must be a flat contiguous tensor, not of shape {tuple(plane.shape)}")
    if plane.dtype not in dtypes:
        raise ValueError(f"{name} is {plane.dtype}, must be {' or '.join(map(str, dtypes))}")
    if like is not None and plane.device != like.device:
        raise ValueError(f"{name} is on {plane.device}, the others on {like.device}")
