"""Checkpoints of a run: what makes it this run, and how it goes on."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import slidecore
from slidecore.checkpoints.loading import read_state
from slidecore.checkpoints.manifest import read_manifest
from slidecore.errors import CheckpointError, InputError
from slidecore.finetune.data import PackedData
from slidecore.finetune.options import Options
from slidecore.finetune.report import StepMetrics
from slidecore.finetune.training import Training

_DATA = "the data"
_ADDED = {"--max-grad-norm"}  # to what `identity_of` gives, since checkpoints were first saved
_MAY_BE_NONE, _ABSENT = ("eval_loss", "grad_norm"), " is None"


class Resumption:
    """A checkpoint that a run goes on from, read but for its planes.

    Attributes:
        path: its directory.
        step: number of steps taken when it was saved.
        compute_dtype: "bfloat16" or "float32".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            manifest = read_manifest(path)
            kept = read_state(manifest)["extra"]
        except CheckpointError as error:
            raise self._refused(error) from error
        if not isinstance(kept, dict) or not kept.keys() >= {"step", "identity", "history"}:
            raise InputError(
                f"{path} is not a checkpoint of `slidecore finetune`", "Give the --out of the run that is to go on."
            )
        self.step = int(kept["step"])
        self.compute_dtype = str(manifest.body["compute_dtype"])
        self._identity: dict[str, Any] = kept["identity"]
        self._history = kept["history"]

    def check(self, identity: dict[str, Any]) -> None:
        """Raises InputError naming the first option that is not that of the run to go on with."""
        # What earlier versions did not write down cannot be compared.
        for name in [name for name in identity if name not in _ADDED or name in self._identity] + [*self._identity]:
            mine, theirs = identity.get(name), self._identity.get(name)
            if mine != theirs:
                raise InputError(
                    f"{_DATA} is not that of the run saved in {self.path}"
                    if name == _DATA
                    else f"{name} is {mine}, but the run saved in {self.path} has {theirs}",
                    "Give the options and data of that run to go on with it, or another --out to begin a new one.",
                )

    def load(self, training: Training) -> None:
        """Puts model, optimizer, schedule, random states and metrics where they were."""
        try:
            slidecore.load_checkpoint(training.model, training.optimizer, self.path, scheduler=training.scheduler)
        except CheckpointError as error:
            raise self._refused(error) from error
        training.go_on_from(decode_history(self._history))

    def _refused(self, error: CheckpointError) -> InputError:
        return InputError(
            f"cannot go on from {self.path}: {error.message}",
            f"Check first that --model is that of the run. If the checkpoint itself is damaged, move {self.path} away: "
            f"--resume then takes the one before it, if there is one.",
        )


def identity_of(options: Options, steps: int, data: PackedData) -> dict[str, Any]:
    """What has to be the same for a run to go on bit by bit: everything that decides its arithmetic, and its data.

    Not in it: where it computes and with what budgets, what is traced, saved and evaluated when.
    """
    return {
        "--sequence-length": options.sequence_length,
        "--batch-size": options.batch_size,
        "the number of steps": steps,
        "--lr": options.lr,
        "the number of warm-up steps": options.warmup_steps(steps),
        "--weight-decay": options.weight_decay,
        "betas": list(options.betas),
        "--max-grad-norm": options.max_grad_norm,
        "--moments": options.moments,
        "--seed": options.seed,
        "--assistant-only": options.assistant_only,
        "--eval-fraction": options.eval_fraction,
        _DATA: data.digest(),
    }


def save(training: Training, directory: Path, identity: dict[str, Any], tokenizer: Any) -> Path:
    """Saves a run between two steps as `step-NNNNNN` in `directory`, and removes what `--keep` does not keep."""
    return slidecore.save_checkpoint(
        training.model,
        training.optimizer,
        directory / f"step-{training.done:06}",
        scheduler=training.scheduler,
        extra={"step": training.done, "identity": identity, "history": encode_history(training.history)},
        tokenizer=tokenizer,
        keep=training.options.keep,
        overwrite=True,
    )


def encode_history(history: list[StepMetrics]) -> dict[str, torch.Tensor]:
    """The metrics as a float64 tensor for each field, and for those that may be None another that says where they are.

    A million steps are 74 MB.
    """
    encoded: dict[str, torch.Tensor] = {}
    for field in fields(StepMetrics):
        values = [getattr(metrics, field.name) for metrics in history]
        encoded[field.name] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
        if field.name in _MAY_BE_NONE:
            encoded[field.name + _ABSENT] = torch.tensor([value is None for value in values], dtype=torch.bool)
    return encoded


def decode_history(encoded: dict[str, torch.Tensor]) -> list[StepMetrics]:
    """The inverse of `encode_history`."""
    whole = {"step", "device_memory", "host_memory"}
    columns: dict[str, list[Any]] = {}
    for name, values in encoded.items():
        if name.endswith(_ABSENT):
            continue
        column = [int(value) if name in whole else value for value in values.tolist()]
        if name in _MAY_BE_NONE:
            absent = encoded.get(name + _ABSENT, values.isnan())  # earlier versions wrote NaN for None, and no more
            column = [None if a else value for value, a in zip(column, absent.tolist(), strict=True)]
        columns[name] = column
    return [StepMetrics(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
