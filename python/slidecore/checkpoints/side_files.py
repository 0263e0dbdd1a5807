"""The small files that libraries write beside the weights: configuration, generation settings, tokenizer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from slidecore.checkpoints.files import PIECE, FileRecord, failure, record_of
from slidecore.checkpoints.weights import is_transformers_model
from slidecore.errors import CheckpointError
from slidecore.integrations.huggingface import without_bars


def write_side_files(model: nn.Module, tokenizer: Any, directory: Path) -> dict[str, FileRecord]:
    """Lets transformers and the tokenizer write their files, and makes them last; returns their records by name.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        if is_transformers_model(model):
            _write_configuration(model, directory)
        if tokenizer is not None:
            with without_bars():
                tokenizer.save_pretrained(directory)
    except OSError as error:
        raise failure("write configuration and tokenizer in", directory, error) from error
    except Exception as error:  # the tokenizers library raises plain Exception, for a full disk as for anything
        raise CheckpointError(f"cannot write configuration and tokenizer in {directory}: {error}") from error
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _adopt(path) for path in paths}


def _write_configuration(model: Any, directory: Path) -> None:
    """What `save_pretrained` writes besides the weights."""
    try:
        with without_bars():
            model.save_pretrained(directory, state_dict={})
    except ValueError as error:
        # Its checks of generation settings come after config.json; a run is worth more than them.
        warnings.warn(f"the checkpoint is saved without generation_config.json: {error}", stacklevel=4)
    for weights in directory.glob("*.safetensors"):  # of the empty state: the real ones are streamed
        weights.unlink()
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"transformers has written no config.json in {directory}")


def _adopt(path: Path) -> FileRecord:
    """The record of a file that somebody else has written; syncs it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = bytearray()
            while part := os.read(fd, PIECE):
                data += part
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise failure("sync", path, error) from error
    return record_of(data)
