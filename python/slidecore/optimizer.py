"""AdamW whose update runs on the CPU while backward goes on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from slidecore import _core
from slidecore.engine import Engine, engines
from slidecore.errors import UsageError
from slidecore.partition import Entry


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) for the parameters of offloaded models.

    Defaults and arithmetic are those of `torch.optim.AdamW`; master weights and moments are float32 in host memory.
    `backward()` starts each chunk's update as soon as its gradient has come down, with the groups' settings at that
    moment; `step()` checks for errors of the update and closes the step. `p.grad` stays None.

    Args:
        params: parameters, or groups with options of their own, of one offloaded model; frozen ones are ignored.
        lr: learning rate.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by `lr`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an option is out of its range.
        UsageError: a parameter does not belong to an offloaded model, or parameters of several models are mixed.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        self._engine: Engine | None = None
        self._entries: dict[int, Entry] = {}
        super().__init__(params, defaults)
        engine = self._offloaded()
        previous = engine.optimizer() if engine.optimizer is not None else None
        if previous is not None:
            raise UsageError(
                "this offloaded model already has a slidecore.AdamW; give it several groups instead of several "
                "optimizers (or delete the first)"
            )
        engine.forget_moments()
        engine.optimizer = weakref.ref(self)

    def _offloaded(self) -> Engine:
        assert self._engine is not None  # torch.optim refuses an empty list of parameters
        return self._engine

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time: its parameters begin with their first step.

        Raises:
            ValueError: an option is out of its range.
            UsageError: a parameter does not belong to the offloaded model.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (UsageError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if not float(group["lr"]) >= 0:
            raise ValueError(f"lr={group['lr']} must be at least 0")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas={group['betas']} must each be in [0, 1)")
        if not group["eps"] >= 0:
            raise ValueError(f"eps={group['eps']} must be at least 0")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay={group['weight_decay']} must be at least 0")
        for parameter in group["params"]:
            engine = next((e for e in engines if not e.closed and id(parameter) in e.entries), None)
            if engine is None:
                raise UsageError(
                    f"a parameter of shape {tuple(parameter.shape)} does not belong to an offloaded model; call "
                    f"slidecore.offload(model) first, and use torch.optim for parameters that are not offloaded"
                )
            if self._engine is None:
                self._engine = engine
            if engine is not self._engine:
                raise UsageError("the parameters belong to several offloaded models; use one slidecore.AdamW for each")
            if not engine.train:
                raise UsageError("this model was offloaded with train=False and has no optimizer state")
            self._entries[id(parameter)] = engine.entries[id(parameter)][1]

    def hyper_parameters(self) -> dict[Entry, _core.AdamWHyper]:
        """The settings of each trainable entry, as the groups say now."""
        hyper: dict[Entry, _core.AdamWHyper] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                entry = self._entries[id(parameter)]
                if entry.trainable:
                    hyper[entry] = _core.AdamWHyper(
                        lr=float(group["lr"]),
                        beta1=float(beta1),
                        beta2=float(beta2),
                        eps=float(group["eps"]),
                        weight_decay=float(group["weight_decay"]),
                        maximize=bool(group["maximize"]),
                    )
        return hyper

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Closes the step that backward has carried out.

        Args:
            closure: called first, with gradients enabled, as in torch.optim.

        Raises:
            Error: a lane failed since the last call (typed as in `slidecore._core`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._offloaded().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The groups' settings. The moments stay in their planes and are not in it, which a warning says."""
        warnings.warn(
            "the state of slidecore.AdamW holds the groups' settings only: moments and step counts are not saved, and "
            "a run that is resumed from it starts them anew",
            stacklevel=2,
        )
        return super().state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing for offloaded parameters: their gradients are consumed by backward."""
