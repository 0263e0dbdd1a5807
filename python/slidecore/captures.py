"""What a module hands out by other ways than its return value, so that it can be an output of the module's visit.

A tensor that leaves a visit has to be one of its outputs: a gradient that comes back to it then is part of the visit's
backward. Besides the return value these are found:

- attributes that the module or its submodules set to tensors with a graph (`self.auxiliary_loss = ...`),
- what is set in mappings that the module was given (keys and values that later blocks share),
- what transformers records by hooks inside of blocks (router logits, attention weights).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slidecore.calls import Mapping, Place
from slidecore.integrations import transformers_records as records

Attributes = dict[str, torch.Tensor]


def _attributes(module: nn.Module) -> Attributes:
    return {name: value for name, value in module.__dict__.items() if isinstance(value, torch.Tensor)}


@dataclass
class Captured:
    """Besides a module's return value; a pytree but for its class."""

    attributes: list[tuple[int, str, torch.Tensor]]  # of the module numbered so among the visit's modules
    mappings: list[tuple[Place, dict[Any, Any], list[Any]]]  # where it stands, what was set, which keys were removed
    records: dict[str, list[Any]]

    def flat(self) -> tuple[Any, ...]:
        return self.attributes, self.mappings, self.records

    def deliver(self, modules: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Puts it where the module would have: the call's own `args` and `kwargs`, and its `modules`."""
        for index, name, tensor in self.attributes:
            modules[index].__dict__[name] = tensor
        for place, changed, removed in self.mappings:
            mapping = args[place] if isinstance(place, int) else kwargs[place]
            for key in removed:
                mapping.pop(key, None)
            mapping.update(changed)
        records.add(self.records)


class Capture:
    """Watches one run of a module."""

    def __init__(self, modules: Sequence[nn.Module], mappings: Sequence[Mapping]) -> None:
        self._modules = modules
        self._mappings = mappings
        self._before: list[Attributes] = []
        self._records: records.Recording | None = None

    def taken(self) -> Captured:
        """What was handed out so far."""
        attributes = [
            (i, name, value)
            for i, (module, before) in enumerate(zip(self._modules, self._before, strict=True))
            for name, value in _attributes(module).items()
            if value.requires_grad and before.get(name) is not value
        ]
        mappings = []
        for mapping in self._mappings:
            changed, removed = mapping.changes()
            if changed or removed:
                mappings.append((mapping.place, changed, removed))
        return Captured(attributes, mappings, self._records.taken() if self._records is not None else {})

    @contextlib.contextmanager
    def watching(self) -> Iterator[Capture]:
        self._before = [_attributes(module) for module in self._modules]
        with records.recording() as self._records:
            yield self


@contextlib.contextmanager
def unnoticed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A run beside the forward proper (a recomputation, a probe) hands out nothing."""
    before = [(dict(module.__dict__), _attributes(module)) for module in modules]
    try:
        with records.recording():
            yield
    finally:
        for module, (everything, attributes) in zip(modules, before, strict=True):
            for name in _attributes(module):
                if name in everything:
                    module.__dict__[name] = everything[name]
                else:
                    del module.__dict__[name]
            module.__dict__.update(attributes)
