"""Offloaded and plain training side by side: the same script runs on both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import slidecore
import torch
from _models import Batch, clone, loss_of
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
# A large eps damps what Adam makes of rounding in gradients near zero: all parameters can be compared.
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}


@dataclass(eq=False)
class Side:
    model: nn.Module
    optimizer: Any

    @property
    def offloaded(self) -> bool:
        return isinstance(self.optimizer, slidecore.AdamW)

    def no_sync(self) -> Any:
        return self.model.no_sync() if self.offloaded else contextlib.nullcontext()

    def backward(self, batch: Batch, scale: float = 1.0) -> float:
        loss = loss_of(self.model, batch) * scale
        loss.backward()
        return loss.item()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def sides(offload: Offload, plain: nn.Module, *, update: str = "deferred", **options: Any) -> tuple[Side, Side]:
    """`plain` with torch.optim.AdamW, and an offloaded copy; options with a capital letter are the optimizer's."""
    mine = {name.lower(): options.pop(name) for name in list(options) if name[0].isupper()}
    model = offload(clone(plain), **options)
    return (
        Side(model, slidecore.AdamW(model.parameters(), **SETTINGS, update=update, **mine)),  # type: ignore[arg-type]
        Side(plain, torch.optim.AdamW(plain.parameters(), **SETTINGS)),
    )


def narrow(batch: Batch) -> Batch:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}


def assert_alike(mine: Side, theirs: Side, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Weights, and step counts, are the same."""
    slidecore.synchronize(mine.model)
    for (name, a), (_, b) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=atol), (name, (a - b).abs().max())
    counts = {name: 0 for name, _ in theirs.model.named_parameters()}
    for name, parameter in theirs.model.named_parameters():
        if parameter in theirs.optimizer.state:
            counts[name] = int(theirs.optimizer.state[parameter]["step"])
    assert {entry.name: entry.step for _, entry in engine_of(mine.model).entries.values()} == counts


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all planes of the training state, and of the step counts."""
    slidecore.synchronize(model)
    engine = engine_of(model)
    found = {}
    for chunk in engine.chunks:
        with engine.planes.borrowed(chunk) as parts:
            found |= {f"{chunk.name}/{kind}": part.clone() for kind, part in parts.items()}
    steps = [entry.step for _, entry in engine.entries.values()]
    return {**found, "steps": torch.tensor(steps)}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])

    return a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)
