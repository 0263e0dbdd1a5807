"""What a step moves to and from disk, and the seconds that the drives need for that by themselves, in the same run."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

TICKET_BYTES, RING = 16 << 20, 16
# Stands for saved inputs where no planes are on disk, or as much as there is room for.
SAMPLE_BYTES = 4 << 30


def per_step(before: dict[str, int], after: dict[str, int], steps: int, seconds: float) -> dict[str, float]:
    """Bytes that the disk tier moved in each of `steps` steps of `seconds` together, by its own counters."""
    read = after["read_bytes"] - before["read_bytes"]
    written = after["written_bytes"] - before["written_bytes"]
    return {
        "read_bytes": read / steps,
        "written_bytes": written / steps,
        "read_gb_per_s": read / seconds / 1e9,
        "written_gb_per_s": written / seconds / 1e9,
    }


def seconds_alone(tiers: Any, moved: dict[str, float]) -> float:
    """Seconds in which the model's own swap files give and take what a step moves, and nothing else goes on.

    Planes are read and written back as they were, 16 MiB at a time through a ring of buffers, with the model's own
    transfers; what a step reads more often than it writes is read again, evenly in between. Where no planes are on
    disk, a region of its own stands for the saved inputs. A probe of a few gigabytes would not do: its pattern is
    another, and it is short.
    """
    from slidecore import _core

    store = tiers.store
    parts = sorted(tiers.on_disk, key=lambda part: (part.chunk, part.name))
    planes = [store.region(part.chunk, part.name) for part in parts]
    if not planes:
        free = min(facts.free_bytes for facts in store.storage.directories) * len(store.storage.directories)
        sample = max(TICKET_BYTES, int(min(SAMPLE_BYTES, moved["written_bytes"], free / 2)) // 4096 * 4096)
        planes = [store.storage.allocate("measurement", sample)]
    weights = [store.region(part.chunk, part.name) for part in parts if part.name == "weight"] or planes
    updated, again = moved["written_bytes"], moved["read_bytes"] - moved["written_bytes"]
    ring = [_core.HostBuffer(_core.Device("host", 0), TICKET_BYTES, False) for _ in range(RING)]
    if not parts:
        # Reading preallocated space that was never written moves nothing.
        memoryview(ring[0])[:] = random.Random(0).randbytes(TICKET_BYTES)
        for region, at, length in _tickets(planes, len(planes[0])):
            store.transfers.wait(store.transfers.write(region, at, ring[0].address, length))
    begin = time.perf_counter()
    _replay(store.transfers, ring, _mixed(_tickets(planes, updated), _tickets(weights, again), again / updated))
    return time.perf_counter() - begin


Place = tuple[Any, int, int]  # region, offset, bytes


def _tickets(regions: Sequence[Any], nbytes: float) -> Iterator[Place]:
    left = int(nbytes)
    for region in itertools.cycle(regions):
        for at in range(0, len(region), TICKET_BYTES):
            if left <= 0:
                return
            length = min(TICKET_BYTES, len(region) - at, left)
            yield region, at, length
            left -= length


def _mixed(updated: Iterator[Place], again: Iterator[Place], share: float) -> Iterator[tuple[Place, bool]]:
    """All of both, evenly: each place, and whether it is written back."""
    owed = 0.0
    for place in updated:
        yield place, True
        owed += place[2] * share
        while owed > 0 and (more := next(again, None)) is not None:
            yield more, False
            owed -= more[2]
    for place in again:
        yield place, False


def _replay(transfers: Any, ring: Sequence[Any], places: Iterator[tuple[Place, bool]]) -> None:
    """Half of the ring is read ahead, half is written behind."""
    ahead: list[tuple[Any, int, Place, bool]] = []
    written = [0] * len(ring)  # a ticket that is done from the start

    def write_back() -> None:
        buffer, ticket, (region, at, length), back = ahead.pop(0)
        transfers.wait(ticket)
        if back:
            written[ring.index(buffer)] = transfers.write(region, at, buffer.address, length)

    for number, (place, back) in enumerate(places):
        buffer = ring[number % len(ring)]
        if len(ahead) == len(ring) // 2:
            write_back()
        transfers.wait(written[number % len(ring)])
        region, at, length = place
        ahead.append((buffer, transfers.read(region, at, buffer.address, length), place, back))
    while ahead:
        write_back()
    transfers.synchronize()
