"""What `p.grad` is after backward: a stand-in for a gradient that lies in a plane, or that its update has consumed.

Code that was written for PyTorch looks at `p.grad`: to clip, to log, to skip a step. In `deferred` updates a handle
answers for the gradient in host memory: its 2-norm comes from the device and a product with a scalar becomes a factor
of the update, so that `torch.nn.utils.clip_grad_norm_` touches no gradient; other operations get the plane's real
tensor. In `overlap` updates the gradient is gone, and any operation says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch

from slidecore.errors import UsageError

_aten = torch.ops.aten
CONSUMED = (
    "this gradient was consumed by its update during backward (overlap updates), so it can no longer be read, clipped "
    "or changed. Give max_grad_norm= to slidecore.AdamW to clip by the global norm, or update='deferred' to have "
    "gradients until optimizer.step(). Hugging Face's Trainer wants the norm at every step, with max_grad_norm=0 too: "
    "leave update= at 'auto' there, or give 'deferred'"
)


class GradientSource(Protocol):
    """Where the gradients of handles are."""

    def norm(self, handle: GradientHandle) -> torch.Tensor:
        """The 2-norm, a float32 scalar on the CPU."""

    def scale(self, handle: GradientHandle, factor: float) -> None:
        """Multiplies the gradient, when it is used."""

    def tensor(
        self, handle: GradientHandle, writes: bool = False, shows: bool = False
    ) -> AbstractContextManager[torch.Tensor]:
        """The gradient itself, with its factor, for use inside the context: `writes` if it is about to be changed,
        `shows` if the user gets a view of it, to read and write whenever they like.
        """


class GradientHandle(torch.Tensor):
    """Has its parameter's shape and dtype, on the CPU as the parameter is; `source` None: consumed."""

    source: GradientSource | None

    @staticmethod
    def make(parameter: torch.Tensor, source: GradientSource | None) -> GradientHandle:
        made: GradientHandle = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            GradientHandle, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made.source = source
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (_aten.detach.default, _aten.alias.default) and isinstance(first, GradientHandle):
            return first
        if isinstance(first, GradientHandle) and first.source is not None:
            if func is _aten.linalg_vector_norm.default and _is_two_norm(args[1:], kwargs):
                return first.source.norm(first)
            if func in _PRODUCTS and _is_scalar(args[1]) and not (func in _QUOTIENTS and args[1] == 0):
                factor = float(args[1])
                first.source.scale(first, 1 / factor if func in _QUOTIENTS else factor)
                return first
        written = {id(value) for value in _aliased(func, args, kwargs, writes=True)}
        shown = {id(value) for value in _aliased(func, args, kwargs, writes=False)}

        with ExitStack() as stack:

            def real(value: Any) -> Any:
                if isinstance(value, GradientHandle):
                    if value.source is None:
                        raise UsageError(CONSUMED)
                    return stack.enter_context(value.source.tensor(value, id(value) in written, id(value) in shown))
                if isinstance(value, (list, tuple)):
                    return type(value)(real(item) for item in value)
                return value

            result = func(*(real(a) for a in args), **{k: real(v) for k, v in kwargs.items()})
        return first if id(first) in written else result

    def numpy(self, *, force: bool = False) -> Any:
        return self.view_as(self).numpy(force=force)

    def tolist(self) -> Any:
        return self.clone().tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "consumed by its update" if self.source is None else "in host memory"
        return f"GradientHandle(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"


_QUOTIENTS = {_aten.div_.Tensor, _aten.div_.Scalar}
_PRODUCTS = {_aten.mul_.Tensor, _aten.mul_.Scalar} | _QUOTIENTS


def _is_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not isinstance(value, GradientHandle)
    return isinstance(value, (int, float))


def _is_two_norm(args: Any, kwargs: Any) -> bool:
    names = dict(zip(("ord", "dim", "keepdim"), args, strict=False)) | dict(kwargs)
    return names.get("ord", 2) == 2 and names.get("dim") is None and not names.get("keepdim") and not names.get("dtype")


def _aliased(func: Any, args: Any, kwargs: Any, *, writes: bool) -> Iterator[Any]:
    """The arguments (those in lists, too) that the operator changes in place, or returns views of."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write == writes:
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            yield from value if isinstance(value, (list, tuple)) else (value,)
