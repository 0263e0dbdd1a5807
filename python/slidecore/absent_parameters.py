"""What a parameter is while its weight is not in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from slidecore.errors import UsageError

_ATTRIBUTES = {
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_quantized",
    "is_sparse", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape", "_version",
}  # fmt: skip
_CHANGEABLE = {"grad", "requires_grad"}
_FUNCTIONS = {
    torch.Tensor.__len__, torch.Tensor.dim, torch.Tensor.element_size, torch.Tensor.get_device, torch.Tensor.is_complex,
    torch.Tensor.is_floating_point, torch.Tensor.nelement, torch.Tensor.numel, torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook, torch.Tensor.requires_grad_, torch.Tensor.size,
    torch.is_complex, torch.is_floating_point, torch.numel,
}  # fmt: skip


class AbsentParameter(nn.Parameter):
    """Tells its form (shape, dtype, device) and holds gradient and hooks as before; its values cannot be touched.

    A parameter becomes one, and what it was again, by its class, as PyTorch's own uninitialized parameters do: it stays
    the same object, which modules, optimizers and hooks hold. (A tensor on "meta" cannot be assigned to `.data` of one
    on the CPU, and reading a CPU tensor whose storage was freed ends the process.) Code that gets past this class would
    read NaN from a single element in all places, into which PyTorch copies nothing.
    """

    _slidecore_name: str
    _slidecore_class: type

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUNCTIONS or _is_allowed_attribute(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        named = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, AbsentParameter)]
        name = repr(named[0]._slidecore_name) if named else "a parameter"
        raise UsageError(
            f"the weight of {name} is not in host memory, so {getattr(func, '__name__', func)} cannot read or change "
            f"it there. slidecore.master_parameter(model, name) gives a copy, slidecore.assign_parameter(model, name, "
            f"value) sets it, slidecore.save_checkpoint(model, optimizer, directory) saves all of them"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentParameter({self._slidecore_name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _is_allowed_attribute(func: Any) -> bool:
    """Whether `func` gets, sets or deletes an attribute of tensors for which it may."""
    descriptor, access = getattr(func, "__self__", None), getattr(func, "__name__", "")
    name = getattr(descriptor, "__name__", "")
    if access == "__get__":
        return name in _ATTRIBUTES
    return access in ("__set__", "__delete__") and name in _CHANGEABLE


def make_absent(parameter: nn.Parameter, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Takes the parameter's memory away, in place."""
    if not isinstance(parameter, AbsentParameter):
        parameter.data = torch.full((), float("nan"), dtype=dtype).expand(shape)
        kind = type(parameter)
        parameter.__class__ = AbsentParameter
        parameter._slidecore_class = kind  # type: ignore[attr-defined]
        parameter._slidecore_name = name  # type: ignore[attr-defined]


def make_present(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Lets the parameter be what it was, over `data`."""
    if isinstance(parameter, AbsentParameter):
        kind = parameter._slidecore_class
        del parameter._slidecore_class, parameter._slidecore_name
        parameter.__class__ = kind  # type: ignore[assignment]
    parameter.data = data


def check_present(module: nn.Module, instead: str) -> None:
    """Raises UsageError, with what to do `instead`, where the weight of a parameter of `module` is not in memory."""
    for parameter in module.parameters():
        if isinstance(parameter, AbsentParameter):
            raise UsageError(f"the weight of {parameter._slidecore_name!r} is not in host memory: {instead}")
