"""Filling planes from a checkpoint's files: straight into memory, or chunk by chunk where planes are not in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from slidecore.checkpoints.files import Stop, bytes_of, checked_pieces, read_file, run_all
from slidecore.checkpoints.held import HeldWeights
from slidecore.plane import entry_view
from slidecore.planes import Planes

if TYPE_CHECKING:
    from slidecore.checkpoints.manifest import Manifest
    from slidecore.engine import Engine
    from slidecore.partition import Chunk, Entry

# Where an entry's weight begins in a file.
_Place = tuple[int, "Chunk", "Entry"]


@dataclass(frozen=True)
class Filling:
    """Files that one thread reads and checks one after the other; `run` puts them where they belong."""

    names: Sequence[str]
    run: Callable[[], None]


def run_largest_first(manifest: Manifest, fillings: Sequence[Filling], threads: int, stop: Stop) -> None:
    """Runs them, several at the same time.

    Raises:
        CheckpointError: a file cannot be read or is damaged.
    """

    def nbytes(filling: Filling) -> int:
        return sum(manifest.files[name].nbytes for name in filling.names)

    run_all([filling.run for filling in sorted(fillings, key=nbytes, reverse=True)], threads, stop)


def fill_from(
    manifest: Manifest,
    name: str,
    parts: Iterable[tuple[int, memoryview]],
    stop: Stop,
    *,
    keep_cached: bool = False,
) -> Filling:
    """Reads one file into memory that is there; see `read_file`."""
    path, record = manifest.directory / name, manifest.files[name]
    return Filling([name], partial(read_file, path, record, parts, stop, keep_cached=keep_cached))


def fillings_of_planes(manifest: Manifest, engine: Engine, stop: Stop) -> list[Filling]:
    """What fills all planes."""
    planes = engine.planes
    fillings: list[Filling] = []
    places: dict[str, list[_Place]] = {}
    for chunk, said in zip(engine.chunks, manifest.body["chunks"], strict=True):
        if said["file"] is not None:
            run = partial(_fill_chunk, manifest, said["file"], planes, chunk, said["offsets"], stop)
            fillings.append(Filling([said["file"]], run))
        for entry, kept in zip(chunk.entries, said["entries"], strict=True):
            if kept["weight"] is not None:
                file, offset = kept["weight"]
                places.setdefault(file, []).append((offset, chunk, entry))
    absent: dict[str, list[_Place]] = {}
    for name, found in places.items():
        if all(planes.weight.present(chunk) for _, chunk, _ in found):
            parts = [(offset, bytes_of(planes.weight.view(chunk, entry))) for offset, chunk, entry in found]
            fillings.append(fill_from(manifest, name, parts, stop))
        else:
            absent[name] = found
    if absent:
        # In the order of the chunks, one of which may begin in one file and end in the next.
        ordered = dict(sorted(absent.items(), key=lambda item: min(chunk.index for _, chunk, _ in item[1])))
        fillings.append(Filling(list(ordered), partial(_fill_weights, manifest, ordered, planes, stop)))
    return fillings


def _fill_chunk(
    manifest: Manifest, name: str, planes: Planes, chunk: Chunk, offsets: dict[str, int], stop: Stop
) -> None:
    """Fills the planes that the chunk's own file holds, whole."""
    path, record = manifest.directory / name, manifest.files[name]
    with planes.borrowed(chunk, offsets, write=True, fresh=True) as parts:
        # No variable holds the parts' memory when other threads may borrow.
        read_file(path, record, [(offset, bytes_of(parts[plane])) for plane, offset in offsets.items()], stop)


def _fill_weights(manifest: Manifest, places: dict[str, list[_Place]], planes: Planes, stop: Stop) -> None:
    """Fills weights from weight files, one chunk's at a time in memory."""
    with HeldWeights(planes, write=True) as held:
        for name, found in places.items():
            waiting = deque(sorted(found, key=lambda place: place[0]))
            for begin, (data,) in checked_pieces(manifest.directory / name, manifest.files[name], stop=stop):
                while waiting and waiting[0][0] < begin + len(data) and _fill_entry(held, waiting[0], begin, data):
                    waiting.popleft()


def _fill_entry(held: HeldWeights, place: _Place, begin: int, data: memoryview) -> bool:
    """Copies what a piece of the file, from the byte `begin` on, has of the entry; returns whether that is its last."""
    offset, chunk, entry = place
    memory = bytes_of(entry_view(held.turn_to(chunk), entry))
    first, last = max(begin, offset), min(begin + len(data), offset + len(memory))
    memory[first - offset : last - offset] = data[first - begin : last - begin]
    return last == offset + len(memory)
