"""What a step moves to and from disk, and what the drives need for that by themselves, measured in the same run."""

from __future__ import annotations

import statistics
from typing import Any

MODES = ("read", "write", "both")
# Moved per measurement, or as much as there is room for; not a thousand times what a small model has there.
SAMPLE_BYTES, SMALLEST_SAMPLE, SAMPLE_OF_STORE = 4 << 30, 64 << 20, 8


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


def measure_rates(store: Any) -> dict[str, list[float]]:
    """GB/s of the model's own swap files with its own transfers, while it rests: reading, writing, and both at once.

    Each twice, in turns, as drives' rates vary.
    """
    from slidecore.drives import Workload

    free = min(facts.free_bytes for facts in store.storage.directories) * len(store.storage.directories)
    enough = max(SMALLEST_SAMPLE, SAMPLE_OF_STORE * store.nbytes)
    sample = min(SAMPLE_BYTES, enough, free // 2) // 4096 * 4096
    work = Workload(store.storage, sample)
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(2):
        for mode in MODES:
            rates[mode].append(work.run(store.transfers, mode).gb_per_s)
    return rates


def sustained(samples: list[float]) -> float:
    """The rate of several measurements of equal size as one: all bytes over all seconds."""
    return statistics.harmonic_mean(samples)


def limit_seconds(moved: dict[str, float], rates: dict[str, float]) -> float:
    """The time that the drives need for a step: what can be read and written at once, then the rest."""
    read, written = moved["read_bytes"], moved["written_bytes"]
    rest = "read" if read > written else "write"
    return (2 * min(read, written) / rates["both"] + abs(read - written) / rates[rest]) / 1e9
