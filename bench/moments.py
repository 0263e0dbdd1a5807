#!/usr/bin/env python3
"""Loss curves of 8-bit moments beside those of float32 moments: the same model, data, seeds and settings.

The training is the demo's (slidecore.finetune.demo). A third run, with float32 moments and the batch in micro-batches,
adds up gradients in another order: what rounding alone does to the curve is the scale to read differences by.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _machine import core_facts, emit, log, machine

QUICK = {"steps": 6, "batch_size": 2, "seeds": "0", "glob": "json/*.py"}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"moments": "float32"},
    "8bit": {"moments": "8bit"},
    "float32 in micro-batches": {"moments": "float32", "micro_batch": 1},
}
LAST = 50
SMOOTH = 25


def train(options: Any) -> dict[str, Any]:
    """One run; its losses, one a step, in nats per token."""
    from rich.console import Console
    from slidecore.finetune.loop import run
    from slidecore.finetune.output import METRICS
    from slidecore.finetune.report import Progress

    began = time.perf_counter()
    summary = run(options, Progress(Console(file=sys.stderr, highlight=False, force_terminal=False)))
    lines = (options.out / METRICS).read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    last = losses[-min(LAST, len(losses)) :]
    return {
        "losses": losses,
        "mean_of_last": sum(last) / len(last),
        "planes_bytes": summary.planes_bytes,
        "parameters": summary.parameters,
        "seconds": time.perf_counter() - began,
    }


def smoothed(losses: list[float]) -> list[float]:
    """Means of SMOOTH consecutive losses, or of all where there are fewer."""
    width = min(SMOOTH, len(losses))
    return [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far each run is from the one with float32 moments."""
    base = runs["float32"]
    result = {}
    for name in list(runs)[1:]:
        differences = [a - b for a, b in zip(smoothed(runs[name]["losses"]), smoothed(base["losses"]), strict=True)]
        result[name] = {
            "difference_of_means_of_last": runs[name]["mean_of_last"] - base["mean_of_last"],
            "largest_difference_smoothed": max(differences, key=abs),
            "largest_difference_of_a_step": max(
                (a - b for a, b in zip(runs[name]["losses"], base["losses"], strict=True)), key=abs
            ),
        }
    return result


def plot(path: Path, seeds: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Writes the smoothed curves of every seed, and below them their differences to the one of float32 moments."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles: dict[str, dict[str, Any]] = {
        "float32": {"color": "#1f618d", "linewidth": 2.4},
        "8bit": {"color": "#e67e22", "linewidth": 1.1},
        "float32 in micro-batches": {"color": "#7f8c8d", "linewidth": 0.9},
    }
    figure = Figure(figsize=(8, 8))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for runs in seeds.values():
        base = smoothed(runs["float32"]["losses"])
        steps = range(len(runs["float32"]["losses"]) - len(base) + 1, len(runs["float32"]["losses"]) + 1)
        for name, run in runs.items():
            smooth = smoothed(run["losses"])
            above.plot(steps, smooth, **styles[name])
            if name != "float32":
                below.plot(steps, [a - b for a, b in zip(smooth, base, strict=True)], **styles[name])
    above.set(ylabel=f"loss (nats per token), means of {SMOOTH} steps", title="8-bit and float32 moments")
    above.legend(handles=[Line2D([], [], label=name, **style) for name, style in styles.items()], frameon=False)
    below.axhline(0, color=styles["float32"]["color"], linewidth=1)
    below.set(xlabel="step", ylabel="difference to float32 of the same seed")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of 128 tokens")
    parser.add_argument("--seeds", default="0,1", help="of weights and data order, each with all runs")
    parser.add_argument("--betas", default="0.9,0.95", help="AdamW's decay rates")
    parser.add_argument("--glob", default="*.py", help="files of Python's standard library to learn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="picture to write (PNG)")
    parser.add_argument("--out", help="also write the JSON to this file")
    parser.add_argument("--quick", action="store_true", help="few steps: checks that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        beta1, beta2 = (float(beta) for beta in arguments.betas.split(","))
    except ValueError:
        parser.error("--seeds are whole numbers and --betas two numbers, separated by commas")

    from slidecore.finetune import demo

    document: dict[str, Any] = {
        "bench": "moments",
        "machine": machine(),
        "command": sys.argv[1:],
        "core": core_facts(),
        "steps": arguments.steps,
        "tokens_per_step": arguments.batch_size * 128,
        "betas": [beta1, beta2],
        "compute_dtype": "bfloat16",
        "seeds": {},
        "compared": {},
    }
    size, dtype = demo.choose_size(arguments.device, "bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            model = Path(scratch) / f"model-{seed}"
            demo.make_model(model, hidden=size.hidden, layers=size.layers, seed=seed)
            options = replace(
                demo.training(model, Path(scratch) / "trained", size, dtype, arguments.steps, arguments.device),
                glob=arguments.glob,
                batch_size=arguments.batch_size,
                betas=(beta1, beta2),
                seed=seed,
                # Room for all activations, so that one run differs from another by what it is asked for alone.
                device_memory="1GiB",
                micro_batch=arguments.batch_size,
                trace_step=0,
            )
            runs = {}
            for name, changed in RUNS.items():
                log(f"seed {seed}: {name}")
                runs[name] = train(replace(options, **changed))
            document["seeds"][str(seed)] = runs
            document["compared"][str(seed)] = compare(runs)
    if arguments.plot:
        plot(arguments.plot, document["seeds"])
    emit(document, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
