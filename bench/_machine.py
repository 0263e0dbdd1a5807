"""Facts of the machine and the software a figure was measured with, so that no figure travels without them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# The distributions whose versions can move a figure.
PACKAGES = ("slidecore", "torch", "transformers", "accelerate", "numpy", "triton", "deepspeed")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> dict[str, int]:
    """`/proc/meminfo` in bytes; empty where there is none."""
    values: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            fields = rest.split()
            if fields:
                values[key] = int(fields[0]) * (1024 if len(fields) > 1 and fields[1] == "kB" else 1)
    except OSError:
        pass
    return values


def usable_cpus() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def _huge_pages() -> str:
    """The kernel's transparent huge page mode: always, madvise, never or unknown."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    start, end = text.find("["), text.find("]")
    return text[start + 1 : end] if 0 <= start < end else text.strip()


def _graphics_cards() -> list[dict[str, str]]:
    """NVIDIA cards as nvidia-smi reports them: read in a process of its own, so that no context is opened here."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = ("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max")
    try:
        answer = subprocess.run(
            [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(fields, (part.strip() for part in line.split(",")), strict=False))
        for line in answer.stdout.splitlines()
        if line.strip()
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, memory (bytes), cards and software versions. Opens no device."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "usable_cpus": usable_cpus(),
        "memory_nodes": _memory_nodes(),
        "memory_bytes": memory_bytes().get("MemTotal", 0),
        "huge_pages": _huge_pages(),
        "cards": _graphics_cards(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _versions(),
    }


def core_facts() -> dict[str, Any]:
    """What slidecore's native module chose on this machine."""
    from slidecore import _core

    return {
        "instruction_set": _core.instruction_set(),
        "instruction_sets": list(_core.available_instruction_sets()),
        "usable_cpus": _core.usable_cpus(),
    }


def keep(result: dict[str, Any], out: str | None) -> None:
    """Writes what there is so far to the file asked for: a run that is cut off leaves it."""
    if out:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def emit(result: dict[str, Any], out: str | None) -> None:
    """Prints the result as JSON on standard output and, when asked, writes the same to a file."""
    keep(result, out)
    print(json.dumps(result, indent=2), flush=True)


def log(*words: object) -> None:
    """Progress goes to standard error: standard output carries the JSON only."""
    print(*words, file=sys.stderr, flush=True)
