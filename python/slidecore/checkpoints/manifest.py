"""The manifest: what a checkpoint consists of. It is written last, and a directory without it is no checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidecore.checkpoints.files import PIECE, FileRecord, preferred_checksum, read_file
from slidecore.errors import CheckpointError

MANIFEST = "slidecore_checkpoint.json"
FORMAT = 1
# Relative to the checkpoint's directory. In a directory of their own, where no tool takes them for weights.
STATE, OTHERS = "training/state.pt", "training/others.safetensors"


def planes_file(index: int) -> str:
    """The file of a chunk's planes."""
    return f"training/chunk-{index:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint, its own checksum checked.

    Attributes:
        directory: where it was found.
        body: `format`, `slidecore` (version), `sequence` (a number that grows with every checkpoint saved beside
            others), `compute_dtype`, `chunks` (name, planes, entries with their layout and step counts), `others`
            (tensors that lie in no plane).
        files: by relative path; the manifest itself is not in it.
    """

    directory: Path
    body: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def sequence(self) -> int:
        return int(self.body["sequence"])

    def check_sizes(self) -> None:
        """Raises CheckpointError where a file is missing or has another size; reads none."""
        for name, record in self.files.items():
            path = self.directory / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path} is missing: {error.strerror}") from error
            if size != record.nbytes:
                raise CheckpointError(f"{path} has {size} bytes and should have {record.nbytes}")

    def read(self, name: str) -> bytearray:
        """The content of a small file, checked."""
        if name not in self.files:
            raise CheckpointError(f"{self.directory / MANIFEST} lists no {name}")
        data = bytearray(self.files[name].nbytes)
        read_file(self.directory / name, self.files[name], [(0, memoryview(data))])
        return data


def encode_manifest(body: dict[str, Any], files: dict[str, FileRecord]) -> bytes:
    """The manifest's bytes."""
    listed = {name: {"bytes": record.nbytes, "pieces": list(record.pieces)} for name, record in sorted(files.items())}
    content = {**body, "piece_bytes": PIECE, "checksum": preferred_checksum(), "files": listed}
    return json.dumps({"digest": _digest(content), "checkpoint": content}, indent=1).encode()


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest in `directory`.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a format that this version does not know.
    """
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_bytes())
        content = document["checkpoint"]
        if _digest(content) != document["digest"]:
            raise CheckpointError(f"{path} is damaged: it does not have the checksum it should")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is no complete checkpoint: it has no {MANIFEST}, which a save writes last"
            if directory.is_dir()
            else f"there is no checkpoint at {directory}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if "\0" in str(directory):
            raise CheckpointError(f"there is no checkpoint at {str(directory)!r}: {error}") from error
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} is a checkpoint of format {content.get('format')}, and this version of slidecore reads "
            f"format {FORMAT}; load it with the version that saved it ({content.get('slidecore')})"
        )
    files = {
        name: FileRecord(f["bytes"], tuple(f["pieces"]), content["checksum"])
        for name, f in content.pop("files").items()
    }
    return Manifest(directory, content, files)


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()
