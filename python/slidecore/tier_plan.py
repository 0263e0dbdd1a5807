"""Which parts of planes go to disk, given what host memory they may take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slidecore.errors import BudgetError
from slidecore.partition import Chunk
from slidecore.sizes import format_size

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """A chunk's part of a plane, of `nbytes`."""

    chunk: int
    name: str
    nbytes: int

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory: whole pages."""
        return -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def disk_bytes(self) -> int:
        """What it takes in swap files, which are divided into blocks of a page."""
        return self.memory_bytes


def in_order_of_need(chunks: Sequence[Chunk], parts: Iterable[Part]) -> list[Part]:
    """Parts that may go to disk, what should go first in front.

    What only the update needs goes before weights, which are read twice a step. Of several chunks the last goes first:
    backward updates it first, the next forward needs it last, so its update has the longest to wait for a disk. Chunks
    that are resident on the device stay in memory.
    """
    movable = [p for p in parts if chunks[p.chunk].kind != "resident"]
    return sorted(movable, key=lambda p: (p.name == "weight", -p.chunk, p.name))


def plan_tiers(
    chunks: Sequence[Chunk],
    parts: Sequence[Part],
    *,
    host_memory: int | None,
    fixed: int,
    disk_memory: int | None,
    has_disk: bool,
    fixed_on_disk: int = 0,
    to_come: str = "",
) -> frozenset[Part]:
    """The parts that lie on disk.

    Args:
        chunks: laid out.
        parts: all parts of all planes.
        host_memory: bytes that parts in memory and `fixed` may take together; None: no limit.
        fixed: bytes of host memory that everything else takes.
        disk_memory: bytes that may lie on disk; None: no limit but the drives'.
        has_disk: whether there is a disk at all.
        fixed_on_disk: bytes that everything else takes there.
        to_come: a sentence about host memory that is not in `fixed` and may be asked for later.

    Raises:
        BudgetError: what is left in memory, or goes to disk, exceeds its budget; the message has the numbers.
    """
    in_memory = fixed + sum(part.memory_bytes for part in parts)
    if host_memory is None or in_memory <= host_memory:
        return frozenset()
    if not has_disk:
        raise BudgetError(
            f"host_memory={format_size(host_memory)} ({host_memory} bytes) is too small: weights and training state "
            f"take {format_size(in_memory - fixed)}, rings and buffers {format_size(fixed)}. Use host_memory of at "
            f"least {in_memory} bytes ({format_size(in_memory)}), moments='8bit', or disk=[directory, ...] for the "
            f"rest{'. ' if to_come else ''}{to_come}"
        )
    down: list[Part] = []
    for part in in_order_of_need(chunks, parts):
        if in_memory <= host_memory:
            break
        down.append(part)
        in_memory -= part.memory_bytes
    if in_memory > host_memory:
        raise BudgetError(
            f"host_memory={format_size(host_memory)} ({host_memory} bytes) is too small even with everything on disk "
            f"that can lie there: rings, buffers and what stays in memory take {format_size(in_memory)}. Use "
            f"host_memory of at least {in_memory} bytes, or a smaller piece_bytes{'. ' if to_come else ''}{to_come}"
        )
    on_disk = fixed_on_disk + sum(part.disk_bytes for part in down)
    if disk_memory is not None and on_disk > disk_memory:
        raise BudgetError(
            f"disk_memory={format_size(disk_memory)} ({disk_memory} bytes) is too small: with host_memory="
            f"{format_size(host_memory)}, {on_disk} bytes ({format_size(on_disk)}) have to lie on disk. Raise either"
        )
    return frozenset(down)
