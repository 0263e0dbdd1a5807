"""What it takes to run a module again as it ran before, or beside its forward without leaving a trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(eq=False)
class RandomState:
    """States of PyTorch's, Python's and NumPy's generators, and autocast settings: what it takes to repeat a run."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    others: tuple[Any, Any] | None  # Python's and NumPy's
    autocast: tuple[bool, torch.dtype, bool]

    @staticmethod
    def capture(device: torch.device, *, others: bool = True) -> RandomState:
        """The states now; Python's and NumPy's only if `others`, and otherwise they are not set either."""
        kind = device.type
        return RandomState(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if kind == "cuda" else None,
            _other_states() if others else None,
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()),
        )

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        before = RandomState.capture(device, others=self.others is not None)
        enabled, dtype, cache = self.autocast
        self.set(device)
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache):
                yield
        finally:
            before.set(device)

    def is_same(self, other: RandomState) -> bool:
        """Whether no random number was drawn between the two."""
        devices = (self.device, other.device)
        same = devices[0] is devices[1] or (
            devices[0] is not None and devices[1] is not None and torch.equal(devices[0], devices[1])
        )
        others = self.others is None or other.others is None or _are_same(self.others, other.others)
        return same and others and torch.equal(self.cpu, other.cpu)

    def set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.others is not None:
            random.setstate(self.others[0])
            np.random.set_state(self.others[1])
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


def _other_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _are_same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    (python, (kind, keys, *rest)), (other_python, (other_kind, other_keys, *other_rest)) = a, b
    same_numpy = kind == other_kind and np.array_equal(keys, other_keys) and rest == other_rest
    return python == other_python and same_numpy


class OtherDraws:
    """Whether forwards draw from Python's or NumPy's generator.

    Copying their states takes as long as launching a small layer, and setting them would disturb other threads that
    draw. So visits capture them only if forwards are known to draw, or if nothing is known: in the first forward of
    each mode (training or not), and outside of any forward.
    """

    def __init__(self) -> None:
        self._draws: dict[bool, bool] = {}  # by mode
        self._mode = False
        self._before: tuple[Any, Any] | None = None  # at the begin of the forward that is under way

    def expected(self) -> bool:
        """Whether a visit captures them."""
        return self._before is None or self._draws.get(self._mode, True)

    def begin_forward(self, training: bool) -> None:
        """Before a forward with a graph."""
        self._mode, self._before = training, _other_states()

    def forget_forward(self) -> None:
        """It has failed."""
        self._before = None

    def end_forward(self) -> bool:
        """After it; whether it has drawn numbers that nobody expected."""
        before, self._before = self._before, None
        known = self._draws.get(self._mode)
        if before is None or known:
            return False
        self._draws[self._mode] = drawn = not _are_same(before, _other_states())
        return known is not None and drawn


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


@dataclass(eq=False)
class _Buffer:
    owner: nn.Module
    name: str
    tensor: torch.Tensor
    version: int
    value: torch.Tensor

    def has_changed(self) -> bool:
        return self.owner._buffers.get(self.name) is not self.tensor or version_of(self.tensor) != self.version


class Buffers:
    """The buffers of a module and of those below it, as they are at one time."""

    def __init__(self, buffers: Sequence[_Buffer] = ()) -> None:
        self._buffers = list(buffers)

    @staticmethod
    def capture(module: nn.Module) -> Buffers:
        return Buffers(
            [
                _Buffer(owner, name, tensor, version_of(tensor), tensor.clone())
                for owner in module.modules()
                for name, tensor in owner._buffers.items()
                if tensor is not None
            ]
        )

    def __len__(self) -> int:
        return len(self._buffers)

    def changed(self) -> Buffers:
        """Those that were written to, or replaced, since; as they were."""
        return Buffers([b for b in self._buffers if b.has_changed()])

    def put_back(self) -> None:
        """Makes them what they were."""
        for buffer in self._buffers:
            buffer.owner._buffers[buffer.name] = buffer.tensor
            buffer.tensor.data.copy_(buffer.value)  # not a modification that graphs should complain about


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was modified in place; 0 for those made under inference_mode, which are not counted."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


@contextlib.contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Undoes what runs beside the training step's own forward do to buffers (the running statistics of BatchNorm)."""
    before = Buffers.capture(module)
    try:
        yield
    finally:
        before.put_back()
