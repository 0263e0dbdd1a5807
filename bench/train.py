#!/usr/bin/env python3
"""Seconds per training step, device memory and host memory of slidecore and its peers on one machine, in one run.

Every system gets the same model, the same starting weights and the same tokens, in a process of its own. The result is
one JSON document on standard output; `bench/README.md` says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _machine import emit, keep, log, machine
from _memory import HostMemorySampler, used_bytes

SYSTEMS = ("resident", "fsdp2-offload", "slidecore")
# More ways to run slidecore, on request: arguments of slidecore.offload, and of slidecore.AdamW.
VARIANTS: dict[str, dict[str, Any]] = {
    "slidecore-clipped": {"optimizer": {"max_grad_norm": 1.0}},
    "slidecore-8bit": {"moments": "8bit"},
    "slidecore-8bit-clipped": {"moments": "8bit", "optimizer": {"max_grad_norm": 1.0}},
    "slidecore-disk": {},  # and --disk-options
    "slidecore-8bit-disk": {"moments": "8bit"},
}

# The shape of --quick: seconds on two processors.
QUICK = {
    "hidden": 64,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 128,
    "vocabulary": 512,
    "sequence": 64,
    "batch": [2, 4],
    "steps": 3,
    "warmup": 1,
}


def _list_of_int(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def _options(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("model (defaults: 3.6 billion parameters)")
    shape.add_argument("--hidden", type=int, default=3072)
    shape.add_argument("--layers", type=int, default=28)
    shape.add_argument("--heads", type=int, default=24)
    shape.add_argument("--kv-heads", type=int, default=8)
    shape.add_argument("--intermediate", type=int, default=8192)
    shape.add_argument("--vocabulary", type=int, default=128256)
    tie = shape.add_mutually_exclusive_group()
    tie.add_argument("--tied", dest="tied", action="store_true", help="input and output embedding share one weight")
    tie.add_argument("--untied", dest="tied", action="store_false")
    shape.set_defaults(tied=False)
    work = parser.add_argument_group("work")
    work.add_argument("--sequence", type=int, default=1024, help="tokens in a sequence")
    work.add_argument("--batch", type=_list_of_int, default=[4, 16, 64], help="sequences in a step, e.g. 4,16,64")
    work.add_argument("--steps", type=int, default=5, help="timed steps of each batch size")
    work.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    work.add_argument("--seed", type=int, default=0)
    work.add_argument("--lr", type=float, default=1e-4)
    work.add_argument(
        "--kernels", default="auto", choices=("auto", "liger", "torch"), help="of the layers, the same for every system"
    )
    work.add_argument("--weight-decay", type=float, default=0.1)
    run = parser.add_argument_group("systems")
    run.add_argument(
        "--systems",
        default=",".join(SYSTEMS),
        help="which, in this order (default: %(default)s); also: " + ", ".join(VARIANTS),
    )
    run.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    run.add_argument("--device-memory", help="slidecore's device budget, e.g. 7GiB")
    run.add_argument("--window", type=int, help="slidecore's slots")
    run.add_argument("--trace", metavar="DIR", help="write slidecore's lanes over two steps there, per batch")
    run.add_argument("--micro-batch", type=int, help="slidecore's sequences in a micro-batch")
    run.add_argument("--slidecore-options", type=_options, default={}, help="JSON: more arguments of slidecore.offload")
    run.add_argument(
        "--disk-options",
        type=_options,
        default={},
        help='JSON of the systems that end in -disk: {"host_memory": "8GiB", "disk": "/mnt/nvme0"}',
    )
    run.add_argument("--resident-options", type=_options, default={}, help="JSON: micro_batch, recompute, tile")
    run.add_argument("--fsdp2-options", type=_options, default={}, help="JSON: as resident, and reduce_dtype")
    run.add_argument("--timeout", type=float, default=1800.0, help="seconds a system may take in all")
    parser.add_argument("--out", help="also write the JSON to this file, after each batch size")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: checks that all of it works")
    first = parser.parse_args(arguments)
    if first.quick:
        parser.set_defaults(**QUICK)
        first = parser.parse_args(arguments)
    first.systems = [word for word in first.systems.split(",") if word]
    unknown = sorted(set(first.systems) - {*SYSTEMS, *VARIANTS})
    if unknown:
        parser.error(f"unknown system {', '.join(unknown)}; there are {', '.join([*SYSTEMS, *VARIANTS])}")
    if first.steps < 1 or first.warmup < 0 or not first.batch or min(first.batch) < 1:
        parser.error("--steps and every --batch must be at least 1, --warmup at least 0")
    # Ascending, so that the memory peak of a small batch is not that of a larger one before it.
    first.batch = sorted(set(first.batch))
    return first


def _device(wanted: str) -> str:
    if wanted != "auto":
        return "cuda:0" if wanted == "cuda" else wanted
    # Asked in another process: this one must not hold a context on the card that is being measured.
    probe = "import torch; print('cuda:0' if torch.cuda.is_available() else 'cpu')"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return answer.stdout.split()[-1]


def _system_options(arguments: argparse.Namespace, system: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "lr": arguments.lr,
        "weight_decay": arguments.weight_decay,
        "kernels": arguments.kernels,
    }
    if system == "resident":
        options.update(arguments.resident_options)
    elif system == "fsdp2-offload":
        options.update(arguments.fsdp2_options)
    else:
        for key in ("device_memory", "window", "micro_batch", "trace"):
            value = getattr(arguments, key)
            if value is not None:
                options[key] = value
        options.update(VARIANTS.get(system, {}))
        if system.endswith("-disk"):
            options.update(arguments.disk_options)
        options.update(arguments.slidecore_options)
    return options


def _per_parameter(result: dict[str, Any]) -> None:
    """Adds to each batch's host memory the bytes per parameter, with and without the baseline taken off."""
    parameters = result.get("parameters")
    baseline = result.get("host_memory", {}).get("baseline", {}).get("now", {})
    for batch in result["batches"].values():
        peak = batch["host_memory"]["peak"]
        if not parameters:
            continue
        batch["host_bytes_per_parameter"] = {
            "whole": {key: peak[key] / parameters for key in peak},
            "above_baseline": {key: (peak[key] - baseline.get(key, 0)) / parameters for key in peak},
        }


def run_system(
    system: str, job: dict[str, Any], timeout_s: float, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Runs one system in its own process and gathers its events in `result`, calling `keep` after each.

    A failure is a result too: its `error`.
    """
    result.update(system=system, options=job["options"], batches={}, host_memory={})
    idle = used_bytes()
    read_end, write_end = os.pipe()
    # Whatever the worker prints belongs with the progress: standard output carries only the JSON.
    worker = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("_train_worker.py")),
            json.dumps(job),
            "--events",
            str(write_end),
        ],
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        pass_fds=(write_end,),
        text=True,
        # One rank and no launcher; every processor may take part.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    os.close(write_end)
    assert worker.stdin is not None
    deadline = time.monotonic() + timeout_s
    finished = False
    with (
        os.fdopen(read_end, "rb", buffering=0) as events,
        selectors.DefaultSelector() as selector,
        HostMemorySampler(worker.pid, idle) as sampler,
    ):
        selector.register(events, selectors.EVENT_READ)
        pending = b""
        while not finished:
            if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
                worker.kill()
                result["error"] = f"stopped after {timeout_s:g} s"
                break
            data = events.read(65536)
            if not data:
                break
            pending += data
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                finished = _take_event(json.loads(line), result, sampler, system) or finished
                keep()
                try:
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                except BrokenPipeError:
                    break
    try:
        code = worker.wait(timeout=120)
    except subprocess.TimeoutExpired:
        worker.kill()
        code = worker.wait()
    if code != 0 and "error" not in result:
        result["error"] = f"the process ended with code {code}" + (" (killed: out of memory?)" if code == -9 else "")
    _per_parameter(result)


def _take_event(event: dict[str, Any], result: dict[str, Any], sampler: HostMemorySampler, system: str) -> bool:
    """Files one event; true when it was the last."""
    kind = event.pop("event")
    memory = sampler.take()
    if kind == "baseline":
        result["accelerator"] = event["accelerator"]
        result["host_memory"]["baseline"] = memory
    elif kind == "built":
        result.update(parameters=event["parameters"], build_s=event["seconds"], notes=event["notes"])
        result["host_memory"]["built"] = memory
        log(f"{system}: {event['parameters'] / 1e6:.1f} M parameters built in {event['seconds']:.1f} s")
    elif kind == "batch":
        batch = event["result"]
        batch["host_memory"] = memory
        result["batches"][str(batch["batch"])] = batch
        seconds = batch["seconds_per_step"]
        device = batch["device_memory"].get("allocated_peak_bytes", 0) / 2**30
        host = memory["peak"]["rss_anon_shmem_bytes"] / 2**30  # type: ignore[index,call-overload]
        log(
            f"{system}: batch {batch['batch']}: {seconds['mean']:.3f} s a step (median {seconds['median']:.3f}), "
            f"{batch['tokens_per_s']:.0f} tokens/s, loss {batch['losses'][0]:.4f} to {batch['losses'][-1]:.4f}, "
            f"device {device:.2f} GiB, host {host:.2f} GiB"
        )
    elif kind == "error":
        result["error"] = f"{event['stage']}: {event['error']}"
        log(f"{system}: {result['error']}")
        return True
    elif kind == "done":
        result["facts"] = event["facts"]
        for number, limit in event["disk_alone_s"].items():
            batch = result["batches"][number]
            share = limit / batch["seconds_per_step"]["mean"]
            batch["disk"] |= {"limit_s": limit, "limit_over_step": share}
            log(f"{system}: batch {number}: the disk alone needs {limit:.3f} s, {share:.0%} of the step")
        return True
    return False


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How often each system fits into another's step, and how far their losses lie apart.

    A speed-up is the other's seconds divided by this system's: above 1 this one is faster. Losses are comparable as
    long as both systems took the same steps before, that is while neither failed at an earlier batch.
    """
    compared: dict[str, Any] = {}
    for other in ("fsdp2-offload", "resident", "slidecore"):
        for name, result in results.items():
            if name == other or other not in results:
                continue
            for batch, mine in result["batches"].items():
                theirs = results[other]["batches"].get(batch)
                if theirs is None:
                    continue
                compared.setdefault(name, {}).setdefault(batch, {})[f"against {other}"] = {
                    "speedup_mean": theirs["seconds_per_step"]["mean"] / mine["seconds_per_step"]["mean"],
                    "speedup_median": theirs["seconds_per_step"]["median"] / mine["seconds_per_step"]["median"],
                    "loss_max_difference": max(
                        abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True)
                    ),
                }
    return compared


def main() -> int:
    arguments = parse()
    device = _device(arguments.device)
    shape = {
        key: getattr(arguments, key)
        for key in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary", "tied", "sequence")
    }
    document: dict[str, Any] = {
        "bench": "train",
        "machine": machine(),
        "command": sys.argv[1:],
        "model": shape,
        "seed": arguments.seed,
        "lr": arguments.lr,
        "weight_decay": arguments.weight_decay,
        "kernels": arguments.kernels,
        "device": device,
        "systems": {},
        "compared": {},
    }
    for system in arguments.systems:
        log(f"{system}: starting")
        job = {
            "system": "slidecore" if system in VARIANTS else system,
            "shape": shape,
            "device": device,
            "seed": arguments.seed,
            "batches": arguments.batch,
            "steps": arguments.steps,
            "warmup": arguments.warmup,
            "options": _system_options(arguments, system),
        }
        result = document["systems"][system] = {}
        run_system(system, job, arguments.timeout, result, lambda: keep(document, arguments.out))
        document["compared"] = compare(document["systems"])
        keep(document, arguments.out)
    emit(document, arguments.out)
    failed = [name for name, result in document["systems"].items() if "error" in result]
    if failed:
        log(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
