#!/usr/bin/env python3
"""Saving and loading checkpoints, against what the disk itself does in the same run.

The state is that of a Llama-like model with random weights and moments, as bench/train.py trains it. The disk's own
rate is that of large writes of the same number of bytes to the same directory by as many threads, with fsync, and of
large reads after the page cache was told to forget the files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _machine import core_facts, emit, keep, log, machine
from _model import Shape, build_empty, describe, fill
from slidecore.sizes import parse_size

CONFIGS = {
    "tiny": Shape(64, 4, 4, 2, 128, 512, False, 64),
    "small": Shape(768, 20, 12, 12, 2048, 2000, False, 64),
    "3.6B": Shape(3072, 28, 24, 8, 8192, 128256, False, 1024),
}
LOADS = {"load": True, "load_without_verification": False}  # and verify=
BUFFER = 16 << 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="tiny", help="model (default: tiny, figures mean nothing)")
    parser.add_argument("--compute-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--device-memory", help="slidecore's device budget, e.g. 7GiB")
    parser.add_argument("--dir", type=Path, help="directory on the disk to measure (default: a temporary one here)")
    parser.add_argument("--threads", type=int, default=0, help="files at the same time (0: slidecore's choice)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", default="load,load_without_verification", help="which ways to load (default: both)")
    parser.add_argument("--disk-size", help="bytes of the disk's own measurement (default: those of the checkpoint)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the JSON to this file, after each part")
    parser.add_argument("--quick", action="store_true", help="the tiny model once: checks that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.config, arguments.repeats = "tiny", 1
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    arguments.loads = arguments.loads.split(",")
    if unknown := set(arguments.loads) - LOADS.keys():
        parser.error(f"--loads takes {' and '.join(LOADS)}, not {', '.join(sorted(unknown))}")
    try:
        arguments.disk_size = arguments.disk_size and parse_size(arguments.disk_size, "--disk-size")
    except ValueError as error:
        parser.error(str(error))
    return arguments


def build(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its optimizer, every plane filled: memory that was never written has no pages to write out."""
    import slidecore
    from slidecore.offloading import engine_of

    model = build_empty(CONFIGS[arguments.config])
    dtype = getattr(torch, arguments.compute_dtype)
    slidecore.offload(model, device=arguments.device, compute_dtype=dtype, device_memory=arguments.device_memory)
    engine = engine_of(model)
    fill(model, arguments.seed, engine.backend.torch_device)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(arguments.seed)
    noise = torch.empty(1 << 20).uniform_(1e-9, 1e-3, generator=generator)
    for chunk in engine.chunks:
        with engine.planes.borrowed(chunk, engine.planes.moments, write=True) as planes:
            for plane in planes.values():
                for part in plane.split(noise.numel()):
                    part.copy_(noise[: part.numel()])
    return model, optimizer


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def figures(seconds: list[float], nbytes: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": {"median": median, "min": min(seconds), "all": seconds},
        "bytes": nbytes,
        "gb_per_s": nbytes / median / 1e9,
    }


class HostMemory:
    """How far the process's own memory rises while the context is entered, in bytes."""

    def __enter__(self) -> HostMemory:
        self._before = self._peak = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above = self._peak - self._before

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._read())

    @staticmethod
    def _read() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0


# --- the disk


def forget(directory: Path) -> None:
    """Tells the page cache to drop the files in `directory`, which are on the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def write_plainly(directory: Path, sizes: list[int], buffer: memoryview) -> None:
    """Files of these sizes, a thread each: write, fsync."""

    def write(index: int) -> None:
        fd = os.open(directory / f"plain-{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        left = sizes[index]
        while left:
            left -= os.write(fd, buffer[: min(left, len(buffer))])
        os.fsync(fd)
        os.close(fd)

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(write, range(len(sizes))))


def read_plainly(directory: Path, sizes: list[int]) -> None:
    def read(index: int) -> None:
        buffer = memoryview(bytearray(BUFFER))
        fd = os.open(directory / f"plain-{index}", os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(read, range(len(sizes))))


def measure_disk(directory: Path, nbytes: int, threads: int, repeats: int) -> dict[str, Any]:
    buffer = memoryview(os.urandom(BUFFER))
    sizes = [nbytes // threads] * threads
    writes, reads = [], []
    for _ in range(repeats):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        writes.append(timed(lambda: write_plainly(directory, sizes, buffer)))
        forget(directory)
        reads.append(timed(lambda: read_plainly(directory, sizes)))
    shutil.rmtree(directory)
    return {"threads": threads, "write": figures(writes, sum(sizes)), "read": figures(reads, sum(sizes))}


def file_system(directory: Path) -> dict[str, str]:
    """The mount that `directory` is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    path = str(directory.resolve())
    inside = [m for m in mounts if path == m[1] or path.startswith(m[1].rstrip("/") + "/")]
    device, point, kind = max(inside, key=lambda m: len(m[1]))[:3] if inside else ("unknown", "unknown", "unknown")
    return {"device": device, "mount": point, "type": kind}


# --- checksums


def measure_checksums(repeats: int) -> dict[str, float]:
    """GB/s of one thread over 64 MiB."""
    data = memoryview(os.urandom(64 << 20))
    candidates: dict[str, Callable[[], object]] = {
        "blake2b-128": lambda: hashlib.blake2b(data, digest_size=16).digest(),
        "sha256": lambda: hashlib.sha256(data).digest(),
        "crc32 (zlib)": lambda: zlib.crc32(data),
    }
    try:
        import xxhash
    except ImportError:
        pass
    else:
        candidates["xxh3-128"] = lambda: xxhash.xxh3_128(data).digest()
    return {name: len(data) / min(timed(call) for _ in range(repeats + 1)) / 1e9 for name, call in candidates.items()}


def main() -> None:
    arguments = parse()
    import slidecore
    from slidecore.checkpoints.files import choose_threads, preferred_checksum

    if arguments.dir is not None:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    log(f"building {arguments.config}")
    model, optimizer = build(arguments)
    threads = choose_threads(arguments.threads)
    base = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=arguments.dir))
    try:
        saves, above = [], 0
        path = base / "step-0"
        for number in range(arguments.repeats):
            shutil.rmtree(path, ignore_errors=True)
            path = base / f"step-{number}"
            with HostMemory() as memory:
                saves.append(
                    timed(lambda path=path: slidecore.save_checkpoint(model, optimizer, path, threads=threads))
                )
            above = max(above, memory.above)
            log(f"saved in {saves[-1]:.2f} s")
        nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        result: dict[str, Any] = {
            "bench": "checkpoint",
            "machine": machine(),
            "core": core_facts(),
            "command": sys.argv[1:],
            "config": {"name": arguments.config, **describe(CONFIGS[arguments.config])},
            "compute_dtype": arguments.compute_dtype,
            "parameters": sum(p.numel() for p in model.parameters()),
            "planes_bytes": slidecore.stats(model).planes_bytes,
            "threads": threads,
            "file_system": file_system(base),
            "checksum": preferred_checksum(),
            "checksum_gb_per_s": measure_checksums(arguments.repeats),
            "save": {**figures(saves, nbytes), "host_memory_above_bytes": above},
        }
        keep(result, arguments.out)
        for name in arguments.loads:
            verify = LOADS[name]
            loads, above = [], 0
            for _ in range(arguments.repeats):
                forget(path)
                with HostMemory() as memory:
                    loads.append(
                        timed(
                            lambda verify=verify: slidecore.load_checkpoint(
                                model, optimizer, path, verify=verify, threads=threads
                            )
                        )
                    )
                above = max(above, memory.above)
                log(f"{name} in {loads[-1]:.2f} s")
            result[name] = {**figures(loads, nbytes), "host_memory_above_bytes": above}
            keep(result, arguments.out)
        shutil.rmtree(path)
        log("the disk by itself")
        disk = measure_disk(base / "plain", arguments.disk_size or nbytes, threads, arguments.repeats)
        result["disk"] = disk
        result["over_disk"] = {
            "save": result["save"]["gb_per_s"] / disk["write"]["gb_per_s"],
            **{name: result[name]["gb_per_s"] / disk["read"]["gb_per_s"] for name in arguments.loads},
        }
    finally:
        shutil.rmtree(base, ignore_errors=True)
    emit(result, arguments.out)


if __name__ == "__main__":
    main()
