"""Training runs that can be stopped and taken up again, compared bit by bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import slidecore
import torch
from _models import Batch, feature_batches, language_model, loss_of, token_batches
from slidecore.offloading import engine_of
from torch import nn

State = dict[str, Any]


class Run:
    """An offloaded model in training mode, with its optimizer and, on request, a scheduler."""

    def __init__(
        self,
        model: nn.Module,
        offload: Callable[..., nn.Module],
        *,
        groups: Callable[[nn.Module], Any] | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        accumulate: int = 1,
        **options: Any,
    ) -> None:
        self.model = offload(model.train(), **options)
        parameters = groups(model) if groups else list(model.parameters())
        self.optimizer = slidecore.AdamW(parameters, lr=1e-2, weight_decay=0.1, **(optimizer or {}))
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.accumulate = accumulate  # backward passes to a step, each over the same batch
        self.dtype = engine_of(model).compute_dtype

    def train(self, batches: Iterable[Batch]) -> list[float]:
        losses = []
        for batch in batches:
            with self.model.no_sync() if self.accumulate > 1 else contextlib.nullcontext():  # type: ignore[operator]
                for _ in range(self.accumulate - 1):
                    self.loss(batch).backward()
            loss = self.loss(batch)
            loss.backward()
            losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler:
                self.scheduler.step()
        return losses

    def loss(self, batch: Batch) -> torch.Tensor:
        return loss_of(self.model, {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in batch.items()})

    def save(self, directory: Path, **options: Any) -> Path:
        return slidecore.save_checkpoint(
            self.model, self.optimizer, directory, **{"scheduler": self.scheduler, **options}
        )

    def load(self, directory: Path, **options: Any) -> Any:
        return slidecore.load_checkpoint(
            self.model, self.optimizer, directory, **{"scheduler": self.scheduler, **options}
        )

    def state(self) -> State:
        """Everything that decides how the run goes on, copied."""
        slidecore.synchronize(self.model)
        engine = engine_of(self.model)
        state: State = {f"rates {i}": (g["lr"], g["weight_decay"]) for i, g in enumerate(self.optimizer.param_groups)}
        for chunk in engine.chunks:
            with engine.planes.borrowed(chunk) as parts:
                state |= {f"{chunk.name} {name}": part.clone() for name, part in parts.items()}
            state[f"{chunk.name} steps"] = [entry.step for entry in chunk.entries]
        state |= {f"buffer {name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        state["scheduler"] = self.scheduler.state_dict() if self.scheduler else None
        state["torch"], state["python"] = torch.get_rng_state(), random.getstate()
        state["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        return state

    def close(self) -> None:
        slidecore.close(self.model)


def differences(left: State, right: State) -> list[str]:
    """Names of what is not the same in every bit."""
    names = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if isinstance(a, torch.Tensor):
            same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
        else:
            same = a == b
        if not same:
            names.append(name)
    return names


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def batches_for(model: nn.Module, count: int) -> list[Batch]:
    return feature_batches(count) if hasattr(model, "enter") else token_batches(count)


__all__ = ["Run", "State", "batches_for", "differences", "language_model", "seed_all"]
