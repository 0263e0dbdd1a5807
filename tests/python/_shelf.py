"""Parts of planes that are kept as bytes in a dict: what a tier of disks does, without disks."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from _models import Stack
from slidecore import _core, plane
from slidecore.offloading import engine_of
from slidecore.partition import Chunk
from slidecore.planes import Planes
from torch import nn

Part = tuple[int, str]  # a chunk's index and a plane


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.reshape(-1).view(torch.uint8)


class Shelf:
    """Takes parts out of memory; counts what is fetched and stored, and how much memory that takes."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.bytes: dict[Part, torch.Tensor] = {}
        self.fetched: Counter[Part] = Counter()
        self.stored: Counter[Part] = Counter()
        self.most_memory = 0
        self._stale: list[torch.Tensor] = []
        self._temporary: list[weakref.ref[_core.HostBuffer]] = []
        planes.fetch, planes.store = self.fetch, self.store

    def take(self, chunk: Chunk, name: str) -> None:
        """Releases a part. Its old memory stays where it was, full of garbage, for whoever still reads there."""
        part = self.planes.plane(name).of(chunk)
        self.bytes[chunk.index, name] = raw(part).clone()
        self.planes.plane(name).release(chunk)
        raw(part).fill_(0xA5)
        self._stale.append(part)

    def fetch(self, chunk: Chunk, name: str, part: torch.Tensor) -> None:
        self._notice()
        assert part.data_ptr() % 4096 == 0
        self.fetched[chunk.index, name] += 1
        kept = self.bytes.get((chunk.index, name))
        if kept is None:
            raw(part).zero_()
        else:
            raw(part).copy_(kept)

    def store(self, chunk: Chunk, name: str, part: torch.Tensor) -> None:
        self._notice()
        self.stored[chunk.index, name] += 1
        self.bytes[chunk.index, name] = raw(part).clone()

    def _notice(self) -> None:
        self.most_memory = max(self.most_memory, self._memory())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Counts from here on; at the end no temporary memory is left."""
        self.fetched.clear()
        self.stored.clear()
        self.most_memory = 0
        self._temporary.clear()
        plane._core = SimpleNamespace(HostBuffer=self._allocate)  # type: ignore[assignment]
        gc.disable()  # nothing here may wait for it
        try:
            yield
        finally:
            gc.enable()
            plane._core = _core  # type: ignore[assignment]
        if self._memory():
            gc.collect()  # the traceback of an exception
        assert not self._memory()

    def _allocate(self, device: _core.Device, nbytes: int, pinned: bool) -> _core.HostBuffer:
        buffer = _core.HostBuffer(device, nbytes, pinned)
        if not pinned:  # a part that comes back into memory is
            self._temporary.append(weakref.ref(buffer))
        return buffer

    def _memory(self) -> int:
        return sum(len(buffer) for reference in self._temporary if (buffer := reference()) is not None)

    def once(self) -> Counter[Part]:
        """Counts of one for every part that is here."""
        return Counter(self.bytes.keys())


Choice = Callable[[Chunk, str], bool]
CHOICES: dict[str, Choice] = {
    "everything": lambda chunk, name: True,
    "weights": lambda chunk, name: name == "weight",
    "state": lambda chunk, name: name != "weight",
    "one chunk": lambda chunk, name: chunk.index == 2,
    "some": lambda chunk, name: random.Random(f"{chunk.index} {name}").random() < 0.5,
}


def shelve(model: nn.Module, choice: Choice) -> Shelf:
    """Takes the chosen parts of an offloaded model's planes out of memory."""
    engine = engine_of(model)
    engine.drain()
    shelf = Shelf(engine.planes)
    for chunk in engine.chunks:
        for name in engine.planes.names(chunk):
            if choice(chunk, name):
                shelf.take(chunk, name)
        engine.point_parameters(chunk)
    assert shelf.bytes
    return shelf


def partly_frozen(seed: int = 0) -> nn.Module:
    model = Stack(seed=seed)
    model.blocks[1].requires_grad_(False)
    model.blocks[3].up.weight.requires_grad_(False)
    return model


choices = pytest.mark.parametrize("choice", CHOICES)
settings = pytest.mark.parametrize(
    "options",
    [
        {"compute_dtype": torch.float32},
        {"compute_dtype": torch.bfloat16},
        {"compute_dtype": torch.bfloat16, "moments": "8bit"},
    ],
    ids=["float32", "bfloat16", "8bit"],
)


def chunk_bytes(chunks: Iterable[Chunk], planes: Planes) -> int:
    """What all parts of the largest chunk take."""
    return max(sum(form.nbytes for form in planes.forms(chunk).values()) for chunk in chunks)
