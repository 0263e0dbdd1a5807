"""torch.compile of an offloaded model: what visits do cannot be traced, so they run as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which a compiler calls and does not look into.

    As `torch.compiler.disable`, but for importing the compiler, which takes seconds, where nobody compiles.
    """

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(forward)(*args, **kwargs)
        return forward(*args, **kwargs)

    return called
