#!/usr/bin/env python3
"""How fast slidecore's transfers move bytes to and from drives, against fio on the same drives in the same run.

Sequential reads, writes, and both at once, for each backend, block size and queue depth. Rounds of slidecore and of
the peer take turns, each round beginning with the next, so that what else the drive is doing meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from typing import Any

from _disk_peers import Peer, find
from _machine import emit, keep, log, machine
from slidecore import _core
from slidecore.drives import Rate, Workload, identify
from slidecore.sizes import parse_size

QUICK = {"size": "16MiB", "repeats": 1, "blocks": "1MiB", "depths": "4"}
MODES = ("read", "write", "both")


def figures(rates: list[Rate]) -> dict[str, Any]:
    """Of one program's rounds: the median counts."""
    speeds = [rate.gb_per_s for rate in rates]
    return {
        "gb_per_s": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds), "all": speeds},
        "cpu_s_per_gb": statistics.median(rate.cpu_s_per_gb for rate in rates),
        "bytes": rates[0].nbytes,
    }


def measure(
    storage: _core.Storage, work: Workload, peer: Peer | None, backends: list[str], block: int, depth: int, repeats: int
) -> list[dict[str, Any]]:
    """All modes at one block size and queue depth."""
    points = []
    for mode in MODES:
        mine: dict[str, list[Rate]] = {backend: [] for backend in backends}
        theirs: list[Rate] = []
        programs = [*backends, "peer"] if peer is not None and mode in peer.modes else list(backends)
        for round_number in range(repeats):
            # Each program follows each other one equally often: a drive's cache is left full or empty by the last.
            first = round_number % len(programs)
            for program in programs[first:] + programs[:first]:
                if program == "peer":
                    assert peer is not None
                    theirs.append(peer.run(mode, block, depth))
                    continue
                transfers = _core.Transfers(storage, backend=program, block_bytes=block, queue_depth=depth)
                mine[program].append(work.run(transfers, mode))
                transfers.close()
        for backend in backends:
            point: dict[str, Any] = {"backend": backend, "mode": mode, "block_bytes": block, "queue_depth": depth}
            point.update(figures(mine[backend]))
            if theirs:
                point["peer"] = figures(theirs)
                point["over_peer"] = point["gb_per_s"]["median"] / point["peer"]["gb_per_s"]["median"]
            points.append(point)
            compared = f", {100 * point['over_peer']:.0f} % of the peer's" if theirs else ""
            log(
                f"{backend:8} {mode:5} {block >> 10:6} KiB x {depth:2}: {point['gb_per_s']['median']:6.2f} GB/s, "
                f"{point['cpu_s_per_gb']:.3f} CPU s/GB{compared}"
            )
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directories", nargs="*", help="one on each drive (default: a new one in the current directory)"
    )
    parser.add_argument("--size", default="2GiB", help="bytes moved in each round, and space for as much twice")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--blocks", default="256KiB,1MiB,4MiB", help="block sizes")
    parser.add_argument("--depths", default="4,16", help="queue depths per drive")
    parser.add_argument("--backends", default="uring,threads")
    parser.add_argument("--peer", choices=("auto", "fio", "loop", "none"), default="auto")
    parser.add_argument("--out", help="also write the JSON to this file, after each block size and depth")
    parser.add_argument("--quick", action="store_true", help="few bytes: checks that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    try:
        nbytes = parse_size(arguments.size, "--size")
        blocks = [parse_size(block, "--blocks") for block in arguments.blocks.split(",")]
        depths = [int(depth) for depth in arguments.depths.split(",")]
    except ValueError as error:
        parser.error(str(error))
    backends = arguments.backends.split(",")
    with tempfile.TemporaryDirectory(dir=".", prefix="disk-bench-") as made:
        directories = arguments.directories or [made]
        facts = [_core.inspect_directory(directory) for directory in directories]
        reason = _core.why_no_io_uring()
        document: dict[str, Any] = {
            "bench": "disk",
            "machine": machine(),
            "command": sys.argv[1:],
            "drives": [identify(fact).to_json() for fact in facts],
            # Memory that looks like a file system is fast for reasons that no drive has.
            "counts": not any(fact.in_memory for fact in facts),
            "direct": all(fact.direct for fact in facts),
            "bytes": nbytes,
            "repeats": arguments.repeats,
            "skipped": {},
            "results": [],
        }
        if not document["counts"]:
            log("This is memory (tmpfs), not a drive: the figures do not count.")
        if reason and "uring" in backends:
            document["skipped"]["uring"] = reason
            backends.remove("uring")
        found: Peer | str = (
            "not asked for" if arguments.peer == "none" else find(directories, nbytes, not reason, arguments.peer)
        )
        storage = _core.Storage(directories)
        try:
            document["storage"] = storage.describe()
            work = Workload(storage, nbytes)
            with contextlib.ExitStack() as stack:
                peer: Peer | None = None
                if isinstance(found, str):
                    document["skipped"]["peer"] = found
                else:
                    document["peer"] = found.name
                    peer = stack.enter_context(found)
                for block in blocks:
                    for depth in depths:
                        document["results"] += measure(storage, work, peer, backends, block, depth, arguments.repeats)
                        keep(document, arguments.out)
        finally:
            storage.close()
    emit(document, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
