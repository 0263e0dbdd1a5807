"""A module's call and its output taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Where a mapping stands among the arguments: a position, or a keyword.
Place = int | str


@dataclass
class Output:
    """A value taken apart: tensor leaves, and what is needed to put it together again."""

    spec: pytree.TreeSpec
    leaves: list[Any]  # tensors replaced by None
    tensor_at: list[int]

    @staticmethod
    def take(value: Any) -> tuple[Output, list[torch.Tensor]]:
        leaves, spec = pytree.tree_flatten(value)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in at]
        return Output(spec, [None if isinstance(x, torch.Tensor) else x for x in leaves], at), tensors

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensor_at, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class Mapping:
    """A mapping that a call was given, as the module got it: a copy, which it may have changed since."""

    place: Place
    given: MutableMapping[Any, Any]
    before: dict[Any, Any]

    def changes(self) -> tuple[dict[Any, Any], list[Any]]:
        """What the module has set, and the keys that it has removed."""
        unset = object()
        changed = {k: v for k, v in self.given.items() if self.before.get(k, unset) is not v}
        return changed, [k for k in self.before if k not in self.given]


@dataclass
class Call:
    """A call of a module taken apart.

    Mappings among the arguments (a dict, or a kind of dict, that blocks hand to each other what they share in) are
    copied for the module: what it sets in them are outputs.
    """

    arguments: Output
    empty: dict[Place, MutableMapping[Any, Any]]  # an empty mapping of the class that stands there

    @staticmethod
    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
        places: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
        empty: dict[Place, MutableMapping[Any, Any]] = {}
        opened: dict[Place, Any] = {}
        for place, value in places:
            if _is_shared(value):
                empty[place] = _emptied(value)
                value = dict(value)
            opened[place] = value
        arguments, tensors = Output.take(([opened[i] for i in range(len(args))], {k: opened[k] for k in kwargs}))
        return Call(arguments, empty), tensors

    def put(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any], list[Mapping]]:
        """Arguments over `tensors`, and the mappings among them."""
        args, kwargs = self.arguments.put(tensors)
        mappings: list[Mapping] = []
        for place, empty in self.empty.items():
            holder = args if isinstance(place, int) else kwargs
            before = holder[place]
            given = copy.copy(empty)
            given.update(before)
            holder[place] = given
            mappings.append(Mapping(place, given, before))
        return args, kwargs, mappings


def _is_shared(value: Any) -> bool:
    """Whether `value` is a mapping that may be changed; records that only look like one (ModelOutput) are not."""
    return isinstance(value, MutableMapping) and (
        type(value) in (dict, OrderedDict, defaultdict) or pytree.tree_is_leaf(value)
    )


def _emptied(mapping: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    empty = copy.copy(mapping)
    empty.clear()
    return empty
