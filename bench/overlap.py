#!/usr/bin/env python3
"""How far copies, computation and the CPU's update hide behind each other on this machine.

Four lanes: upload (host to device), download (device to host), compute (matrix products) and update (AdamW on the
CPU). Each runs alone, then with others. With a lane's times alone known,

    hidden = (sum of the times alone - time together) / (sum of the times alone - the longest of them)

For two lanes the divisor is the shorter one's time: 1 means that the shorter was free, 0 that the two took turns, and
below 0 that together they were slower than in turns.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from typing import Any

import torch
from _machine import core_facts, emit, log, machine

MIB = 2**20
QUICK = {"seconds": 0.05, "repeats": 2, "buffer_mib": 16, "piece_mib": 1, "update_parameters": 1 << 21, "matrix": 0}

COMBINATIONS = (
    ("upload", "download"),
    ("upload", "compute"),
    ("download", "compute"),
    ("upload", "update"),
    ("download", "update"),
    ("compute", "update"),
    ("upload", "download", "compute"),
    ("upload", "download", "update"),
    ("upload", "download", "compute", "update"),
)


class Lane:
    """Ordered work in equal pieces. `begin`, then `issue` for each piece, `end`, `wait`; then `seconds`."""

    name: str
    unit: str
    amount: float  # of the unit (bytes or floating-point operations) in one piece

    def begin(self, pieces: int) -> None:
        raise NotImplementedError

    def issue(self, index: int) -> None:
        """Enqueues one piece without waiting for it."""

    def end(self) -> None:
        """Marks the end of what was issued."""

    def wait(self) -> None:
        """Returns when all of it is done."""
        raise NotImplementedError

    def seconds(self) -> float:
        """From the first piece's start to the last one's end."""
        raise NotImplementedError


class CopyLane(Lane):
    """Copies on a stream of slidecore's device, piece by piece through two buffers; bytes are counted once."""

    unit = "GB/s"

    def __init__(self, name: str, device: Any, host: Any, device_address: int, size: int, piece: int) -> None:
        self.name = name
        self.amount = float(piece)
        self._device = device
        self._host = host
        self._address = device_address
        self._piece = piece
        self._pieces = size // piece
        self._stream = device.create_stream()
        self._start = device.create_event(timing=True)
        self._stop = device.create_event(timing=True)

    def begin(self, pieces: int) -> None:
        self._device.record(self._start, self._stream)

    def issue(self, index: int) -> None:
        offset = index % self._pieces * self._piece
        if self.name == "upload":
            self._device.to_device(self._address + offset, self._host.address + offset, self._piece, self._stream)
        else:
            self._device.to_host(self._host.address + offset, self._address + offset, self._piece, self._stream)

    def end(self) -> None:
        self._device.record(self._stop, self._stream)

    def wait(self) -> None:
        self._device.synchronize_event(self._stop)

    def seconds(self) -> float:
        return float(self._device.elapsed_ms(self._start, self._stop)) / 1e3

    def close(self) -> None:
        self._device.synchronize(self._stream)
        self._device.destroy_event(self._start)
        self._device.destroy_event(self._stop)
        self._device.destroy_stream(self._stream)


class CardCompute(Lane):
    """Matrix products in bfloat16 on torch's current stream of a card."""

    name, unit = "compute", "TFLOP/s"

    def __init__(self, device: torch.device, size: int) -> None:
        self.amount = 2.0 * size**3
        self._a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self._b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self._c = torch.empty_like(self._a)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def begin(self, pieces: int) -> None:
        self._start.record()

    def issue(self, index: int) -> None:
        torch.mm(self._a, self._b, out=self._c)

    def end(self) -> None:
        self._stop.record()

    def wait(self) -> None:
        self._stop.synchronize()

    def seconds(self) -> float:
        return float(self._start.elapsed_time(self._stop)) / 1e3


class ThreadLane(Lane):
    """Work that blocks its caller, and so runs in a thread of its own."""

    def begin(self, pieces: int) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(pieces,), name=self.name)
        self._thread.start()

    def _run(self, pieces: int) -> None:
        start = time.perf_counter()
        try:
            for index in range(pieces):
                self.work(index)
        except BaseException as error:
            self._error = error
        self._seconds = time.perf_counter() - start

    def work(self, index: int) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def seconds(self) -> float:
        return self._seconds


class HostCompute(ThreadLane):
    """Matrix products in float32 by torch on the CPU: what computes on the host backend."""

    name, unit = "compute", "TFLOP/s"

    def __init__(self, size: int) -> None:
        self.amount = 2.0 * size**3
        self._a, self._b = torch.randn(size, size), torch.randn(size, size)
        self._c = torch.empty_like(self._a)

    def work(self, index: int) -> None:
        torch.mm(self._a, self._b, out=self._c)


class Update(ThreadLane):
    """slidecore's AdamW with bfloat16 gradients, 26 bytes per parameter, over planes much larger than a piece."""

    name, unit = "update", "GB/s"

    def __init__(self, pool: Any, parameters: int, pieces: int = 8) -> None:
        from adamw import CoreAdamW, CorePlanes

        self._each = [CoreAdamW(pool, CorePlanes(parameters // pieces)) for _ in range(pieces)]
        self.amount = 26.0 * (parameters // pieces)

    def work(self, index: int) -> None:
        self._each[index % len(self._each)]()


def run_together(lanes: list[Lane], pieces: dict[str, int]) -> tuple[float, dict[str, float]]:
    """Starts all lanes at once; the seconds until all are done, and of each lane.

    Pieces are issued in the order in which the lanes are expected to reach them, so that no lane waits for another's
    being enqueued.
    """
    order = sorted(
        ((index + 0.5) / pieces[lane.name], k, index)
        for k, lane in enumerate(lanes)
        for index in range(pieces[lane.name])
    )
    start = time.perf_counter()
    for lane in lanes:
        lane.begin(pieces[lane.name])
    for _, k, index in order:
        lanes[k].issue(index)
    for lane in lanes:
        lane.end()
    for lane in lanes:
        lane.wait()
    return time.perf_counter() - start, {lane.name: lane.seconds() for lane in lanes}


def rates(lane: Lane, pieces: int, seconds: float) -> float:
    """GB/s or TFLOP/s."""
    return lane.amount * pieces / seconds / (1e12 if lane.unit == "TFLOP/s" else 1e9)


def calibrate(lane: Lane, target_s: float) -> int:
    """How many pieces keep the lane busy for about `target_s` seconds."""
    pieces = 2
    while True:
        seconds, _ = run_together([lane], {lane.name: pieces})
        if seconds >= target_s / 4 or pieces >= 1 << 16:
            return max(4, round(pieces * target_s / seconds))
        pieces *= 2


def median_run(lanes: list[Lane], pieces: dict[str, int], repeats: int) -> tuple[float, dict[str, float], list[float]]:
    """The run of median length, after one that is not counted; its seconds, each lane's, and all runs' seconds."""
    run_together(lanes, pieces)
    runs = sorted((run_together(lanes, pieces) for _ in range(repeats)), key=lambda run: run[0])
    middle = runs[(len(runs) - 1) // 2]
    return middle[0], middle[1], [run[0] for run in runs]


def measure(lanes: dict[str, Lane], target_s: float, repeats: int) -> dict[str, Any]:
    """Every lane alone, then every combination."""
    pieces = {name: calibrate(lane, target_s) for name, lane in lanes.items()}
    alone: dict[str, Any] = {}
    for name, lane in lanes.items():
        seconds, each, runs = median_run([lane], pieces, repeats)
        alone[name] = {
            "seconds": seconds,
            "all_seconds": runs,
            "pieces": pieces[name],
            "rate": rates(lane, pieces[name], each[name]),
            "unit": lane.unit,
        }
        log(f"{name:40s} {seconds:7.3f} s   {alone[name]['rate']:8.2f} {lane.unit}")
    together: list[dict[str, Any]] = []
    for names in COMBINATIONS:
        used = [lanes[name] for name in names]
        seconds, each, runs = median_run(used, pieces, repeats)
        apart = [alone[name]["seconds"] for name in names]
        entry = {
            "lanes": {
                name: {
                    "seconds": each[name],
                    "rate": rates(lanes[name], pieces[name], each[name]),
                    "unit": lanes[name].unit,
                    "rate_over_alone": rates(lanes[name], pieces[name], each[name]) / alone[name]["rate"],
                }
                for name in names
            },
            "seconds": seconds,
            "all_seconds": runs,
            "seconds_in_turns": sum(apart),
            "hidden": (sum(apart) - seconds) / (sum(apart) - max(apart)),
        }
        together.append(entry)
        shown = ", ".join(f"{name} {entry['lanes'][name]['rate']:.2f}" for name in names)
        log(f"{' + '.join(names):40s} {seconds:7.3f} s   hidden {entry['hidden']:6.1%}   {shown}")
    return {"alone": alone, "together": together}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, hip or host; cuda:N for a card by number")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each lane alone should take")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each combination; the median counts")
    parser.add_argument("--buffer-mib", type=int, default=1024, help="size of the buffers that copies go through")
    parser.add_argument("--piece-mib", type=int, default=32, help="size of one copy")
    parser.add_argument("--update-parameters", type=int, default=1 << 26, help="parameters that the update walks over")
    parser.add_argument("--matrix", type=int, default=0, help="rows of the matrices; 0: 8192 on a card, else 512")
    parser.add_argument("--threads", type=int, default=0, help="threads of the update; 0: slidecore's own choice")
    parser.add_argument("--out", help="also write the JSON to this file")
    parser.add_argument("--quick", action="store_true", help="small and short: checks that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    if not 1 <= arguments.piece_mib <= arguments.buffer_mib:
        parser.error("--piece-mib must be at least 1 and no more than --buffer-mib")
    if arguments.seconds <= 0 or arguments.repeats < 1 or arguments.update_parameters < 8:
        parser.error("--seconds must be above 0, --repeats at least 1, --update-parameters at least 8")
    backend, _, ordinal = arguments.device.partition(":")
    if backend == "auto":
        backend = ("hip" if torch.version.hip else "cuda") if torch.cuda.is_available() else "host"
    number = int(ordinal or 0)

    from slidecore import _core

    size, piece = arguments.buffer_mib * MIB, arguments.piece_mib * MIB
    card = torch.device("cuda", number)
    matrix = arguments.matrix or (512 if backend == "host" else 8192)
    device_buffers: list[Any]
    if backend == "host":
        # The framework's own threads would otherwise be as many as the update's; one computes, as one stream does.
        torch.set_num_threads(1)
        device = _core.Device("host")
        device_buffers = [_core.DeviceBuffer(device, size) for _ in range(2)]
        addresses = [buffer.address for buffer in device_buffers]
        compute: Lane = HostCompute(matrix)
    else:
        torch.cuda.set_device(card)
        device_buffers = [torch.zeros(size, dtype=torch.uint8, device=card) for _ in range(2)]
        addresses = [buffer.data_ptr() for buffer in device_buffers]
        torch.cuda.synchronize(card)
        device = _core.Device(backend, number)
        compute = CardCompute(card, matrix)
    host_buffers = [_core.HostBuffer(device, size, True) for _ in range(2)]
    for buffer in host_buffers:
        torch.frombuffer(buffer, dtype=torch.int64).random_()
    pool = _core.ThreadPool(arguments.threads)
    copies = [
        CopyLane(name, device, host_buffers[k], addresses[k], size, piece)
        for k, name in enumerate(("upload", "download"))
    ]
    lanes: dict[str, Lane] = {lane.name: lane for lane in [*copies, compute, Update(pool, arguments.update_parameters)]}
    document: dict[str, Any] = {
        "bench": "overlap",
        "machine": machine(),
        "command": sys.argv[1:],
        "core": core_facts(),
        "device": {"backend": device.backend, "ordinal": device.ordinal, "name": device.name},
        "buffer_bytes": size,
        "piece_bytes": piece,
        "pinned": all(buffer.pinned for buffer in host_buffers),
        "update_threads": pool.threads,
        "update_parameters": arguments.update_parameters,
        "matrix_rows": matrix,
        "target_s": arguments.seconds,
    }
    document.update(measure(lanes, arguments.seconds, arguments.repeats))
    for lane in copies:
        lane.close()
    document["hidden"] = {" + ".join(entry["lanes"]): entry["hidden"] for entry in document["together"]}
    emit(document, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
