"""The run itself: check everything, load, train, save."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from typing import Any

import torch

import slidecore
from slidecore.errors import InputError, InterruptedRunError, MissingDependencyError, TrainingError
from slidecore.finetune import output
from slidecore.finetune.data import PackedData, find_files, pack
from slidecore.finetune.options import Options
from slidecore.finetune.plots import plot_loss, plot_timeline
from slidecore.finetune.report import MetricsFile, Progress, StepMetrics, Summary
from slidecore.loading import Checkpoint

_SUMMARY_STEPS = 10


def run(options: Options, progress: Progress | None = None) -> Summary:
    """Fine-tunes a model as `options` say and writes the output directory.

    Written are the model and its tokenizer, metrics.jsonl (StepMetrics, a line per step), loss.png, and, if a step was
    traced, timeline.png and trace.json.

    Raises:
        InputError: the model, the data, the output directory or an option cannot be used; nothing has been trained.
        MissingDependencyError: a package of the `finetune` extra is not installed.
        TrainingError: the loss is not finite, or the disk is full.
        InterruptedRunError: Ctrl-C.
    """
    options.check()
    _check_packages()
    progress = progress or Progress()
    # Cheap checks first: each finds its error before the next, longer piece of work.
    try:
        files = find_files(options.data, options.glob)
        checkpoint = Checkpoint(options.model)
        _check_context(checkpoint.config, options.sequence_length)
        tokenizer = load_tokenizer(options.model)
    except PermissionError as error:  # of a directory, when what lies in it is asked for
        raise InputError(f"cannot read {error.filename}: {error.strerror}", "Check its permissions.") from error
    out = output.OutputDirectory(options.out, overwrite=options.overwrite)
    if files.skipped:
        progress.say(f"{len(files.skipped)} files are neither text nor .jsonl nor .parquet and are left out")

    step, saved = 0, False
    try:
        with out.scratch() as scratch:
            with progress.stage(f"Reading and packing {len(files)} files"):
                data = pack(
                    files,
                    tokenizer,
                    sequence_length=options.sequence_length,
                    cache_dir=scratch,
                    assistant_only=options.assistant_only,
                )
            steps = _count_steps(options, data, checkpoint.config)
            progress.say(
                f"{data.documents:,} documents, {data.tokens:,} tokens, {len(data):,} sequences of "
                f"{data.sequence_length}; {steps:,} steps of {options.batch_size}"
            )
            with progress.stage(f"Loading {checkpoint.parameters:,} parameters"):
                model = _load(checkpoint, options)
            state = slidecore.stats(model)
            out.check_space(sum(p.numel() * p.element_size() for p in model.parameters()))
            training = Training(model, data, options, steps)
            out.remove_figures()
            with MetricsFile(out.path / output.METRICS) as metrics_file, progress.steps(steps) as show:
                for step in range(1, steps + 1):
                    metrics = training.step(step, out.path)
                    metrics_file.write(metrics)
                    show(metrics)
            slidecore.synchronize(model)
        _check_weights(model, steps)
        with progress.stage("Saving"):
            out.save_model(model, tokenizer)
            saved = True
        plot_loss(out.path / output.LOSS_PLOT, training.losses)
    except KeyboardInterrupt:
        # Where a checkpoint will be written, so that a run can be taken up again.
        lost = f"the updates of {step - 1} steps are lost" if step > 1 else "nothing was trained yet"
        raise InterruptedRunError(
            f"interrupted; {lost}, and no model was written", f"What was measured so far is in {out.path}."
        ) from None
    except Exception as error:
        if not output.disk_is_full(error):
            raise
        raise TrainingError(
            f"the disk that {out.path} is on is full; the model was {'' if saved else 'not '}written",
            "Free some space, or give an --out on another disk.",
        ) from error
    finally:
        out.release()
    state = slidecore.stats(model)
    ends = min(_SUMMARY_STEPS, steps)
    return Summary(
        steps=steps,
        first_loss=training.losses[0],
        last_loss=sum(training.losses[-ends:]) / ends,
        tokens_per_second=training.tokens_per_second(),
        seconds=sum(training.seconds),
        parameters=state.parameters,
        planes_bytes=state.planes_bytes,
        device_memory_peak=state.device_memory_peak,
        ordinary_training_bytes=state.ordinary_training_bytes,
        out=out.path,
    )


def _check_weights(model: Any, steps: int) -> None:
    """The last update is followed by no loss that would show what it did to the weights."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise TrainingError(
                f"{name} is no longer finite after step {steps}; no model was written",
                "Lower --lr, lengthen --warmup, or check the data.",
            )


def _check_packages() -> None:
    """Finds a missing package before hours of work need it."""
    for package in ("transformers", "accelerate", "datasets", "matplotlib", "rich"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"{package} cannot be imported ({error})", "Run: pip install 'slidecore[finetune]'"
            ) from error


class Training:
    """An offloaded model with its optimizer and schedule, stepped over packed data."""

    def __init__(self, model: Any, data: PackedData, options: Options, steps: int) -> None:
        self.model = model
        self.data = data
        self.options = options
        self.losses: list[float] = []
        self.seconds: list[float] = []
        torch.manual_seed(options.seed)
        self.optimizer = slidecore.AdamW(
            parameter_groups(model, options.weight_decay), lr=options.lr, betas=options.betas
        )
        self.scheduler = cosine_schedule(self.optimizer, options.warmup_steps(steps), steps)
        model.train()

    def step(self, number: int, out: Path) -> StepMetrics:
        """Trains on the batch of step `number`, counted from 1; traces it into `out` if it is the step to trace.

        Raises TrainingError where the loss is not finite; the weights have not been touched by that step.
        """
        began = time.perf_counter()
        if number == self.options.trace_step:
            # Whole, from idle lanes to idle lanes: the picture of one step, at the price of one overlap.
            slidecore.synchronize(self.model)
            with slidecore.trace(self.model) as trace:
                loss, lr = self._update(number)
                slidecore.synchronize(self.model)
            trace.save(out / output.TRACE)
            plot_timeline(out / output.TIMELINE_PLOT, trace.spans, title=f"Lanes in step {number}")
        else:
            loss, lr = self._update(number)
        seconds = time.perf_counter() - began
        self.losses.append(loss)
        self.seconds.append(seconds)
        state = slidecore.stats(self.model)
        return StepMetrics(
            step=number,
            loss=loss,
            lr=lr,
            tokens_per_second=self._batch_tokens() / seconds,
            device_memory=state.device_memory,
            host_memory=state.host_memory,
            seconds=seconds,
        )

    def tokens_per_second(self) -> float:
        """Over all steps but the first, which warms up, and the traced one."""
        left_out = {1, self.options.trace_step}
        counted = [s for number, s in enumerate(self.seconds, start=1) if number not in left_out] or self.seconds
        return self._batch_tokens() * len(counted) / sum(counted)

    def _batch_tokens(self) -> int:
        return self.options.batch_size * self.data.sequence_length

    def _update(self, number: int) -> tuple[float, float]:
        batch = self.data.batch(number - 1, self.options.batch_size, self.options.seed)
        lr = float(self.scheduler.get_last_lr()[0])
        result = self.model(**batch).loss
        # Looked at before backward, which in overlap mode already updates weights.
        loss = float(result.detach())
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} at step {number}; the run stopped and no model was written",
                "Lower --lr, lengthen --warmup, or check the data; at step 1 it is the model's weights that are bad.",
            )
        result.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, lr


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises InputError where it has none, or one that cannot be read."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed", "Run: pip install 'slidecore[finetune]'"
        ) from error
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        raise InputError(
            f"{path} has no tokenizer", "Copy the model's tokenizer.json and tokenizer_config.json into the directory."
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise InputError(
            f"cannot read the tokenizer in {path}: {str(error).strip().splitlines()[0] if str(error) else error!r}",
            "Copy or download the tokenizer's files again.",
        ) from error


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: parameters of two or more dimensions with weight decay; norms and biases without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear rise over `warmup` steps to the peak, then half a cosine towards zero at `steps`.

    Neither the first nor the last step has a rate of zero: each would be a step without effect.
    """

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def choose_compute_dtype(name: str, device: str) -> torch.dtype:
    """The dtype that "auto" stands for: bfloat16 on a card; on the host backend whichever this CPU multiplies faster.

    CPUs differ by more than ten times either way: some have bfloat16 units, others emulate it.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        return torch.bfloat16
    times = {dtype: _multiply_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(times, key=lambda dtype: times[dtype])


def _multiply_seconds(dtype: torch.dtype) -> float:
    """The shortest of a few products of the shape that small models have."""
    left, right = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return min(times)


def _load(checkpoint: Checkpoint, options: Options) -> Any:
    try:
        return checkpoint.load(
            compute_dtype=choose_compute_dtype(options.compute_dtype, options.device), **options.offload_options()
        )
    except InputError:
        raise
    except (ValueError, RuntimeError, MemoryError) as error:
        # The engine refuses: no such device, a budget that is too small, too little memory. It says what would work.
        raise InputError(f"cannot offload the model: {error}") from error


def _check_context(config: Any, sequence_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise InputError(
            f"--sequence-length is {sequence_length}, but the model has {longest} positions",
            f"Give --sequence-length {longest} or less.",
        )


def _count_steps(options: Options, data: PackedData, config: Any) -> int:
    per_epoch = len(data) // options.batch_size
    if not per_epoch:
        raise InputError(
            f"the data gives {len(data)} sequences of {data.sequence_length} tokens, fewer than a batch of "
            f"{options.batch_size}",
            "Give more data, or a smaller --batch-size or --sequence-length.",
        )
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and data.largest_token >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {data.largest_token}, but the model's vocabulary has {vocabulary} entries",
            "The tokenizer in the model directory belongs to another model.",
        )
    return options.steps or max(1, round(options.epochs * per_epoch))
