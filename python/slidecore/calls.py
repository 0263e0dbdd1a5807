"""A module's call and its output taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Where a mapping stands among the arguments: a position, or a keyword.
Place = int | str
_PLAIN = (bool, int, float, complex, str, bytes)


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

    def says_the_same(self, other: Output) -> bool:
        """Whether both have the same structure, the same numbers and the same texts beside their tensors."""
        if self.spec != other.spec or self.tensor_at != other.tensor_at:
            return False
        pairs = zip(self.leaves, other.leaves, strict=True)
        return all(type(a) is type(b) and (a == b or not isinstance(a, _PLAIN)) for a, b in pairs)

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

    def put(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any], list[Mapping], list[Within]]:
        """Arguments over `tensors`, the mappings among them, and the lists and mappings further in."""
        args, kwargs = self.arguments.put(tensors)
        within: list[Within] = []
        for place, value in [*enumerate(args), *kwargs.items()]:
            for inner in value.values() if place in self.empty else [value]:
                _look_into(place, inner, within)
        mappings: list[Mapping] = []
        for place, empty in self.empty.items():
            holder = args if isinstance(place, int) else kwargs
            before = holder[place]
            given = copy.copy(empty)
            given.update(before)
            holder[place] = given
            mappings.append(Mapping(place, given, before))
        return args, kwargs, mappings, within


@dataclass
class Within:
    """A list or mapping among the arguments, as it was given; the module has a copy, of which nothing comes back."""

    place: Place
    given: Any
    before: list[Any]

    def has_changed(self) -> bool:
        now = _items(self.given)
        return len(now) != len(self.before) or any(a is not b for a, b in zip(now, self.before, strict=True))


def _items(container: Any) -> list[Any]:
    if isinstance(container, MutableMapping):
        return [part for item in container.items() for part in item]
    return list(container)


def _look_into(place: Place, value: Any, found: list[Within]) -> None:
    if isinstance(value, (list, deque)) or type(value) in (dict, OrderedDict, defaultdict):
        found.append(Within(place, value, _items(value)))
    elif type(value) is not tuple:
        return
    for item in value.values() if isinstance(value, MutableMapping) else value:
        _look_into(place, item, found)


def _is_shared(value: Any) -> bool:
    """Whether `value` is a mapping that may be changed; records that only look like one (ModelOutput) are not."""
    return isinstance(value, MutableMapping) and (
        type(value) in (dict, OrderedDict, defaultdict) or pytree.tree_is_leaf(value)
    )


def _emptied(mapping: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    empty = copy.copy(mapping)
    empty.clear()
    return empty
