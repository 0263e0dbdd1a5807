"""NVIDIA's cuFile (GPUDirect Storage): where it lies, whether it can be used, and what to do where it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from slidecore import _core
from slidecore.backend import Backend
from slidecore.errors import UsageError

logger = logging.getLogger("slidecore")

# Names the one library to load, and lets the host backend use it: for tests, with a library that takes host memory.
VARIABLE = "SLIDECORE_CUFILE_LIBRARY"
INSTALL = (
    "Install cuFile (`pip install nvidia-cufile-cu12` beside PyTorch for CUDA 12, `pip install nvidia-cufile` for CUDA "
    f"13; the CUDA toolkit has it too; {VARIABLE} may name libcufile.so.0)"
)
LEAVE_OFF = "leave gpu_direct off: inputs then go to disk through pinned host memory"
LOAD_NVIDIA_FS = (
    "Load the nvidia-fs kernel module (NVIDIA's package nvidia-gds; in a container also pass in /dev/nvidia-fs* and "
    "/run/udev)"
)
_NVIDIA_FS = Path("/proc/driver/nvidia-fs")


def library_paths() -> list[str]:
    """Where NVIDIA's Python packages keep cuFile, which is nowhere that the loader searches."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or [] if spec is not None else []
    return sorted(str(path) for root in roots for path in Path(root).glob("*/lib/libcufile.so.0"))


def nvidia_fs() -> str | None:
    """The version of the nvidia-fs kernel module ("" if it does not say), or None where it is not loaded."""
    if not _NVIDIA_FS.is_dir():
        return None
    try:
        return (_NVIDIA_FS / "version").read_text(errors="replace").strip().removeprefix("version:").strip()
    except OSError:
        return ""


def check(backend: Backend, *, has_disk: bool, train: bool) -> None:
    """Refuses `gpu_direct=True` where it makes no sense, before anything is loaded.

    Raises:
        UsageError: the card is not NVIDIA's, or there is none.
        ValueError: there is nothing that would go this way.
    """
    if not has_disk:
        raise ValueError("gpu_direct=True needs disk=[directory, ...]: it is a way for saved inputs to go there")
    if not train:
        raise ValueError("gpu_direct=True is for saved inputs, which there are none of with train=False; leave it off")
    if backend.core.backend == "hip":
        raise UsageError("gpu_direct=True needs cuFile, which serves NVIDIA cards only; this is an AMD card", _off())
    if backend.is_host and not os.environ.get(VARIABLE):
        raise UsageError("gpu_direct=True needs an NVIDIA card; this model computes on the host backend", _off())


def _off() -> str:
    return LEAVE_OFF[0].upper() + LEAVE_OFF[1:]


def _refused_files() -> str:
    """Where the reasons are, and what else to do. File systems that cuFile does not know it refuses, unless told so."""
    log = os.environ.get("CUFILE_LOGFILE_PATH") or "cufile.log in the current directory"
    reasons = f"{log} has cuFile's reasons"
    if os.environ.get("CUFILE_FORCE_COMPAT_MODE", "").lower() == "true":
        return reasons
    return (
        f"{reasons}. Where there is no nvidia-fs, CUFILE_FORCE_COMPAT_MODE=true in the environment lets cuFile take "
        "other file systems, and copy through host memory"
    )


def connect(device: _core.Device, storage: _core.Storage) -> _core.GpuDirect:
    """Loads cuFile, opens its driver and registers the swap files.

    Raises:
        UsageError: there is no cuFile, or it cannot be used with this card or these directories.
    """
    paths = library_paths()
    try:
        direct = _core.GpuDirect(device, storage, paths)
    except _core.UnsupportedError as error:
        advice = _refused_files() if "registering" in str(error) else INSTALL
        raise UsageError(f"gpu_direct=True cannot be honoured: {error}", f"{advice}, or {LEAVE_OFF}") from error
    logger.info("saved inputs go between device memory and disk by %s", direct.describe())
    if not direct.direct:
        logger.warning(
            "gpu_direct=True: cuFile works in its compatibility mode, which copies through host memory, as there is no "
            "nvidia-fs. It is then no faster than without. %s, or %s",
            LOAD_NVIDIA_FS,
            LEAVE_OFF,
        )
    return direct
