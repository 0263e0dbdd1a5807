"""The threads that slidecore's core has in this process."""

from __future__ import annotations

import time
from pathlib import Path

NAMES = ("slidecore-", "upload", "download", "update", "disk")  # the lanes' own, and those of pools and transfers


def native_threads() -> frozenset[int]:
    """Ids of the core's threads; those of PyTorch and of other libraries come and go as they like."""
    return frozenset(int(task.name) for task in Path("/proc/self/task").iterdir() if _is_ours(task))


def _is_ours(task: Path) -> bool:
    try:
        return (task / "comm").read_text().startswith(NAMES)
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return False


def assert_no_more_threads(than: frozenset[int]) -> None:
    """A joined thread's entry may outlive the join by a moment, so they get some time to go.

    Threads of models that other tests have left to the garbage collector may end meanwhile: fewer is right too.
    """
    deadline = time.monotonic() + 60
    while (left := native_threads() - than) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not left
