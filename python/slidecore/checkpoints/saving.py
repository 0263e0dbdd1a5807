"""Writing a checkpoint: plan every file, write them side by side, publish the directory in one step."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slidecore.checkpoints import state as training_state
from slidecore.checkpoints.checks import check_at_rest, check_usable
from slidecore.checkpoints.chunks import describe_chunks, describe_others, lay_out_planes, layout_of, planes_of
from slidecore.checkpoints.directories import (
    check_exchange,
    check_target,
    is_occupied,
    next_sequence,
    publish,
    remove_old,
    staging,
)
from slidecore.checkpoints.files import (
    FileRecord,
    FileWriter,
    Stop,
    bytes_of,
    choose_threads,
    failure,
    run_all,
    sync_directory,
)
from slidecore.checkpoints.layout import FileLayout
from slidecore.checkpoints.manifest import FORMAT, MANIFEST, OTHERS, STATE, encode_manifest, planes_file
from slidecore.checkpoints.side_files import write_side_files
from slidecore.checkpoints.weights import INDEX, WeightFiles, other_tensors, plan_weight_files
from slidecore.errors import CheckpointError
from slidecore.offloading import engine_of
from slidecore.sizes import parse_size

if TYPE_CHECKING:
    from slidecore.engine import Engine

# By name: how large a file will be, and what writes it into a directory.
_Writes = dict[str, tuple[int, Callable[[Path], FileRecord]]]


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    directory: str | Path,
    *,
    scheduler: Any = None,
    extra: Any = None,
    tokenizer: Any = None,
    keep: int | None = None,
    overwrite: bool = False,
    shard_size: int | str = "4GB",
    threads: int = 0,
) -> Path:
    """Writes everything that a run needs to go on bit by bit as if it had not stopped.

    `directory` then holds the weights as safetensors files (with the configuration of a model of transformers, so that
    `from_pretrained` reads it), and in `training/` residuals, moments, step counts, the optimizer's options, the
    scheduler, and the states of PyTorch's, NumPy's and Python's random generators. Weights are those that the model
    computes with; masters are weights and residuals together.

    Pending updates are waited for. Files are written from the planes' own memory, several at a time; beside them a few
    MB are needed (one chunk for models whose weights have another form in files than in memory). The directory appears
    in one step when all of it is on the disk: whatever fails or is killed on the way leaves earlier checkpoints as
    they are.

    Args:
        model: an offloaded model.
        optimizer: its slidecore.AdamW; or, where all that is trained is kept on the device, the optimizer of
            torch.optim that does it (the state of one beside a slidecore.AdamW can be part of `extra`).
        directory: where to; must not exist or be empty, unless `overwrite`. For example "run/step-000100".
        scheduler: a learning-rate scheduler, or anything with state_dict and load_state_dict.
        extra: the caller's own state, which `load_checkpoint` returns: the position in the data, say. Tensors, and
            numbers, strings, None, lists, tuples, sets and dicts of them.
        tokenizer: saved beside the weights (`save_pretrained`).
        keep: after saving, removes all but the last `keep` complete checkpoints of the series: those beside
            `directory` whose names differ in the digits at the end. None removes nothing.
        overwrite: replace the checkpoint at `directory`, in one step.
        shard_size: weights are split into files of about this size, in bytes or such as "4GB".
        threads: files written at the same time; 0: as many as there are CPUs, at most 8.

    Returns:
        `directory` as a path.

    Raises:
        UsageError: the model is between forward, backward and `optimizer.step()`, was offloaded with train=False, is
            another optimizer's, or something given cannot be saved.
        CheckpointError: `directory` is occupied, the disk has too little space, or a call of the system failed; the
            message names file and offset. Nothing new is at `directory` then, and nothing old is gone.
    """
    target = Path(directory).absolute()
    engine = engine_of(model)
    check_usable(engine, optimizer)
    check_at_rest(model, engine)
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} must be at least 1 (or None, to keep all)")
    threads = choose_threads(threads)
    limit = parse_size(shard_size, "shard_size")
    check_target(target, overwrite=overwrite)
    engine.drain()

    state = training_state.encode(training_state.collect(model, engine, optimizer, scheduler, extra))
    stop = Stop()
    weights = plan_weight_files(model, engine, limit)
    writes = _weight_writes(weights, stop)
    body = _plan_training_state(model, engine, weights, writes, stop)
    writes[STATE] = len(state), partial(_write_bytes, name=STATE, data=state, stop=stop)
    body["sequence"] = next_sequence(target.parent)

    with staging(target) as temporary:
        _check_space(temporary, sum(nbytes for nbytes, _ in writes.values()))
        if is_occupied(target):
            check_exchange(temporary)
        files = write_side_files(model, tokenizer, temporary)
        try:
            os.mkdir(temporary / "training")
        except OSError as error:
            raise failure("create", temporary / "training", error) from error
        files.update(_write_all(writes, temporary, threads, stop))
        _write_bytes(temporary, name=MANIFEST, data=memoryview(encode_manifest(body, files)), stop=stop)
        sync_directory(temporary / "training")
        publish(temporary, target)
    if keep is not None:
        remove_old(target, keep)
    return Path(directory)


def write_model(
    model: nn.Module, directory: Path, *, tokenizer: Any = None, shard_size: int | str = "4GB", threads: int = 0
) -> None:
    """Writes weights, configuration and tokenizer into an empty directory, as `save_checkpoint` does: synced, streamed.

    transformers' own `save_pretrained` copies all weights first, because they share the storage of a plane.

    Raises:
        UsageError: `model` is not offloaded.
        CheckpointError: a call of the system failed.
    """
    engine = engine_of(model)
    engine.drain()
    stop = Stop()
    weights = plan_weight_files(model, engine, parse_size(shard_size, "shard_size"))
    write_side_files(model, tokenizer, directory)
    _write_all(_weight_writes(weights, stop), directory, choose_threads(threads), stop)
    sync_directory(directory)


def _write_all(writes: _Writes, directory: Path, threads: int, stop: Stop) -> dict[str, FileRecord]:
    # The largest first, so that what is written last, alone, is small.
    order = sorted(writes, key=lambda name: -writes[name][0])
    records = run_all([partial(writes[name][1], directory) for name in order], threads, stop)
    return dict(zip(order, records, strict=True))


def _weight_writes(weights: WeightFiles, stop: Stop) -> _Writes:
    writes: _Writes = {}
    converting = threading.Lock()
    for shard in weights.shards:
        writes[shard.name] = shard.layout.nbytes, partial(shard.write, stop=stop, converting=converting)
    if weights.index is not None:
        text = json.dumps(weights.index, indent=2, sort_keys=True).encode()
        writes[INDEX] = len(text), partial(_write_bytes, name=INDEX, data=memoryview(text), stop=stop)
    return writes


def _plan_training_state(
    model: nn.Module, engine: Engine, weights: WeightFiles, writes: _Writes, stop: Stop
) -> dict[str, Any]:
    """Adds the files of planes and other tensors to `writes`; returns the manifest's body."""
    layouts = {chunk: lay_out_planes(engine, chunk, whole=chunk in weights.converted) for chunk in engine.chunks}
    for chunk, layout in layouts.items():
        if layout is not None:
            name, tensors = planes_file(chunk.index), planes_of(engine, chunk)
            writes[name] = layout.nbytes, partial(_write_tensors, name=name, layout=layout, tensors=tensors, stop=stop)
    others = {name: t.detach().cpu().contiguous() for name, t in other_tensors(model, engine).items()}
    layout = layout_of(others)
    writes[OTHERS] = (
        layout.nbytes,
        partial(_write_tensors, name=OTHERS, layout=layout, tensors=others, stop=stop),
    )
    from slidecore import __version__

    return {
        "format": FORMAT,
        "slidecore": __version__,
        "model": type(model).__name__,
        "compute_dtype": str(engine.compute_dtype).removeprefix("torch."),
        "chunks": describe_chunks(engine, layouts, weights.places()),
        "others": describe_others(layout),
    }


def _check_space(directory: Path, nbytes: int) -> None:
    """Raises CheckpointError where the disk has too little space left: before hours of writing, not after."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise failure("ask for the free space of", directory, error) from error
    if free < nbytes:
        raise CheckpointError(
            f"this checkpoint takes {nbytes / 2**30:.1f} GiB, but {directory.parent} has {free / 2**30:.1f} GiB free"
        )


def _write_tensors(
    directory: Path, *, name: str, layout: FileLayout, tensors: dict[str, torch.Tensor], stop: Stop
) -> FileRecord:
    with FileWriter(directory / name, stop) as file:
        file.write(layout.header)
        for spec in layout.tensors:
            file.write(bytes_of(tensors[spec.name]))
        return file.finish()


def _write_bytes(directory: Path, *, name: str, data: memoryview, stop: Stop) -> FileRecord:
    with FileWriter(directory / name, stop) as file:
        file.write(data)
        return file.finish()
