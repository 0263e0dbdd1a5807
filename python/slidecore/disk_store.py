"""Parts of planes, and saved inputs, in swap files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from slidecore import _core, calibration, cufile
from slidecore.errors import BudgetError
from slidecore.sizes import format_size
from slidecore.tier_plan import Part

logger = logging.getLogger("slidecore")

_ZEROS_BYTES = 16 << 20


class DiskStore:
    """Swap files in some directories, and the regions of them that are in use.

    Attributes:
        transfers: of these files.
        gpu_direct: the way of saved inputs past host memory, or None.
        limit: bytes that regions may take together; None: what the drives have.
        calibration: what `slidecore calibrate` found for these directories' drives, or None.
    """

    def __init__(self, directories: Sequence[str], limit: int | None) -> None:
        """
        Raises:
            slidecore._core.Error: a directory cannot be used, or is in use.
        """
        self.limit = limit
        self.calibration = calibration.load(directories)
        self.storage = _core.Storage(list(directories))
        try:
            self.transfers = calibration.open_transfers(self.storage, self.calibration)
        except BaseException:
            self.storage.close()
            raise
        self.gpu_direct: _core.GpuDirect | None = None
        self._parts: dict[tuple[int, str], _core.Region] = {}
        self._unwritten: set[tuple[int, str]] = set()
        logger.info("disk tier: %s Transfers by %s", self.storage.describe(), self.transfers.describe())

    @property
    def nbytes(self) -> int:
        """Bytes of all regions."""
        return self.storage.allocated_bytes

    def use_gpu_direct(self, device: _core.Device) -> None:
        """Lets saved inputs go between `device` and the files by cuFile.

        Raises:
            UsageError: it cannot be used.
        """
        self.gpu_direct = cufile.connect(device, self.storage)

    def counters(self) -> dict[str, int]:
        """What was read and written, and of that, by cuFile."""
        counts = self.transfers.counters()
        if self.gpu_direct is not None:
            direct = self.gpu_direct.counters()
            counts = {name: count + direct.get(name, 0) for name, count in counts.items()}
            counts["gpu_direct_bytes"] = direct["read_bytes"] + direct["written_bytes"]
        return counts

    def reserve(self, nbytes: int) -> None:
        """Preallocates so many bytes in all, so that a lack of space shows now.

        Raises:
            slidecore._core.Error: a drive has not got them; the message says what each has.
        """
        if nbytes > self.storage.reserved_bytes:
            self.storage.reserve(nbytes)

    def trim(self) -> None:
        """Gives the drives back what is free at the end of the files."""
        self.storage.trim()

    def allocate(self, name: str, nbytes: int) -> _core.Region:
        """A new region; it goes with its last user.

        Raises:
            BudgetError: it would exceed the limit.
            slidecore._core.Error: the drives are full.
        """
        if self.limit is not None and self.nbytes + nbytes > self.limit:
            raise BudgetError(
                f"disk_memory={format_size(self.limit)} ({self.limit} bytes) is used up: {format_size(self.nbytes)} "
                f"are in use, and {name} needs {format_size(nbytes)} ({nbytes} bytes) more. Raise disk_memory or "
                f"host_memory, or use a smaller batch"
            )
        return self.storage.allocate(name, nbytes)

    def add(self, part: Part, name: str) -> None:
        """Makes room for a part, which is zero until written."""
        key = part.chunk, part.name
        self._parts[key] = self.allocate(name, part.nbytes)
        self._unwritten.add(key)

    def remove(self, part: Part) -> None:
        key = part.chunk, part.name
        del self._parts[key]
        self._unwritten.discard(key)

    def region(self, chunk: int, name: str) -> _core.Region:
        """Where a part lies."""
        return self._parts[chunk, name]

    def read(self, chunk: int, name: str, memory: torch.Tensor) -> None:
        """Fills `memory`, of the part's size."""
        if (chunk, name) in self._unwritten:
            memory.zero_()
        else:
            with self._settled():
                self.transfers.wait(self.transfers.read(self._parts[chunk, name], 0, memory.data_ptr(), memory.nbytes))

    def write(self, chunk: int, name: str, memory: torch.Tensor) -> None:
        """Writes the whole part."""
        with self._settled():
            self.transfers.wait(self.transfers.write(self._parts[chunk, name], 0, memory.data_ptr(), memory.nbytes))
        self._unwritten.discard((chunk, name))

    def write_zeros(self) -> None:
        """Makes files hold what parts read as that were never written: updates read files."""
        if not self._unwritten:
            return
        largest = max(len(self._parts[key]) for key in self._unwritten)
        # Pages of its own: a tensor's memory begins anywhere, and each write of it would be copied.
        zeros = _core.HostBuffer(_core.Device("host", 0), min(largest, _ZEROS_BYTES), False)
        for key in sorted(self._unwritten):
            region = self._parts[key]
            with self._settled():
                tickets = [
                    self.transfers.write(region, at, zeros.address, min(len(zeros), len(region) - at))
                    for at in range(0, len(region), len(zeros))
                ]
                for ticket in tickets:
                    self.transfers.wait(ticket)
        self._unwritten.clear()

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Memory that transfers use may go after this, also if an interrupt came before they were waited for."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(_core.Error):  # then nothing is in flight either
                self.transfers.synchronize()
            raise

    def close(self) -> None:
        """Removes the files. Nothing may be in flight."""
        self._parts.clear()
        if self.gpu_direct is not None:
            self.gpu_direct.close()
        self.transfers.close()
        self.storage.close()
