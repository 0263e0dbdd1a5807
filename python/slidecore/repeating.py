"""What it takes to run a module again as it ran before, or beside its forward without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(eq=False)
class RandomState:
    """Generator states and autocast settings, so that recomputation repeats the forward exactly."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    autocast: tuple[bool, torch.dtype, bool]

    @staticmethod
    def capture(device: torch.device) -> RandomState:
        kind = device.type
        return RandomState(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if kind == "cuda" else None,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()),
        )

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        before = RandomState.capture(device)
        enabled, dtype, cache = self.autocast
        self.set(device)
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache):
                yield
        finally:
            before.set(device)

    def set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@contextlib.contextmanager
def in_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> Iterator[None]:
    """Puts `modules` in the given training modes, and back afterwards."""
    before = [m.training for m in modules]
    for m, mode in zip(modules, modes, strict=True):
        m.training = mode
    try:
        yield
    finally:
        for m, mode in zip(modules, before, strict=True):
            m.training = mode


@contextlib.contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Undoes what runs beside the training step's own forward do to buffers (the running statistics of BatchNorm)."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # not a modification that graphs should complain about
