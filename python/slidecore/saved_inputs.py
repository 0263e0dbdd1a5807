"""Inputs of visits between forward and backward: kept on the device, or sent to host memory and fetched back."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from slidecore import _core
from slidecore.backend import Backend
from slidecore.errors import BudgetError
from slidecore.sizes import format_size

if TYPE_CHECKING:
    from slidecore.tiers import Tiers


class SavedInput:
    """One saved tensor. Exactly one holds it: `tensor` (on the device), a pinned buffer, or a region on disk.

    Several visits may have saved it: `users` counts them, and the last one to `free` it does.
    """

    def __init__(self, store: SavedInputs, tensor: torch.Tensor, chunk: int, shared: bool) -> None:
        self._store = store
        self._held = 0 if shared else tensor.numel() * tensor.element_size()
        store.backend.hold(self._held)
        self._chunk = chunk
        self._version = tensor._version
        self._meta = (tensor.shape, tensor.dtype)
        self.users = 1
        self.tensor: torch.Tensor | None = tensor
        self._host: _core.HostBuffer | None = None
        self._disk: _core.Region | None = None
        self._saved_ticket = 0
        self._fetched: tuple[torch.Tensor, int] | None = None

    @property
    def nbytes(self) -> int:
        shape, dtype = self._meta
        return shape.numel() * dtype.itemsize

    def check_unmodified(self) -> None:
        """Raises RuntimeError if the tensor on the device was changed in place since it was saved."""
        if self.tensor is not None and self.tensor._version != self._version:
            raise RuntimeError(
                "the input of an offloaded block was modified in place after the block had used it; its backward would "
                "be wrong. Replace the in-place operation (for example `h += x` by `h = h + x`)"
            )

    def send(self) -> None:
        """Starts the copy to host memory or disk; the device tensor stays until `settle`."""
        assert self.tensor is not None
        store, address = self._store, self.tensor.data_ptr()
        if store.goes_to_disk(self.nbytes):
            self._disk = store.take_disk(self.nbytes)
            self._saved_ticket = store.scheduler.save_input_to_disk(
                self._chunk, self._disk, address, self.nbytes, store.backend.stream()
            )
        else:
            self._host = store.take_host(self.nbytes)
            self._saved_ticket = store.scheduler.save_input(
                self._chunk, self._host.address, address, self.nbytes, store.backend.stream()
            )

    def settle(self) -> None:
        """Lets go of the device tensor; the compute stream comes after the copy, so its memory can be reused."""
        self.check_unmodified()
        self._store.scheduler.wait(self._saved_ticket, self._store.backend.stream())
        self._let_go()

    def _let_go(self) -> None:
        self.tensor = None
        self._store.backend.drop(self._held)
        self._held = 0

    def prefetch(self) -> None:
        """Starts the copy back to the device, if it is not there."""
        if self.tensor is not None or self._fetched is not None:
            return
        shape, dtype = self._meta
        store = self._store
        buffer = store.backend.empty(shape.numel(), dtype)
        if self._disk is not None:
            ticket = store.scheduler.fetch_input_from_disk(
                self._chunk, buffer.data_ptr(), self._disk, self.nbytes, store.backend.stream(), self._saved_ticket
            )
        else:
            assert self._host is not None
            ticket = store.scheduler.fetch_input(
                self._chunk,
                buffer.data_ptr(),
                self._host.address,
                self.nbytes,
                store.backend.stream(),
                self._saved_ticket,
            )
        self._fetched = (buffer.view(shape), ticket)

    def get(self) -> torch.Tensor:
        """The tensor, once work on the compute stream may use it."""
        if self.tensor is None:
            self.prefetch()
            assert self._fetched is not None
            tensor, ticket = self._fetched
            self._store.scheduler.wait(ticket, self._store.backend.stream())
            return tensor
        self.check_unmodified()
        return self.tensor

    def free(self) -> None:
        """Gives the host buffer back, once no copy uses the device tensor any more.

        A later save into the buffer follows this fetch: it waits for later compute work.
        """
        self.users -= 1
        if self.users > 0:
            return
        ticket = self._fetched[1] if self._fetched is not None else self._saved_ticket if self.tensor is not None else 0
        if ticket:
            try:
                self._store.scheduler.wait(ticket, self._store.backend.stream())
            except _core.Error:
                # The lanes have stopped (their error was raised to the caller): nothing uses the tensor any more.
                self._store.lost.append((self.tensor, self._fetched, self._host, self._disk))
        if self._disk is not None:
            self._store.give_disk(self._disk)
            self._disk = None
        if self._host is not None:
            self._store.give_host(self._host, ticket or self._saved_ticket)
            self._host = None
        self._let_go()
        self._fetched = None

    def __del__(self) -> None:
        self.users = 1
        self.free()


_Identity = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype, int]


def _identity(tensor: torch.Tensor) -> tuple[_Identity, StorageWeakRef]:
    """What two tensors with the same values in the same memory have in common, while the reference is held."""
    storage = StorageWeakRef(tensor.untyped_storage())
    place = (storage.cdata, int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
    return place, storage


class SavedInputs:
    """Pinned host buffers by size, and the tensors whose copies to them are under way."""

    # How many tensors may still be on the device while their copies run: one being copied, one just produced.
    SETTLING = 2

    def __init__(self, backend: Backend, scheduler: _core.Scheduler, tiers: Tiers) -> None:
        self.backend = backend
        self.scheduler = scheduler
        self._tiers = tiers
        # What is saved first is needed last, so it is what goes to disk if not all of a forward's inputs fit in memory.
        self._sent = 0  # bytes of this forward so far
        self._expected = 0  # of the last one
        self._regions: list[_core.Region] = []  # free
        self.disk_bytes = 0
        self._free: list[tuple[_core.HostBuffer, int]] = []  # with the fetch that may still read it
        self._settling: deque[SavedInput] = deque()
        self.host_bytes = 0
        self._saved: dict[_Identity, tuple[StorageWeakRef, weakref.ref[SavedInput]]] = {}
        # What copies on failed lanes may still touch lives as long as the lanes.
        self.lost: list[object] = []

    def begin_forward(self) -> None:
        """A forward begins whose inputs are saved."""
        if self._sent:
            self._expected, self._sent = self._sent, 0
        self.trim(self._tiers.room_for_inputs())

    def goes_to_disk(self, nbytes: int) -> bool:
        """Where the next input, of `nbytes`, goes: to disk if the later ones will fill what memory there is.

        In the first forward, nobody knows how many will come: they fill the memory.
        """
        before, self._sent = self._sent, self._sent + nbytes
        room = self._tiers.room_for_inputs()
        if room is None:
            return False
        fits = any(len(buffer) >= nbytes for buffer, _ in self._free) or self.host_bytes + nbytes <= room
        if fits and before + nbytes > self._expected - room:
            return False
        if self._tiers.store is None:
            raise BudgetError(
                f"the inputs of blocks that are saved for backward take more than the {format_size(room)} that "
                f"host_memory leaves beside planes and rings. Raise host_memory, give disk=[directory, ...], or use a "
                f"smaller batch"
            )
        return True

    def take_disk(self, nbytes: int) -> _core.Region:
        """A free region that is large enough, or a new one, of whole pages."""
        fitting = [i for i, region in enumerate(self._regions) if len(region) >= nbytes]
        if fitting:
            return self._regions.pop(min(fitting, key=lambda i: len(self._regions[i])))
        if self._regions:  # in the place of one that is too small
            self.disk_bytes -= len(
                self._regions.pop(max(range(len(self._regions)), key=lambda i: len(self._regions[i])))
            )
        assert self._tiers.store is not None
        region = self._tiers.store.allocate("a saved input", -(-nbytes // 4096) * 4096)
        self.disk_bytes += len(region)
        return region

    def give_disk(self, region: _core.Region) -> None:
        """Takes a region back. A later save there waits for what is under way."""
        self._regions.append(region)

    def trim(self, room: int | None) -> None:
        """Frees buffers that nobody uses: those that are too many for `room` bytes, or on disk where that is enough."""
        if room is None or room >= self._expected:
            self.disk_bytes -= sum(len(region) for region in self._regions)
            self._regions.clear()
        while room is not None and self.host_bytes > room and self._free:
            self._drop(self._free.pop())

    def take_host(self, nbytes: int) -> _core.HostBuffer:
        """The smallest free buffer that is large enough, or a new one in the place of one that is too small.

        So there are never more buffers than inputs saved at once, whatever lengths the batches have.
        """
        fitting = [i for i, (buffer, _) in enumerate(self._free) if len(buffer) >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: len(self._free[i][0])))[0]
        if self._free:
            self._drop(self._free.pop(max(range(len(self._free)), key=lambda i: len(self._free[i][0]))))
        self.host_bytes += nbytes
        return _core.HostBuffer(self.backend.core, nbytes, True)

    def give_host(self, buffer: _core.HostBuffer, ticket: int) -> None:
        """Takes a buffer back; the transfer `ticket` (or 0) may still use it."""
        self._free.append((buffer, ticket))

    def _drop(self, free: tuple[_core.HostBuffer, int]) -> None:
        buffer, ticket = free
        if ticket:
            self.scheduler.synchronize_ticket(ticket)  # before the memory is unmapped
        self.host_bytes -= len(buffer)

    def save(self, tensor: torch.Tensor, chunk: int, *, on_device: bool, shared: bool) -> SavedInput:
        """Saves a detached tensor of device memory; contiguous ones go to the host unless `on_device`.

        `shared` tensors (masks, positions) belong to all blocks and are not counted as this one's memory. A tensor
        that is saved already (what an encoder made, for every block of a decoder) is not saved again.
        """
        if shared:
            return SavedInput(self, tensor, chunk, shared)
        identity, storage = _identity(tensor)
        known = self._saved.get(identity)
        if known is not None:
            saved = known[1]()
            if saved is not None and saved.users > 0:
                saved.users += 1
                return saved
        saved = SavedInput(self, tensor, chunk, shared)
        # The weak reference keeps another storage from getting this one's identity.
        self._saved = {key: value for key, value in self._saved.items() if value[1]() is not None}
        self._saved[identity] = storage, weakref.ref(saved)
        if not on_device and tensor.is_contiguous() and tensor.numel() > 0:
            saved.send()
            self._settling.append(saved)
            while len(self._settling) > self.SETTLING:
                self._settling.popleft().settle()
        return saved

    def end_of_forward(self) -> None:
        """The tensors still settling are the ones that backward needs first: they stay on the device."""
        self._settling.clear()
