"""The run itself: check everything, load, train, save."""

from __future__ import annotations

import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import slidecore
from slidecore import _core
from slidecore.backend import choose_device
from slidecore.engine import Engine
from slidecore.errors import (
    CheckpointError,
    InputError,
    InterruptedRunError,
    MissingDependencyError,
    TrainingError,
    UsageError,
)
from slidecore.finetune import output, resuming
from slidecore.finetune.compute import choose_compute_dtype, describe_compute
from slidecore.finetune.data import DataFiles, PackedData, find_files, name_some, pack
from slidecore.finetune.interrupts import Interrupts
from slidecore.finetune.options import Options
from slidecore.finetune.plots import plot_loss
from slidecore.finetune.report import MetricsFile, Progress, StepMetrics, Summary, format_seconds
from slidecore.finetune.resuming import Resumption, identity_of
from slidecore.finetune.training import DivergedError, Training, cosine_schedule, parameter_groups
from slidecore.loading import Checkpoint
from slidecore.offloading import engine_of
from slidecore.parameters import visit_weights

__all__ = [
    "Training",
    "choose_compute_dtype",
    "cosine_schedule",
    "load_tokenizer",
    "parameter_groups",
    "run",
]

_SUMMARY_STEPS = 10
# What says nothing of a bug: a drive, a file or a card that fails, memory that is short.
_OF_THE_MACHINE = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    _core.IoError,
    _core.OutOfMemoryError,
    _core.DeviceError,
)
_MOST_SKIPPED = 10  # steps in a row: single ones happen, these do not end by themselves


def run(options: Options, progress: Progress | None = None) -> Summary:
    """Fine-tunes a model as `options` say and writes the output directory.

    Written are the model and its tokenizer, metrics.jsonl (StepMetrics, a line per step), loss.png, if a step was
    traced timeline.png and trace.json, and the checkpoints that were asked for.

    Raises:
        InputError: the model, the data, the output directory or an option cannot be used; nothing has been trained.
        MissingDependencyError: a package of the `finetune` extra is not installed.
        TrainingError: the loss, a weight, or the gradients of many steps in a row are not finite, or the disk is full.
        CheckpointError: the model, or the checkpoint at an interrupt, cannot be written for another reason.
        InterruptedRunError: Ctrl-C; TerminatedRunError: SIGTERM or SIGHUP. The step that ran was finished and saved,
            except where nothing had been trained or the signal came twice; the message says which.
    """
    options.check()
    _check_packages()
    progress = progress or Progress()
    with Interrupts(progress.say) as interrupts:
        return _Run(options, progress, interrupts).run()


class _Run:
    """One run, and how far it has come, for the messages of what stops it."""

    def __init__(self, options: Options, progress: Progress, interrupts: Interrupts) -> None:
        self.options = options
        self.progress = progress
        self.interrupts = interrupts
        self.step = 0  # that is being taken, or was taken last
        self.kept = 0  # the last one that is in a checkpoint
        self.checkpoint_path: Path | None = None  # that one's
        self.trained = False  # to the end
        self.saved = False  # the model
        self.unsaved: list[int] = []  # steps whose checkpoints could not be written
        self.warnings: list[str] = []  # to be repeated at the end
        self._engine: Engine | None = None
        self.eval_files: DataFiles | None = None
        # Cheap checks first: each finds its error before the next, longer piece of work.
        try:
            _check_apart(options)
            _check_places(options)
            self.files = find_files(options.data, options.glob, but=options.out)
            if options.eval_data is not None:
                self.eval_files = find_files(options.eval_data, but=options.out)
            self.checkpoint = Checkpoint(options.model)
            _check_context(self.checkpoint.config, options.sequence_length)
            self.tokenizer = load_tokenizer(options.model)
        except PermissionError as error:  # of a directory, when what lies in it is asked for
            raise InputError(f"cannot read {error.filename}: {error.strerror}", "Check its permissions.") from error
        self.out = output.OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume)
        for files in filter(None, (self.files, self.eval_files)):
            if files.skipped:
                progress.say(
                    f"{len(files.skipped)} files are neither text nor .jsonl nor .parquet and are left out: "
                    f"{name_some(files.skipped)}"
                )
            if files.links:
                progress.say(
                    f"{len(files.links)} directories are links and are not searched: {name_some(files.links)}; give "
                    f"them as --data, or copy what they hold"
                )

    def run(self) -> Summary:
        """Everything from reading the data on."""
        try:
            with self.out.scratch() as scratch:
                training, steps = self._prepare(scratch)
                with self.interrupts.deferred("finishing this step and saving"):
                    self._train(training, steps)
                    # Hours of training are worth the minutes of a save, also to whoever wants the run to end.
                    self.interrupts.work = "saving the model"
                    self.trained = True
                    self._save_model(training, steps)
                    return self._summary(training, steps)
        except KeyboardInterrupt:
            raise self.interrupts.error(f"interrupted; {self._lost()}", self._what_is_left()) from None
        except DivergedError as error:
            raise TrainingError(error.message, self._way_back() or error.hint) from error
        except Exception as error:
            if not output.disk_is_full(error):
                if not isinstance(error, _OF_THE_MACHINE):
                    raise
                where = f"stopped at step {self.step}: " if self.step else ""
                text = str(error).strip() or type(error).__name__
                raise TrainingError(where + text, self._what_is_left()) from error
            raise TrainingError(
                f"the disk that {self.out.path} is on is full; the model was {'' if self.saved else 'not '}written",
                f"Free some space, or give an --out on another disk. {self._what_is_left()}".strip(),
            ) from error
        finally:
            self.out.release()
            if self._engine is not None:
                self._engine.close()  # the weights need not come back from disk

    def _prepare(self, scratch: Path) -> tuple[Training, int]:
        """Data, model and what trains it, with `steps` to train to; gone on from a checkpoint if there is one."""
        options, progress = self.options, self.progress
        resumption = self._find_resumption()
        compute_dtype = _compute_dtype(options, resumption)
        progress.say(describe_compute(options.device, compute_dtype))
        with progress.stage(f"Reading and packing {len(self.files)} files"):
            data, held_out = self._pack(scratch)
        steps = _count_steps(options, data)
        progress.say(
            f"{data.documents:,} documents, {data.tokens:,} tokens, {len(data):,} sequences of "
            f"{data.sequence_length}{f' ({len(held_out):,} more held out)' if held_out else ''}; {steps:,} steps of "
            f"{options.batch_size}"
        )
        if options.trace_step > steps:
            progress.say(f"no step is traced: --trace-step is {options.trace_step}, and there are {steps}")
        self.identity = identity_of(options, steps, data)
        if resumption is not None:
            resumption.check(self.identity)
        with progress.stage(f"Loading {self.checkpoint.parameters:,} parameters"):
            model = _load(self.checkpoint, options, compute_dtype)
            self._engine = engine_of(model)
        if options.disk:
            progress.say(self._engine.tiers.describe())
        training = Training(model, data, options, steps, held_out, lambda: self.interrupts.requested)
        if resumption is not None:
            with progress.stage(f"Going on from {resumption.path.name}"):
                resumption.load(training)
            self.step = self.kept = resumption.step
            self.checkpoint_path = resumption.path
        saved = sum(p.numel() * p.element_size() for p in model.parameters())
        saves = steps // options.save_every - training.done // options.save_every if options.save_every else 0
        state = slidecore.stats(model)
        self.out.check_space(saved, state.planes_bytes + state.disk_memory, keep=options.keep, saves=saves)
        return training, steps

    def _pack(self, scratch: Path) -> tuple[PackedData, PackedData | None]:
        options, vocabulary = self.options, getattr(self.checkpoint.config, "vocab_size", None)
        settings: dict[str, Any] = {
            "sequence_length": options.sequence_length,
            "assistant_only": options.assistant_only,
        }
        data = pack(self.files, self.tokenizer, cache_dir=scratch, **settings)
        _check_vocabulary(data, vocabulary)
        self._say_left_out(data, "")
        if self.eval_files is not None:
            (scratch / "eval").mkdir()
            try:
                held_out = pack(self.eval_files, self.tokenizer, cache_dir=scratch / "eval", **settings)
            except InputError as error:
                raise InputError(f"--eval-data: {error.message}", error.hint) from error
            _check_vocabulary(held_out, vocabulary)
            self._say_left_out(held_out, " of --eval-data")
            return data, held_out
        if options.eval_fraction:
            return data.split(options.eval_fraction, options.seed)
        return data, None

    def _say_left_out(self, data: PackedData, where: str) -> None:
        if data.invalid:
            first = data.invalid[0]
            self._warn(
                f"{sum(found.count for found in data.invalid):,} places in {len(data.invalid)} files{where} are not "
                f"valid UTF-8 and are read as U+FFFD; the first is byte {first.offset:,} of {name_some([first.path])}"
            )
        if data.left_out:
            self.progress.say(
                f"{data.left_out:,} of {len(data) + data.left_out:,} sequences{where} have no token that carries loss "
                f"(--assistant-only) and are left out"
            )

    def _find_resumption(self) -> Resumption | None:
        if self.out.newest is None:
            if self.options.resume:
                self.progress.say(f"no checkpoint in {self.out.path} yet: training begins with the first step")
            return None
        return Resumption(self.out.newest)

    def _train(self, training: Training, steps: int) -> None:
        options, interrupts = self.options, self.interrupts
        if training.owes_evaluation():
            self._make_up(training, steps)
        metrics_file = MetricsFile(self.out.path / output.METRICS, training.history, self._warn)
        with metrics_file, self.progress.steps(steps, training.done) as show:
            for self.step in range(training.done + 1, steps + 1):
                metrics = training.step(self.step)
                if self.step == 1:
                    # Not before: a run that is refused in its first step (a budget too small for the batch) would
                    # have destroyed the earlier one for nothing.
                    self.out.remove_earlier_run()
                self._save_trace(training)
                metrics_file.write(metrics)
                show(metrics)
                _check_skipped(training.history)
                due = options.save_every > 0 and self.step % options.save_every == 0
                stopping = interrupts.requested and self.step < steps
                if stopping:
                    self._save(training)
                    raise self._stopped(training, steps)
                if due:
                    self._save_if_possible(training)

    def _make_up(self, training: Training, steps: int) -> None:
        """Takes the evaluation that the signal which stopped the run has cut short."""
        with self.progress.stage(f"Making up the evaluation after step {self.step}"):
            training.make_up()
        if training.owes_evaluation():  # and again
            raise self._stopped(training, steps)
        self.progress.say(f"step {self.step}/{steps}  held out {training.history[-1].eval_loss:.3f}")

    def _stopped(self, training: Training, steps: int) -> InterruptedRunError:
        """The end of a run that is saved."""
        owed = " The evaluation that was due is made up then." if training.owes_evaluation() else ""
        return self.interrupts.error(
            f"interrupted after step {self.step} of {steps}; everything is saved in {self.checkpoint_path}",
            f"Go on with the same command and --resume (without --overwrite).{owed}",
        )

    def _save_model(self, training: Training, steps: int) -> None:
        _check_weights(training.model, f"no longer finite after step {steps}; no model was written")
        with self.progress.stage("Saving"):
            self.out.save_model(training.model, self.tokenizer)
            self.saved = True
        evaluated = [(m.step, m.eval_loss) for m in training.history if m.eval_loss is not None]
        plot_loss(self.out.path / output.LOSS_PLOT, [m.loss for m in training.history], held_out=evaluated)

    def _save(self, training: Training) -> Path:
        began = time.monotonic()
        # The loss was finite before this step's update; what that did to the weights shows only here. A checkpoint of
        # ruined weights would be of no use, and take the place of one that is.
        _check_weights(
            training.model,
            f"no longer finite after step {self.step}; the run stopped and no checkpoint of it was written",
        )
        path = resuming.save(training, self.out.checkpoints, self.identity, self.tokenizer)
        self.kept, self.checkpoint_path = self.step, path
        self.progress.say(f"saved {path} in {format_seconds(time.monotonic() - began)}")
        return path

    def _save_if_possible(self, training: Training) -> None:
        """A checkpoint that cannot be written is told, and no reason to lose what it was to keep."""
        try:
            self._save(training)
        except (CheckpointError, OSError) as error:
            self.unsaved.append(self.step)
            left = f"The newest one is {self.checkpoint_path}" if self.checkpoint_path else "There is none yet"
            self.progress.say(
                f"WARNING: the checkpoint of step {self.step} could not be saved: {' '.join(str(error).split())}; "
                f"training goes on. {left}: what stops the run before the next loses {self.step - self.kept} steps"
            )

    def _save_trace(self, training: Training) -> None:
        try:
            training.save_trace(self.out.path)
        except OSError as error:
            self._warn(f"the trace of step {self.step} could not be written: {error.strerror}")

    def _warn(self, text: str) -> None:
        """Says it now and, as it scrolls away, once more at the end."""
        self.progress.say(f"WARNING: {text}")
        self.warnings.append(text)

    def _lost(self) -> str:
        if self.saved:
            return f"the model was written to {self.out.path}"
        taken = self.step if self.trained else max(self.step - 1, self.kept)  # one was under way
        if not taken:
            return "nothing was trained yet, and no model was written"
        if not self.kept:
            return f"the updates of {taken} steps are lost, and no model was written"
        if taken == self.kept:
            return "no model was written, but every update is in a checkpoint"
        return f"the updates of {taken - self.kept} steps after the last checkpoint are lost, and no model was written"

    def _way_back(self) -> str:
        """What helps after numbers that are not finite: the options of a run that goes on cannot be changed."""
        if self.checkpoint_path is None:
            return ""
        return (
            f"The newest checkpoint, after step {self.kept}, is good: begin a new run from it with --model "
            f"{self.checkpoint_path}, another --out and a lower --lr."
        )

    def _what_is_left(self) -> str:
        if self.saved:
            return ""
        if self.kept:
            return f"--resume goes on after step {self.kept}, from {self.out.checkpoints}."
        return f"What was measured so far is in {self.out.path}." if self.step else ""

    def _unsaved(self) -> list[str]:
        if not self.unsaved:
            return []
        steps = ", ".join(map(str, self.unsaved[:5])) + (", ..." if len(self.unsaved) > 5 else "")
        return [f"{len(self.unsaved)} checkpoints could not be saved (after step {steps})"]

    def _summary(self, training: Training, steps: int) -> Summary:
        state = slidecore.stats(training.model)
        history = training.history
        ends = min(_SUMMARY_STEPS, steps)
        return Summary(
            steps=steps,
            first_loss=history[0].loss,
            last_loss=sum(m.loss for m in history[-ends:]) / ends,
            tokens_per_second=training.tokens_per_second(),
            seconds=sum(m.seconds for m in history),
            parameters=state.parameters,
            planes_bytes=state.planes_bytes,
            device_memory_peak=state.device_memory_peak,
            ordinary_training_bytes=state.ordinary_training_bytes,
            out=self.out.path,
            eval_loss=history[-1].eval_loss,
            skipped=sum(m.skipped for m in history),
            warnings=(*self.warnings, *self._unsaved()),
        )


def _check_skipped(history: list[StepMetrics]) -> None:
    """Raises DivergedError where the last steps were all skipped: nothing is learnt any more."""
    last = history[-_MOST_SKIPPED:]
    if len(last) == _MOST_SKIPPED and all(metrics.skipped for metrics in last):
        raise DivergedError(
            f"the gradients of {_MOST_SKIPPED} steps in a row, the last of them step {last[-1].step}, were not finite, "
            f"and the steps were skipped (--max-grad-norm); the run stopped and no model was written"
        )


def _check_weights(model: Any, told: str) -> None:
    """Raises DivergedError, with the weight's name and what is `told` of it, where one is not finite.

    The last update is followed by no loss that would show what it did to the weights.
    """

    def check(name: str, weight: torch.Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise DivergedError(f"{name} is {told}")

    slidecore.synchronize(model)
    visit_weights(model, engine_of(model), check)


def _check_packages() -> None:
    """Finds a missing package before hours of work need it."""
    for package in ("transformers", "accelerate", "datasets", "matplotlib", "rich"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"{package} cannot be imported ({error})", "Run: pip install 'slidecore[finetune]'"
            ) from error


def _check_apart(options: Options) -> None:
    """What the run writes may neither become its data nor take the place of its model.

    Below the data, it is left out of them; among the data it cannot be told from them.
    """
    for name, data in (("--data", options.data), ("--eval-data", options.eval_data)):
        if data is not None and data.resolve() == options.out.resolve():
            raise InputError(
                f"--out is the directory of {name}, {data}: what the run writes would be read as data when it goes on",
                f"Give another --out, such as {data / 'out'}.",
            )
    if options.overwrite and options.model.resolve().is_relative_to((options.out / output.CHECKPOINTS).resolve()):
        raise InputError(
            f"--overwrite would remove {options.model}, the --model itself: it is a checkpoint of the run in --out",
            "Give another --out.",
        )


def _check_places(options: Options) -> None:
    """The device and the directories of --disk, which are used only when the data have been read."""
    try:
        choose_device(options.device)
    except UsageError as error:
        raise InputError(f"--device: {error.message}", error.hint) from error
    for directory in options.disk:
        try:
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise InputError(
                f"cannot write to --disk {directory}: {error.strerror}",
                "Give a directory that is there and that you may write to, on the drive to use.",
            ) from error


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


def _compute_dtype(options: Options, resumption: Resumption | None) -> torch.dtype:
    """What to compute in: what the run to go on with does, whatever "auto" stands for on this machine."""
    name = options.compute_dtype
    if resumption is not None:
        if name not in ("auto", resumption.compute_dtype):
            raise InputError(
                f"--compute-dtype is {name}, but the run saved in {resumption.path} has {resumption.compute_dtype}",
                'Give that one, or "auto".',
            )
        name = resumption.compute_dtype
    return choose_compute_dtype(name, options.device)


def _load(checkpoint: Checkpoint, options: Options, compute_dtype: torch.dtype) -> Any:
    try:
        return checkpoint.load(compute_dtype=compute_dtype, **options.offload_options())
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


def _check_vocabulary(data: PackedData, vocabulary: Any) -> None:
    if isinstance(vocabulary, int) and data.largest_token >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {data.largest_token}, but the model's vocabulary has {vocabulary} entries",
            "The tokenizer in the model directory belongs to another model.",
        )


def _count_steps(options: Options, data: PackedData) -> int:
    per_epoch = len(data) // options.batch_size
    if not per_epoch:
        raise InputError(
            f"the data gives {len(data)} sequences of {data.sequence_length} tokens, fewer than a batch of "
            f"{options.batch_size}",
            "Give more data, or a smaller --batch-size or --sequence-length.",
        )
    return options.steps or max(1, round(options.epochs * per_epoch))
