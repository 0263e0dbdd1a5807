"""`save_pretrained` of an offloaded model: weights as a stream from their planes, everything else by transformers.

transformers' own takes a state dict first. Of weights that are not in memory there is none, and of those that are it
copies all, because they share the storage of a plane.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from slidecore.checkpoints.directories import staging
from slidecore.checkpoints.files import failure, sync_directory
from slidecore.checkpoints.saving import write_weights
from slidecore.checkpoints.weights import INDEX, is_transformers_model
from slidecore.integrations.huggingface import without_bars
from slidecore.sizes import parse_size

if TYPE_CHECKING:
    from slidecore.engine import Engine

_NEEDED = {"save_directory", "is_main_process", "state_dict", "max_shard_size"}
_WEIGHTS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX)}")


def attach(model: nn.Module, engine: Engine) -> None:
    """Replaces `model.save_pretrained` until the model is closed; arguments and what is written mean the same.

    What asks for another form (a state dict of its own, another format, names that are not the original's, an upload)
    is left to transformers, which needs the weights in memory.
    """
    original: Any = model.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if not _streams(model, bound.arguments):
            return original(*args, **kwargs)
        bound.arguments["state_dict"] = {}
        if not bound.arguments["is_main_process"]:
            return original(*bound.args, **bound.kwargs)  # another process writes
        _save(model, engine, original, bound)
        return None

    model.__dict__["save_pretrained"] = save_pretrained
    engine.detach.append(lambda: model.__dict__.pop("save_pretrained", None))


def _streams(model: nn.Module, arguments: dict[str, Any]) -> bool:
    if not arguments.keys() >= _NEEDED:  # a model's own save_pretrained
        return False
    more = arguments.get("kwargs", {})
    return (
        arguments["state_dict"] is None
        and not arguments.get("push_to_hub", False)
        and arguments.get("variant") is None
        and arguments.get("save_original_format", True)
        and not arguments.get("distributed_checkpoint", False)
        and arguments.get("safe_serialization", more.get("safe_serialization", True))
        and getattr(model, "hf_quantizer", None) is None
        and is_transformers_model(model)
        and not os.path.isfile(arguments["save_directory"])
    )


def _save(model: nn.Module, engine: Engine, original: Any, bound: inspect.BoundArguments) -> None:
    """
    Raises:
        CheckpointError: a call of the system failed; what was in the directory before is there still, unless names
            could not be given.
    """
    directory = Path(bound.arguments["save_directory"])
    limit = parse_size(bound.arguments["max_shard_size"], "max_shard_size")
    engine.drain()
    with staging(directory / "model") as temporary:
        bound.arguments["save_directory"] = temporary
        with without_bars():
            original(*bound.args, **bound.kwargs)
        for file in temporary.glob("*.safetensors"):  # of the empty state
            file.unlink()
        write_weights(model, engine, temporary, limit)
        try:
            _replace(temporary, directory)
        except OSError as error:
            raise failure("give their names to the files in", directory, error) from error
        sync_directory(directory)


def _replace(temporary: Path, directory: Path) -> None:
    """Moves all files; weights of an earlier model, which may have had other shards, go first.

    `config.json` is gone in between, so that half of a replacement cannot be mistaken for a model.
    """
    (directory / "config.json").unlink(missing_ok=True)
    for old in directory.iterdir():
        if _WEIGHTS.fullmatch(old.name):
            old.unlink()
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.name == "config.json"):
        target = directory / file.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
