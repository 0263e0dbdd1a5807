"""What goes into the weight files: which tensors, under which names, in which shards.

Parameters are written from their planes as they lie there. A model of transformers is stored under the names that its
`save_pretrained` gives; where those need another form (experts that are one tensor in memory and many in files), one
chunk at a time is converted.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slidecore.checkpoints.files import FileRecord, FileWriter, Stop, bytes_of
from slidecore.checkpoints.held import HeldWeights
from slidecore.checkpoints.layout import FileLayout, TensorSpec, lay_out_file
from slidecore.errors import CheckpointError
from slidecore.plane import entry_view
from slidecore.planes import Planes

if TYPE_CHECKING:
    from slidecore.engine import Engine
    from slidecore.partition import Chunk, Entry

logger = logging.getLogger("slidecore")

INDEX = "model.safetensors.index.json"


@dataclass(eq=False)
class Unit:
    """Tensors of one shard that are made available together: of a chunk's weights, or of what lies in no plane."""

    specs: list[TensorSpec]
    sources: dict[str, torch.Tensor | Entry]  # by the model's own names; an entry: what `chunk` has of it
    chunk: Chunk | None
    convert: Any = None  # sources -> tensors by stored name; None: the one source is what is stored

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def entry(self) -> Entry | None:
        """The entry that is stored here as it lies in its plane, if that is what is stored."""
        (source, *_) = self.sources.values()
        return source if self.convert is None and not isinstance(source, torch.Tensor) else None

    @contextmanager
    def opened(self, planes: Planes, converting: threading.Lock) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors by stored name; of those that need a conversion, one chunk's at a time are in memory."""
        with nullcontext() if self.convert is None else converting, self._sources(planes) as sources:
            if self.convert is None:
                (source,) = sources.values()
                yield {self.specs[0].name: source.detach().cpu().contiguous()}
                return
            converted = self.convert(sources)
            yield converted
            converted.clear()  # here, not when the next ones have been made

    @contextmanager
    def _sources(self, planes: Planes) -> Iterator[dict[str, torch.Tensor]]:
        with nullcontext({}) if self.chunk is None else planes.borrowed(self.chunk, ("weight",)) as parts:
            sources = {
                name: source if isinstance(source, torch.Tensor) else entry_view(parts["weight"], source)
                for name, source in self.sources.items()
            }
            yield sources
            sources.clear()


@dataclass(eq=False)
class Shard:
    """One weight file: what is in it, and where."""

    name: str
    units: list[Unit]
    layout: FileLayout

    def write(
        self, directory: Path, stop: Stop, planes: Planes, converting: threading.Lock, held: HeldWeights | None = None
    ) -> FileRecord:
        """Writes the file; other threads may write others at the same time."""
        with FileWriter(directory / self.name, stop) as file:
            file.write(self.layout.header)
            for unit in self.units:
                if held is not None and unit.chunk is not None and not held.holds(unit.chunk):
                    file.flush()
                    held.turn_to(unit.chunk)
                with unit.opened(planes, converting) as tensors:
                    for spec in unit.specs:
                        tensor = tensors.pop(spec.name)
                        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                            raise CheckpointError(f"{spec.name} was converted to another form than was planned")
                        file.write(bytes_of(tensor.contiguous()))
                        if unit.convert is not None:
                            file.flush()
                        del tensor
            return file.finish()


@dataclass
class WeightFiles:
    """The weight files of a model."""

    shards: list[Shard]
    converted: set[Chunk] = field(default_factory=set)  # chunks whose planes are nowhere in the shards as they lie

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of `INDEX`; None where there is one file only."""
        if len(self.shards) == 1:
            return None
        return {
            "metadata": {"total_size": sum(unit.nbytes for shard in self.shards for unit in shard.units)},
            "weight_map": {spec.name: shard.name for shard in self.shards for spec in shard.layout.tensors},
        }

    def places(self) -> dict[Entry, tuple[str, int]]:
        """(file, offset of the first byte) of the entries that are stored as their planes hold them."""
        return {
            unit.entry: (shard.name, shard.layout.offsets[unit.specs[0].name])
            for shard in self.shards
            for unit in shard.units
            if unit.entry is not None
        }


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is one of transformers that `save_pretrained` saves whole; does not import it.

    Of a model with adapters inside it saves only these.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return not getattr(model, "_hf_peft_config_loaded", False)


def other_tensors(model: nn.Module, engine: Engine) -> dict[str, torch.Tensor]:
    """What belongs to the model's state and lies in no plane: persistent buffers, and parameters kept on the device.

    By name: buffers by their first, parameters by the one that they are stored under.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{prefix}.{name}" if prefix else name] = buffer
    kept = {id(p): p for p in model.parameters() if id(p) not in engine.entries}
    return found | {name: kept[key] for key, name in _stored_names(model)[0].items() if key in kept}


def plan_weight_files(model: nn.Module, engine: Engine, shard_bytes: int) -> WeightFiles:
    """Lays out the weight files; reads no weights.

    Args:
        model: the offloaded model.
        engine: its engine.
        shard_bytes: a shard is closed before it would become larger (a single tensor may be larger).

    Raises:
        ModelError: a buffer has a dtype that safetensors files cannot hold.
    """
    names, aliases = _stored_names(model)
    sources: dict[Chunk | None, dict[str, torch.Tensor | Entry]] = {
        **{chunk: {names[id(entry.parameter)]: entry for entry in chunk.entries} for chunk in engine.chunks},
        None: dict(other_tensors(model, engine)),
    }
    forms = {chunk: _forms_of(engine, chunk, own) for chunk, own in sources.items()}

    revert = _reverting(model, list(forms.values()))
    files = WeightFiles([])
    units: list[Unit] = []
    for chunk, own in sources.items():
        stored = _in_place(forms[chunk]) if revert is None else revert(forms[chunk])
        specs = {
            name: TensorSpec(name, form.dtype, tuple(form.shape))
            for name, origin in stored.items()
            for form in [forms[chunk][origin] if isinstance(origin, str) else origin]
        }
        if all(isinstance(origin, str) for origin in stored.values()):
            units += [Unit([specs[name]], {str(o): own[str(o)]}, chunk) for name, o in stored.items()]
        elif stored:
            units.append(Unit(list(specs.values()), own, chunk, _Conversion(model)))
            if chunk is not None:
                files.converted.add(chunk)

    metadata = {"format": "pt"} if is_transformers_model(model) else {"format": "pt", **aliases}
    files.shards = _shards(units, shard_bytes, metadata)
    return files


def _shards(units: Sequence[Unit], shard_bytes: int, metadata: dict[str, str]) -> list[Shard]:
    grouped: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if grouped[-1] and size + unit.nbytes > shard_bytes:
            grouped.append([])
            size = 0
        grouped[-1].append(unit)
        size += unit.nbytes
    count = len(grouped)
    shards = []
    for number, group in enumerate(grouped, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        group.sort(key=lambda unit: -unit.specs[0].dtype.itemsize)  # aligned, see lay_out_file
        shards.append(Shard(name, group, lay_out_file([s for unit in group for s in unit.specs], metadata)))
    return shards


def _stored_names(model: nn.Module) -> tuple[dict[int, str], dict[str, str]]:
    """The name each parameter (by id) is stored under, and for its other names (if it is tied) the stored one.

    Of a tied parameter's names transformers keeps the one that the others are tied to.
    """
    all_names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        all_names.setdefault(id(parameter), []).append(name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for key, candidates in all_names.items():
        names[key] = min(candidates, key=lambda name: (name in ignored, name in tied))  # the first of the best
        aliases.update({name: names[key] for name in candidates if name != names[key]})
    return names, aliases


# Stored name -> the name of the source that is stored as it is, or what a conversion makes (without storage).
_Stored = dict[str, "str | torch.Tensor"]


def _in_place(sources: dict[str, torch.Tensor]) -> _Stored:
    return {name: name for name in sources}


def _forms_of(engine: Engine, chunk: Chunk | None, sources: dict[str, torch.Tensor | Entry]) -> dict[str, torch.Tensor]:
    """The sources' dtypes and shapes, as tensors without storage."""
    weight = None if chunk is None else engine.planes.weight.form(chunk)
    forms: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        if isinstance(source, torch.Tensor):
            forms[name] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        else:
            assert weight is not None
            forms[name] = entry_view(weight, source)
    return forms


class _Conversion:
    """transformers' way from the form in memory to the form in files, for one chunk."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        on_cpu = {name: tensor.detach().cpu() for name, tensor in sources.items()}
        return revert_weight_conversion(self._model, on_cpu)  # type: ignore[no-any-return]

    def plan(self, sources: dict[str, torch.Tensor]) -> _Stored:
        """The same over tensors without storage, telling those that were only renamed."""
        from transformers.core_model_loading import revert_weight_conversion

        origin = {id(tensor): name for name, tensor in sources.items()}
        return {
            name: origin.get(id(tensor), tensor)
            for name, tensor in revert_weight_conversion(self._model, dict(sources)).items()
        }


def _reverting(model: nn.Module, groups: Sequence[dict[str, torch.Tensor]]) -> Any:
    """What names and converts a group's tensors as save_pretrained does; None where they are stored as they are.

    transformers converts a model as a whole. That chunk by chunk gives the same is checked here, over `groups` without
    storage; where it does not, the tensors keep the form and the names that they have in memory, which from_pretrained
    reads as well.
    """
    if not is_transformers_model(model):
        return None
    conversion = _Conversion(model)
    try:
        whole = conversion.plan({name: tensor for group in groups for name, tensor in group.items()})
        apart = {name: stored for group in groups for name, stored in conversion.plan(group).items()}
    except Exception as error:  # conversions are code of each model's own
        logger.warning("weights are saved under the model's own names: transformers' conversion failed (%s)", error)
        return None

    def form(stored: _Stored) -> dict[str, Any]:
        return {name: o if isinstance(o, str) else (o.dtype, o.shape) for name, o in stored.items()}

    if form(whole) != form(apart):
        logger.warning("weights are saved under the model's own names: their conversion spans several chunks")
        return None
    return conversion.plan
