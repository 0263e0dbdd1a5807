#!/usr/bin/env python3
"""The CPU's AdamW against what this machine's memory can do, and against other implementations.

AdamW does a handful of operations per byte, so its limit is the memory. Each implementation is charged the bytes its
arithmetic has to move, no more: what it moves beyond that (a second copy, a cast) shows as a lower rate.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _machine import core_facts, emit, log, machine

QUICK = {"parameters": 1 << 22, "repeats": 5}
HYPER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def time_calls(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after two that are not counted."""
    call()
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def rate(seconds: list[float], moved_bytes: int, counted: str, parameters: int | None = None) -> dict[str, Any]:
    """The figures of one measurement: medians, with the bytes that were counted spelled out."""
    median = statistics.median(seconds)
    result: dict[str, Any] = {
        "seconds": {"median": median, "min": min(seconds), "all": seconds},
        "counted": counted,
        "bytes": moved_bytes,
        "gb_per_s": moved_bytes / median / 1e9,
    }
    if parameters is not None:
        result["bytes_per_parameter"] = moved_bytes / parameters
        result["parameters_per_s"] = parameters / median
    return result


# What an update moves, per parameter. The two scales of 128 parameters are read and written, too: 0.125 bytes a
# parameter that are not counted.
MOVED = {
    "float32": (26, "reads gradient 2, weight 2, residual 2, moments 4, 4; writes weight 2, residual 2, moments 4, 4"),
    "8bit": (14, "reads gradient 2, weight 2, residual 2, moments 1, 1; writes weight 2, residual 2, moments 1, 1"),
}


class CorePlanes:
    """slidecore's planes of n parameters in host memory, filled with random numbers.

    14 bytes per parameter with float32 moments, 8.0625 with 8-bit ones.
    """

    def __init__(self, n: int, moments: str = "float32") -> None:
        from slidecore import _core

        host = _core.Device("host")
        self.n = n
        groups = -(-n // _core.MOMENTS_GROUP)
        wide = {"weight": torch.bfloat16, "residual": torch.int16, "gradient": torch.bfloat16}
        if moments == "float32":
            self._kinds = {**wide, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        else:
            scales = dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.float32)
            self._kinds = {**wide, "exp_avg": torch.int8, "exp_avg_sq": torch.uint8, **scales}
        self._buffers = {
            name: _core.HostBuffer(host, (groups if name.endswith("scale") else n) * dtype.itemsize, False)
            for name, dtype in self._kinds.items()
        }
        generator = torch.Generator().manual_seed(0)
        master = torch.empty(n).normal_(0, 0.02, generator=generator)
        pool = _core.ThreadPool()
        _core.split(pool, master.data_ptr(), self.addresses()["weight"], self.addresses()["residual"], n)
        del master
        if moments == "float32":
            self.tensor("exp_avg").normal_(0, 1e-3, generator=generator)
            self.tensor("exp_avg_sq").uniform_(1e-7, 1e-6, generator=generator)
        else:
            self.tensor("exp_avg").random_(-127, 128, generator=generator)
            self.tensor("exp_avg_sq").random_(1, 256, generator=generator)
            self.tensor("exp_avg_scale").fill_(4e-3)
            self.tensor("exp_avg_sq_scale").fill_(1e-3)
        self.tensor("gradient").normal_(0, 1e-3, generator=generator)

    def tensor(self, name: str) -> torch.Tensor:
        """The plane as a tensor over the same memory."""
        return torch.frombuffer(self._buffers[name], dtype=self._kinds[name])

    def addresses(self) -> dict[str, int]:
        """Of all planes, and of the gradient."""
        return {name: buffer.address for name, buffer in self._buffers.items()}

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both moments in float64, dequantised if they are in 8 bits."""
        first, second = self.tensor("exp_avg").double(), self.tensor("exp_avg_sq").double()
        if "exp_avg_scale" not in self._kinds:
            return first, second
        scale, scale_sq = (
            self.tensor(name).double().repeat_interleave(_group())[: self.n]
            for name in ("exp_avg_scale", "exp_avg_sq_scale")
        )
        y = first / 127
        return y / (2 - y.abs()) * scale, (second / 255 * scale_sq).square()

    def masters(self) -> torch.Tensor:
        """In float64."""
        high = self.tensor("weight").view(torch.int16).to(torch.int64)
        bits = ((high << 16) + self.tensor("residual").to(torch.int64)) & 0xFFFFFFFF
        return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32).double()


def _group() -> int:
    from slidecore import _core

    return _core.MOMENTS_GROUP


class CoreAdamW:
    """Repeated steps of `slidecore._core.adamw` on a set of planes."""

    def __init__(self, pool: Any, planes: CorePlanes) -> None:
        self._pool, self._planes, self._step = pool, planes, 0

    def __call__(self) -> None:
        from slidecore import _core

        self._step += 1
        hyper = _core.AdamWHyper(
            lr=HYPER["lr"],
            beta1=HYPER["beta1"],
            beta2=HYPER["beta2"],
            eps=HYPER["eps"],
            weight_decay=HYPER["weight_decay"],
            step=self._step,
        )
        _core.adamw(self._pool, hyper, n=self._planes.n, gradient_float32=False, **self._planes.addresses())


def check(pool: Any, moments: str) -> float:
    """The relative difference of masters to AdamW in float64 after one step, so that a fast wrong kernel is seen."""
    planes = CorePlanes(100_003, moments)
    start, gradient = planes.masters(), planes.tensor("gradient").double()
    first, second = planes.moments()
    CoreAdamW(pool, planes)()
    beta1, beta2 = HYPER["beta1"], HYPER["beta2"]
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient * gradient
    wanted = start * (1 - HYPER["lr"] * HYPER["weight_decay"])
    wanted -= HYPER["lr"] / (1 - beta1) * first / ((second / (1 - beta2)).sqrt() + HYPER["eps"])
    got = planes.masters()
    return float((got - wanted).norm() / wanted.norm())


def core_results(n: int, repeats: int, threads: int, systems: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """slidecore's update with each instruction set and kind of moments, and the same threads' plain copy."""
    from slidecore import _core

    pool = _core.ThreadPool(threads)
    results: dict[str, Any] = {}
    chosen = _core.instruction_set()
    for label, (name, moments) in systems.items():
        planes = CorePlanes(n, moments)
        _core.force_instruction_set(name)
        moved, counted = MOVED[moments]
        result = rate(time_calls(CoreAdamW(pool, planes), repeats), moved * n, counted, n)
        result.update(threads=pool.threads, relative_error=check(pool, moments))
        results[label] = result
        log(f"{label}: {result['gb_per_s']:.1f} GB/s, {result['parameters_per_s'] / 1e9:.2f}e9 parameters/s")
        del planes
        gc.collect()
    _core.force_instruction_set(chosen)
    host = _core.Device("host")
    size = 7 * n
    source, target = _core.HostBuffer(host, size, False), _core.HostBuffer(host, size, False)
    torch.frombuffer(source, dtype=torch.uint8).random_(0, 256)
    counted = "7 bytes per parameter read and as many written: as much memory as float32 moments' planes take"
    result = rate(
        time_calls(lambda: _core.parallel_copy(pool, target.address, source.address, size), repeats), 2 * size, counted
    )
    result["threads"] = pool.threads
    results["memcpy"] = result
    log(f"memcpy: {result['gb_per_s']:.1f} GB/s")
    tensors = torch.frombuffer(target, dtype=torch.uint8), torch.frombuffer(source, dtype=torch.uint8)
    result = rate(time_calls(lambda: tensors[0].copy_(tensors[1]), repeats), 2 * size, counted)
    result["threads"] = torch.get_num_threads()
    results["torch copy"] = result
    log(f"torch copy: {result['gb_per_s']:.1f} GB/s")
    return results


def torch_results(n: int, repeats: int) -> dict[str, Any]:
    """torch's fused AdamW on float32 tensors, alone and with the casts that bfloat16 compute needs around it."""
    results: dict[str, Any] = {}
    weight = torch.nn.Parameter(torch.randn(n) * 0.02)
    weight.grad = torch.randn(n) * 1e-3
    optimizer = torch.optim.AdamW(
        [weight],
        lr=HYPER["lr"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
        fused=True,
    )
    result = rate(
        time_calls(optimizer.step, repeats),
        28 * n,
        "reads gradient 4, weight 4, moments 4 + 4; writes weight 4, moments 4 + 4 (all float32)",
        n,
    )
    result["threads"] = torch.get_num_threads()
    results["torch fused"] = result
    log(f"torch fused: {result['gb_per_s']:.1f} GB/s")
    half_gradient = weight.grad.to(torch.bfloat16)
    half_weight = weight.detach().to(torch.bfloat16)

    def with_casts() -> None:
        assert weight.grad is not None
        weight.grad.copy_(half_gradient)
        optimizer.step()
        with torch.no_grad():
            half_weight.copy_(weight)

    result = rate(
        time_calls(with_casts, repeats),
        40 * n,
        "as torch fused, and gradient bfloat16 to float32 (2 + 4), weight float32 to bfloat16 (4 + 2)",
        n,
    )
    result["threads"] = torch.get_num_threads()
    results["torch fused with casts"] = result
    log(f"torch fused with casts: {result['gb_per_s']:.1f} GB/s")
    return results


def deepspeed_result(n: int, repeats: int) -> dict[str, Any]:
    """DeepSpeed's CPUAdam in AdamW mode, where it is installed and builds."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "deepspeed is not installed"}
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        weight = torch.nn.Parameter(torch.randn(n) * 0.02)
        weight.grad = torch.randn(n) * 1e-3
        optimizer = DeepSpeedCPUAdam(
            [weight],
            lr=HYPER["lr"],
            betas=(HYPER["beta1"], HYPER["beta2"]),
            eps=HYPER["eps"],
            weight_decay=HYPER["weight_decay"],
            adamw_mode=True,
        )
        result = rate(
            time_calls(optimizer.step, repeats),
            28 * n,
            "reads gradient 4, weight 4, moments 4 + 4; writes weight 4, moments 4 + 4 (all float32)",
            n,
        )
    except Exception as error:  # its kernels are compiled on first use: a missing compiler is no failure of ours
        return {"skipped": f"deepspeed is installed but did not run: {type(error).__name__}: {error}"}
    log(f"deepspeed CPUAdam: {result['gb_per_s']:.1f} GB/s")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1 << 28, help="parameters in one update (default: 2^28)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls; the median counts")
    parser.add_argument("--threads", type=int, default=0, help="threads of slidecore's pool; 0: its own choice")
    parser.add_argument("--torch-threads", type=int, default=0, help="threads of the peers; 0: every processor")
    parser.add_argument("--isa", default="auto", help="instruction set: auto, all, or a name")
    parser.add_argument("--moments", default="both", choices=("float32", "8bit", "both"), help="kind of moments")
    parser.add_argument("--out", help="also write the JSON to this file")
    parser.add_argument("--quick", action="store_true", help="few parameters: checks that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    if arguments.parameters < 1 or arguments.repeats < 1:
        parser.error("--parameters and --repeats must be at least 1")
    facts = machine()
    torch.set_num_threads(arguments.torch_threads or facts["usable_cpus"])
    document: dict[str, Any] = {
        "bench": "adamw",
        "machine": facts,
        "command": sys.argv[1:],
        "parameters": arguments.parameters,
        "repeats": arguments.repeats,
        "core": core_facts(),
        "results": {},
        "ratios": {},
    }
    available = document["core"]["instruction_sets"]
    if arguments.isa == "all":
        sets = list(available)
    else:
        sets = [document["core"]["instruction_set"] if arguments.isa == "auto" else arguments.isa]
        if sets[0] not in available:
            parser.error(f"--isa {sets[0]}: this machine has {', '.join(available)}")
    kinds = list(MOVED) if arguments.moments == "both" else [arguments.moments]
    systems = {
        f"slidecore {name}" + ("" if moments == "float32" else f" {moments}"): (name, moments)
        for name in sets
        for moments in kinds
    }
    results = document["results"]
    results.update(core_results(arguments.parameters, arguments.repeats, arguments.threads, systems))
    gc.collect()
    results.update(torch_results(arguments.parameters, arguments.repeats))
    gc.collect()
    results["deepspeed CPUAdam"] = deepspeed_result(arguments.parameters, arguments.repeats)
    for name in systems:
        mine = results[name]
        document["ratios"][name] = {
            "gb_per_s over memcpy": mine["gb_per_s"] / results["memcpy"]["gb_per_s"],
            "gb_per_s over torch copy": mine["gb_per_s"] / results["torch copy"]["gb_per_s"],
            **{
                f"parameters_per_s over {peer}": mine["parameters_per_s"] / results[peer]["parameters_per_s"]
                for peer in ("torch fused", "torch fused with casts", "deepspeed CPUAdam", name.removesuffix(" 8bit"))
                if peer != name and "parameters_per_s" in results.get(peer, {})
            },
        }
    emit(document, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
