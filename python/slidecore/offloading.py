"""`offload` and the functions that take an offloaded model."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from slidecore import cufile, roots
from slidecore.absent_parameters import check_present
from slidecore.backend import Backend
from slidecore.disk_traffic import Traffic
from slidecore.edits import note_version, overwritten, take_over
from slidecore.engine import Engine, engines
from slidecore.errors import ModelError, UsageError
from slidecore.integrations import huggingface, liger
from slidecore.integrations.liger import Kernels
from slidecore.kept import Keep, choose
from slidecore.parameters import bring_back_weights
from slidecore.partition import Chunk, Entry
from slidecore.planes import Moments
from slidecore.refusals import check_initialized, check_model
from slidecore.sizes import parse_size

logger = logging.getLogger("slidecore")

Model = TypeVar("Model", bound=nn.Module)
_ATTRIBUTE = "_slidecore_engine"
_NO_FLOAT16 = (
    "compute_dtype=torch.float16 is refused: its range needs loss scaling, and the exact split of a float32 master "
    "into weight and residual exists for bfloat16 only. Use torch.bfloat16 or torch.float32"
)


def engine_of(model: nn.Module) -> Engine:
    """The engine of an offloaded model.

    Raises:
        UsageError: `model` is not offloaded (or has been closed).
    """
    engine = model.__dict__.get(_ATTRIBUTE)
    if engine is None:
        raise UsageError(f"this {type(model).__name__} is not offloaded; call slidecore.offload(model) first")
    assert isinstance(engine, Engine)
    return engine


def offload(
    model: Model,
    *,
    device: str | torch.device = "auto",
    compute_dtype: torch.dtype | None = None,
    moments: Moments = "float32",
    device_memory: int | float | str | None = None,
    window: int = 2,
    micro_batch: int | Literal["auto"] = "auto",
    keep_graphs: int | Literal["auto"] = "auto",
    blocks: Sequence[str | nn.Module] | None = None,
    keep: Keep | None = None,
    train: bool = True,
    kernels: Kernels = "auto",
    threads: int = 0,
    piece_bytes: int = 16 << 20,
    ring_pieces: int | Literal["auto"] = "auto",
    host_memory: int | str | None = None,
    disk: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    disk_memory: int | str | None = None,
    gpu_direct: bool = False,
) -> Model:
    """Makes `model` compute on `device` with its weights in host memory, in place; returns the same object.

    Args:
        model: any module with a run of same-class blocks. Its parameters may be on any device, or on "meta": they are
            then zero until `assign_parameter` sets them. They become CPU views of the weight planes.
        device: "auto" (a card if PyTorch sees one, else the host backend), "cuda", "cuda:1", or "cpu" (host backend).
        compute_dtype: torch.bfloat16 or torch.float32; None takes float32 on the host backend for a float32 model and
            bfloat16 otherwise.
        moments: what the optimizer's moments are kept in: "float32" (8 bytes a parameter), or "8bit" (2.0625 bytes; the
            update moves 14 bytes a parameter instead of 26). 8-bit moments are rounded at every step; docs/numerics.md
            has the format, docs/moments.md its loss curves beside those of float32.
        device_memory: bytes (or "20GiB") of device memory to stay within; None takes what the card has free.
        window: slots of the window that blocks slide through; 2 overlaps copies with compute. More of them spare
            backward uploads that forward has made: none is left to it with as many slots as blocks, the most there are.
        micro_batch: samples a visit computes at once; "auto" takes what the budget allows.
        keep_graphs: how many of the last blocks keep their graph instead of recomputing; "auto" as the budget allows.
        blocks: names or modules of the blocks, where the structure does not show them.
        keep: parameters that stay ordinary ones on the device, for an optimizer of torch.optim: a list of their names,
            of modules (or their names) or of parameters, or a function of (name, parameter) that says so. None keeps
            the adapters of a PEFT model and whatever else of it is trained; [] nothing. Their bytes (of trained ones:
            with gradients and two moments) count as device memory; their dtypes stay as they are.
        train: False allocates no optimizer state and no gradients: for inference alone.
        kernels: "liger" runs the layers of models that Liger-Kernel knows with its kernels, "torch" as they are; "auto"
            takes Liger-Kernel on a card where it is installed.
        threads: of the CPU update; 0 for all usable CPUs less one.
        piece_bytes, ring_pieces: size and number of the pinned pieces that gradients come down in. "auto" makes room
            for an eighth of the gradients (a sixteenth with 8-bit moments): that much of the update goes on during the
            next forward.
        host_memory: bytes (or "100GiB") of host memory for planes, rings, buffers and saved inputs together; what does
            not fit goes to `disk`. None: no limit, or with `disk`, 90 % of the memory that is available now.
        disk: a directory, or one for each drive (files are striped over them), for swap files. They are removed at
            exit, and after a crash by the next run that uses the directory.
        disk_memory: bytes that may lie there; None takes what the drives have free.
        gpu_direct: saved inputs that go to disk go there from device memory, and back, by NVIDIA's cuFile (GPUDirect
            Storage), without a copy in host memory where the nvidia-fs kernel module is loaded.

    Raises:
        ModelError: no blocks were found, the model is offloaded already, a block shares a parameter, `keep` names
            what the model does not have, a parameter has a hook for its gradient, an embedding is sparse, or a lazy
            module is not initialized.
        BudgetError: `device_memory`, `host_memory` or `disk_memory` is too small; the message says what works.
        slidecore._core.Error: a directory of `disk` cannot be used, another process uses it, or it lacks the space.
        ValueError: an argument is out of its range.
        TypeError: `disk` is no directory, nor a list of directories.
        UsageError: the device is not usable, or cuFile with `gpu_direct`.
    """
    if _ATTRIBUTE in model.__dict__:
        raise ModelError("this model is offloaded already; slidecore.close(model) undoes it")
    if any(id(p) in engine.entries for engine in engines if not engine.closed for p in model.parameters()):
        raise ModelError(
            "parameters of this model are offloaded already, with a model that holds it or a part of it; offload the "
            "outermost model only"
        )
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window} must be a whole number of at least 1 (2 to overlap)")
    for name, number in (("micro_batch", micro_batch), ("keep_graphs", keep_graphs)):
        least = 1 if name == "micro_batch" else 0
        if number != "auto" and (not isinstance(number, int) or number < least):
            raise ValueError(f"{name}={number!r} must be 'auto' or a whole number of at least {least}")
    if piece_bytes < 1 or (piece_bytes > 4096 and piece_bytes % 4096):
        raise ValueError(f"piece_bytes={piece_bytes} must be a multiple of 4096 (or less, which means 4096)")
    if ring_pieces != "auto" and (not isinstance(ring_pieces, int) or ring_pieces < 2):
        raise ValueError(f"ring_pieces={ring_pieces!r} must be 'auto' or a whole number of at least 2")
    if threads < 0:
        raise ValueError(f"threads={threads} must be at least 0 (0 for all usable CPUs less one)")
    budget = None if device_memory is None else parse_size(device_memory, "device_memory")
    backend = Backend(device)
    if compute_dtype is None:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        whole = backend.is_host and first is not None and first.dtype == torch.float32
        compute_dtype = torch.float32 if whole else torch.bfloat16
    if compute_dtype == torch.float16:
        raise ValueError(_NO_FLOAT16)
    if compute_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"compute_dtype={compute_dtype} is not supported; use torch.bfloat16 or torch.float32")
    if moments not in get_args(Moments):
        raise ValueError(f"moments={moments!r} must be one of {', '.join(map(repr, get_args(Moments)))}")
    if kernels not in ("auto", "liger", "torch"):
        raise ValueError(f"kernels={kernels!r} must be 'auto', 'liger' or 'torch'")
    directories = _directories(disk)
    if disk_memory is not None and not directories:
        raise ValueError("disk_memory= needs disk=[directory, ...]")
    if gpu_direct:
        cufile.check(backend, has_disk=bool(directories), train=train)
    check_initialized(model)
    kept = choose(model, keep)
    check_model(model, kept, train)
    undo_kernels = liger.apply(model, kernels, on_card=not backend.is_host)
    engine = Engine(
        model,
        backend,
        compute_dtype=compute_dtype,
        moments=moments,
        device_memory=budget,
        window=window,
        micro_batch=None if micro_batch == "auto" else micro_batch,
        keep_graphs=None if keep_graphs == "auto" else keep_graphs,
        blocks=blocks,
        kept=kept,
        train=train,
        threads=threads,
        piece_bytes=piece_bytes,
        ring_pieces=None if ring_pieces == "auto" else ring_pieces,
        host_memory=None if host_memory is None else parse_size(host_memory, "host_memory"),
        disk=directories,
        disk_memory=None if disk_memory is None else parse_size(disk_memory, "disk_memory"),
        gpu_direct=gpu_direct,
    )
    _move_buffers(model, backend.torch_device)
    engine.wrap()
    roots.wrap(model, engine)
    model.__dict__[_ATTRIBUTE] = engine
    _hook(model, engine)
    huggingface.attach(model, engine)
    if undo_kernels is not None:
        engine.detach.append(undo_kernels)
    return model


def _directories(disk: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> list[str]:
    given: Any = [] if disk is None else [disk] if isinstance(disk, (str, os.PathLike)) else disk
    try:
        paths = [os.fspath(directory) for directory in given]
    except TypeError:
        paths = [None]
    if not all(isinstance(path, str) for path in paths):
        raise TypeError(
            f"disk={disk!r} must be a directory, or a list of directories, each a str or an os.PathLike[str]"
        )
    return paths


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _hook(model: nn.Module, engine: Engine) -> None:
    def loaded(module: nn.Module, _: Any) -> None:
        for parameter in module._parameters.values():
            if id(parameter) in engine.entries:
                chunk, entry = engine.entries[id(parameter)]
                overwritten(engine, chunk, entry)

    def settle(module: nn.Module, *_: Any) -> None:
        check_present(
            module,
            "a state dict of all weights may not fit there. slidecore.save_checkpoint(model, optimizer, directory), or "
            "save_pretrained(directory) of a model of transformers, writes one chunk at a time; "
            "slidecore.master_parameter(model, name) gives single parameters",
        )
        engine.drain()

    def loading(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise UsageError(
                "load_state_dict(assign=True) would put other tensors in the place of the planes that the model "
                "computes with; use assign=False, which copies into them"
            )
        check_present(
            module,
            "load_state_dict cannot copy into it. slidecore.load_checkpoint loads what save_checkpoint has written; "
            "slidecore.assign_parameter(model, name, value) sets single parameters",
        )
        engine.drain()

    def apply(function: Any, recurse: bool = True) -> nn.Module:
        """Replaces Module._apply: .to(device), .cuda(), .half() and so on."""
        probe = function(torch.zeros(0, dtype=engine.compute_dtype))
        if probe.dtype != engine.compute_dtype:
            raise UsageError(
                f"the dtype of an offloaded model is fixed ({engine.compute_dtype}); give compute_dtype= to offload()"
            )
        return model  # where weights compute is slidecore's business; their masters stay in host memory

    handles: list[Any] = []
    for part in model.modules():  # whose state may be asked for, or loaded, by itself
        handles += [
            part.register_state_dict_pre_hook(settle),
            part.register_load_state_dict_pre_hook(loading),
            part.register_load_state_dict_post_hook(loaded),
        ]
    parts = list(model.modules())
    model.__dict__["_apply"] = apply
    model.__dict__["no_sync"] = engine.no_sync
    for part in parts:
        part.__dict__["__reduce_ex__"] = engine.refuse_copy

    def restore() -> None:
        model.__dict__.pop("_apply", None)
        model.__dict__.pop("no_sync", None)
        for part in parts:
            part.__dict__.pop("__reduce_ex__", None)

    engine.detach = [*(handle.remove for handle in handles), restore]


def close(model: nn.Module) -> None:
    """Ends offloading: waits for updates, frees device memory and threads; the weights stay on the CPU.

    Raises:
        UsageError: `model` is not offloaded.
        Error: weights that were not in memory do not fit there; the model is closed, but those cannot be used.
    """
    engine = engine_of(model)
    if engine.deferred.waiting():
        logger.warning("closing a model whose gradients wait for optimizer.step(): they are dropped")
    try:
        bring_back_weights(engine)
    finally:
        engine.close()
        for undo in engine.detach:
            undo()
        del model.__dict__[_ATTRIBUTE]


def synchronize(model: nn.Module) -> None:
    """Waits until all updates have reached the planes, for code that looks at `p.data` itself.

    Raises:
        UsageError: `model` is not offloaded.
        Error: a lane has failed.
    """
    engine_of(model).drain()


def set_budget(
    model: nn.Module,
    *,
    host_memory: int | str | None = None,
    disk_memory: int | str | None = None,
) -> None:
    """Changes the memory budgets of an offloaded model between steps; planes go to disk, or come back, at once.

    What is trained is the same whatever lies where. After the machine ran short of memory and planes went down by
    themselves, a call with `host_memory` brings them back.

    Args:
        model: an offloaded model.
        host_memory, disk_memory: as of `offload`; None leaves the budget as it is.

    Raises:
        UsageError: `model` is not offloaded, has no disk, or a step is under way: a forward whose graph is still
            there, or a backward pass. A graph that was dropped, and a pass that failed, are none.
        BudgetError: a budget is too small; nothing was changed.
        slidecore._core.Error: the drives lack the space.
    """
    engine = engine_of(model)
    if not engine.between_steps():
        raise UsageError(
            "set_budget() is for between steps: after optimizer.step(), before the next forward. The graph of a "
            "forward is still there: call backward() on its loss, or drop all that holds the graph (`del loss`); "
            "forwards under torch.no_grad() have none"
        )
    engine.tiers.set_budgets(
        None if host_memory is None else parse_size(host_memory, "host_memory"),
        None if disk_memory is None else parse_size(disk_memory, "disk_memory"),
    )


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Clips the norm of all of the model's gradients together, between backward and `optimizer.step()`.

    Needs deferred updates (`slidecore.AdamW(..., update="deferred")`). No gradient is touched: with `norm_type=2` the
    norms are known, and the factor is applied by the update, in float32.

    Args:
        model: an offloaded model.
        max_norm, norm_type, error_if_nonfinite: as of `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping, a float32 scalar on the CPU.

    Raises:
        UsageError: `model` is not offloaded, or its gradients were consumed by overlapping updates.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
    """
    engine = engine_of(model)
    if engine.state == "backward":
        raise UsageError(
            "clip_grad_norm_ is called between backward() and optimizer.step(); the last backward has not finished (or "
            "has failed, and its gradients will be dropped)"
        )
    return nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None], max_norm, norm_type, error_if_nonfinite
    )


def assign_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Sets the master value of parameter `name` (as in `named_parameters`) from a tensor of any float dtype.

    float32 values are kept exactly (bf16 weight and residual).

    Raises:
        ModelError: there is no such parameter, it is kept on the device, or shape or dtype do not fit.
        UsageError: `model` is not offloaded.
    """
    engine = engine_of(model)
    chunk, entry = _entry_of(model, engine, name)
    engine.scheduler.synchronize()
    engine.planes.write(chunk, entry, tensor)
    note_version(entry)  # what was changed in place before is replaced
    engine.scheduler.invalidate(chunk.index)
    engine.generation += 1


def master_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """The float32 master value of parameter `name`, a copy in host memory.

    Raises:
        ModelError: there is no such parameter, or it is kept on the device.
        UsageError: `model` is not offloaded.
    """
    engine = engine_of(model)
    chunk, entry = _entry_of(model, engine, name)
    engine.scheduler.synchronize()
    take_over(engine, [(chunk, entry)])
    return engine.planes.master(chunk, entry)


def _entry_of(model: nn.Module, engine: Engine, name: str) -> tuple[Chunk, Entry]:
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"the model has no parameter named {name!r}") from error
    if id(parameter) not in engine.entries:
        raise ModelError(f"parameter {name!r} is kept on the device: it has no master, read or change it directly")
    return engine.entries[id(parameter)]


@dataclass(frozen=True)
class Stats:
    """Sizes in bytes, and what the scheduler and the disk tier counted since offload()."""

    parameters: int
    device_memory: int
    device_memory_peak: int
    host_memory: int
    planes_bytes: int
    saved_inputs_bytes: int
    ordinary_training_bytes: int
    counters: dict[str, int]
    disk_memory: int = 0
    disk_counters: dict[str, int] = field(default_factory=dict)
    disk_traffic: Traffic = field(default_factory=lambda: Traffic(0, 0))


def stats(model: nn.Module) -> Stats:
    """Memory in use and the scheduler's counters.

    `device_memory` is PyTorch's allocated memory on a card, and on the host backend what slidecore places there: slots,
    gradients, saved inputs and graphs. `host_memory` is planes, rings, buffers and saved inputs, `disk_memory` what
    lies in swap files, `disk_counters` what was read and written there (with `gpu_direct`, also what of that went by
    cuFile). `disk_traffic` is what a step is foretold to read and write (`read_bytes`, `written_bytes`), how long the
    drives need for it (`seconds`) and what that wears (`terabytes_per_1000_steps`, `terabytes_per_day`); saved inputs
    and accumulation come on top of it. `ordinary_training_bytes` is what weights and gradients in the compute dtype
    with float32 masters and moments take on a device.

    Raises:
        UsageError: `model` is not offloaded.
    """
    engine = engine_of(model)
    now, peak = engine.backend.memory_in_use()
    store = engine.tiers.store
    parameters = sum(e.numel for c in engine.chunks for e in c.entries)
    trainable = sum(e.numel for c in engine.chunks for e in c.entries if e.trainable)
    item = engine.compute_dtype.itemsize
    masters = 4 if item < 4 else 0
    return Stats(
        parameters=parameters,
        device_memory=now,
        device_memory_peak=peak,
        host_memory=engine.planes.nbytes
        + engine.ring_bytes
        + engine.tiers.buffer_bytes
        + engine.saved_inputs.host_bytes,
        planes_bytes=engine.planes.nbytes,
        saved_inputs_bytes=engine.saved_inputs.host_bytes,
        ordinary_training_bytes=parameters * item + trainable * (item + masters + 8),
        counters=engine.scheduler.counters(),
        disk_memory=store.nbytes if store is not None else 0,
        disk_counters=store.counters() if store is not None else {},
        disk_traffic=engine.tiers.traffic(),
    )


@atexit.register
def _close_all() -> None:
    # The lanes must have ended before the driver and PyTorch's allocator are torn down.
    for engine in list(engines):
        engine.close()


__all__ = [
    "Stats",
    "assign_parameter",
    "clip_grad_norm_",
    "close",
    "engine_of",
    "master_parameter",
    "offload",
    "set_budget",
    "stats",
    "synchronize",
]
