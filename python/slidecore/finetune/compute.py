"""Where a run computes and in what: what "auto" stands for, and how that is told."""

from __future__ import annotations

from pathlib import Path

import torch

from slidecore.backend import choose_device

# Units that multiply bfloat16, as Linux names them on x86-64 and on AArch64. Other CPUs emulate it, up to ten times
# slower than float32.
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


def choose_compute_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that "auto" stands for: bfloat16 on a card and on a CPU that has units for it, else float32.

    Nothing is measured: the same command computes the same on the same machine, however busy that is.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        return torch.bfloat16
    return torch.bfloat16 if _BFLOAT16_UNITS & _cpu_flags() else torch.float32


def describe_compute(device: str, dtype: torch.dtype) -> str:
    """A line on what `device` stands for and on the dtype."""
    name = str(dtype).removeprefix("torch.")
    chosen = choose_device(device)
    if chosen.type != "cpu":
        return f"computing on {chosen} ({torch.cuda.get_device_name(chosen)}) in {name}"
    why = f": PyTorch {torch.__version__} sees no card" if device == "auto" else ""
    return f"computing on the CPU in {name}{why}"


def _cpu_flags() -> set[str]:
    try:
        text = _CPU_INFO.read_text(errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(flags.split())
    return set()
