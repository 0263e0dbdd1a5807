"""An offloaded model with optimizer and schedule, stepped over packed data and measured on what was held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import slidecore
from slidecore.errors import TrainingError
from slidecore.finetune import output
from slidecore.finetune.data import PackedData
from slidecore.finetune.options import Options
from slidecore.finetune.plots import plot_timeline
from slidecore.finetune.report import StepMetrics


class DivergedError(TrainingError):
    """What was computed is not finite: the run cannot go on, and going on from its last step would not help.

    The hint is for a run without a checkpoint.
    """

    def __init__(self, message: str, hint: str = "Lower --lr, lengthen --warmup, or check the data.") -> None:
        super().__init__(message, hint)


class Training:
    """The state of a run between its steps.

    Attributes:
        history: the metrics of all steps so far, those before a resumption included.
    """

    def __init__(
        self,
        model: Any,
        data: PackedData,
        options: Options,
        steps: int,
        held_out: PackedData | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stopping` says whether time is short: all evaluations but the last are then left out, see `make_up`."""
        self.model = model
        self.data = data
        self.options = options
        self.held_out = held_out
        self.history: list[StepMetrics] = []
        self._total = steps
        self._stopping = stopping
        self._trace: slidecore.trace | None = None  # of the step that was taken last
        self._warming = {1}  # steps that also make something ready, and say nothing of the speed
        torch.manual_seed(options.seed)
        self.optimizer = slidecore.AdamW(
            parameter_groups(model, options.weight_decay),
            lr=options.lr,
            betas=options.betas,
            max_grad_norm=options.max_grad_norm,
            skip_nonfinite=options.max_grad_norm is not None,
        )
        self.scheduler = cosine_schedule(self.optimizer, options.warmup_steps(steps), steps)
        model.train()

    @property
    def done(self) -> int:
        """Number of steps taken."""
        return len(self.history)

    def go_on_from(self, history: list[StepMetrics]) -> None:
        """Takes over the metrics of the steps before; model, optimizer and scheduler are already where they ended."""
        self.history = history
        self._warming.add(self.done + 1)

    def step(self, number: int) -> StepMetrics:
        """Trains on the batch of step `number`, counted from 1; traces it if it is the step to trace.

        Where it is due, the loss on what was held out is taken afterwards.

        Raises DivergedError where the loss is not finite, and the weights have not been touched by that step; or where
        that on held-out data is not, and there are steps left to save.
        """
        began = time.perf_counter()
        if number == self.options.trace_step:
            # Whole, from idle lanes to idle lanes: the picture of one step, at the price of one overlap.
            slidecore.synchronize(self.model)
            with slidecore.trace(self.model) as trace:
                loss, lr = self._update(number)
                slidecore.synchronize(self.model)
            self._trace = trace
        else:
            loss, lr = self._update(number)
        seconds = time.perf_counter() - began
        state = slidecore.stats(self.model)
        metrics = StepMetrics(
            step=number,
            loss=loss,
            lr=lr,
            tokens_per_second=self._batch_tokens() / seconds,
            device_memory=state.device_memory,
            host_memory=state.host_memory,
            seconds=seconds,
            eval_loss=self._evaluate(number),
            grad_norm=float(self.optimizer.grad_norm) if self.optimizer.grad_norm is not None else None,
        )
        self.history.append(metrics)
        return metrics

    def save_trace(self, out: Path) -> None:
        """Writes and draws into `out` what the last step recorded, if it was the one to trace."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            trace.save(out / output.TRACE)
            plot_timeline(out / output.TIMELINE_PLOT, trace.spans, title=f"Lanes in step {self.done}")

    def tokens_per_second(self) -> float:
        """Over all steps but the first of a process, which warms up, and the traced one."""
        left_out = {*self._warming, self.options.trace_step}
        counted = [m.seconds for m in self.history if m.step not in left_out] or [m.seconds for m in self.history]
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
            raise DivergedError(
                f"the loss became {loss} at step {number}; the run stopped and no model was written",
                "Lower --lr, lengthen --warmup, or check the data; at step 1 it is the model's weights that are bad.",
            )
        result.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, lr

    def owes_evaluation(self) -> bool:
        """Whether the evaluation after the last step is due and was left out, for `stopping`."""
        return self.done > 0 and self._evaluation_due(self.done) and self.history[-1].eval_loss is None

    def make_up(self) -> None:
        """Takes the evaluation that is owed. Raises as `step` does."""
        self.history[-1] = replace(self.history[-1], eval_loss=self._evaluate(self.done))

    def _evaluation_due(self, number: int) -> bool:
        every = self.options.eval_every
        return self.held_out is not None and (number == self._total or (every > 0 and number % every == 0))

    def _evaluate(self, number: int) -> float | None:
        if self.held_out is None or not self._evaluation_due(number):
            return None
        # The last one is finished: no resumption follows that could make it up.
        stopping = self._stopping if number < self._total else lambda: False
        loss = evaluate(self.model, self.held_out, self.options.batch_size, stopping)
        # After the last step there is nothing left to stop: whether the model is worth anything is for others to say.
        if loss is not None and not math.isfinite(loss) and number < self._total:
            raise DivergedError(
                f"the loss on held-out data became {loss} after step {number}; the run stopped and no model was written"
            )
        return loss


def evaluate(
    model: Any, data: PackedData, batch_size: int, stopping: Callable[[], bool] = lambda: False
) -> float | None:
    """The mean loss over all tokens of `data` that carry one, in nats; None if `stopping` cut it short.

    The model computes in evaluation mode (no dropout, no random numbers drawn) and is in training mode afterwards.
    """
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for begin in range(0, len(data), batch_size):
                if stopping():
                    return None
                batch = data.rows(list(range(begin, min(begin + batch_size, len(data)))))
                counted = int((batch["labels"][:, 1:] != -100).sum())
                if counted:
                    total += float(model(**batch).loss) * counted
                    tokens += counted
    finally:
        model.train()
    return total / tokens if tokens else math.nan


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
