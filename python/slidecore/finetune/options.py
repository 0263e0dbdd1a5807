"""What a fine-tuning run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from slidecore.errors import InputError
from slidecore.planes import Moments
from slidecore.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run. `check` raises InputError for values that no run could use.

    Attributes:
        model: directory of the model and its tokenizer.
        data: a file, or a directory that is searched recursively.
        out: directory to write; created if needed.
        sequence_length: tokens per sequence.
        batch_size: sequences per optimizer step.
        steps: number of optimizer steps; None: as many as `epochs` passes over the data take.
        epochs: passes over the data, where `steps` is None; may be fractional.
        lr: peak learning rate.
        warmup: below 1, the share of all steps over which the learning rate rises; from 1 on, the number of steps.
        weight_decay: decoupled weight decay, for parameters of two or more dimensions only.
        betas: Adam's decay rates.
        max_grad_norm: clip the norm of all gradients together to this, and skip steps where it is not finite; None:
            neither.
        glob: files to take from a data directory, as a pattern such as "**/*.md"; None: every file that can be read.
        assistant_only: for chats, take the loss on the assistant's tokens only.
        device: "auto", "cuda" (also for AMD's cards, as in PyTorch), "cuda:1" or "cpu" (the host backend).
        device_memory: budget such as "20GiB", or bytes; None: what the device has.
        host_memory: budget of host memory such as "100GiB", or bytes; None: no limit, or what is available with `disk`.
        disk: directories for swap files, one on each drive.
        disk_memory: bytes that may lie there; None: what the drives have free.
        gpu_direct: saved inputs go there past host memory, by cuFile.
        compute_dtype: "auto", "bfloat16" or "float32". "auto" is bfloat16 on a card and on a CPU that is faster in it
            (amx_bf16, AArch64's bf16, avx512_bf16 of AMD's), else float32.
        moments: what the optimizer's moments are kept in, "float32" or "8bit".
        window: number of slots.
        micro_batch: sequences that a chunk computes at once, or "auto".
        seed: of data order and dropout.
        trace_step: the step, counted from 1, whose lanes are recorded; 0: none.
        overwrite: allow `out` to have files in it; those of an earlier run are replaced.
        resume: go on from the newest complete checkpoint in `out`; from the beginning if there is none.
        save_every: steps between checkpoints; 0: only when the run is interrupted.
        keep: how many of the newest checkpoints to keep.
        eval_every: steps between evaluations on held-out data; 0: only after the last step.
        eval_fraction: share of the sequences, drawn with `seed`, that is held out of training; 0: none.
        eval_data: file or directory with data to evaluate on, instead of a share of the training data.
    """

    model: Path
    data: Path
    out: Path
    sequence_length: int = 1024
    batch_size: int = 16
    steps: int | None = None
    epochs: float = 1.0
    lr: float = 1e-5
    warmup: float = 0.03
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    glob: str | None = None
    assistant_only: bool = False
    device: str = "auto"
    device_memory: str | int | None = None
    host_memory: str | int | None = None
    disk: tuple[Path, ...] = ()
    disk_memory: str | int | None = None
    gpu_direct: bool = False
    compute_dtype: str = "auto"
    moments: str = "float32"
    window: int = 2
    micro_batch: int | str = "auto"
    seed: int = 0
    trace_step: int = 3
    overwrite: bool = False
    resume: bool = False
    save_every: int = 0
    keep: int = 2
    eval_every: int = 0
    eval_fraction: float = 0.0
    eval_data: Path | None = None

    def check(self) -> None:
        """Raises InputError naming the first option whose value makes no sense."""
        micro_batch = self.micro_batch
        rules = [
            (self.sequence_length >= 2, "--sequence-length", self.sequence_length, "at least 2"),
            (self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1"),
            (self.steps is None or self.steps >= 1, "--steps", self.steps, "at least 1"),
            (0 < self.epochs < 1e9, "--epochs", self.epochs, "above 0 and below 1e9"),
            (0 < self.lr < float("inf"), "--lr", self.lr, "a number above 0"),
            (0 <= self.warmup < float("inf"), "--warmup", self.warmup, "0 or more"),
            (0 <= self.weight_decay < float("inf"), "--weight-decay", self.weight_decay, "0 or more"),
            (
                self.max_grad_norm is None or 0 < self.max_grad_norm < float("inf"),
                "--max-grad-norm",
                self.max_grad_norm,
                "a number above 0",
            ),
            (self.window >= 2, "--window", self.window, "at least 2"),
            (0 <= self.seed < 2**32, "--seed", self.seed, f"0 to {2**32 - 1}"),
            (self.save_every >= 0, "--save-every", self.save_every, "0 (none but at an interrupt) or more"),
            (self.keep >= 1, "--keep", self.keep, "at least 1"),
            (self.eval_every >= 0, "--eval-every", self.eval_every, "0 (after the last step) or more"),
            (0 <= self.eval_fraction < 1, "--eval-fraction", self.eval_fraction, "0 or more and below 1"),
            (self.trace_step >= 0, "--trace-step", self.trace_step, "0 (no trace) or a step"),
            (
                self.compute_dtype in ("auto", "bfloat16", "float32"),
                "--compute-dtype",
                self.compute_dtype,
                "auto, bfloat16 or float32 (float16 has too small a range to train in)",
            ),
            (self.moments in get_args(Moments), "--moments", self.moments, " or ".join(get_args(Moments))),
            (
                micro_batch == "auto" or (isinstance(micro_batch, int) and micro_batch >= 1),
                "--micro-batch",
                micro_batch,
                '"auto" or at least 1',
            ),
        ]
        for holds, name, value, allowed in rules:
            if not holds:
                raise InputError(f"{name} is {value}", f"It has to be {allowed}.")
        for name in ("device_memory", "host_memory", "disk_memory"):
            size = getattr(self, name)
            try:
                if size is not None:
                    parse_size(size, f"--{name.replace('_', '-')}")
            except ValueError as error:
                raise InputError(str(error)) from error
        if self.disk_memory is not None and not self.disk:
            raise InputError("--disk-memory is given without --disk", "Say where the swap files go with --disk DIR.")
        if self.gpu_direct and not self.disk:
            raise InputError("--gpu-direct is given without --disk", "Say where the swap files go with --disk DIR.")
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run, --overwrite replaces it", "Give one of the two.")
        if self.eval_fraction and self.eval_data is not None:
            raise InputError("both --eval-fraction and --eval-data are given", "Give one of the two.")
        if self.eval_every and not self.eval_fraction and self.eval_data is None:
            raise InputError(
                f"--eval-every is {self.eval_every}, but there is nothing to evaluate on",
                "Give --eval-fraction 0.01, say, or --eval-data.",
            )

    def warmup_steps(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
        return min(steps, round(self.warmup * steps) if self.warmup < 1 else round(self.warmup))

    def offload_options(self) -> dict[str, Any]:
        """What is passed on to `slidecore.offload`, apart from the compute dtype."""
        return {
            "device": self.device,
            "device_memory": self.device_memory,
            "host_memory": self.host_memory,
            "disk": list(self.disk) or None,
            "disk_memory": self.disk_memory,
            "gpu_direct": self.gpu_direct,
            "moments": self.moments,
            "window": self.window,
            "micro_batch": self.micro_batch,
        }
