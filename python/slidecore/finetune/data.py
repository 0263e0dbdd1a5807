"""From files to packed sequences of tokens.

Text files, JSON Lines and Parquet are read into documents, tokenised, joined with the tokenizer's end-of-sequence
token behind every document, and cut into sequences of equal length. Everything is kept in Arrow files that are mapped,
not read, so that data may exceed host memory. Sequences may span documents; attention is not cut at their borders.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from slidecore.errors import InputError, MissingDependencyError

# A document longer than this is tokenised in pieces, cut at line ends, because tokenizers hold a multiple of their
# input.
PIECE_CHARACTERS = 1 << 20
_SNIFFED_BYTES = 1 << 16
_IGNORED_LABEL = -100
_HELD_OUT = (1 << 20) - 1  # stands for an epoch where sequences to hold out are drawn
# Suffixes of files that are certainly not what they would be read as, and what to do about a single one.
_NOT_TEXT = {
    ".json": "For JSON, give one object per line in a file that ends in .jsonl.",
    ".ndjson": "If it has one object per line, name it .jsonl.",
    ".csv": "Convert it to .jsonl or .parquet with a `text` column.",
    ".arrow": "Convert it to .parquet with a `text` column.",
}
# Halves of characters, which escapes in JSON may give and no tokenizer takes. (Whole pairs have become one character.)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class DataFiles:
    """The files of a run by format.

    Of a directory, `skipped` are those of no format that is read, and `links` the directories that are only linked into
    it, which are not searched.
    """

    text: list[Path] = field(default_factory=list)
    jsonl: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text) + len(self.jsonl) + len(self.parquet)

    def add(self, path: Path) -> None:
        """Sorts one file in by its suffix, or by its first bytes. Raises OSError where it cannot be read."""
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".parquet"):
            open(path, "rb").close()
        if suffix == ".jsonl":
            self.jsonl.append(path)
        elif suffix == ".parquet":
            self.parquet.append(path)
        elif suffix not in _NOT_TEXT and _is_text(path):
            self.text.append(path)
        else:
            self.skipped.append(path)


@dataclass(frozen=True)
class InvalidText:
    """A file with `count` places that are no UTF-8, the first of them at the byte `offset`."""

    path: Path
    count: int
    offset: int


@dataclass(frozen=True)
class PackedData:
    """Sequences of equal length, in the order of the data.

    Attributes:
        sequences: datasets.Dataset with a column `input_ids` (int32, sequence_length values a row) and, if some tokens
            carry no loss, `labels` (int32, -100 where there is none).
        sequence_length: tokens per sequence.
        documents: number of documents.
        tokens: number of tokens, including the remainder that fills no sequence.
        largest_token: the largest token id.
        left_out: number of sequences that are not here, because none of their tokens carries loss.
        invalid: the files with bytes that are no UTF-8 and have become U+FFFD.
    """

    sequences: Any
    sequence_length: int
    documents: int
    tokens: int
    largest_token: int
    left_out: int = 0
    invalid: tuple[InvalidText, ...] = ()

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
        """The batch of one step: int64 tensors `input_ids` and `labels` of shape [batch_size, sequence_length].

        It depends on nothing but the arguments: every epoch is a permutation of its own drawn from `seed`, of which
        only whole batches are used. `step` counts from 0.
        """
        per_epoch = len(self) // batch_size
        epoch, position = divmod(step, per_epoch)
        order = _order(len(self), seed, epoch)
        return self.rows(order[position * batch_size : (position + 1) * batch_size].tolist())

    def rows(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """These sequences, as `batch` gives them."""
        rows = self.sequences[indices]
        input_ids = torch.as_tensor(rows["input_ids"], dtype=torch.int64)
        labels = torch.as_tensor(rows["labels"], dtype=torch.int64) if "labels" in rows else input_ids.clone()
        return {"input_ids": input_ids, "labels": labels}

    def split(self, fraction: float, seed: int) -> tuple[PackedData, PackedData]:
        """Two parts: what is left, and a share of `fraction` of the sequences (one at least), drawn with `seed`.

        Raises:
            InputError: nothing would be left.
        """
        held = max(1, round(fraction * len(self)))
        if held >= len(self):
            raise InputError(
                f"the data gives {len(self)} sequences, too few to hold out {fraction:g} of them",
                "Give more data, or a smaller --eval-fraction or --sequence-length.",
            )
        order = _order(len(self), seed, _HELD_OUT)
        chosen, left = order[:held].sort().values, order[held:].sort().values
        return self._select(left), self._select(chosen)

    def _select(self, indices: torch.Tensor) -> PackedData:
        return replace(self, sequences=self.sequences.select(indices.tolist()))

    def digest(self) -> str:
        """A BLAKE2b digest of all tokens and of which of them carry loss, in hexadecimal."""
        import numpy as np

        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self.sequences.column_names):
            for batch in self.sequences.select_columns(name).iter(batch_size=1024):
                found.update(np.asarray(batch[name], dtype=np.int32).tobytes())
        return found.hexdigest()


def find_files(data: Path, pattern: str | None = None, *, but: Path | None = None) -> DataFiles:
    """The data files at `data`: itself, or what lies below it, hidden files and `__pycache__` left out, sorted.

    What lies in the directory `but` is left out too: what a run writes would be read when the run goes on.

    Raises InputError where there is nothing to read, where a file or a directory cannot be read, or where a single file
    is of no known format.
    """
    files = DataFiles()
    if data.is_file():
        if hint := _NOT_TEXT.get(data.suffix.lower()):
            raise InputError(f"{data} is of a format that is not read", hint)
        with _readable(data):
            files.add(data)
        if files.skipped:
            raise InputError(
                f"{data} is of an unknown format: neither UTF-8 text nor .jsonl nor .parquet",
                "Convert it to one of these.",
            )
    elif data.is_dir():
        try:
            found = sorted(data.glob(pattern or "**/*"))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--glob {pattern!r}: {error}", 'Give a relative pattern such as "**/*.md".') from error
        left_out = _inside(but, data)

        def wanted(inside: tuple[str, ...]) -> bool:
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
            return not (left_out and inside[: len(left_out)] == left_out) and (pattern is not None or not hidden)

        if "**" in (pattern or "**"):
            # A pattern may name a link.
            searched = {parent for path in found for parent in path.parents}
            files.links = [link for link in _links(data, wanted) if link not in searched]
        for path in found:
            if path.is_file() and wanted(path.relative_to(data).parts):
                with _readable(path):
                    files.add(path)
        if not files:
            what = f"{data} has no file that matches {pattern!r} and" if pattern else f"{data} has no file that"
            binary = f" ({len(files.skipped)} others: {name_some(files.skipped)})" if files.skipped else ""
            raise InputError(
                f"{what} can be read as text, JSON Lines or Parquet{binary}",
                "Give a file, or a directory with .txt, .md, source, .jsonl or .parquet files.",
            )
    else:
        raise InputError(f"there is no data at {data}", "Give a file, or a directory with files.")
    if all(path.stat().st_size == 0 for path in (*files.text, *files.jsonl, *files.parquet)):
        raise InputError(f"the data at {data} is empty", "Give files with something in them.")
    return files


def _links(data: Path, wanted: Callable[[tuple[str, ...]], bool]) -> list[Path]:
    """The linked directories below `data`.

    Raises InputError for a directory that cannot be read, which glob leaves out without a word.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the directory {error.filename}: {error.strerror}", "Check its permissions.")

    links = []
    for directory, names, _ in os.walk(data, onerror=refuse):
        here = Path(directory)
        names[:] = sorted(name for name in names if wanted((here / name).relative_to(data).parts))
        links += [here / name for name in names if (here / name).is_symlink()]
    return links


def name_some(paths: list[Path]) -> str:
    """The first few names, for a message."""
    return ", ".join(_shown(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


def _inside(path: Path | None, directory: Path) -> tuple[str, ...]:
    """The parts of the way from `directory` to `path`; none where it is not below."""
    if path is None or not path.resolve().is_relative_to(directory.resolve()):
        return ()
    return path.resolve().relative_to(directory.resolve()).parts


def pack(
    files: DataFiles,
    tokenizer: Any,
    *,
    sequence_length: int,
    cache_dir: Path,
    assistant_only: bool = False,
) -> PackedData:
    """Reads, tokenises and packs all files; `cache_dir` keeps the tokens for as long as the result is used.

    Of a text file the whole is one document; of JSON Lines and Parquet every row is, with either `text` (a string) or
    `messages` (a list of {"role", "content"}, rendered by the tokenizer's chat template). Tokens that do not fill a
    last sequence are dropped, once, at the end of all data. Sequences without any token that carries loss are left out
    (and counted): a batch of nothing else would have no mean loss.

    Args:
        files: from `find_files`.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens per sequence.
        cache_dir: an existing directory.
        assistant_only: take the loss of `messages` on the assistant's tokens only, for chat templates that mark them.

    Raises:
        InputError: the tokenizer has no end-of-sequence token or no chat template, a row cannot be used, there are not
            enough tokens for one sequence, or no sequence has a token that carries loss.
        MissingDependencyError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets is not installed", "Run: pip install 'slidecore[finetune]'") from error

    invalid = [found for path in (*files.text, *files.jsonl) if (found := find_invalid(path)) is not None]
    encoder = _Encoder(tokenizer, assistant_only)
    columns = {"input_ids": datasets.List(datasets.Value("int32"))}
    if assistant_only:
        columns["labels"] = datasets.List(datasets.Value("int32"))
    parts = []
    with _quiet(datasets):
        sources: list[tuple[str, list[Path], Callable[..., Any], Callable[..., Any]]] = [
            ("text", files.text, _text_pieces, encoder.encode_pieces),
            ("jsonl", files.jsonl, _json_lines, encoder.encode_lines),
            ("parquet", files.parquet, _parquet_rows, encoder.encode_lines),
        ]
        for name, paths, read, encode in sources:
            # An empty generator cannot be written as Arrow.
            if not paths or next(read(paths), None) is None:
                continue
            with _own_errors(datasets):
                rows = datasets.Dataset.from_generator(
                    read, gen_kwargs={"paths": paths}, cache_dir=str(cache_dir / name), fingerprint=f"read-{name}"
                )
                parts.append(
                    rows.map(
                        encode,
                        batched=True,
                        batch_size=64,
                        remove_columns=rows.column_names,
                        features=datasets.Features(columns),
                        new_fingerprint=f"tokens-{name}",  # hashing a tokenizer takes longer than small data
                        cache_file_name=str(cache_dir / f"tokens-{name}.arrow"),
                    )
                )
        if not parts or not encoder.tokens:
            raise InputError("the data has no text in it", "Give files with something in them.")
        if encoder.tokens < sequence_length:
            raise InputError(
                f"the data has {encoder.tokens} tokens, fewer than one sequence of {sequence_length}",
                "Give more data, or a smaller --sequence-length.",
            )
        tokens = datasets.concatenate_datasets(parts).with_format("numpy")
        if next(_cut(tokens, sequence_length), None) is None:
            raise InputError(
                f"no token of the data carries loss: in no sequence of {sequence_length} tokens is there one that the "
                f"assistant says",
                "Give chats with messages of the assistant, a larger --sequence-length, or leave --assistant-only out.",
            )
        sequences = datasets.Dataset.from_generator(
            _cut,
            gen_kwargs={"tokens": tokens, "length": sequence_length},
            features=datasets.Features(columns),
            cache_dir=str(cache_dir / "packed"),
            fingerprint="packed",
        )
    return PackedData(
        sequences.with_format("numpy"),
        sequence_length,
        encoder.documents,
        encoder.tokens,
        encoder.largest_token,
        left_out=encoder.tokens // sequence_length - len(sequences),
        invalid=tuple(invalid),
    )


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch))


class _Encoder:
    """Turns rows into token ids, and counts what it has seen."""

    def __init__(self, tokenizer: Any, assistant_only: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, which separates documents",
                "Set eos_token in the model directory's tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only
        self.eos: int = tokenizer.eos_token_id
        first = tokenizer("a")["input_ids"][:1]
        self.prefix: list[int] = first if first and first[0] == tokenizer.bos_token_id else []
        self.documents = 0
        self.tokens = 0
        self.largest_token = 0

    def encode_pieces(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Pieces of text documents (columns `text`, `start`, `end`)."""
        encoded = self._encode(batch["text"])
        for row, start, end in zip(encoded, batch["start"], batch["end"], strict=True):
            if start:
                row[:0] = self.prefix
            if end:
                row.append(self.eos)
        self.documents += sum(batch["end"])
        return self._columns(encoded, [None] * len(encoded))

    def encode_lines(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Rows of JSON Lines and Parquet (columns `row`, as JSON, and `where`, for messages)."""
        encoded: list[list[int]] = []
        masks: list[list[int] | None] = []
        for line, where in zip(batch["row"], batch["where"], strict=True):
            row = _parse(line, where)
            mask: list[int] | None = None
            if isinstance(row.get("messages"), list):
                tokens, mask = self._chat(row, where)
            elif isinstance(row.get("text"), str):
                tokens = self.prefix + self._encode([row["text"]])[0]
            else:
                raise InputError(
                    f"{where} has neither `text` (a string) nor `messages` (a list); it has: "
                    f"{', '.join(sorted(row)) or 'nothing'}",
                    "Name the column with the training text `text`, or give chats as `messages`.",
                )
            if tokens[-1:] != [self.eos]:
                tokens.append(self.eos)
                mask = None if mask is None else [*mask, 0]
            encoded.append(tokens)
            masks.append(mask)
        self.documents += len(encoded)
        return self._columns(encoded, masks)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Quietly, because documents longer than the model's context are cut afterwards.
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _chat(self, row: dict[str, Any], where: str) -> tuple[list[int], list[int] | None]:
        for number, message in enumerate(row["messages"], start=1):
            # Templates render what is missing as "None", or as nothing, and would have that learnt. A call of a tool
            # needs no content.
            calls = isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call"))
            if not isinstance(message, dict) or (message.get("content") is None and not calls):
                raise InputError(
                    f"{where}: message {number} has no `content`",
                    'Every message needs "role" and "content"; leave out messages that say nothing.',
                )
        template = self.tokenizer.chat_template
        if not template:
            raise InputError(
                f"{where} has `messages`, but the tokenizer has no chat template",
                "Add chat_template.jinja to the model directory, or give the rendered chats as `text`.",
            )
        if self.assistant_only and not _GENERATION_MARK.search(str(template)):
            raise InputError(
                "--assistant-only: the tokenizer's chat template does not mark the assistant's tokens",
                "Put {% generation %} ... {% endgeneration %} around them in the template, or leave the option out.",
            )
        try:
            encoded = self.tokenizer.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.assistant_only,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise InputError(
                f"{where}: the chat template cannot render these messages: {error}",
                'Every message needs "role" and "content", in the order that the template asks for.',
            ) from error
        tokens = list(encoded["input_ids"])
        return tokens, list(encoded["assistant_masks"]) if self.assistant_only else None

    def _columns(self, encoded: list[list[int]], masks: list[list[int] | None]) -> dict[str, list[list[int]]]:
        self.tokens += sum(map(len, encoded))
        self.largest_token = max(self.largest_token, *(max(row, default=0) for row in encoded))
        columns = {"input_ids": encoded}
        if self.assistant_only:
            columns["labels"] = [
                row if mask is None else [t if kept else _IGNORED_LABEL for t, kept in zip(row, mask, strict=True)]
                for row, mask in zip(encoded, masks, strict=True)
            ]
        return columns


def _text_pieces(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        piece, start = "", True
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            while more := file.read(PIECE_CHARACTERS):
                if piece:
                    yield {"text": piece, "start": start, "end": False}
                    start = False
                # On to the line's end, if it has one.
                piece = more + file.readline(PIECE_CHARACTERS)
        if piece:
            yield {"text": piece, "start": start, "end": True}


def _json_lines(paths: list[Path]) -> Iterator[dict[str, str]]:
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield {"row": line, "where": f"{_shown(path)}, line {number}"}


def _parquet_rows(paths: list[Path]) -> Iterator[dict[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                wanted = [name for name in ("text", "messages", "tools") if name in names]
                if not wanted:
                    raise InputError(
                        f"{path} has neither a column `text` nor `messages`; it has: {', '.join(names)}",
                        "Name the column with the training text `text`, or give chats as `messages`.",
                    )
                for batch in file.iter_batches(batch_size=256, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        # As JSON, so that rows of any nesting are handled as those of JSON Lines are.
                        yield {"row": json.dumps(_without_nulls(row)), "where": f"{_shown(path)}, row {number}"}
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"cannot read {path}: {error}", "The file is damaged or no Parquet file.") from error


def _shown(path: Path) -> str:
    """A path that Arrow can hold: a file's name need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def _without_nulls(value: Any) -> Any:
    """Drops the keys that a columnar format has had to fill in, which chat templates would take for given."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}", "JSON Lines have one whole object on every line.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object", 'Every line has to be an object such as {"text": "..."}.')
    if "\\u" in line:
        row = json.loads(_LONE_SURROGATE.sub("\ufffd", json.dumps(row, ensure_ascii=False)))
    return row


def _cut(tokens: Any, length: int) -> Iterator[dict[str, Any]]:
    """The stream of all rows' tokens in pieces of `length`, without the remainder, and without those with no loss."""
    import numpy as np

    held: dict[str, list[Any]] = {name: [] for name in tokens.column_names}
    count = 0
    for batch in tokens.iter(batch_size=64):
        for index in range(len(batch["input_ids"])):
            count += len(batch["input_ids"][index])
            for name, arrays in held.items():
                arrays.append(np.asarray(batch[name][index], dtype=np.int32))
        if count >= length:
            streams = {name: np.concatenate(arrays) for name, arrays in held.items()}
            whole = count - count % length
            for start in range(0, whole, length):
                piece = {name: stream[start : start + length] for name, stream in streams.items()}
                # The first label is that of no prediction.
                if "labels" not in piece or (piece["labels"][1:] != _IGNORED_LABEL).any():
                    yield piece
            held = {name: [stream[whole:]] for name, stream in streams.items()}
            count -= whole


def find_invalid(path: Path) -> InvalidText | None:
    """Where a file that is read as text has bytes that are no UTF-8; None if nowhere.

    Apart from reading it: next to tokenising, another pass over the bytes takes no time.
    """
    count, first = 0, 0
    with open(path, "rb") as file:
        position = behind = 0  # bytes read, and those of them that the decoder holds back for the rest of a character

        def note(error: UnicodeError) -> tuple[str, int]:
            nonlocal count, first
            assert isinstance(error, UnicodeDecodeError)
            first = first if count else position - behind + error.start
            count += 1
            return "\ufffd", error.end

        codecs.register_error("slidecore-note", note)
        decoder = codecs.getincrementaldecoder("utf-8")("slidecore-note")
        while block := file.read(PIECE_CHARACTERS):
            decoder.decode(block)
            position += len(block)
            behind = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    return InvalidText(path, count, first) if count else None


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(_SNIFFED_BYTES)
    if b"\0" in head:
        return False
    try:
        # Incremental, because the sniffed part may end within a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Check its permissions.") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without datasets' own progress bars, which would fight with the run's."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _own_errors(datasets: Any) -> Iterator[None]:
    """Lets an InputError through that datasets has wrapped on its way out of a generator."""
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None
