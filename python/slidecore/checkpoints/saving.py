"""Writing a checkpoint: plan every file, write them side by side, publish the directory in one step."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slidecore.checkpoints import state as training_state
from slidecore.checkpoints.checks import check_at_rest, check_usable
from slidecore.checkpoints.chunks import PlanesFile, describe_chunks, describe_others, lay_out_planes, layout_of
from slidecore.checkpoints.directories import (
    check_exchange,
    check_target,
    is_occupied,
    next_sequence,
    publish,
    remove_old,
    resolve_target,
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
from slidecore.checkpoints.held import HeldWeights
from slidecore.checkpoints.layout import FileLayout
from slidecore.checkpoints.manifest import FORMAT, MANIFEST, OTHERS, STATE, encode_manifest
from slidecore.checkpoints.side_files import write_side_files
from slidecore.checkpoints.weights import INDEX, Shard, WeightFiles, other_tensors, plan_weight_files
from slidecore.errors import CheckpointError
from slidecore.offloading import engine_of
from slidecore.sizes import parse_size

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.partition import Chunk
    from slidecore.planes import Planes


@dataclass(frozen=True)
class _Write:
    """Files that one thread writes into a directory one after the other; `run` returns their records by name."""

    nbytes: int
    run: Callable[[Path], dict[str, FileRecord]]


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
        directory: where to; must not exist or be empty, unless `overwrite`. For example "run/step-000100". Of a
            symbolic link it is what the link points to.
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
    target = resolve_target(directory)
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
    others = {name: t.detach().cpu().contiguous() for name, t in other_tensors(model, engine).items()}
    planes_files = {
        chunk: PlanesFile(engine.planes, chunk, layout)
        for chunk in engine.chunks
        if (layout := lay_out_planes(engine, chunk, whole=chunk in weights.converted)) is not None
    }
    body = _describe(model, engine, weights, planes_files, layout_of(others))
    writes = [
        *_plan_writes(engine, weights, planes_files, stop),
        _Write(layout_of(others).nbytes, partial(_write_tensors, name=OTHERS, tensors=others, stop=stop)),
        _Write(len(state), partial(_write_bytes, name=STATE, data=state, stop=stop)),
    ]
    body["sequence"] = next_sequence(target.parent)

    with staging(target) as temporary:
        _check_space(temporary, sum(write.nbytes for write in writes))
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
    write_side_files(model, tokenizer, directory)
    write_weights(model, engine, directory, parse_size(shard_size, "shard_size"), threads)
    sync_directory(directory)


def write_weights(model: nn.Module, engine: Engine, directory: Path, shard_bytes: int, threads: int = 0) -> None:
    """Writes the weight files, and their index if there are several, into a directory that has none; pending updates
    must be done.

    Raises:
        CheckpointError: a call of the system failed.
    """
    stop = Stop()
    weights = plan_weight_files(model, engine, shard_bytes)
    _write_all(_plan_writes(engine, weights, {}, stop), directory, choose_threads(threads), stop)


def _write_all(writes: Sequence[_Write], directory: Path, threads: int, stop: Stop) -> dict[str, FileRecord]:
    # The largest first, so that what is written last, alone, is small.
    order = sorted(writes, key=lambda write: -write.nbytes)
    records = run_all([partial(write.run, directory) for write in order], threads, stop)
    return {name: record for written in records for name, record in written.items()}


def _plan_writes(
    engine: Engine, weights: WeightFiles, planes_files: Mapping[Chunk, PlanesFile], stop: Stop
) -> list[_Write]:
    """What writes the weight files and those of the planes."""
    writes: list[_Write] = []
    apart = dict(planes_files)
    if all(engine.planes.weight.present(chunk) for chunk in engine.chunks):
        converting = threading.Lock()
        for shard in weights.shards:
            run = partial(_write_shards, shards=[shard], planes=engine.planes, converting=converting, stop=stop)
            writes.append(_Write(shard.layout.nbytes, run))
    else:
        # One after the other, each chunk's weights once: also for a file of planes that holds them.
        inside = {chunk: apart.pop(chunk) for chunk in planes_files if chunk in weights.converted}
        nbytes = sum(shard.layout.nbytes for shard in weights.shards)
        nbytes += sum(file.layout.nbytes for file in inside.values())
        writes.append(_Write(nbytes, partial(_stream, weights=weights, inside=inside, planes=engine.planes, stop=stop)))
    writes += [_Write(file.layout.nbytes, partial(file.write, stop=stop)) for file in apart.values()]
    if weights.index is not None:
        text = json.dumps(weights.index, indent=2, sort_keys=True).encode()
        writes.append(_Write(len(text), partial(_write_bytes, name=INDEX, data=memoryview(text), stop=stop)))
    return writes


def _write_shards(
    directory: Path,
    *,
    shards: Sequence[Shard],
    planes: Planes,
    converting: threading.Lock,
    stop: Stop,
    held: HeldWeights | None = None,
) -> dict[str, FileRecord]:
    return {shard.name: shard.write(directory, stop, planes, converting, held) for shard in shards}


def _stream(
    directory: Path, *, weights: WeightFiles, inside: Mapping[Chunk, PlanesFile], planes: Planes, stop: Stop
) -> dict[str, FileRecord]:
    """Writes all weight files, and while a chunk's weights are in memory its file of planes if that is `inside`."""
    records: dict[str, FileRecord] = {}

    def arrived(chunk: Chunk) -> None:
        if chunk in inside:
            records.update(inside[chunk].write(directory, stop))

    with HeldWeights(planes, arrived=arrived) as held:
        lock = threading.Lock()
        records |= _write_shards(directory, shards=weights.shards, planes=planes, converting=lock, stop=stop, held=held)
    return records


def _describe(
    model: nn.Module,
    engine: Engine,
    weights: WeightFiles,
    planes_files: Mapping[Chunk, PlanesFile],
    others: FileLayout,
) -> dict[str, Any]:
    """The manifest's body."""
    from slidecore import __version__

    layouts = {chunk: planes_files[chunk].layout if chunk in planes_files else None for chunk in engine.chunks}
    return {
        "format": FORMAT,
        "slidecore": __version__,
        "model": type(model).__name__,
        "compute_dtype": str(engine.compute_dtype).removeprefix("torch."),
        "chunks": describe_chunks(engine, layouts, weights.places()),
        "others": describe_others(others),
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
    directory: Path, *, name: str, tensors: dict[str, torch.Tensor], stop: Stop
) -> dict[str, FileRecord]:
    layout = layout_of(tensors)
    with FileWriter(directory / name, stop) as file:
        file.write(layout.header)
        for spec in layout.tensors:
            file.write(bytes_of(tensors[spec.name]))
        return {name: file.finish()}


def _write_bytes(directory: Path, *, name: str, data: memoryview, stop: Stop) -> dict[str, FileRecord]:
    with FileWriter(directory / name, stop) as file:
        file.write(data)
        return {name: file.finish()}
