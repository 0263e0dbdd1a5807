"""Reading a checkpoint: compare it with the model, check every byte, and only then fill the planes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slidecore.checkpoints import state as training_state
from slidecore.checkpoints.checks import check_at_rest, check_usable
from slidecore.checkpoints.chunks import describe_entries, describe_planes
from slidecore.checkpoints.files import Stop, bytes_of, choose_threads
from slidecore.checkpoints.filling import fill_from, fillings_of_planes, run_largest_first
from slidecore.checkpoints.manifest import MANIFEST, OTHERS, STATE, Manifest, read_manifest
from slidecore.checkpoints.weights import other_tensors
from slidecore.errors import CheckpointError
from slidecore.offloading import engine_of

if TYPE_CHECKING:
    from slidecore.engine import Engine


def load_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    directory: str | Path,
    *,
    scheduler: Any = None,
    random_state: bool = True,
    verify: bool = True,
    threads: int = 0,
) -> Any:
    """Puts a model, its optimizer and the random states where `save_checkpoint` found them.

    Build the model as in the run that was saved (its weights may be anything, even "meta"), offload it with the same
    compute dtype and blocks, and create optimizer and scheduler with the same groups. What follows is bit for bit what
    the saved run would have done, on the same device, with the same budgets.

    Args:
        model: an offloaded model, between steps.
        optimizer: of the kind that was saved; the groups' options become those that were saved. `max_grad_norm` and
            `skip_nonfinite` of slidecore.AdamW have to be those that were saved already.
        directory: a checkpoint; see `latest_checkpoint`.
        scheduler: given if, and only if, one was saved; of the same class.
        random_state: False leaves the random generators as they are.
        verify: read everything once to check it before anything is changed, and a second time to fill the planes. False
            reads once and checks on the way: half the time where the files do not fit the page cache, but a damaged
            file is found when parts of the model are overwritten (the error says so; build the model anew then).
        threads: files read at the same time; 0: as many as there are CPUs, at most 8.

    Returns:
        `extra` of `save_checkpoint`.

    Raises:
        CheckpointError: there is no complete checkpoint, a file is missing, truncated or damaged, or it belongs to
            another model, dtype, optimizer or scheduler. Nothing was changed (see `verify` for the exception).
        UsageError: the model is between forward, backward and `optimizer.step()`, was offloaded with train=False, or is
            another optimizer's.
    """
    engine = engine_of(model)
    check_usable(engine, optimizer)
    check_at_rest(model, engine)
    threads = choose_threads(threads)
    manifest = read_manifest(Path(directory))
    manifest.check_sizes()
    _check_model(manifest, engine)
    others = other_tensors(model, engine)
    _check_others(manifest, others)
    state = read_state(manifest)
    training_state.check_fits(state, engine, optimizer, scheduler, model)
    if verify:
        stop = Stop()
        checks = [fill_from(manifest, name, (), stop, keep_cached=True) for name in manifest.files]
        run_largest_first(manifest, checks, threads, stop)

    engine.drain()
    staged = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in others.items()}
    stop = Stop()
    fillings = [
        *fillings_of_planes(manifest, engine, stop),
        fill_from(
            manifest, OTHERS, [(s["offset"], bytes_of(staged[s["name"]])) for s in manifest.body["others"]], stop
        ),
    ]
    if not verify:
        filled = {name for filling in fillings for name in filling.names}
        fillings += [fill_from(manifest, name, (), stop) for name in manifest.files if name not in filled]
    try:
        run_largest_first(manifest, fillings, threads, stop)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error.message}. Parts of the model have been overwritten: build it anew before going on"
        ) from error
    finally:
        for chunk in engine.chunks:
            engine.scheduler.invalidate(chunk.index)
    with torch.no_grad():
        for name, tensor in others.items():
            tensor.copy_(staged[name])
    for chunk, said in zip(engine.chunks, manifest.body["chunks"], strict=True):
        for entry, kept in zip(chunk.entries, said["entries"], strict=True):
            entry.step = int(kept["step"])
    training_state.apply(state, model, engine, optimizer, scheduler, random_state)
    return state["extra"]


def read_state(manifest: Manifest) -> dict[str, Any]:
    """The training state besides the planes: a dict with `extra`, `groups`, `scheduler` and more."""
    return training_state.decode(manifest.read(STATE), str(manifest.directory / STATE))


def _parts_of_others(manifest: Manifest, staged: dict[str, torch.Tensor]) -> list[tuple[int, memoryview]]:
    return [(said["offset"], bytes_of(staged[said["name"]])) for said in manifest.body["others"]]


def _check_model(manifest: Manifest, engine: Engine) -> None:
    """Raises CheckpointError naming the first thing in which the model differs from the one that was saved."""
    where = manifest.directory / MANIFEST
    dtype = str(engine.compute_dtype).removeprefix("torch.")
    kept_dtype = manifest.body["compute_dtype"]
    if kept_dtype != dtype:
        raise CheckpointError(
            f"{where}: saved with compute_dtype={kept_dtype}, but the model was offloaded with {dtype}"
        )
    _check_entries(where, manifest.body["chunks"], engine)
    for chunk, said in zip(engine.chunks, manifest.body["chunks"], strict=True):
        mine = describe_planes(engine, chunk)
        for name in sorted(mine.keys() | said["planes"].keys()):
            if mine.get(name) != said["planes"].get(name):
                raise CheckpointError(
                    f"{where}: the {name} plane of {chunk.name!r} was saved as {_form(said['planes'].get(name))}, the "
                    f"model has {_form(mine.get(name))}: offload it with the options of the run that was saved"
                )


def _check_entries(where: Path, chunks: list[dict[str, Any]], engine: Engine) -> None:
    saved = {entry["name"]: entry for chunk in chunks for entry in chunk["entries"]}
    mine = {entry["name"]: entry for chunk in engine.chunks for entry in describe_entries(chunk)}
    for name in [*mine, *saved]:
        if name not in saved:
            raise CheckpointError(f"{where}: the checkpoint is of another model; it has no parameter {name!r}")
        if name not in mine:
            raise CheckpointError(f"{where}: the checkpoint is of another model; it has a parameter {name!r}")
        if saved[name]["shape"] != mine[name]["shape"]:
            raise CheckpointError(
                f"{where}: {name} has shape {saved[name]['shape']} in the checkpoint and {mine[name]['shape']} in the "
                f"model"
            )
        if saved[name]["trainable"] != mine[name]["trainable"]:
            word = "trained" if saved[name]["trainable"] else "frozen"
            raise CheckpointError(f"{where}: {name} was {word} in the run that was saved, and is not in this model")
    layouts = [
        [(c["name"], [(e["name"], e["offset"]) for e in c["entries"]]) for c in chunks],
        [(c.name, [(e["name"], e["offset"]) for e in describe_entries(c)]) for c in engine.chunks],
    ]
    if layouts[0] != layouts[1]:
        raise CheckpointError(
            f"{where}: the parameters are the model's, but they were divided into other chunks; offload with the "
            f"blocks= (and the version of slidecore) of the run that was saved"
        )


def _form(plane: dict[str, Any] | None) -> str:
    return "none" if plane is None else f"{plane['numel']} elements of {plane['dtype'].removeprefix('torch.')}"


def _check_others(manifest: Manifest, others: dict[str, torch.Tensor]) -> None:
    saved = {said["name"]: (said["dtype"], said["shape"]) for said in manifest.body["others"]}
    mine = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in others.items()}
    for name in [*mine, *saved]:
        if saved.get(name) != mine.get(name):
            raise CheckpointError(
                f"{manifest.directory / MANIFEST}: {name!r} (a buffer, or a parameter kept on the device) is "
                f"{saved.get(name, 'not there')} in the checkpoint and {mine.get(name, 'not there')} in the model"
            )
