"""The native core. Addresses, streams and events are integers; blocking calls release the GIL."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

class Error(RuntimeError):
    """Base of every error of the core; the subclasses below also derive from the matching built-in."""

class InvalidArgumentError(Error, ValueError): ...
class OutOfMemoryError(Error, MemoryError): ...
class DeviceError(Error): ...
class IoError(Error, OSError): ...
class StateError(Error): ...
class UnsupportedError(Error): ...

@final
class Device:
    """An opened device. `backend` is "host", "cuda" or "hip"."""

    def __init__(self, backend: str, ordinal: int = 0) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def numa_node(self) -> int: ...
    @property
    def is_host(self) -> bool: ...
    @property
    def needs_pinning(self) -> bool: ...
    @property
    def memory_in_use(self) -> int: ...
    @property
    def memory_peak(self) -> int: ...
    def alloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def wait(self, stream: int, event: int) -> None: ...
    def create_event(self, timing: bool = False) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record(self, event: int, stream: int) -> None: ...
    def done(self, event: int) -> bool: ...
    def synchronize_event(self, event: int) -> None: ...
    def elapsed_ms(self, start: int, end: int) -> float: ...
    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None: ...
    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None: ...

@final
class HostBuffer:
    """Zero-filled host memory of exactly `nbytes`, exported as a writable buffer of bytes."""

    def __init__(self, device: Device, nbytes: int, pinned: bool) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def pinned(self) -> bool: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @staticmethod
    def mapped_now() -> int: ...
    @staticmethod
    def mapped_peak() -> int: ...

@final
class DeviceBuffer:
    """Device memory of the host backend (accounted by it), exported as a writable buffer of bytes."""

    def __init__(self, device: Device, nbytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class DirectoryFacts:
    """What a directory's file system said when it was asked. Sizes and alignments are in bytes."""

    directory: str
    filesystem: str
    in_memory: bool
    direct: bool
    why_not_direct: str
    alignment_reported: bool
    memory_alignment: int
    offset_alignment: int
    free_bytes: int
    total_bytes: int
    device_major: int
    device_minor: int

def inspect_directory(directory: str) -> DirectoryFacts: ...
def why_no_io_uring() -> str:
    """Why io_uring cannot be used here; empty if it can."""

@final
class Region:
    """A named range of a Storage, of `len()` bytes. Its space returns when the object is gone."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...

@final
class Storage:
    """Swap files striped over directories, which it locks. The files go with it, at the latest at exit."""

    def __init__(self, directories: Sequence[str], *, stripe_bytes: int = ...) -> None: ...
    def reserve(self, nbytes: int) -> None:
        """Preallocates until regions of `nbytes` in total fit; IoError with the numbers if space is short."""
    def allocate(self, name: str, nbytes: int) -> Region: ...
    def trim(self) -> None:
        """Gives the drives back what lies behind the last region."""
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def memory_alignment(self) -> int: ...
    @property
    def directories(self) -> list[DirectoryFacts]: ...
    @property
    def files(self) -> list[str]: ...
    def describe(self) -> str: ...
    def close(self) -> None:
        """Removes the files' names; their space returns when Transfers and Regions are gone too."""

@final
class Transfers:
    """Asynchronous transfers between memory (by address) and regions. Errors are raised by the next call."""

    def __init__(
        self,
        storage: Storage,
        *,
        backend: str = "",
        block_bytes: int = ...,
        queue_depth: int = 0,
        patience_s: float = 30.0,
    ) -> None:
        """backend: "uring", "threads", or "" for SLIDECORE_IO if set, else io_uring where the kernel allows it."""
    def read(self, region: Region, offset: int, memory: int, nbytes: int) -> int:
        """Starts a read into `memory`, which must stay until the returned ticket is done."""
    def write(self, region: Region, offset: int, memory: int, nbytes: int) -> int: ...
    def done(self, ticket: int) -> bool: ...
    def wait(self, ticket: int) -> None: ...
    def synchronize(self) -> None: ...
    def check(self) -> None: ...
    def register_memory(self, memory: int, nbytes: int) -> bool: ...
    def unregister_memory(self, memory: int) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def queue_depth(self) -> int: ...
    def describe(self) -> str: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the threads. Later calls raise StateError."""

@final
class CuFileFacts:
    """`version` is "" where the library does not say."""

    library: str
    version: str

def inspect_cufile(paths: Sequence[str]) -> CuFileFacts:
    """Loads NVIDIA's cuFile without opening its driver; it stays loaded. UnsupportedError names every attempt.

    `paths` are tried after SLIDECORE_CUFILE_LIBRARY, or without that after what is mapped and what the loader finds.
    """

@final
class GpuDirect:
    """Transfers between a Storage's files and device memory by cuFile. UnsupportedError where that cannot be.

    The calls block; all work that uses the device memory must be done before.
    """

    def __init__(self, device: Device, storage: Storage, paths: Sequence[str]) -> None: ...
    def read(self, region: Region, device_memory: int, nbytes: int) -> None:
        """The first `nbytes` of the region."""
    def write(self, region: Region, device_memory: int, nbytes: int) -> None: ...
    @property
    def direct(self) -> bool:
        """False: cuFile itself copies through host memory (its compatibility mode)."""
    def describe(self) -> str: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None:
        """Later calls raise StateError. The files stay registered until no Scheduler uses this any more."""

@final
class ThreadPool:
    def __init__(self, threads: int = 0) -> None: ...
    @property
    def threads(self) -> int: ...

def usable_cpus() -> int: ...
def instruction_set() -> str: ...
def available_instruction_sets() -> list[str]: ...
def force_instruction_set(name: str) -> None: ...
def split(pool: ThreadPool, master: int, weight: int, residual: int, n: int) -> None: ...
def merge(pool: ThreadPool, weight: int, residual: int, master: int, n: int) -> None: ...
def parallel_copy(pool: ThreadPool, to: int, source: int, nbytes: int) -> None: ...

@final
class AdamWHyper:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    maximize: bool
    gradient_scale: float
    def __init__(
        self,
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        step: int = 1,
        maximize: bool = False,
        gradient_scale: float = 1.0,
    ) -> None: ...

def adamw(
    pool: ThreadPool,
    hyper: AdamWHyper,
    *,
    n: int,
    gradient: int,
    gradient_float32: bool,
    exp_avg: int,
    exp_avg_sq: int,
    weight: int = 0,
    residual: int = 0,
    weight32: int = 0,
    exp_avg_scale: int = 0,
    exp_avg_sq_scale: int = 0,
) -> None:
    """One AdamW step on n parameters; all arrays by address. Give weight and residual, or weight32.

    With scales (float32, one for MOMENTS_GROUP parameters) exp_avg and exp_avg_sq are 8-bit codes (int8 and uint8).
    """

MOMENTS_GROUP: int

@final
class AdamWSink:
    """Updates chunks on the update lane."""

    def __init__(self, pool: ThreadPool) -> None: ...
    def add_chunk(self, *, n: int, gradient_float32: bool) -> int:
        """Registers the next chunk, of n trainable elements; `place` says where its planes are. Returns its index."""
    def place(self, chunk: int, *, memory: Mapping[str, int], disk: Mapping[str, Region]) -> None:
        """Where the chunk's planes lie from now on, by name: addresses, and regions on disk.

        weight and residual, or weight32; exp_avg and exp_avg_sq, which are 8-bit codes where there are exp_avg_scale
        and exp_avg_sq_scale. The update lane must be idle.
        """
    def use_disk(self, transfers: Transfers, device: Device, *, stages: int, stage_elements: int) -> None:
        """Lets planes lie on disk: pieces of up to `stage_elements` elements pass through so many stages of memory."""
    @property
    def staging_bytes(self) -> int: ...
    def squares(self, chunk: int) -> list[float]:
        """The sum of squares of each segment after the chunk's last submission to a sum."""

@final
class Scheduler:
    def __init__(
        self,
        device: Device,
        chunks: Sequence[tuple[str, int, int, int]],
        windows: Sequence[tuple[Sequence[int], int]],
        sink: AdamWSink | None,
        piece_bytes: int = ...,
        ring_pieces: int = ...,
        trace_spans: int = ...,
        transfers: Transfers | None = None,
        disk_pieces: int = ...,
        gpu_direct: GpuDirect | None = None,
    ) -> None:
        """chunks: (name, weight address, bytes, window). windows: (slot addresses, slot bytes).

        A chunk whose weights lie on disk has the address 0, and `place_weight` is called before its first visit.
        With `gpu_direct`, of the same Storage as `transfers`, saved inputs go to disk and back past host memory.
        """
    FORWARD: ClassVar[int]
    BACKWARD: ClassVar[int]
    def set_schedule(self, visits: Sequence[tuple[int, int, bool, bool]]) -> None:
        """visits: (chunk, FORWARD | BACKWARD, reads weights, ends in an update)."""
    def acquire(self, chunk: int, phase: int, stream: int) -> int: ...
    def release(self, chunk: int, phase: int, stream: int) -> None: ...
    def submit_gradient(
        self,
        chunk: int,
        segments: Sequence[tuple[int, int, AdamWHyper]],
        gradient_float32: bool,
        gradient: int,
        nbytes: int,
        stream: int,
    ) -> int:
        """Downloads a gradient and updates the chunk by it: segments are (offset, length, hyper), ascending.

        Elements outside the segments stay as they are. On an error nothing is submitted.
        """
    def add_gradient(
        self,
        chunk: int,
        segments: Sequence[tuple[int, int, bool]],
        sum: int,
        gradient_float32: bool,
        gradient: int,
        nbytes: int,
        stream: int,
    ) -> int:
        """Downloads a gradient and adds it to the float32 elements at address `sum`.

        segments: (offset, length, whether what is there is overwritten) in elements, ascending.
        """
    def save_gradient(self, chunk: int, host: int, gradient: int, nbytes: int, stream: int) -> int:
        """Downloads the gradient to `host`, once the chunk's updates so far are done."""
    def update(
        self,
        chunk: int,
        segments: Sequence[tuple[int, int, AdamWHyper]],
        gradient_float32: bool,
        gradient: int,
        nbytes: int,
        after: int,
    ) -> None:
        """As submit_gradient(), from a gradient in host memory, once the ticket `after` (or 0) is done."""
    def save_input(self, chunk: int, host: int, device: int, nbytes: int, stream: int) -> int: ...
    def fetch_input(self, chunk: int, device: int, host: int, nbytes: int, stream: int, after: int = 0) -> int: ...
    def save_input_to_disk(self, chunk: int, on_disk: Region, device: int, nbytes: int, stream: int) -> int: ...
    def fetch_input_from_disk(
        self, chunk: int, device: int, on_disk: Region, nbytes: int, stream: int, after: int = 0
    ) -> int: ...
    def place_weight(self, chunk: int, weight: int, on_disk: Region | None = None) -> None:
        """Where the chunk's weights lie from now on, with the same content; to be called after synchronize()."""
    def done(self, ticket: int) -> bool: ...
    def wait(self, ticket: int, stream: int) -> None: ...
    def synchronize_ticket(self, ticket: int) -> None: ...
    def invalidate(self, chunk: int) -> None: ...
    def wait_updates(self) -> None: ...
    def synchronize(self) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None:
        """Synchronizes (errors are dropped), stops and joins the lanes. Later calls raise StateError."""
    def start_trace(self) -> None: ...
    def stop_trace(self) -> None: ...
    def chrome_trace(self) -> str: ...
    def trace_spans(self) -> list[tuple[str, str, int, int, int, int]]:
        """(lane, kind, chunk or -1, start ns, end ns, bytes), oldest first."""
    def trace_summary(self) -> dict[str, object]:
        """wall_s, exposed_wait_s, dropped, lanes: {name: {busy_s, busy_share, bytes, spans}}."""
    def counters(self) -> dict[str, int]: ...
