"""The safetensors format, laid out before any tensor is there: so that a file of any size is written as a stream.

A file is 8 bytes (the header's length, little-endian), the header (JSON: dtype, shape and place of each tensor), and
the tensors' bytes one behind the other without gaps (https://github.com/huggingface/safetensors, "Format"). The
library itself writes from tensors that are all in memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from slidecore.errors import ModelError

# Also the alignment of the first tensor: whole pages, for tools that map files. The format allows spaces at the end.
_HEADER_ALIGNMENT = 4096
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """The header of a file, and where each tensor begins; tensors lie in the order of `tensors`."""

    header: bytes
    tensors: tuple[TensorSpec, ...]
    offsets: dict[str, int] = field(hash=False)
    nbytes: int


def lay_out_file(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Where the tensors of a safetensors file lie, in the order in which they are given.

    Give wider dtypes first: each tensor then begins at a multiple of its element's size.

    Raises:
        ModelError: a dtype that the format does not have, or two tensors of one name.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    at = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise ModelError(f"two tensors would be saved under the name {tensor.name!r}")
        if tensor.dtype not in _NAMES:
            raise ModelError(f"{tensor.name} has dtype {tensor.dtype}, which safetensors files cannot hold")
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        begins[tensor.name] = at
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return FileLayout(
        header, tuple(tensors), {name: len(header) + begin for name, begin in begins.items()}, len(header) + at
    )
