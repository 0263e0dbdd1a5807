"""Loading a Hugging Face model directory straight into planes.

The model is built without weights, offloaded, and then filled parameter by parameter from memory-mapped safetensors
files. What is held beyond the planes is one parameter at a time (for a checkpoint that stores the pieces of a fused
parameter separately, that parameter's pieces and their fusion).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from slidecore.errors import InputError, MissingDependencyError
from slidecore.offloading import engine_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slidecore.partition import Chunk

logger = logging.getLogger("slidecore")

# The file formats' names of the types that a parameter may have; integers and 8-bit floats mean a quantized checkpoint.
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file: where it lies, its shape and its dtype as safetensors names it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class _Filling:
    """What fills one or several tensors of the model: one stored tensor, or several through a conversion."""

    target: str
    tensors: list[tuple[str, StoredTensor]] = field(default_factory=list)  # (source pattern, stored tensor)
    converter: Any = None  # transformers' WeightConverter, or None where the tensor is used as it lies
    targets: dict[str, torch.Size] = field(default_factory=dict)


class _ConversionUnsupportedError(Exception):
    """transformers' conversion of this checkpoint cannot be done parameter by parameter."""


class Checkpoint:
    """A model directory whose configuration and file headers have been read, and no weights yet.

    Raises InputError where the directory, its config.json or one of its weight files cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"{self.path} is not a model directory",
                "Give a local directory that holds config.json, *.safetensors and the tokenizer's files.",
            )
        self.config = self._read_config()
        self.tensors = self._read_headers()

    @property
    def parameters(self) -> int:
        """Number of elements stored in the checkpoint (tied weights that are stored twice count twice)."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def load(self, *, compute_dtype: torch.dtype = torch.bfloat16, **offload_options: Any) -> PreTrainedModel:
        """Builds the model, offloads it and fills its planes; see `load_pretrained`."""
        import slidecore

        model = self._build(compute_dtype)
        try:
            fillings = self._plan(model)
        except _ConversionUnsupportedError as error:
            # Correct for every architecture, only hungrier: the whole model lies in host memory beside its planes.
            message = (
                f"{type(model).__name__}: this checkpoint's weights need a conversion that cannot be done parameter by "
                f"parameter ({error}); loading the whole model into host memory first"
            )
            warnings.warn(message, stacklevel=2)
            return self._load_in_memory(compute_dtype, offload_options)
        self._fill_buffers(model, fillings)
        self._read_generation_config(model)
        slidecore.offload(model, compute_dtype=compute_dtype, **offload_options)
        self._fill_parameters(model, fillings)
        return model.eval()

    # Reading what the directory says.

    def _read_config(self) -> Any:
        transformers = _import_transformers()
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise InputError(
                f"{self.path} has no config.json, so it is not a Hugging Face model directory",
                "Point to the directory that save_pretrained wrote (or that was downloaded), not to one above it.",
            )
        try:
            config = transformers.AutoConfig.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # a configuration class validates as it likes, with exceptions of its own
            raise InputError(
                f"cannot read {config_file}: {_reason(error)}",
                f"Check the file, and that transformers {transformers.__version__} knows this model.",
            ) from error
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{self.path} holds a quantized model, whose parameters cannot all be trained",
                "Start from the unquantized model (bfloat16, float16 or float32 weights).",
            )
        return config

    def _weight_files(self) -> list[Path]:
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise InputError(f"cannot read {index}: {_first_line(error)}", "Copy or download it again.") from error
            absent = [name for name in names if not (self.path / name).is_file()]
            if absent or not names:
                raise InputError(
                    f"{index} names weight files that are not there: {_shorten(absent) if absent else '(none)'}",
                    "Copy or download the missing files into the model directory.",
                )
            return [self.path / name for name in names]
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise InputError(
                f"{self.path} has its weights as pickled files, not as safetensors",
                "Convert once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR).",
            )
        raise InputError(
            f"{self.path} has neither model.safetensors nor model.safetensors.index.json",
            "Copy or download the model's *.safetensors files into it.",
        )

    def _read_headers(self) -> dict[str, StoredTensor]:
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            try:
                with open(file, "rb"):  # safetensors says of a file without permission that it is not there
                    pass
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a dict
                        entry = opened.get_slice(key)
                        tensors[key] = StoredTensor(file, key, tuple(entry.get_shape()), entry.get_dtype())
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot read {file}: {_first_line(error)}",
                    "Check its permissions."
                    if isinstance(error, PermissionError)
                    else "The file is damaged or incomplete; copy or download it again.",
                ) from error
        return tensors

    def _read_generation_config(self, model: PreTrainedModel) -> None:
        # save_pretrained writes it back, so that a fine-tuned model generates as the original did.
        file = self.path / "generation_config.json"
        if file.is_file() and model.can_generate():
            from transformers import GenerationConfig

            try:
                model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
            except Exception as error:
                raise InputError(
                    f"cannot read {file}: {_reason(error)}", "Copy or download it again, or remove it."
                ) from error

    # From names in the files to names in the model.

    def _build(self, compute_dtype: torch.dtype) -> PreTrainedModel:
        transformers = _import_transformers()
        try:
            from accelerate import init_empty_weights
        except ImportError as error:
            raise _missing("accelerate") from error
        # Parameters take no memory; buffers (rotary frequencies, masks) are computed by the constructors, as files
        # rarely hold them.
        try:
            with init_empty_weights(include_buffers=False):
                model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=compute_dtype)
        except Exception as error:  # constructors look their settings up in tables, divide by them, and so on
            raise InputError(
                f"{self.path} is not a causal language model that transformers can build: {_reason(error)}",
                "Check config.json. Only models that AutoModelForCausalLM loads without remote code can be fine-tuned.",
            ) from error
        model.config.name_or_path = str(self.path)
        return model

    def _plan(self, model: PreTrainedModel) -> list[_Filling]:
        """Matches stored tensors to the model's parameters and buffers, ties weights, and checks every shape."""
        entries = model.state_dict()  # on the meta device, apart from buffers
        fillings, unexpected = self._match(model, entries)
        filled = {name: shape for filling in fillings for name, shape in filling.targets.items()}
        unexpected |= {name for name in filled if name not in entries}
        fillings = self._tie(model, fillings, set(entries) - set(filled))

        # By identity: a tied parameter may be stored under any of its names.
        names = {name for filling in fillings for name in filling.targets if name in entries}
        covered = {id(model.get_parameter(name)) for name in names if _is_parameter(model, name)}
        missing_parameters = sorted(name for name, p in model.named_parameters() if id(p) not in covered)
        missing_buffers = {name for name in entries if name not in names and not _is_parameter(model, name)}
        keys = SimpleNamespace(missing_keys=missing_buffers, unexpected_keys=unexpected)
        model._adjust_missing_and_unexpected_keys(keys)

        mismatched = [
            f"{name} (file {list(shape)}, model {list(entries[name].shape)})"
            for name, shape in filled.items()
            if name in entries and shape != entries[name].shape
        ]
        problems = []
        if missing_parameters:
            problems.append(f"without weights in the files: {_shorten(missing_parameters)}")
        if mismatched:
            problems.append(f"of another shape in the files: {_shorten(mismatched)}")
        if problems:
            surplus = f"; in the files but not in the model: {_shorten(keys.unexpected_keys)}" if unexpected else ""
            raise InputError(
                f"the weights in {self.path} do not fit its config.json. Parameters {'; '.join(problems)}{surplus}",
                "Check that config.json and the weight files belong to the same model.",
            )
        quantized = sorted(
            stored.key
            for filling in fillings
            for _, stored in filling.tensors
            if stored.dtype not in _FLOAT_DTYPES and _is_parameter(model, filling.target)
        )
        if quantized:
            raise InputError(
                f"{self.path} holds weights that are not 16-bit, 32-bit or 64-bit floats: {_shorten(quantized)}",
                "Start from the unquantized model.",
            )
        if keys.missing_keys:
            warnings.warn(f"buffers without values in the files: {_shorten(keys.missing_keys)}", stacklevel=3)
        if keys.unexpected_keys:
            warnings.warn(
                f"weights in {self.path} that the model does not have, not used: {_shorten(keys.unexpected_keys)}",
                stacklevel=3,
            )
        return fillings

    def _match(self, model: PreTrainedModel, entries: dict[str, torch.Tensor]) -> tuple[list[_Filling], set[str]]:
        """Applies transformers' renamings and conversions (old names, prefixes, fused experts) to the stored keys."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = model.base_model_prefix

        fillings: dict[str, _Filling] = {}
        unexpected: set[str] = set()
        # Natural order, because experts are stacked in the order in which they come.
        for key in sorted(self.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, entries)
            if name not in entries and key in entries:
                name, pattern = key, None
            if name not in entries:
                unexpected.add(name)
                continue
            filling = fillings.setdefault(name, _Filling(name))
            if pattern is None:
                filling.tensors = [(key, self.tensors[key])]
            else:
                filling.converter = filling.converter or deepcopy(by_pattern[pattern])
                filling.tensors.append((pattern, self.tensors[key]))
        # What save_pretrained reverts, so that a saved model has the names and shapes of the original's files.
        model._weight_conversions = [entry for entry in mapping if entry.was_used()]

        for filling in fillings.values():
            converted = _convert(filling, model, lambda stored: torch.empty(stored.shape, device="meta"))
            filling.targets = {name: tensor.shape for name, tensor in converted.items()}
        return list(fillings.values()), unexpected

    def _tie(self, model: PreTrainedModel, fillings: list[_Filling], missing: set[str]) -> list[_Filling]:
        """Ties weights as from_pretrained does: to whichever is stored; not at all where both are and they differ."""
        stored = {filling.target: filling for filling in fillings if filling.converter is None}
        for target, source in list(model.all_tied_weights_keys.items()):
            if target in stored and source in stored:
                if self._equal(stored[target].tensors[0][1], stored[source].tensors[0][1]):
                    missing.add(target)
                else:
                    warnings.warn(
                        f"{self.path}: config.json ties {target} to {source}, but the files hold different values; "
                        "they are trained as separate parameters",
                        stacklevel=4,
                    )
                    model.all_tied_weights_keys.pop(target)
        dropped = missing.intersection(stored)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        return [filling for filling in fillings if filling.target not in dropped]

    def _equal(self, left: StoredTensor, right: StoredTensor) -> bool:
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return False
        with _OpenFiles() as files:
            return torch.equal(files.read(left), files.read(right))

    # Filling.

    def _fill_buffers(self, model: PreTrainedModel, fillings: list[_Filling]) -> None:
        buffers = dict(model.named_buffers())
        with _OpenFiles() as files:
            for filling in fillings:
                if filling.target in buffers:
                    for name, tensor in _convert(filling, model, files.read).items():
                        buffers[name].copy_(tensor)

    def _fill_parameters(self, model: PreTrainedModel, fillings: list[_Filling]) -> None:
        import slidecore

        engine = engine_of(model)
        # A tied parameter has several names; the first is the one that named_parameters gives.
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        # Chunk by chunk: planes that are not in memory then move once.
        by_chunk: dict[Chunk | None, list[_Filling]] = {}
        for filling in fillings:
            if _is_parameter(model, filling.target):
                place = engine.entries.get(id(model.get_parameter(filling.target)))
                by_chunk.setdefault(place[0] if place else None, []).append(filling)
        with _OpenFiles() as files:
            for chunk, own in by_chunk.items():
                with engine.planes.borrowed_masters(chunk) if chunk is not None else nullcontext():
                    for filling in own:
                        for name, tensor in _convert(filling, model, files.read).items():
                            slidecore.assign_parameter(model, canonical[id(model.get_parameter(name))], tensor)

    def _load_in_memory(self, compute_dtype: torch.dtype, offload_options: dict[str, Any]) -> PreTrainedModel:
        import slidecore

        transformers = _import_transformers()
        # The widest dtype in the files, so that no bit of a float32 checkpoint is lost on the way to the planes.
        dtype = torch.float32 if any(t.dtype in ("F32", "F64") for t in self.tensors.values()) else compute_dtype
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, config=self.config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        bad = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report["mismatched_keys"])
        if bad:
            raise InputError(
                f"the weights in {self.path} do not fit its config.json: {_shorten(bad)}",
                "Check that config.json and the weight files belong to the same model.",
            )
        slidecore.offload(model, compute_dtype=compute_dtype, **offload_options)
        return model.eval()


def load_pretrained(
    path: str | Path, *, compute_dtype: torch.dtype = torch.bfloat16, **offload_options: Any
) -> PreTrainedModel:
    """Loads a causal language model from a local Hugging Face directory, offloaded from the start.

    The model never exists whole outside its planes. Weights may be stored as float16, bfloat16, float32 or float64;
    float32 values become the master weights bit by bit. Tied weights, old key names, keys with or without the base
    model's prefix and separately stored experts are handled as `from_pretrained` handles them.

    Args:
        path: a directory with config.json and model.safetensors, or shards with their index.
        compute_dtype: torch.bfloat16 or torch.float32.
        offload_options: passed on to `slidecore.offload` (device, device_memory, window, micro_batch, ...).

    Returns:
        The model, in evaluation mode like `from_pretrained`'s; call `.train()` before training.

    Raises:
        InputError: the directory cannot be used: no or bad config.json, no or damaged weight files, a parameter
            without stored weights or of another shape (all of these before the planes are allocated).
        MissingDependencyError: transformers or accelerate is not installed.
    """
    return Checkpoint(path).load(compute_dtype=compute_dtype, **offload_options)


class _OpenFiles:
    """Keeps the weight files that have been read from mapped until the end of the block."""

    def __enter__(self) -> _OpenFiles:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, stored: StoredTensor) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if stored.file not in self._files:
                self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
            return self._files[stored.file].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read {stored.key} from {stored.file}: {_first_line(error)}",
                "The file is damaged or incomplete; copy or download it again.",
            ) from error


def _convert(filling: _Filling, model: PreTrainedModel, read: Any) -> dict[str, torch.Tensor]:
    """The tensors that a filling gives, by name in the model. `read` maps a StoredTensor to a tensor."""
    if filling.converter is None:
        return {filling.target: read(filling.tensors[0][1])}
    converter = deepcopy(filling.converter)
    for pattern, stored in filling.tensors:
        # A list of callables is transformers' own way to read lazily.
        converter.add_tensor(filling.target, stored.key, pattern, lambda stored=stored: read(stored))
    try:
        converted = converter.convert(filling.target, model=model, config=model.config)
    except InputError:
        raise
    except Exception as error:  # whatever a conversion may raise; from_pretrained then has the last word
        raise _ConversionUnsupportedError(f"{filling.target}: {_first_line(error)}") from error
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _is_parameter(model: torch.nn.Module, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(module)._parameters


def _shorten(names: Any) -> str:
    names = sorted(names)
    shown = ", ".join(names[:_SHOWN_KEYS])
    return shown if len(names) <= _SHOWN_KEYS else f"{shown} and {len(names) - _SHOWN_KEYS} more"


def _first_line(error: BaseException) -> str:
    lines: Iterator[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _reason(error: BaseException) -> str:
    """Its first line, with the next one where the first is a heading, and with its type where the text needs that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"{package} is not installed", "Run: pip install 'slidecore[finetune]'")


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    return transformers
