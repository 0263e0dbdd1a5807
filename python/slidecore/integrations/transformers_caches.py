"""transformers' key-value caches in training: a block that runs again would add to them again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from slidecore.errors import UsageError


def refuse_cache(name: str, arguments: Sequence[Any]) -> None:
    """Raises UsageError if one of a visit's `arguments` is a cache."""
    module = sys.modules.get("transformers.cache_utils")
    if module is not None and any(isinstance(argument, module.Cache) for argument in arguments):
        raise UsageError(
            f"{name} was given a key-value cache in a forward with gradients: its recomputation would add to the cache "
            f"again. Give no past_key_values (and use_cache=False), or run under torch.no_grad()"
        )
