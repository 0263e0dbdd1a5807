"""AdamW whose update runs on the CPU while the device computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from slidecore import _core
from slidecore.engine import Engine, engines
from slidecore.errors import UsageError
from slidecore.partition import Chunk, Entry
from slidecore.planes import Planes


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) for the parameters of offloaded models.

    Defaults and arithmetic are those of `torch.optim.AdamW`; master weights and moments are float32 in host memory
    (moments in 8 bits where `slidecore.offload(..., moments="8bit")` says so).

    When the update happens:

    - "overlap": `backward()` starts each chunk's update as soon as its gradient has come down, with the groups' options
      at that moment; `step()` checks for errors and closes the step. One backward to a step; no clipping.
    - "deferred": gradients collect in host memory (2 bytes a parameter in bfloat16; 4 where several backward passes
      add up, in float32), and `step()` starts all updates, which overlap the next forward in its order. Allows
      clipping, accumulation, and looking at gradients (`p.grad`).
    - "auto": "overlap", unless `max_grad_norm` or `skip_nonfinite` is given, `model.no_sync()` is used, or an
      `accelerate.Accelerator` runs the training (as in Hugging Face's Trainer), which clips and accumulates by itself.

    `step()` uses gradients up: `p.grad` is None after it.

    Args:
        params: parameters, or groups with options of their own, of one offloaded model; frozen ones are ignored.
        lr: learning rate.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by `lr`.
        maximize: ascend instead of descend.
        update: when the update happens, as above.
        max_grad_norm: clips the 2-norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` before `step()`.
        skip_nonfinite: a step whose gradients' norm is infinite or NaN changes nothing, is counted in
            `skipped_steps`, and a warning is logged.

    Attributes:
        grad_norm: float32 scalar, the norm before clipping that the last `step()` saw; None if it took none.
        skipped_steps: how many steps `skip_nonfinite` has skipped.

    Raises:
        ValueError: an option is out of its range, or asks for what `update` cannot do.
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
        update: Literal["auto", "overlap", "deferred"] = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if update not in ("auto", "overlap", "deferred"):
            raise ValueError(f"update={update!r} must be 'auto', 'overlap' or 'deferred'")
        if max_grad_norm is not None and not float(max_grad_norm) > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm} must be more than 0, or None for no clipping")
        if update == "overlap":
            _check_overlap(max_grad_norm, skip_nonfinite)
        self.update = update
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: torch.Tensor | None = None
        self.skipped_steps = 0
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
        if engine.defers(self):
            engine.deferred.allocate()

    def _offloaded(self) -> Engine:
        assert self._engine is not None  # torch.optim refuses an empty list of parameters
        return self._engine

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; before the first step only.

        Raises:
            ValueError: an option is out of its range.
            UsageError: a parameter does not belong to the offloaded model, or training has begun.
        """
        if self._engine is not None and self._engine.has_trained():
            raise UsageError(
                "a group cannot be added after training began: what is not in a group has no moments in the run's "
                "checkpoints, and its steps would count from another beginning. Give all groups to slidecore.AdamW, "
                "with lr=0 for those whose turn comes later"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (UsageError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        _check_options(group)
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

    def options(self) -> list[object]:
        """What the groups' options are now, for comparison."""
        # load_state_dict of torch adds to `defaults` what groups need not have.
        groups = [tuple(group.get(key) for key in self.defaults) for group in self.param_groups]
        return [*groups, self.max_grad_norm, self.skip_nonfinite]

    def hyper_parameters(self) -> dict[Entry, _core.AdamWHyper]:
        """The settings of each trainable entry, as the groups say now.

        Raises:
            ValueError: one is out of its range.
        """
        if self.update == "overlap":
            _check_overlap(self.max_grad_norm, self.skip_nonfinite)
        hyper: dict[Entry, _core.AdamWHyper] = {}
        for group in self.param_groups:
            _check_options(group)
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
        """Closes the step that backward has carried out (overlap), or starts its updates (deferred).

        Args:
            closure: called first, with gradients enabled, as in torch.optim.

        Raises:
            ValueError: an option of a group is out of its range; nothing is changed then.
            UsageError: the groups' options were changed, or gradients dropped, after an overlapping backward had used
                them, or a gradient was replaced by another tensor.
            Error: a lane failed since the last call (typed as in `slidecore._core`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = None
        self._offloaded().step(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that wait for a step; after a step there are none.

        Args:
            set_to_none: False zeroes the gradients that wait instead.

        Raises:
            UsageError: backward has used them already (overlapping updates), and `step()` was not called since.
        """
        if set_to_none:
            self._offloaded().zero_grad()
        else:
            super().zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state as of `torch.optim.Optimizer`, once pending updates are done.

        The state of a parameter that has been updated: "step" (float32 scalar), "exp_avg" and "exp_avg_sq", and with
        bfloat16 weights "residual" (int16), what the float32 master has beyond the weight; once any parameter has been
        updated, those of the groups that have not are there for their residuals. 8-bit moments are their codes (int8,
        uint8), with "exp_avg_scale" and "exp_avg_sq_scale". These are views of the planes, no copies: save them, or
        clone them, before the next step. Of planes that are not in memory they are copies, which may not fit:
        `slidecore.save_checkpoint` needs one chunk's at a time.

        `max_grad_norm`, `skip_nonfinite` and `update` are not in it, as clipping is in no state of torch.optim: give
        them again when the optimizer is created. (`slidecore.load_checkpoint` compares the first two.)
        """
        engine = self._offloaded()
        engine.drain()
        packed = super().state_dict()
        split = engine.compute_dtype != torch.float32
        everything = split and engine.has_trained()
        parameters = [p for group in self.param_groups for p in group["params"]]
        wanted: dict[Chunk, list[tuple[int, Entry]]] = {}
        for index, parameter in enumerate(parameters):
            chunk, entry = engine.entries[id(parameter)]
            if entry.trainable and (entry.step > 0 or everything):
                wanted.setdefault(chunk, []).append((index, entry))
        state = {}
        for chunk, entries in wanted.items():
            with engine.planes.borrowed(chunk, engine.planes.state_names(chunk)):
                for index, entry in entries:
                    planes = engine.planes.state_of(chunk, entry)
                    state[index] = {"step": torch.tensor(float(entry.step)), **planes}
        packed["state"] = dict(sorted(state.items()))
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups and state, of `state_dict()` or of `torch.optim.AdamW`.

        Load the model's weights first: loading them afterwards makes masters equal to the bfloat16 weights.

        Raises:
            ValueError: groups, shapes or the kind of moments do not fit; nothing is changed then.
        """
        engine = self._offloaded()
        engine.drain()
        self._check_groups_of(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        places = [engine.entries[id(p)] for group in self.param_groups for p in group["params"]]
        found: dict[Chunk, dict[Entry, Any]] = {}
        for (chunk, entry), index in zip(places, saved, strict=True):
            state = state_dict["state"].get(index)
            if state:
                if not entry.trainable:
                    raise ValueError(f"the state has moments of {entry.name}, which is frozen here")
                forms = engine.planes.views(engine.planes.forms(chunk), entry)
                forms.pop("weight")
                _check_state(entry, forms, state)
            if entry.trainable:
                found.setdefault(chunk, {})[entry] = state
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            group.setdefault("maximize", self.defaults["maximize"])
        for chunk, states in found.items():
            _load_chunk(engine.planes, chunk, states)

    def _check_groups_of(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError(
                f"the state has groups of {[len(group['params']) for group in groups]} parameters, this optimizer of "
                f"{sizes}; make the groups as they were when it was saved"
            )
        for group in groups:
            missing = {"lr", "betas", "eps", "weight_decay"} - group.keys()
            if missing:
                raise ValueError(f"the state's groups lack {sorted(missing)}: it is of another kind of optimizer")
            if group.get("amsgrad") or not group.get("decoupled_weight_decay", True):
                raise ValueError("the state is of Adam with amsgrad or with coupled weight decay, which AdamW is not")
            _check_options(group)


def _load_chunk(planes: Planes, chunk: Chunk, states: Mapping[Entry, Any]) -> None:
    """Sets the state of these entries of the chunk; where it is none, they have not been updated yet."""
    with planes.borrowed(chunk, planes.state_names(chunk), write=True) as parts:
        # What comes may be views of these very planes, of state_dict(): only what does not come is cleared.
        planes.clear_moments(chunk, [entry for entry, state in states.items() if not state])
        for entry, state in states.items():
            entry.step = int(state["step"]) if state else 0
            for name, view in planes.views(parts, entry).items():
                if state and name in state:
                    view.copy_(state[name])


def _check_overlap(max_grad_norm: float | None, skip_nonfinite: bool) -> None:
    if max_grad_norm is not None or skip_nonfinite:
        raise ValueError(
            "max_grad_norm and skip_nonfinite need the norm of all gradients before the first update, which "
            "update='overlap' makes during backward; use update='deferred' or 'auto'"
        )


def _check_options(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']} must be at least 0")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={group['betas']} must each be in [0, 1)")
    if not group["eps"] >= 0:
        raise ValueError(f"eps={group['eps']} must be at least 0")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']} must be at least 0")


def _check_state(entry: Entry, planes: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    for name, plane in planes.items():
        if name not in state:
            if name == "residual":
                continue  # of another optimizer: the master stays as it is
            raise ValueError(f"the state of {entry.name} lacks {name!r}; it has {sorted(state)}")
        if state[name].shape != plane.shape or (state[name].is_floating_point() != plane.is_floating_point()):
            raise ValueError(
                f"{name} of {entry.name} is {tuple(state[name].shape)} of {state[name].dtype}, expected "
                f"{tuple(plane.shape)} of {plane.dtype}"
            )
