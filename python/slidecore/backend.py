"""Where a model computes: PyTorch's device and the core's device behind it."""

from __future__ import annotations

import contextlib

import torch

from slidecore import _core
from slidecore.errors import UsageError


def choose_device(device: str | torch.device) -> torch.device:
    """What "auto", "cpu" or "cuda[:i]" (AMD's cards have that name in PyTorch, too) stands for; opens nothing.

    Raises:
        UsageError: the device is of a kind that slidecore does not know, or PyTorch cannot use it.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    unsupported = f"device={str(device)!r} is not supported; use 'auto', 'cuda', 'cuda:1' or 'cpu'"
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise UsageError(unsupported) from error
    if requested.type == "cpu":
        return torch.device("cpu")
    if requested.type != "cuda":
        raise UsageError(unsupported)
    if not torch.cuda.is_available():
        raise UsageError(
            f"device={str(device)!r}, but PyTorch sees no card (torch {torch.__version__}); install a PyTorch build "
            f"for your card, or use device='cpu' for the host backend"
        )
    index = torch.cuda.current_device() if requested.index is None else requested.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"device={str(device)!r}, but there are {torch.cuda.device_count()} cards")
    return torch.device("cuda", index)


class Backend:
    """A compute device. `torch_device` holds slots and activations; `core` moves bytes to and from it."""

    def __init__(self, device: str | torch.device) -> None:
        """Opens `device`: "auto" (a card if PyTorch sees one, else the host), "cpu" (the host backend), "cuda[:i]".

        Raises:
            UsageError: the device is of a kind that slidecore does not know, or PyTorch cannot use it.
        """
        self.torch_device = choose_device(device)
        if self.torch_device.type == "cpu":
            self.core = _core.Device("host", 0)
        else:
            torch.cuda.init()
            self.core = _core.Device("hip" if torch.version.hip else "cuda", self.torch_device.index)
        self.is_host = self.core.is_host
        self._held = 0
        self._peak = 0

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Makes the card current: kernels of other libraries are launched on the current one, wherever tensors lie."""
        return contextlib.nullcontext() if self.is_host else torch.cuda.device(self.torch_device)

    def stream(self) -> int:
        """The current PyTorch stream's handle; 0 on the host backend."""
        return 0 if self.is_host else int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised flat tensor in device memory; on the host backend it is counted there."""
        if not self.is_host:
            return torch.empty(numel, dtype=dtype, device=self.torch_device)
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        made = torch.frombuffer(_core.DeviceBuffer(self.core, numel * dtype.itemsize), dtype=dtype)
        self._note_peak()
        return made

    def hold(self, nbytes: int) -> None:
        """Counts activations as device memory on the host backend; a card's allocator counts them itself."""
        self._held += nbytes
        self._note_peak()

    def drop(self, nbytes: int) -> None:
        """Ends a `hold`."""
        self._held -= nbytes

    def _note_peak(self) -> None:
        if self.is_host:
            self._peak = max(self._peak, self.core.memory_in_use + self._held)

    def available_memory(self) -> int | None:
        """Bytes that could still be allocated on the card, PyTorch's cache included; None on the host backend."""
        if self.is_host:
            return None
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + cached)

    def workspace_bytes(self) -> int:
        """What PyTorch allocates for cuBLAS, or its like, once forward and backward have multiplied matrices.

        One workspace for each of the two threads that do so: 32 MiB on Hopper and later, 8 MiB before and elsewhere.
        """
        if self.is_host:
            return 0
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(self.torch_device) >= (9, 0)
        return 2 * ((32 if hopper else 8) << 20) + (1 << 20)

    def memory_in_use(self) -> tuple[int, int]:
        """Bytes of device memory in use now, and the most there were."""
        if self.is_host:
            return self.core.memory_in_use + self._held, self._peak
        return torch.cuda.memory_allocated(self.torch_device), torch.cuda.max_memory_allocated(self.torch_device)
