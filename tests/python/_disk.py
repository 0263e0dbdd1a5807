"""What tests of planes on disk share: the smallest budget that works, and all planes, wherever they lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from slidecore.offloading import engine_of
from torch import nn

# Small pieces, so that chunks pass through the stages in many of them.
SMALL = {"piece_bytes": 4096, "ring_pieces": 4}


def smallest(build: Callable[[], nn.Module], disk: Path, **options: Any) -> int:
    """The smallest host_memory that works, as the error says it."""
    with pytest.raises(slidecore.BudgetError, match=r"at least \d+ bytes") as error:
        slidecore.offload(build(), device="cpu", host_memory=1, disk=disk, **SMALL, **options)
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found is not None
    return int(found[1])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every plane, wherever it lies."""
    engine = engine_of(model)
    engine.drain()
    copies = {}
    for chunk in engine.chunks:
        with engine.planes.borrowed(chunk) as parts:
            copies |= {f"{chunk.name}, {name}": part.clone() for name, part in parts.items()}
    return copies


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8)), name
