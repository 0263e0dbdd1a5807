"""Where a run computes and in what: what "auto" stands for, and how that is told."""

from __future__ import annotations

from pathlib import Path

import torch

from slidecore.backend import choose_device

# Units that multiply bfloat16 faster than float32, as Linux names them on x86-64 and on AArch64. Other CPUs emulate it,
# up to ten times slower than float32.
_BFLOAT16_UNITS = {"amx_bf16", "bf16"}
# AMD's have this at twice float32's rate. Intel's have it at the same rate: with its conversions, products of matrices
# take 1.7 times as long as in float32.
_BFLOAT16_UNITS_OF_AMD = _BFLOAT16_UNITS | {"avx512_bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


def choose_compute_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that "auto" stands for: bfloat16 on a card and on a CPU that is faster in it, else float32.

    Nothing is measured: the same command computes the same on the same machine, however busy that is.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        return torch.bfloat16
    vendor, flags = _cpu()
    units = _BFLOAT16_UNITS_OF_AMD if vendor == "AuthenticAMD" else _BFLOAT16_UNITS
    return torch.bfloat16 if units & flags else torch.float32


def describe_compute(device: str, dtype: torch.dtype) -> str:
    """A line on what `device` stands for and on the dtype."""
    name = str(dtype).removeprefix("torch.")
    chosen = choose_device(device)
    if chosen.type != "cpu":
        return f"computing on {chosen} ({torch.cuda.get_device_name(chosen)}) in {name}"
    why = f": PyTorch {torch.__version__} sees no card" if device == "auto" else ""
    return f"computing on the CPU in {name}{why}"


def _cpu() -> tuple[str, set[str]]:
    """Vendor (x86-64 only) and flags of the first CPU; empty where Linux does not say."""
    try:
        text = _CPU_INFO.read_text(errors="replace")
    except OSError:
        return "", set()
    first = dict(line.partition(":")[::2] for line in text.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, value in first.items()}
    return fields.get("vendor_id", ""), set(fields.get("flags", fields.get("Features", "")).split())
