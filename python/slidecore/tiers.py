"""Where the planes of one model lie, host memory or disk, and how they move when a budget changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from slidecore import _core, host_pressure
from slidecore.disk_store import DiskStore
from slidecore.disk_traffic import Traffic
from slidecore.errors import BudgetError, UsageError
from slidecore.partition import Chunk
from slidecore.plane import part_bytes
from slidecore.sizes import format_size
from slidecore.tier_plan import Part, plan_tiers

if TYPE_CHECKING:
    from slidecore.engine import Engine

logger = logging.getLogger("slidecore")

# Of a disk-resident update: one piece is read, one updated, one written, and one is ready.
STAGES = 4
# Pinned pieces that weights on disk pass through on their way up, and saved inputs on their way down.
DISK_PIECES = 4
# With a disk and no budget: what is taken of the memory that is available at the start.
SHARE_OF_AVAILABLE = 0.9
SECONDS_BETWEEN_LOOKS = 1.0


def staging_bytes(piece_bytes: int, compute_dtype: torch.dtype) -> int:
    """Host memory of the stages for updates from disk; at most 12 bytes an element, and a page for each plane."""
    stage = piece_bytes // compute_dtype.itemsize * 12 + 6 * 4096
    return STAGES * (-(-stage // 4096) * 4096)


def deferred_needs(chunks: Sequence[Chunk], compute_dtype: torch.dtype) -> str:
    """What deferred updates take beside all that is planned by `offload`, which does not know whether they come."""
    plain, summed = (
        sum(part_bytes(chunk.trainable_numel, dtype) for chunk in chunks) for dtype in (compute_dtype, torch.float32)
    )
    more = f", or {summed} bytes ({format_size(summed)}) where several are added up" if summed > plain else ""
    return (
        f"Deferred updates (clipping, accumulation, update='deferred') need {plain} bytes ({format_size(plain)}) more, "
        f"for gradients that wait{more}"
    )


class Tiers:
    """Budgets for host memory and disk, and the parts that lie on disk because of them.

    Attributes:
        host_memory: bytes that planes, rings, buffers and saved inputs may take together; None: no limit.
        store: what is on disk; None without a disk.
        on_disk: the parts that are there.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        parts: Sequence[Part],
        *,
        host_memory: int | None,
        disk: Sequence[str],
        disk_memory: int | None,
        ring_bytes: int,
        piece_bytes: int,
        compute_dtype: torch.dtype,
        train: bool,
        gpu_direct: _core.Device | None = None,
    ) -> None:
        """Plans, and prepares the swap files. Saved inputs go there past host memory from `gpu_direct`, if given.

        Raises:
            BudgetError: a budget is too small.
            UsageError: they cannot.
            slidecore._core.Error: a directory of `disk` cannot be used, or lacks the space.
        """
        self._chunks, self._parts = chunks, parts
        self._piece_bytes, self._compute_dtype = piece_bytes, compute_dtype
        buffers = 0
        if disk:
            buffers = (2 if train and gpu_direct is None else 1) * DISK_PIECES * piece_bytes
            buffers += staging_bytes(piece_bytes, compute_dtype) if train else 0
            if host_memory is None:
                host_memory = int(host_pressure.available_memory() * SHARE_OF_AVAILABLE)
        self._fixed = ring_bytes + buffers
        self.buffer_bytes = buffers
        self.host_memory = host_memory
        self._grad_bytes = 0
        self._train = train
        self._ceiling: int | None = None  # what a machine that ran short of memory has left of the budget
        self._looked = time.monotonic()
        self._engine: Engine | None = None
        self.on_disk = plan_tiers(
            chunks,
            parts,
            host_memory=host_memory,
            fixed=self._fixed,
            disk_memory=disk_memory,
            has_disk=bool(disk),
            to_come=self._to_come(),
        )
        self._in_memory = self._memory_of(self.on_disk)
        self.store = DiskStore(disk, disk_memory) if disk else None
        if self.store is not None:
            try:
                if gpu_direct is not None:
                    self.store.use_gpu_direct(gpu_direct)
                self.store.reserve(sum(part.disk_bytes for part in self.on_disk))
                for part in self._sorted(self.on_disk):
                    self.store.add(part, self._label(part))
            except BaseException:
                self.store.close()
                raise

    # --- what the engine asks for while it is built

    def is_on_disk(self, chunk: Chunk, name: str) -> bool:
        return (chunk.index, name) in {(part.chunk, part.name) for part in self.on_disk}

    def prepare(self, sink: _core.AdamWSink | None, device: _core.Device) -> None:
        """Gives the sink what it needs for planes on disk."""
        if sink is not None and self.store is not None:
            elements = self._piece_bytes // self._compute_dtype.itemsize
            sink.use_disk(self.store.transfers, device, stages=STAGES, stage_elements=elements)

    def connect(self, engine: Engine) -> None:
        """Tells sink and scheduler where everything lies."""
        self._engine = engine
        if self.store is not None:
            self.store.write_zeros()
        for chunk in self._chunks:
            self._place(chunk)

    def fetch(self, chunk: Chunk, name: str, part: torch.Tensor) -> None:
        """See `slidecore.borrowing.PartTransfer`."""
        assert self.store is not None
        self.store.read(chunk.index, name, part)

    def put(self, chunk: Chunk, name: str, part: torch.Tensor) -> None:
        """See `slidecore.borrowing.PartTransfer`."""
        assert self.store is not None
        self.store.write(chunk.index, name, part)

    # --- budgets

    def fixed_bytes(self) -> int:
        """Host memory of everything but planes and saved inputs."""
        return self._fixed + self._grad_bytes

    def planned_bytes(self) -> int:
        """Host memory of planes and everything else but saved inputs."""
        return self.fixed_bytes() + self._in_memory

    def limit(self) -> int | None:
        """The budget for host memory that holds now."""
        limits = [limit for limit in (self.host_memory, self._ceiling) if limit is not None]
        return min(limits) if limits else None

    def room_for_inputs(self) -> int | None:
        """Host memory that saved inputs may take; None: no limit."""
        return self._room_beside(self._in_memory)

    def _room_beside(self, planes: int) -> int | None:
        limit = self.limit()
        return None if limit is None else max(0, limit - self.fixed_bytes() - planes)

    def set_budgets(self, host_memory: int | None, disk_memory: int | None) -> None:
        """Changes what is not None, and moves planes accordingly.

        Raises:
            UsageError: there is no disk to have a budget for.
            BudgetError: a budget is too small; nothing was changed.
            slidecore._core.Error: the drives lack the space; nothing was changed.
        """
        if disk_memory is not None and self.store is None:
            raise UsageError("disk_memory= is for a model that was offloaded with disk=[directory, ...]")
        host = self.host_memory if host_memory is None else host_memory
        most = disk_memory if disk_memory is not None or self.store is None else self.store.limit
        target = self._plan(self.limit() if host_memory is None else host_memory, most)
        if host_memory is not None:
            self._ceiling = None
        before = self.host_memory, self.store.limit if self.store is not None else None
        self.host_memory = host
        if self.store is not None:
            self.store.limit = most
        try:
            self._move(target)
        except BaseException:
            self.host_memory = before[0]
            if self.store is not None:
                self.store.limit = before[1]
            raise
        if self.store is not None:
            self.store.trim()

    def make_room(self, grad_bytes: int) -> None:
        """The `grad` plane is about to take so many bytes: other planes go down for it.

        Raises:
            BudgetError: they cannot; nothing was changed.
        """
        before, self._grad_bytes = self._grad_bytes, grad_bytes
        try:
            if self.limit() is not None:
                target = self._plan(self.limit(), self.store.limit if self.store is not None else None)
                self._move(target | self.on_disk)
        except BaseException:
            self._grad_bytes = before
            raise

    def grad_takes(self, nbytes: int) -> None:
        """What the `grad` plane takes now, where it was less than there was room made for."""
        self._grad_bytes = nbytes

    def relieve(self) -> None:
        """Sends planes down if the machine runs short of memory, and says so."""
        if self.store is None or time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        available, low = host_pressure.available_memory(), host_pressure.low_water()
        if available >= low:
            return
        used = self.planned_bytes()
        self._ceiling = max(0, used - (2 * low - available))
        try:
            target = self._plan(self.limit(), self.store.limit)
            if target == self.on_disk:
                return
            self._reserve(target)
        except (BudgetError, _core.IoError) as error:
            self.store.transfers.check()  # if these have failed, training cannot go on
            logger.warning("the machine is short of memory (%s left), but: %s", format_size(available), error)
            self._ceiling = used
            return
        going = sum(part.nbytes for part in target - self.on_disk)
        logger.warning(
            "the machine is short of memory (%s left): %s of planes go to disk. slidecore.set_budget(model, "
            "host_memory=...) brings them back",
            format_size(available),
            format_size(going),
        )
        self._move(target)

    def _plan(self, host_memory: int | None, disk_memory: int | None) -> frozenset[Part]:
        inputs = self._engine.saved_inputs if self._engine is not None else None
        return plan_tiers(
            self._chunks,
            self._parts,
            host_memory=host_memory,
            fixed=self.fixed_bytes() + (inputs.held_bytes() if inputs is not None else 0),
            disk_memory=disk_memory,
            has_disk=self.store is not None,
            fixed_on_disk=inputs.disk_bytes if inputs is not None else 0,
            to_come=self._to_come(),
        )

    def _to_come(self) -> str:
        return deferred_needs(self._chunks, self._compute_dtype) if self._train and not self._grad_bytes else ""

    # --- moves

    def _move(self, target: frozenset[Part]) -> None:
        """Down first, so that memory never exceeds the larger of the budgets before and after."""
        down, up = self._sorted(target - self.on_disk), self._sorted(self.on_disk - target)
        engine = self._engine
        assert engine is not None
        engine.drain()
        engine.saved_inputs.trim(self._room_beside(self._memory_of(target)))
        if not down and not up:
            return
        assert self.store is not None
        self._reserve(target)
        planes = engine.planes
        try:
            for part in down:
                chunk, plane = self._chunks[part.chunk], planes.plane(part.name)
                self.store.add(part, self._label(part))
                try:
                    self.store.write(part.chunk, part.name, plane.of(chunk))
                except BaseException:
                    self.store.remove(part)
                    raise
                plane.release(chunk)
                self._moved(part, self.on_disk | {part})
            for part in up:
                planes.bring(self._chunks[part.chunk], part.name)
                self.store.remove(part)
                self._moved(part, self.on_disk - {part})
        finally:
            for index in sorted({part.chunk for part in (*down, *up)}):
                self._place(self._chunks[index])
        logger.info("%s", self.describe())

    def _reserve(self, target: frozenset[Part]) -> None:
        """Preallocates for what goes down, before anything moves."""
        assert self.store is not None
        self.store.reserve(self.store.nbytes + sum(part.disk_bytes for part in target - self.on_disk))

    def _moved(self, part: Part, on_disk: frozenset[Part]) -> None:
        self.on_disk = on_disk
        self._in_memory = self._memory_of(on_disk)
        if part.name == "weight":
            assert self._engine is not None
            self._engine.point_parameters(self._chunks[part.chunk])  # the old views keep the old memory

    def _place(self, chunk: Chunk) -> None:
        engine = self._engine
        assert engine is not None
        memory: dict[str, int] = {}
        disk: dict[str, _core.Region] = {}
        for name in engine.planes.names(chunk):
            plane = engine.planes.plane(name)
            if plane.present(chunk):
                memory[name] = plane.address(chunk)
            else:
                assert self.store is not None
                disk[name] = self.store.region(chunk.index, name)
        if chunk.numel:
            engine.scheduler.place_weight(chunk.index, memory.get("weight", 0), disk.get("weight"))
        if engine.sink is not None and chunk.trainable_numel:
            if self._compute_dtype == torch.float32:
                for places in (memory, disk):
                    if "weight" in places:
                        places["weight32"] = places.pop("weight")  # type: ignore[assignment]
            engine.sink.place(chunk.index, memory=memory, disk=disk)

    def _sorted(self, parts: Iterable[Part]) -> list[Part]:
        return sorted(parts, key=lambda part: (part.chunk, part.name))

    def _memory_of(self, on_disk: frozenset[Part]) -> int:
        return sum(part.memory_bytes for part in self._parts if part not in on_disk)

    def _label(self, part: Part) -> str:
        return f"{self._chunks[part.chunk].name}, {part.name}"

    # --- what it costs

    def traffic(self) -> Traffic:
        """What a step moves to and from disk because of where planes lie."""
        point = self.store.calibration.chosen if self.store is not None and self.store.calibration else None
        return Traffic.of(self._chunks, self.on_disk, point, self._train)

    def describe(self) -> str:
        """Sentences: what lies where, and what a step moves because of it."""
        on_disk = sum(part.nbytes for part in self.on_disk)
        if not on_disk:
            return f"all {format_size(self._in_memory)} of planes are in host memory"
        return (
            f"{format_size(self._in_memory)} of planes are in host memory and {format_size(on_disk)} on disk: "
            f"{self.traffic().describe()}"
        )

    def close(self) -> None:
        """Removes the swap files; the lanes must have ended."""
        if self.store is not None:
            self.store.close()
