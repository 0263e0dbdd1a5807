"""What `slidecore doctor` looks at. Each check stands alone: one that cannot be made is a finding, not a failure."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from slidecore import _core, calibration, cufile
from slidecore.drives import Workload, identify
from slidecore.sizes import format_size

Status = Literal["ok", "note", "problem"]
_PIN_BYTES = 1 << 30
_RATE_BYTES = 256 << 20


@dataclass(frozen=True)
class Check:
    """One finding. "note": works, but less well than it could; "problem": will not work."""

    name: str
    status: Status
    finding: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def run(directories: Sequence[str], rates: bool = True) -> list[Check]:
    """Makes all checks. Opens the card, makes and removes files in `directories`.

    Args:
        directories: to be looked at as places for swap files.
        rates: measure how fast the drives are, which takes seconds each.
    """
    device, checks = open_device()
    checks += _safely("PyTorch", lambda: pytorch(device), "Install a PyTorch build that works on this machine")
    checks += _safely("pinned memory", lambda: pinned_memory(device), _NOT_LOOKED_AT)
    checks += _safely("memory lock limit", memory_lock_limit, _NOT_LOOKED_AT)
    checks += _safely("memory nodes", lambda: memory_nodes(device), _NOT_LOOKED_AT)
    checks += _safely("io_uring", io_uring, _NOT_LOOKED_AT)
    checks += _safely("cuFile", lambda: gpu_direct(device), _NOT_LOOKED_AT)
    for directory in directories:
        checks += _safely(
            f"disk {directory}",
            functools.partial(disk, directory, rates),
            "Give a directory that this user can make files in, on a local drive (mkdir -p DIRECTORY)",
        )
    return checks


_NOT_LOOKED_AT = "This could not be looked at: /proc and /sys must be readable, as they usually are"


def _safely(name: str, check: Callable[[], list[Check]], advice: str) -> list[Check]:
    """The check's findings, or what kept it from being made, with `advice` about that."""
    try:
        return check()
    except (_core.Error, OSError, ValueError) as error:
        return [Check(name, "problem", str(error), advice)]


def open_device() -> tuple[_core.Device | None, list[Check]]:
    """The first card of the first driver that answers, and what was found of drivers and card."""
    reasons = []
    for backend in ("cuda", "hip"):
        try:
            device = _core.Device(backend, 0)
        except _core.Error as error:
            reasons.append(f"{backend}: {error}")
            continue
        version = _line("/proc/driver/nvidia/version") if backend == "cuda" else _line("/sys/module/amdgpu/version")
        return device, [
            Check("driver", "ok", f"{backend}{', ' + version if version else ''}"),
            Check("card", "ok", f"{device.name}, {format_size(device.total_bytes)}"),
        ]
    present = [path for path in ("/dev/nvidiactl", "/dev/kfd") if Path(path).exists()]
    advice = (
        f"{' and '.join(present)} exists, so there is a kernel driver: in a container, pass the card in "
        "(--gpus all, or --device /dev/kfd); else install the user-space driver of the same version"
        if present
        else "Without a card slidecore computes on the host backend; for a card install its driver"
    )
    return None, [Check("driver", "problem" if present else "note", "; ".join(reasons), advice)]


def pytorch(device: _core.Device | None) -> list[Check]:
    """Whether PyTorch sees a card: a build for CPUs beside a card that works would train on the CPU."""
    import torch

    name, count = "PyTorch", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return [Check(name, "ok", f"{torch.__version__} sees {count} card{'s' if count > 1 else ''}")]
    finding = f"{torch.__version__} sees no card"
    if device is None:
        return [Check(name, "ok", f"{finding}, as there is none: --device auto computes on the CPU")]
    built = "" if torch.version.cuda or torch.version.hip else " (a build without support for cards)"
    return [
        Check(
            name,
            "problem",
            f"{finding}, though there is one{built}: --device auto would compute on the CPU",
            "Install the PyTorch build for this card and driver (pytorch.org/get-started); see CUDA_VISIBLE_DEVICES",
        )
    ]


def pinned_memory(device: _core.Device | None) -> list[Check]:
    """Pins 1 GiB, or as much of it as memory allows, in the way that planes are pinned."""
    if device is None:
        return [Check("pinned memory", "ok", "the host backend needs none")]
    nbytes = min(_PIN_BYTES, available_memory() // 4)
    try:
        buffer = _core.HostBuffer(device, nbytes, True)
    except _core.Error as error:
        return [
            Check(
                "pinned memory",
                "problem",
                str(error),
                "Containers and WSL limit it: raise their memory and memlock limits (--ulimit memlock=-1)",
            )
        ]
    return [Check("pinned memory", "ok", f"{format_size(len(buffer))} can be pinned at once")]


def memory_lock_limit() -> list[Check]:
    """RLIMIT_MEMLOCK: what io_uring may register without CAP_IPC_LOCK."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    name = "memory lock limit"
    if limit == resource.RLIM_INFINITY:
        return [Check(name, "ok", "unlimited")]
    if _may_lock():
        return [Check(name, "ok", f"{format_size(limit)}, which does not bind this process (CAP_IPC_LOCK)")]
    status: Status = "ok" if limit >= 1 << 30 else "note"
    advice = "" if status == "ok" else "Buffers are then not registered with io_uring; `ulimit -l unlimited` allows it"
    return [Check(name, status, format_size(limit), advice)]


def _may_lock() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 14 & 1)
    return False


def memory_nodes(device: _core.Device | None) -> list[Check]:
    """The memory node of the card, and whether this process may run on its CPUs."""
    name = "memory nodes"
    nodes = sorted(int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        return [Check(name, "ok", "one")]
    if device is None or device.numa_node < 0:
        return [Check(name, "note", f"{len(nodes)}; the card's node is not known", "Planes go where the kernel likes")]
    node = device.numa_node
    cpus = _cpu_list(_line(f"/sys/devices/system/node/node{node}/cpulist"))
    mine = os.sched_getaffinity(0) & cpus
    finding = f"{len(nodes)}; the card is on node {node}, with {len(mine)} of its {len(cpus)} CPUs usable here"
    if not mine:
        return [Check(name, "note", finding, f"Run on the card's node: numactl --cpunodebind={node} ...")]
    return [Check(name, "ok", finding)]


def _cpu_list(text: str) -> set[int]:
    """The CPUs of a kernel list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def io_uring() -> list[Check]:
    """Whether io_uring can be used, and why not."""
    reason = _core.why_no_io_uring()
    if not reason:
        return [Check("io_uring", "ok", "the kernel allows it")]
    return [Check("io_uring", "note", reason, "Files are read and written by threads, which costs more CPU time")]


def gpu_direct(device: _core.Device | None) -> list[Check]:
    """Whether `offload(..., gpu_direct=True)` finds cuFile, and nvidia-fs for it. Its driver is not opened."""
    name = "cuFile"
    if (device is None or device.backend != "cuda") and not os.environ.get(cufile.VARIABLE):
        return [Check(name, "ok", "not looked for: gpu_direct=True is for NVIDIA cards, off by default")]
    try:
        facts = _core.inspect_cufile(cufile.library_paths())
    except _core.UnsupportedError as error:
        return [Check(name, "note", str(error), f"Needed for offload(..., gpu_direct=True) only. {cufile.INSTALL}")]
    finding = f"{' '.join(filter(None, (facts.version, f'({facts.library})')))}, "
    module = cufile.nvidia_fs()
    if module is not None:
        return [Check(name, "ok", f"{finding}nvidia-fs {module}: offload(..., gpu_direct=True) can use it")]
    return [
        Check(
            name,
            "note",
            f"{finding}no nvidia-fs: with gpu_direct=True it would copy through host memory (compatibility mode)",
            f"{cufile.LOAD_NVIDIA_FS}, or {cufile.LEAVE_OFF}",
        )
    ]


def disk(directory: str, rates: bool) -> list[Check]:
    """A directory as a place for swap files: file system, drive, alignment, space and speed."""
    name = f"disk {directory}"
    facts = _core.inspect_directory(directory)
    drive = identify(facts)
    kind = {None: "", True: ", rotational", False: ", not rotational"}[drive.rotational]
    finding = f"{facts.filesystem} on {' '.join(filter(None, (drive.device, drive.model)))}{kind}"
    checks = []
    if facts.in_memory:
        checks.append(Check(name, "note", finding, "This is memory, not a drive: give a directory on an NVMe drive"))
    elif not facts.direct:
        checks.append(
            Check(
                name,
                "note",
                f"{finding}; transfers go through the page cache: {facts.why_not_direct}",
                "That costs memory and CPU time: give a directory on a local ext4 or xfs file system",
            )
        )
    elif drive.rotational:
        advice = "Rotating drives hold training up: give an NVMe drive (virtual drives may say rotational and be none)"
        checks.append(Check(name, "note", finding, advice))
    else:
        checks.append(Check(name, "ok", finding))
    said = "as the file system says" if facts.alignment_reported else "assumed: kernel or file system do not say"
    checks.append(
        Check(
            f"{name}: alignment",
            "ok",
            f"offsets {facts.offset_alignment} bytes, memory {facts.memory_alignment} bytes ({said})",
        )
    )
    free = f"{format_size(facts.free_bytes)} of {format_size(facts.total_bytes)} free"
    short = facts.free_bytes < 0.05 * facts.total_bytes
    checks.append(
        Check(f"{name}: space", "note" if short else "ok", free, "Nearly full drives write slowly" if short else "")
    )
    if rates:
        checks += _safely(
            f"{name}: rates",
            lambda: [_rates(directory, f"{name}: rates", facts)],
            "Rates are measured as training moves bytes, so it would fail alike: see to what the message says. What "
            "else is said of this directory stands; --quick leaves the rates out",
        )
    return checks


def _rates(directory: str, name: str, facts: _core.DirectoryFacts) -> Check:
    nbytes = min(_RATE_BYTES, available_memory() // 4)
    if facts.free_bytes < 2 * nbytes:
        return Check(name, "note", "not measured: too little space", f"Free {format_size(2 * nbytes)} there")
    known = calibration.load([directory])
    storage = _core.Storage([directory])
    try:
        work = Workload(storage, nbytes)
        transfers = calibration.open_transfers(storage, known)
        try:
            write, read = work.run(transfers, "write"), work.run(transfers, "read")
            finding = f"read {read.gb_per_s:.2f} GB/s, write {write.gb_per_s:.2f} GB/s by {transfers.describe()}"
        finally:
            transfers.close()
    finally:
        storage.close()
    if known or facts.in_memory:
        return Check(name, "ok", finding)
    return Check(name, "note", finding, f"Not calibrated: run `slidecore calibrate {directory}` once")


def available_memory() -> int:
    """MemAvailable in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30


def _line(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").splitlines()[0].strip()
    except (OSError, IndexError):
        return ""
