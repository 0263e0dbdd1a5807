"""What a checkpoint holds besides tensors of the model: optimizer options, scheduler, random states, the caller's own.

All of it is one file that `torch.load(..., weights_only=True)` reads: plain values and tensors, no code.
"""

from __future__ import annotations

import io
import random
import warnings
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from slidecore.errors import CheckpointError, UsageError
from slidecore.optimizer import AdamW

if TYPE_CHECKING:
    from slidecore.backend import Backend
    from slidecore.engine import Engine

_PARTS = {"optimizer", "scheduler", "random", "modules", "extra"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def check_plain(value: Any, where: str) -> None:
    """Raises UsageError naming the first thing inside `value` that cannot be saved.

    Exact types, because a subclass (a NumPy float is a float) would have to be unpickled by its own code.
    """
    if type(value) in _PLAIN or isinstance(value, torch.Tensor):
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, entry in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, entry in enumerate(value):
            check_plain(entry, f"{where}[{index}]")
    else:
        raise UsageError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; give "
            f"tensors, and numbers, strings, None, lists, tuples, sets and dicts of them (a NumPy array as "
            f"torch.from_numpy(array), a NumPy number as number.item())"
        )


def collect(model: nn.Module, engine: Engine, optimizer: Optimizer, scheduler: Any, extra: Any) -> dict[str, Any]:
    """The state as plain values and tensors.

    Raises:
        UsageError: something in it cannot be saved.
    """
    state = {
        "optimizer": _optimizer_state(engine, optimizer),
        "scheduler": None
        if scheduler is None
        else {"class": type(scheduler).__name__, "state": dict(scheduler.state_dict())},
        "random": random_states(engine.backend),
        "modules": _module_states(model),
        "extra": extra,
    }
    for name, value in state.items():
        check_plain(value, {"modules": "the modules' extra state"}.get(name, name))
    return state


def encode(state: dict[str, Any]) -> memoryview:
    """The state as the bytes of its file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def decode(data: bytes | bytearray, where: str) -> dict[str, Any]:
    """The state from the bytes of its file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises what it likes
        raise CheckpointError(f"cannot read {where}: {error}") from error
    if not isinstance(state, dict) or not state.keys() >= _PARTS:
        raise CheckpointError(f"{where} does not hold the state of a training run")
    return state


def check_fits(state: dict[str, Any], engine: Engine, optimizer: Optimizer, scheduler: Any, modules: nn.Module) -> None:
    """Raises CheckpointError where the state belongs to another optimizer, scheduler or model. Changes nothing."""
    _check_optimizer(state["optimizer"], engine, optimizer)
    kept = state["scheduler"]
    if (kept is None) != (scheduler is None):
        raise CheckpointError(
            f"the checkpoint holds the state of a {kept['class']}; give it as scheduler="
            if kept is not None
            else "the checkpoint holds no state of a scheduler; leave scheduler= out"
        )
    if scheduler is not None and kept["class"] != type(scheduler).__name__:
        raise CheckpointError(
            f"the checkpoint holds the state of a {kept['class']}, but scheduler= is a {type(scheduler).__name__}"
        )
    names = {name for name, module in modules.named_modules() if _has_own_state(module)}
    if names != state["modules"].keys():
        name = sorted(names ^ state["modules"].keys())[0]
        raise CheckpointError(f"the extra state of module {name!r} is in only one of model and checkpoint")


def apply(
    state: dict[str, Any], model: nn.Module, engine: Engine, optimizer: Optimizer, scheduler: Any, random_state: bool
) -> None:
    """Puts a state that fits in its place."""
    _apply_optimizer(state["optimizer"], engine, optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"]["state"])
    for name, module in model.named_modules():
        if name in state["modules"]:
            module.set_extra_state(state["modules"][name])
    if random_state:
        restore_random_states(state["random"], engine.backend)


def random_states(backend: Backend) -> dict[str, Any]:
    """The states of the generators that training may draw from: PyTorch's (also the card's), NumPy's and Python's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(np.asarray(numpy_state["state"]["key"]).astype(np.int64))
    states = {
        "torch": torch.get_rng_state(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "python": random.getstate(),
    }
    if not backend.is_host:
        states["card"] = torch.cuda.get_rng_state(backend.torch_device)
    return states


def restore_random_states(states: dict[str, Any], backend: Backend) -> None:
    """Sets what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    kept = states["numpy"]
    np.random.set_state({**kept, "state": {**kept["state"], "key": kept["state"]["key"].numpy().astype(np.uint32)}})
    random.setstate(states["python"])
    if backend.is_host != ("card" not in states):
        warnings.warn(
            "the checkpoint was saved on another kind of device: the random state of the card is not restored, and "
            "dropout draws other masks than the run that was saved",
            stacklevel=4,
        )
    elif not backend.is_host:
        torch.cuda.set_rng_state(states["card"], backend.torch_device)


def _optimizer_state(engine: Engine, optimizer: Optimizer) -> dict[str, Any]:
    """Of slidecore.AdamW what lies in no plane; of an optimizer of torch.optim, beside kept parameters, all of it."""
    if not isinstance(optimizer, AdamW):
        return {"class": type(optimizer).__name__, "state": optimizer.state_dict()}
    names = _group_names(engine, optimizer)
    return {
        "class": None,
        "groups": [
            {**{name: value for name, value in group.items() if name != "params"}, "params": parameters}
            for group, parameters in zip(optimizer.param_groups, names, strict=True)
        ],
        "settings": _settings(optimizer),
        "skipped_steps": optimizer.skipped_steps,
        "adds_up": engine.deferred.adds_up,
    }


def _settings(optimizer: AdamW) -> dict[str, Any]:
    """What decides the arithmetic and is no option of a group: it is compared, not taken over.

    How updates are made follows from it when the optimizer is created, so that it cannot come from a checkpoint.
    """
    clipped = optimizer.max_grad_norm
    return {
        "max_grad_norm": None if clipped is None else float(clipped),
        "skip_nonfinite": bool(optimizer.skip_nonfinite),
    }


def _check_optimizer(kept: dict[str, Any], engine: Engine, optimizer: Optimizer) -> None:
    name = None if isinstance(optimizer, AdamW) else type(optimizer).__name__
    if kept["class"] != name:
        kinds = [f"torch.optim.{n}" if n else "slidecore.AdamW" for n in (kept["class"], name)]
        raise CheckpointError(f"the checkpoint holds the state of a {kinds[0]}, the optimizer is a {kinds[1]}")
    if isinstance(optimizer, AdamW):
        groups, names = kept["groups"], _group_names(engine, optimizer)
    else:
        groups = kept["state"]["param_groups"]
        names = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if len(groups) != len(names):
        raise CheckpointError(f"the optimizer has {len(names)} parameter groups, the checkpoint {len(groups)}")
    for index, (group, mine) in enumerate(zip(groups, names, strict=True)):
        if set(group["params"]) != set(mine):
            different = sorted(set(group["params"]) ^ set(mine))[0]
            raise CheckpointError(
                f"parameter group {index} is another one than in the checkpoint: {different!r} is in only one of them"
            )
    if isinstance(optimizer, AdamW):
        for setting, mine in _settings(optimizer).items():
            # Earlier versions did not save them.
            theirs = kept.get("settings", {}).get(setting, mine)
            if theirs != mine:
                raise CheckpointError(
                    f"{setting} is {mine}, but in the run that was saved it is {theirs}: create the optimizer with "
                    f"slidecore.AdamW(..., {setting}={theirs}). To go on otherwise, set optimizer.{setting} = {mine} "
                    f"after loading"
                )


def _apply_optimizer(kept: dict[str, Any], engine: Engine, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, AdamW):
        optimizer.load_state_dict(kept["state"])
        return
    for group, saved in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    optimizer.skipped_steps = kept["skipped_steps"]
    if kept["adds_up"]:  # norms of sums are taken in another order than those of single gradients
        engine.deferred.announce_addition()


def _group_names(engine: Engine, optimizer: AdamW) -> list[list[str]]:
    return [[engine.entries[id(p)][1].name for p in group["params"]] for group in optimizer.param_groups]


def _has_own_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _module_states(model: nn.Module) -> dict[str, Any]:
    return {name: module.get_extra_state() for name, module in model.named_modules() if _has_own_state(module)}
