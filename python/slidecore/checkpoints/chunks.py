"""The chunks as a checkpoint sees them: their planes in files, and their description in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slidecore.checkpoints.files import FileRecord, FileWriter, Stop, bytes_of
from slidecore.checkpoints.layout import FileLayout, TensorSpec, lay_out_file
from slidecore.checkpoints.manifest import planes_file

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.partition import Chunk, Entry
    from slidecore.planes import Planes


@dataclass(frozen=True)
class PlanesFile:
    """The file of a chunk's planes, or of some of them."""

    planes: Planes
    chunk: Chunk
    layout: FileLayout

    def write(self, directory: Path, stop: Stop) -> dict[str, FileRecord]:
        """Writes it, one plane after the other; returns its record by its name."""
        name = planes_file(self.chunk.index)
        with FileWriter(directory / name, stop) as file:
            file.write(self.layout.header)
            for spec in self.layout.tensors:
                with self.planes.borrowed(self.chunk, (spec.name,)) as parts:
                    file.write(bytes_of(parts[spec.name]))
                    file.flush()
            return {name: file.finish()}


def describe_planes(engine: Engine, chunk: Chunk) -> dict[str, dict[str, Any]]:
    """The dtype and the number of elements of each of a chunk's planes."""
    return {n: {"dtype": str(t.dtype), "numel": t.numel()} for n, t in engine.planes.forms(chunk).items()}


def describe_entries(chunk: Chunk) -> list[dict[str, Any]]:
    """The entries' layout in the chunk's planes, in elements."""
    return [
        {"name": e.name, "shape": list(e.shape), "trainable": e.trainable, "offset": e.offset} for e in chunk.entries
    ]


def describe_chunks(
    engine: Engine, layouts: dict[Chunk, FileLayout | None], places: dict[Entry, tuple[str, int]]
) -> list[dict[str, Any]]:
    """What the manifest says of each chunk.

    Args:
        engine: of the model.
        layouts: the file of each chunk's planes, if it has one.
        places: (weight file, offset) of the entries that are in the weight files as they lie in their planes.
    """
    described = []
    for chunk in engine.chunks:
        layout = layouts[chunk]
        entries = describe_entries(chunk)
        for said, entry in zip(entries, chunk.entries, strict=True):
            said["step"] = entry.step
            said["weight"] = list(places[entry]) if entry in places else None
        described.append(
            {
                "name": chunk.name,
                "planes": describe_planes(engine, chunk),
                "file": None if layout is None else planes_file(chunk.index),
                "offsets": {} if layout is None else layout.offsets,
                "entries": entries,
            }
        )
    return described


def describe_others(layout: FileLayout) -> list[dict[str, Any]]:
    """What the manifest says of the tensors in no plane."""
    return [
        {"name": s.name, "dtype": str(s.dtype), "shape": list(s.shape), "offset": layout.offsets[s.name]}
        for s in layout.tensors
    ]


def lay_out_planes(engine: Engine, chunk: Chunk, *, whole: bool) -> FileLayout | None:
    """The file of a chunk's planes: all but the weights, and those too if `whole`; None if that leaves none."""
    tensors = engine.planes.forms(chunk)
    if not whole:
        tensors.pop("weight", None)
    return layout_of(tensors, {"chunk": chunk.name}) if tensors else None


def layout_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileLayout:
    """The safetensors file that holds these tensors."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return lay_out_file(sorted(specs, key=lambda spec: -spec.dtype.itemsize), {"format": "pt", **(metadata or {})})
