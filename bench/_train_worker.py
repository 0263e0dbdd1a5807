"""One system of `train.py`, in a process of its own: builds it, runs the batches, reports events to the parent.

Events are JSON lines on a file descriptor that the parent opened; after each the worker waits for a line on standard
input, so that the parent can measure memory while nothing moves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _disk
import _model
import _peers
import torch


class Slidecore(_peers.System):
    """`slidecore.offload` and `slidecore.AdamW`; the batch goes in whole and slidecore splits it."""

    def __init__(self, shape: _model.Shape, device: torch.device, seed: int, options: dict[str, Any]) -> None:
        import slidecore

        self._slidecore = slidecore
        self._device = device
        lr, weight_decay = float(options.pop("lr")), float(options.pop("weight_decay"))
        optimizer = {"lr": lr, "weight_decay": weight_decay, **options.pop("optimizer", {})}
        self._trace_directory = options.pop("trace", None)
        model = _model.build_empty(shape)
        self.parameters = _model.parameter_count(model)
        settings: dict[str, Any] = {"device": str(device), "compute_dtype": torch.bfloat16, **options}
        self._model: Any = slidecore.offload(model, **settings)
        _model.fill(model, seed, device)
        self._optimizer = slidecore.AdamW(self._model.parameters(), **optimizer)
        self.notes = {key: str(value) for key, value in {**settings, "optimizer": optimizer}.items()}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self._model(input_ids=ids, labels=ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._slidecore.synchronize(self._model)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def trace(self, ids: torch.Tensor) -> dict[str, Any]:
        """Traces two more steps; writes them as a Chrome trace and, where matplotlib is installed, as a picture."""
        if self._trace_directory is None:
            return {}
        from slidecore.errors import MissingDependencyError
        from slidecore.finetune.plots import plot_timeline

        with self._slidecore.trace(self._model) as trace:
            for _ in range(2):
                self.step(ids)
            self.synchronize()
        directory = Path(self._trace_directory)
        directory.mkdir(parents=True, exist_ok=True)
        trace.save(directory / f"trace-{ids.size(0)}.json")
        try:
            title = f"Lanes over two steps of {ids.numel()} tokens"
            plot_timeline(directory / f"timeline-{ids.size(0)}.png", trace.spans, title=title)
        except MissingDependencyError as error:
            print(f"slidecore: no picture of the lanes: {error.message}", file=sys.stderr)
        return trace.summary

    def moved(self) -> dict[str, int]:
        return self._slidecore.stats(self._model).disk_counters  # type: ignore[no-any-return]

    def disk_alone_s(self, moved: dict[str, float]) -> float:
        from slidecore.offloading import engine_of

        self.synchronize()
        return _disk.seconds_alone(engine_of(self._model).tiers, moved)

    def facts(self) -> dict[str, Any]:
        from slidecore import _core
        from slidecore.offloading import engine_of

        tiers = engine_of(self._model).tiers
        return {
            **({"tiers": tiers.describe()} if tiers.store is not None else {}),
            "stats": _plain(self._slidecore.stats(self._model)),
            "instruction_set": _core.instruction_set(),
            "host_planes_peak_bytes": _core.HostBuffer.mapped_peak(),
        }


SYSTEMS: dict[str, Callable[[_model.Shape, torch.device, int, dict[str, Any]], _peers.System]] = {
    "resident": _peers.Resident,
    "fsdp2-offload": _peers.Fsdp2Offload,
    "slidecore": Slidecore,
}


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value)


class _Stamps:
    """Times of the ends of steps: on a GPU events on the compute stream, so that no step waits to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Any] = []
        self._times: list[float] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between neighbouring marks; the device must be synchronized."""
        if self._device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self._events, self._events[1:], strict=False)]
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]


def _device_memory(device: torch.device) -> dict[str, int]:
    """Peaks of torch's allocator since the last reset, and what the card has in use now by everyone, in bytes."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "card_used_now_bytes": total - free,
    }


def run_batch(
    system: _peers.System, shape: _model.Shape, batch: int, steps: int, warmup: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Trains `warmup` + `steps` steps on one batch and times the latter as one window.

    The window starts and ends synchronized, so updates that run behind are inside it. In between nothing waits.
    """
    ids = _model.tokens(shape, batch, seed, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    losses = [system.step(ids) for _ in range(warmup)]
    system.synchronize()
    before = system.moved()
    stamps = _Stamps(device)
    start = time.perf_counter()
    stamps.mark()
    for _ in range(steps):
        losses.append(system.step(ids))
        stamps.mark()
    system.synchronize()
    window = time.perf_counter() - start
    each = stamps.intervals()
    memory = _device_memory(device)
    after = system.moved()
    tokens = batch * shape.sequence
    values = [float(loss) for loss in losses]
    return {
        "batch": batch,
        "tokens_per_step": tokens,
        "steps": steps,
        "warmup": warmup,
        "seconds_per_step": {
            "mean": window / steps,
            "median": statistics.median(each),
            "min": min(each),
            "all": each,
            "window_s": window,
        },
        "tokens_per_s": tokens * steps / window,
        "model_tflop_per_s": shape.flops_per_step(batch) * steps / window / 1e12,
        "losses": values,
        "losses_finite": _model.finite(values),
        "device_memory": memory,
        **({"disk": _disk.per_step(before, after, steps, window)} if after else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", help="the work as JSON, written by train.py")
    parser.add_argument("--events", type=int, required=True, help="file descriptor for events")
    arguments = parser.parse_args()
    job = json.loads(arguments.job)
    events = os.fdopen(arguments.events, "w")

    def tell(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")
        events.flush()
        sys.stdin.readline()

    stage = "start"
    system: _peers.System | None = None
    try:
        shape = _model.Shape(**job["shape"])
        device = torch.device(job["device"])
        if job["system"] == "slidecore":
            import slidecore  # noqa: F401  (part of the baseline: imports are not training state)
        import transformers  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

        accelerator: dict[str, Any] = {"device": str(device)}
        if device.type == "cuda":
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
            properties = torch.cuda.get_device_properties(device)
            accelerator.update(
                name=properties.name,
                memory_bytes=properties.total_memory,
                multiprocessors=properties.multi_processor_count,
                runtime=torch.version.cuda or torch.version.hip,
            )
        tell("baseline", accelerator=accelerator)
        stage = "build"
        start = time.perf_counter()
        system = SYSTEMS[job["system"]](shape, device, job["seed"], dict(job["options"]))
        system.synchronize()
        tell("built", parameters=system.parameters, seconds=time.perf_counter() - start, notes=system.notes)
        moved = {}
        for batch in job["batches"]:
            stage = f"batch {batch}"
            result = run_batch(system, shape, batch, job["steps"], job["warmup"], job["seed"], device)
            tell("batch", result=result)
            moved[batch] = result.get("disk", {})
        stage = "trace"
        # After all timed steps: traced ones train too, and the losses of all systems are to be compared.
        traces = {batch: system.trace(_model.tokens(shape, batch, job["seed"], device)) for batch in job["batches"]}
        stage = "end"
        facts = _plain({**system.facts(), "traces": traces})
        limits = {batch: system.disk_alone_s(of) for batch, of in moved.items() if of and of["written_bytes"]}
        tell("done", facts=facts, disk_alone_s=limits)
        system.close()
    except Exception as error:
        traceback.print_exc()
        tell("error", stage=stage, error=f"{type(error).__name__}: {error}", kind=type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
