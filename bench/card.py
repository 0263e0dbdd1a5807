#!/usr/bin/env python3
"""The figures that README and docs give for a card, measured on this one: the programs of bench/ with sizes for them.

Each measurement runs in a process of its own under a limit of its own, writes DIR/NAME.json as it goes (a run that is
cut off keeps what it has) and DIR/NAME.log, and a failure does not stop the others. DIR/card.json says how each ended.
Paths of this machine are left out of the recorded command lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import keep, log, machine

DISK = "DISK"  # stands for --disk
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measurement:
    """One command. `typical_s` is a guess, with 16 cores and an H200 in mind; the limit is twice that and a minute."""

    name: str
    typical_s: int
    program: str
    sizes: str = ""  # the arguments that --quick replaces

    @property
    def command(self) -> str:
        return f"{self.program} {self.sizes}".rstrip()

    @property
    def limit_s(self) -> int:
        return 2 * self.typical_s + 60

    @property
    def needs_disk(self) -> bool:
        return DISK in self.command

    def arguments(self, disk: str, out: Path, quick: bool) -> list[str]:
        words = [word.replace(DISK, disk) for word in shlex.split(self.program if quick else self.command)]
        return [sys.executable, str(HERE / words[0]), *words[1:], *(["--quick"] if quick else []), "--out", str(out)]


def _train(name: str, typical_s: int, systems: str, sizes: str, host_memory: str = "") -> Measurement:
    disk = f"""--disk-options '{{"host_memory": "{host_memory}", "disk": "{DISK}"}}'""" if host_memory else ""
    return Measurement(name, typical_s, f"train.py --systems {systems}", f"{sizes} {disk}")


# The most telling first: time may run out.
MEASUREMENTS = (
    Measurement("kernels", 45, "kernels.py --tune --only copy,adamw,accumulate,split,merge,square_sum"),
    _train("train-8bit", 65, "slidecore-8bit", "--batch 4,16 --warmup 1 --device-memory 7GiB"),
    _train(
        "train-7gib",
        200,
        "slidecore,fsdp2-offload,resident",
        "--batch 4,16,64 --steps 3 --warmup 1 --device-memory 7GiB",
    ),
    _train("train-64k-clipped", 130, "slidecore,slidecore-clipped", "--batch 64"),
    Measurement(
        "checkpoint", 130, f"checkpoint.py --dir {DISK}", "--config 3.6B --repeats 1 --loads load --disk-size 12GiB"
    ),
    _train("disk-hidden", 140, "slidecore,slidecore-disk", "--batch 128 --steps 3 --warmup 1", "40GiB"),
    _train("disk-moments", 215, "slidecore-disk", "--batch 4 --steps 4 --warmup 1", "15.5GiB"),
    _train("disk-everything", 330, "slidecore-disk", "--batch 4 --steps 4 --warmup 1", "1.5GiB"),
    _train(
        "largest",
        450,
        "slidecore-disk",
        "--hidden 5120 --layers 41 --heads 40 --kv-heads 8 --intermediate 16384 --batch 4 --steps 4 --warmup 1",
        "116GiB",
    ),
    Measurement("head", 200, "kernels.py --only linear_cross_entropy"),
    Measurement("disk", 60, f"disk.py {DISK}", "--size 3GiB --repeats 2 --blocks 1MiB --depths 16"),
    Measurement("adamw", 60, "adamw.py --isa all"),
    Measurement("overlap", 60, "overlap.py"),
)


def _without_paths(document: Any, paths: dict[str, str]) -> Any:
    if isinstance(document, dict):
        return {key: _without_paths(value, paths) for key, value in document.items()}
    if isinstance(document, list):
        return [_without_paths(value, paths) for value in document]
    if isinstance(document, str):
        for path, name in paths.items():
            document = document.replace(path, name)
    return document


def _run(arguments: Sequence[str], log_file: Path, limit_s: float) -> str:
    """How the program ended: "ok", or what went wrong."""
    with log_file.open("w") as output:
        program = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # its workers go with it
        )
        try:
            code = program.wait(limit_s)
        except BaseException as error:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"stopped after {limit_s:.0f} s"
    return "ok" if code == 0 else f"ended with code {code}: see {log_file.name}"


def _measure(chosen: Sequence[Measurement], arguments: argparse.Namespace) -> dict[str, Any]:
    out = arguments.directory
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"bench": "card", "machine": machine(), "measurements": {}}
    end = time.monotonic() + arguments.seconds
    for measurement in chosen:
        left = end - time.monotonic()
        began = time.monotonic()
        if left < measurement.typical_s:
            result = f"skipped: it may take {measurement.typical_s} s and {max(0, left):.0f} were left"
        else:
            log(f"{measurement.name}: {measurement.command}")
            file = out / f"{measurement.name}.json"
            file.unlink(missing_ok=True)  # what an earlier run left is no result of this one
            command = measurement.arguments(arguments.disk or "", file, arguments.quick)
            result = _run(command, out / f"{measurement.name}.log", min(left, measurement.limit_s))
            if file.exists():
                paths = {str(file): file.name, **({arguments.disk: DISK} if arguments.disk else {})}
                keep(_without_paths(json.loads(file.read_text()), paths), str(file))
        seconds = time.monotonic() - began
        log(f"{measurement.name}: {result} ({seconds:.0f} s)")
        document["measurements"][measurement.name] = {
            "command": f"python bench/{measurement.command}",
            "result": result,
            "seconds": seconds,
        }
        keep(document, str(out / "card.json"))
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [measurement.name for measurement in MEASUREMENTS]
    parser.add_argument("directory", type=Path, help="where the results go")
    parser.add_argument("--only", default=",".join(names), help="which, in this order (default: %(default)s)")
    parser.add_argument("--disk", help="a directory on the drive to measure: 64 GB free, needed by some")
    parser.add_argument("--seconds", type=float, default=7200.0, help="for all of it: what would not fit is skipped")
    parser.add_argument("--quick", action="store_true", help="small sizes: checks that all of it works")
    arguments = parser.parse_args()
    known = {measurement.name: measurement for measurement in MEASUREMENTS}
    wanted = [word for word in arguments.only.split(",") if word]
    unknown = [word for word in wanted if word not in known]
    if unknown or not wanted:
        parser.error(f"--only: no measurement called {', '.join(unknown) or 'nothing'}; there are {', '.join(names)}")
    chosen = [known[word] for word in wanted]
    without = [measurement.name for measurement in chosen if measurement.needs_disk]
    if without and not arguments.disk:
        parser.error(f"{', '.join(without)} need --disk DIRECTORY (or name the others with --only)")
    if arguments.disk:
        arguments.disk = str(Path(arguments.disk).resolve())
        try:
            Path(arguments.disk).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--disk: {error}")
    document = _measure(chosen, arguments)
    return 0 if all(entry["result"] == "ok" for entry in document["measurements"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
