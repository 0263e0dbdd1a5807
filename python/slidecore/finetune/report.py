"""What a run tells: one metrics line per step, progress on the terminal, and a closing summary."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

from slidecore.errors import MissingDependencyError
from slidecore.outlet import Outlet

if TYPE_CHECKING:
    from rich.console import Console

# How many lines a run prints where there is no terminal to redraw on.
_BESIDE_FIGURES = 43  # columns of a terminal: steps, bar and time left
_PLAIN_LINES = 40


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        step: counted from 1.
        loss: in nats per token, before this step's update.
        lr: learning rate of this step.
        tokens_per_second: tokens of the batch per second of this step.
        device_memory: bytes of device memory in use at the end of the step.
        host_memory: bytes of host memory in planes and buffers.
        seconds: duration of the step.
        eval_loss: in nats per token of the held-out data, after this step; None where it was not taken. After the last
            step it may be infinite or NaN.
        grad_norm: of all gradients together before clipping; None without --max-grad-norm. Infinite or NaN where the
            step was skipped.
    """

    step: int
    loss: float
    lr: float
    tokens_per_second: float
    device_memory: int
    host_memory: int
    seconds: float
    eval_loss: float | None = None
    grad_norm: float | None = None

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing, as --max-grad-norm has it where the gradients are not finite."""
        return self.grad_norm is not None and not math.isfinite(self.grad_norm)

    def to_json(self) -> dict[str, Any]:
        """All fields, and `skipped`; None for what is not finite, which JSON cannot say."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**values, "skipped": self.skipped}


@dataclass(frozen=True)
class Summary:
    """How a run ended. `last_loss` is the mean of the last steps (up to ten); memory is in bytes.

    `eval_loss` is that on held-out data at the end, None if there is none. It may not be finite. `skipped` is the
    number of steps that changed nothing, as their gradients were not finite. `warnings` are what else went wrong on the
    way.
    """

    steps: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    seconds: float
    parameters: int
    planes_bytes: int
    device_memory_peak: int
    ordinary_training_bytes: int
    out: Path
    eval_loss: float | None = None
    skipped: int = 0
    warnings: tuple[str, ...] = ()


class MetricsFile:
    """Writes metrics.jsonl line by line, so that it can be followed, and is whole up to wherever a run stopped.

    It begins with the steps `before` a resumption: a run that was killed may have written more lines than it saved.
    Until there is a line, an earlier file stays: a run may be refused in its first step.

    A line that cannot be written (the disk is full) is no reason to lose what is being trained: `warn` is told, and the
    line is tried again with the next one.
    """

    def __init__(self, path: Path, before: Iterable[StepMetrics] = (), warn: Callable[[str], None] = print) -> None:
        self._path = path
        self._warn = warn
        # Unbuffered, so that it is known here what is in the file and what is not.
        self._file: io.FileIO | None = None
        self._pending = b""
        self._failing = False
        for metrics in before:
            self._pending += _line(metrics)
        self._write_pending()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_pending()
        if self._pending:
            missing = len(self._pending.splitlines())
            self._warn(f"the last {missing} lines are missing in {self._path}")
        if self._file is not None:
            self._file.close()

    def write(self, metrics: StepMetrics) -> None:
        """Appends one step."""
        self._pending += _line(metrics)
        self._write_pending()

    def _write_pending(self) -> None:
        try:
            if self._pending and self._file is None:
                self._file = io.FileIO(self._path, "w")
            while self._pending and self._file is not None:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._warn(f"cannot write to {self._path}: {error.strerror}; training goes on, and it is tried again")
            self._failing = True


def _line(metrics: StepMetrics) -> bytes:
    return (json.dumps(metrics.to_json(), allow_nan=False) + "\n").encode()


class Progress:
    """Shows stages and steps: a bar on a terminal, plain lines elsewhere.

    Args:
        console: a rich console; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        try:
            from rich.console import Console
        except ImportError as error:
            raise MissingDependencyError("rich is not installed", "Run: pip install 'slidecore[finetune]'") from error
        where = "metrics.jsonl in the output directory has the figures of every step."
        self.console = console or Console(highlight=False, file=cast("IO[str]", Outlet("stdout", where)))

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A part of the work that shows nothing but that it goes on."""
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.console.print(f"{text} ...", markup=False)
            yield

    def say(self, text: str) -> None:
        """One line, kept on the screen."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def steps(self, total: int, done: int = 0) -> Iterator[Any]:
        """Gives a function that takes the StepMetrics of each of `total` steps, of which `done` are done."""
        if not self.console.is_terminal:
            yield _PlainSteps(self, total, done)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None if self.console.width > 120 else 8),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
        ]
        with Bar(*columns, console=self.console) as bar:
            task = bar.add_task("steps", total=total, completed=done, figures="")
            room = self.console.width - _BESIDE_FIGURES
            yield lambda metrics: bar.update(task, completed=metrics.step, figures=_figures(metrics, room))


class _PlainSteps:
    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self._progress = progress
        self._total = total
        self._done = done
        self._every = max(1, total // _PLAIN_LINES)
        self._began = time.monotonic()

    def __call__(self, metrics: StepMetrics) -> None:
        shown = metrics.step in (self._done + 1, self._total) or metrics.eval_loss is not None
        if metrics.step % self._every and not shown:
            return
        left = (time.monotonic() - self._began) / (metrics.step - self._done) * (self._total - metrics.step)
        self._progress.say(f"step {metrics.step}/{self._total}  {_figures(metrics)}  left {format_seconds(left)}")


def summary_lines(summary: Summary) -> list[str]:
    """The closing words: loss, speed, memory against what ordinary training would hold, and where the files are."""
    ordinary = summary.ordinary_training_bytes
    share = summary.device_memory_peak / ordinary if ordinary else 0.0
    held_out = f", {summary.eval_loss:.3f} on held-out data" if summary.eval_loss is not None else ""
    warnings = [f"WARNING        {text}" for text in summary.warnings]
    if summary.eval_loss is not None and not math.isfinite(summary.eval_loss):
        warnings.append(
            f"WARNING        the loss on held-out data is {summary.eval_loss}: the model was written all the same, but "
            f"look at it and at that data before using it"
        )
    if summary.skipped:
        warnings.append(
            f"WARNING        {summary.skipped} of {summary.steps} steps were skipped, as their gradients were not "
            f"finite: they changed nothing; a lower --lr or a longer --warmup may help"
        )
    return [
        f"{summary.steps} steps in {format_seconds(summary.seconds)}",
        f"loss           {summary.first_loss:.3f} -> {summary.last_loss:.3f} nats per token{held_out}",
        f"speed          {summary.tokens_per_second:,.0f} tokens/s",
        f"device memory  {format_bytes(summary.device_memory_peak)} at most; ordinary training would hold "
        f"{format_bytes(ordinary)} for the same {summary.parameters:,} parameters ({share:.0%} of it)",
        f"model          {summary.out} (loads with AutoModelForCausalLM.from_pretrained)",
        f"figures        {', '.join(_written(summary.out))}",
        *warnings,
    ]


def format_bytes(count: float) -> str:
    """Such as "3.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Such as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(metrics: StepMetrics, room: int | None = None) -> str:
    """All of them, or as many as have `room`, in columns, but at least the loss."""
    figures = [
        f"loss {metrics.loss:.3f}",
        *(["skipped"] if metrics.skipped else []),
        *([f"held out {metrics.eval_loss:.3f}"] if metrics.eval_loss is not None else []),
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"device {format_bytes(metrics.device_memory)}",
        f"host {format_bytes(metrics.host_memory)}",
    ]
    while room is not None and len(figures) > 1 and len("  ".join(figures)) > room:
        figures.pop()
    return "  ".join(figures)


def _written(out: Path) -> list[str]:
    from slidecore.finetune import output

    names = (output.METRICS, output.LOSS_PLOT, output.TIMELINE_PLOT, output.TRACE)
    return [name for name in names if (out / name).exists()]
