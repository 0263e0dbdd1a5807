#!/usr/bin/env python3
"""The GPU kernels against the card's own copy, PyTorch and Liger-Kernel; `bench/README.md` says what is counted.

Prints a line on standard error for each measurement as it is made, so that a run that is cut off still tells.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _machine import emit, keep, log, machine

GROUPS = ("copy", "adamw", "accumulate", "split", "merge", "square_sum", "linear_cross_entropy")
QUICK = {"parameters": 20000, "repeats": 2, "tokens": [8, 12], "hidden": [16], "vocabulary": 100}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, e.g. adamw,linear_cross_entropy")
    parser.add_argument("--parameters", type=int, default=218_000_000, help="of the chunk that streams")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of streaming kernels; the median counts")
    parser.add_argument("--tune", action="store_true", help="time the launch candidates first and store the best")
    parser.add_argument("--tokens", type=_integers, default=[65536, 16384, 4096])
    parser.add_argument("--hidden", type=_integers, default=[4096, 3072])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--systems", default="", help="of linear_cross_entropy: those whose name contains a word, a,b")
    parser.add_argument("--sweep", type=_integers, default=[], help="tiles of tokens to try, and eight pieces")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="also write the JSON to this file, after each measurement")
    parser.add_argument("--picture", help="draw the figures to this file (png, svg); needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that all of it works")
    first = parser.parse_args(arguments)
    if first.quick:
        parser.set_defaults(**QUICK)
        first = parser.parse_args(arguments)
    first.only = [word for word in first.only.split(",") if word]
    unknown = sorted(set(first.only) - set(GROUPS))
    if unknown:
        parser.error(f"unknown group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return first


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


class Meter:
    """Times calls: by events on a card's stream, by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_card = device.type == "cuda"

    def seconds(self, call: Callable[[], object], repeats: int, warmup: int = 2) -> list[float]:
        for _ in range(warmup):
            call()
        if not self.on_card:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """How far allocated memory rises over what is there before; None without a card."""
        if not self.on_card:
            call()
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()


def copy_rate(meter: Meter, moved: int, repeats: int) -> float:
    """Bytes per second of a device-to-device copy that moves `moved` bytes, read and written ones counted."""
    source, target = torch.empty(2, max(1, moved // 4), dtype=torch.int16, device=meter.device).unbind()
    return 2 * source.nbytes / statistics.median(meter.seconds(lambda: target.copy_(source), repeats))


def parameters_of(arguments: argparse.Namespace) -> int:
    """Of the chunk that is as near to what was asked for as its shapes allow."""
    from slidecore.triton.tune import block_shapes

    return sum(torch.Size(shape).numel() for shape in block_shapes(arguments.parameters))


def streaming(meter: Meter, arguments: argparse.Namespace, results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fills `results`, and calls `keep` after each of them."""
    from slidecore.triton import tuning
    from slidecore.triton.tune import cases

    for case in cases(arguments.parameters, meter.device):
        if not any(case.operation.split()[0] == group for group in arguments.only):
            continue
        copy = copy_rate(meter, case.bytes, arguments.repeats)
        meter.free()
        config = case.default
        if meter.on_card:
            if arguments.tune:
                config = tuning.tune(case.operation, arguments.parameters, meter.device, case.candidates, case.run)
            config = tuning.lookup(case.operation, arguments.parameters, meter.device, case.default)
        seconds = meter.seconds(lambda case=case, config=config: case.run(config), arguments.repeats)
        median = statistics.median(seconds)
        results[case.name] = {
            "seconds": {"median": median, "min": min(seconds)},
            "bytes": case.bytes,
            "counted": case.counted,
            "gb_per_s": case.bytes / median / 1e9,
            "copy_gb_per_s": copy / 1e9,
            "of_copy": case.bytes / median / copy,
            "launch": vars(config) | {},
        }
        log(
            f"{case.name}: {median * 1e3:.3f} ms, {case.bytes / median / 1e9:.0f} GB/s, copy {copy / 1e9:.0f} GB/s, "
            f"{case.bytes / median / copy:.1%} of it{'' if case.bytes / median >= 0.9 * copy else ', BELOW 90 %'}; "
            f"{config}"
        )
        keep()
    meter.free()
    for name, (call, against) in peers(meter, arguments).items():
        try:
            seconds = meter.seconds(call, arguments.repeats)
        except torch.OutOfMemoryError:
            results[name] = {"error": "out of memory"}
            continue
        median = statistics.median(seconds)
        results[name] = {"seconds": {"median": median, "min": min(seconds)}}
        log(f"{name}: {median * 1e3:.3f} ms")
        for mine in against:
            if mine in results:
                factor = median / results[mine]["seconds"]["median"]
                results[mine].setdefault("times_faster_than", {})[name] = factor
                log(f"  {mine} is {factor:.2f} times as fast")
        keep()
    meter.free()


def peers(meter: Meter, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], object], list[str]]]:
    """PyTorch's own way of doing the same, over tensors of the same block."""
    from slidecore.triton.tune import block_shapes

    device, shapes = meter.device, block_shapes(arguments.parameters)
    made: dict[str, tuple[Callable[[], object], list[str]]] = {}
    if "adamw" in arguments.only:
        masters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        halves = [master.detach().to(torch.bfloat16) for master in masters]
        gradients = [1e-3 * torch.randn_like(half) for half in halves]
        for master in masters:
            master.grad = torch.zeros_like(master)
        wide = [master.grad for master in masters]
        for kind in ("fused", "foreach"):
            optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.1, **{kind: True})

            @torch.no_grad()
            def step(optimizer: torch.optim.AdamW = optimizer) -> None:
                torch._foreach_copy_(wide, gradients)
                optimizer.step()
                torch._foreach_copy_(halves, masters)

            made[f"torch AdamW {kind}, with casts"] = (step, ["adamw", "adamw, 8-bit moments"])
    if "accumulate" in arguments.only:
        own = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
        sums = [torch.zeros(shape, device=device) for shape in shapes]

        def add() -> None:
            for total, gradient in zip(sums, own, strict=True):
                total += gradient.float()

        def add_and_round() -> None:
            add()
            torch._foreach_copy_(own, sums)
            torch._foreach_norm(own, 2.0, torch.float32)

        def add_mixed() -> None:
            for total, gradient in zip(sums, own, strict=True):
                total.add_(gradient)

        made["torch grad.float() adds"] = (add, ["accumulate"])
        made["torch add_ of bf16 to float32"] = (add_mixed, ["accumulate"])  # one kernel a tensor, no float32 copy
        made["torch grad.float() adds, rounding, norm"] = (add_and_round, ["accumulate, last"])
        made["torch foreach_norm"] = (lambda: torch._foreach_norm(own, 2.0, torch.float32), ["square_sum"])
    if "split" in arguments.only or "merge" in arguments.only:
        from slidecore.triton._bits import merge_reference, split_reference

        flat = torch.randn(sum(torch.Size(shape).numel() for shape in shapes), device=device)
        weight, residual = split_reference(flat)
        made["torch split by integers"] = (lambda: split_reference(flat), ["split"])
        made["torch merge by integers"] = (lambda: merge_reference(weight, residual), ["merge"])
    return made


def head_systems(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, sweep: list[int]
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Name and a call that makes the loss, whose backward makes both gradients. The most telling ones first."""
    from slidecore.triton.linear_cross_entropy import linear_cross_entropy

    def mine(**options: Any) -> Callable[[], torch.Tensor]:
        return lambda: linear_cross_entropy(hidden, weight, labels, **options).loss

    for prefer in ("memory", "speed"):
        yield f"slidecore {prefer}, bf16 sums", mine(accumulate=None, prefer=prefer)
        yield f"slidecore {prefer}, float32 sums", mine(prefer=prefer)
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Liger

        def liger(dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
            # input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction,
            # softcap, return_z_loss, accum_dtype
            def call() -> torch.Tensor:
                out = Liger.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "mean", None, False, dtype)
                return out[0] if isinstance(out, tuple) else out

            return call

        yield "Liger, bf16 sums", liger(None)
        yield "Liger, float32 sums", liger(torch.float32)
    compiled = torch.compile(lambda h, w, y: F.cross_entropy((h @ w.t()).float(), y), dynamic=False)
    yield "torch.compile", lambda: compiled(hidden, weight, labels)
    yield "eager", lambda: F.cross_entropy((hidden @ weight.t()).float(), labels)
    if sweep:
        yield "slidecore, 8 pieces", mine(piece=-(-len(weight) // 8))
    for tile in sweep:
        if tile <= len(hidden):
            yield f"slidecore, bf16 sums, tile {tile}", mine(accumulate=None, tile=tile)
            yield f"slidecore, float32 sums, tile {tile}", mine(tile=tile)


def heads(meter: Meter, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for width in arguments.hidden:
        weight = (0.02 * torch.randn(arguments.vocabulary, width, device=meter.device)).to(torch.bfloat16)
        weight.requires_grad_()
        for tokens in arguments.tokens:
            systems = heads_of(meter, arguments, weight, tokens)
            met = verdicts(systems)
            for peer, by in met.items():
                log(f"{tokens} x {width} against {peer}: {'met by ' + '; '.join(by) if by else 'NOT met'}")
            yield {
                "tokens": tokens, "hidden": width, "vocabulary": arguments.vocabulary, "systems": systems,
                "met_by": met,
            }  # fmt: skip
        del weight
        meter.free()


def heads_of(meter: Meter, arguments: argparse.Namespace, weight: torch.Tensor, tokens: int) -> dict[str, Any]:
    width, device = weight.shape[1], meter.device
    hidden = torch.randn(tokens, width, device=device).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, len(weight), (tokens,), device=device)
    words = [word for word in arguments.systems.split(",") if word]
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    systems: dict[str, Any] = {}

    def clear() -> None:
        hidden.grad = weight.grad = None

    for name, loss in head_systems(hidden, weight, labels, arguments.sweep):
        if words and not any(word in name for word in words):
            continue
        if name == "torch.compile" and not meter.on_card:
            continue  # minutes of compiling for the CPU

        def step(loss: Callable[[], torch.Tensor] = loss) -> torch.Tensor:
            clear()
            value = loss()
            value.backward()
            return value.detach()

        systems[name] = try_head(meter, name, step, clear, (tokens, width))
        if "error" not in systems[name]:
            calls[name] = step
        clear()
        meter.free()
    # In turns, each round beginning with the next: a card that gets warm and clocks down meets all alike.
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(2 if not meter.on_card else max(3, min(8, 65_536 // tokens))):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name] += meter.seconds(calls[name], 1, warmup=1)
            clear()
            meter.free()
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = 6.0 * tokens * width * len(weight) / median / 1e12
        systems[name].update(seconds={"median": median, "min": min(times), "all": times}, tflop_per_s=rate)
        peak, value = systems[name]["peak_bytes"], systems[name]["loss"]
        gib = "" if peak is None else f", peak {peak / 2**30:.3f} GiB"
        log(f"{tokens} x {width}, {name}: {median * 1e3:.2f} ms, {rate:.0f} TFLOP/s{gib}, loss {value:.5f}")
    return systems


def try_head(
    meter: Meter, name: str, step: Callable[[], torch.Tensor], clear: Callable[[], None], shape: tuple[int, int]
) -> dict[str, Any]:
    """Its loss and its peak, or its error."""
    try:
        value = float(step())  # compiles what has to be
        clear()  # gradients are part of what the step needs
        return {"peak_bytes": meter.peak_bytes(step), "loss": value}
    except torch.OutOfMemoryError:
        log(f"{shape[0]} x {shape[1]}, {name}: out of memory")
        return {"error": "out of memory"}
    except Exception as error:  # a peer that does not run is no failure of ours
        log(f"{shape[0]} x {shape[1]}, {name}: {type(error).__name__}: {error}")
        if name.startswith("slidecore"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


# Ahead in one of time and memory, and behind by no more than this in the other.
BEHIND = 1.03


def verdicts(systems: dict[str, Any]) -> dict[str, list[str]]:
    """For each peer the settings of slidecore that meet the criterion; the ratios go to the settings' `against`."""
    met: dict[str, list[str]] = {}
    if any("error" not in result and result["peak_bytes"] is None for result in systems.values()):
        return met  # no card, no peaks
    for peer, theirs in systems.items():
        if peer.startswith("slidecore"):
            continue
        met[peer] = []
        for name, mine in systems.items():
            # Sums of one precision are compared; eager and torch.compile have no sums over tiles.
            if not name.startswith("slidecore ") or (peer.startswith("Liger") and name.split(", ")[1] not in peer):
                continue
            if "error" in mine or ("error" in theirs and theirs["error"] != "out of memory"):
                continue
            if "error" in theirs:
                met[peer].append(name)
                continue
            time_ratio = mine["seconds"]["median"] / theirs["seconds"]["median"]
            peak_ratio = mine["peak_bytes"] / theirs["peak_bytes"]
            meets = min(time_ratio, peak_ratio) < 1 and max(time_ratio, peak_ratio) <= BEHIND
            mine.setdefault("against", {})[peer] = {"time": time_ratio, "peak": peak_ratio, "meets": meets}
            log(f"  {name} / {peer}: time {time_ratio:.3f}, peak {peak_ratio:.3f}{', met' if meets else ''}")
            if meets:
                met[peer].append(name)
    return met


def _draw_streams(axis: Any, streams: dict[str, Any]) -> None:
    names = list(streams)[::-1]
    axis.barh(names, [100 * streams[name]["of_copy"] for name in names], color="#3b6ea5")
    axis.axvline(90, color="#888888", linestyle="--", linewidth=1)
    for i, name in enumerate(names):
        faster = streams[name].get("times_faster_than", {})
        text = f"{streams[name]['gb_per_s']:.0f} GB/s" + (f", {min(faster.values()):.1f}x PyTorch" if faster else "")
        axis.text(1, i, text, va="center", color="white", fontsize=8)
    axis.set_xlabel("bytes per second, % of a device-to-device copy")
    axis.set_title("streaming kernels")


SHOWN = [
    ("slidecore memory, bf16 sums", "#3b6ea5", "-"), ("slidecore memory, float32 sums", "#3b6ea5", "--"),
    ("slidecore speed, bf16 sums", "#4f9d69", "-"), ("slidecore speed, float32 sums", "#4f9d69", "--"),
    ("Liger, bf16 sums", "#c0504d", "-"), ("Liger, float32 sums", "#c0504d", "--"),
    ("torch.compile", "#7f7f7f", "-"), ("eager", "#7f7f7f", "--"),
]  # fmt: skip


def _draw_head(axis: Any, rows: list[dict[str, Any]], field: str, unit: str, vocabulary: int) -> None:
    """Of the widest hidden states."""
    width = max(row["hidden"] for row in rows)
    for name, color, style in SHOWN:
        points = sorted(
            (row["tokens"], r["seconds"]["median"] if field == "time" else (r["peak_bytes"] or 0) / 2**30)
            for row in rows
            if row["hidden"] == width and "seconds" in (r := row["systems"].get(name, {}))
        )
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4, label=name)
    axis.set_xscale("log", base=2)
    if any(max(line.get_ydata()) > 0 for line in axis.lines):
        axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_title(f"linear cross-entropy, {width} x {vocabulary}: {field} ({unit})")
    if axis.lines:
        axis.legend(fontsize=7)


def draw(document: dict[str, Any], file: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    streams = {name: r for name, r in document.get("streaming", {}).items() if "of_copy" in r}
    rows = document.get("linear_cross_entropy", [])
    panels = (1 if streams else 0) + (2 if rows else 0)
    if panels == 0:
        return
    figure, grid = plt.subplots(1, panels, figsize=(1 + 5 * panels, 5), constrained_layout=True, squeeze=False)
    axes = list(grid[0])
    if streams:
        _draw_streams(axes.pop(0), streams)
    for axis, field, unit in zip(axes, ("time", "peak memory"), ("s", "GiB"), strict=True) if rows else ():
        _draw_head(axis, rows, field, unit, document["vocabulary"])
    cards = document["machine"]["cards"]
    figure.suptitle(cards[0]["name"] if cards else "no card: figures mean nothing")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> int:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("slidecore").setLevel(logging.INFO)
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    meter = Meter(device)
    document: dict[str, Any] = {
        "bench": "kernels",
        "machine": machine(),
        "command": sys.argv[1:],
        "parameters": parameters_of(arguments),
        "vocabulary": arguments.vocabulary,
    }
    if "copy" in arguments.only:
        moved = 26 * arguments.parameters
        document["copy_gb_per_s"] = copy_rate(meter, moved, arguments.repeats) / 1e9
        log(f"device-to-device copy of {moved / 2e9:.2f} GB: {document['copy_gb_per_s']:.0f} GB/s, read and written")
    if set(arguments.only) - {"copy", "linear_cross_entropy"}:
        document["streaming"] = {}
        streaming(meter, arguments, document["streaming"], lambda: save(document, arguments, picture=False))
    if "linear_cross_entropy" in arguments.only:
        document["linear_cross_entropy"] = []
        for row in heads(meter, arguments):
            document["linear_cross_entropy"].append(row)
            save(document, arguments)
    save(document, arguments)
    emit(document, arguments.out)
    return 0


def save(document: dict[str, Any], arguments: argparse.Namespace, picture: bool = True) -> None:
    keep(document, arguments.out)
    if arguments.picture and picture:
        draw(document, arguments.picture)


if __name__ == "__main__":
    sys.exit(main())
