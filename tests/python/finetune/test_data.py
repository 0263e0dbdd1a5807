"""Packing against a naive concatenation, and everything that data can have wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from slidecore.errors import InputError
from slidecore.finetune import data as data_module
from slidecore.finetune.data import PackedData, find_files, pack

END = 256  # the end-of-sequence token of the byte tokenizer
# Renders "<role>content|" and marks what the assistant says.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}|{% endgeneration %}"
    "{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _pack(path: Path, tokenizer: Any, cache: Path, length: int = 8, **options: Any) -> PackedData:
    cache.mkdir(exist_ok=True)
    return pack(find_files(path), tokenizer, sequence_length=length, cache_dir=cache, **options)


def _naive(documents: list[bytes], length: int) -> list[list[int]]:
    stream = [token for document in documents for token in [*document, END]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def _rows(packed: PackedData, column: str = "input_ids") -> list[list[int]]:
    return [row.tolist() for row in packed.sequences[:][column]]


@pytest.mark.parametrize("length", [2, 7, 64, 333])
@pytest.mark.parametrize("piece", [1, 50, 1 << 20])
def test_text_is_packed_as_a_naive_concatenation(
    length: int, piece: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However it is read: pieces must not show.
    monkeypatch.setattr(data_module, "PIECE_CHARACTERS", piece)
    documents = [f"{'x' * n}\r\ndéf {n}\n\n{'é' * n}".encode() for n in (0, 1, 13, 200)] + [
        b"",
        b"last, with no line end",
    ]
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for index, document in enumerate(documents):
        (source / "b" / f"{index}.py").write_bytes(document)
    packed = _pack(source, tokenizer, tmp_path / "cache", length)
    documents = [document for document in documents if document]
    assert _rows(packed) == _naive(documents, length)
    assert packed.documents == len(documents)
    assert packed.tokens == sum(len(document) + 1 for document in documents)
    assert packed.largest_token == END


def test_a_tokenizers_first_token_comes_once_per_document(tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id, bos_token_id = 0, 1

        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            if isinstance(text, str):
                return {"input_ids": [1, *text.encode()]}
            assert not add_special_tokens
            return {"input_ids": [list(entry.encode()) for entry in text]}

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.txt").write_text("abc")
    (tmp_path / "d" / "2.jsonl").write_text('{"text": "de"}\n')
    packed = _pack(tmp_path / "d", Tokenizer(), tmp_path / "cache", 3)
    assert _rows(packed) == [[1, 97, 98], [99, 0, 1], [100, 101, 0]]


def test_jsonl_and_parquet_give_the_same_as_text(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one", "", "zwei Wörter", "3" * 100]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "more": 1}) for t in texts) + "\n\n")
    pq.write_table(pa.table({"text": texts, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    expected = _naive([text.encode() for text in texts], 5)
    assert _rows(_pack(tmp_path / "a.jsonl", tokenizer, tmp_path / "c1", 5)) == expected
    assert _rows(_pack(tmp_path / "a.parquet", tokenizer, tmp_path / "c2", 5)) == expected


def test_half_characters_and_odd_file_names_are_read(tokenizer: Any, tmp_path: Path) -> None:
    # Escapes in JSON can give halves of characters; names on Linux are bytes.
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    file.write_text(r'{"text": "\ud83d\ude00 \ud83d \\ud83d"}')
    packed = _pack(file, tokenizer, tmp_path / "cache", 15)
    assert bytes(packed.sequences[0]["input_ids"].tolist()).decode() == "\U0001f600 \ufffd \\ud83d"


def test_chats_go_through_the_template(chat_tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rendered = "<user>hé|<assistant>yes|<user>ok|<assistant>no|".encode()
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    # A columnar file fills up the keys that other messages have.
    messages = [[{"role": "user", "content": "x", "name": "n"}], CHAT]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    packed = _pack(tmp_path / "a.jsonl", chat_tokenizer, tmp_path / "c1", len(rendered) + 1)
    assert _rows(packed) == [[*rendered, END]]
    batch = packed.batch(0, 1, seed=0)
    assert torch.equal(batch["labels"], batch["input_ids"])
    packed = _pack(tmp_path / "a.parquet", chat_tokenizer, tmp_path / "c2", 4)
    assert _rows(packed) == _naive([b"<user>x|", rendered], 4)


def test_assistant_only_takes_the_loss_where_the_template_says(chat_tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    packed = _pack(source, chat_tokenizer, tmp_path / "cache", 11, assistant_only=True)
    parts = [("<user>hé|<assistant>", False), ("yes|", True), ("<user>ok|<assistant>", False), ("no|", True)]
    stream = [token if kept else -100 for text, kept in parts for token in text.encode()]
    stream += [-100, *b"plain", END]
    cut = [stream[i : i + 11] for i in range(0, len(stream) - 10, 11)]
    cut = [row for row in cut if set(row[1:]) != {-100}]
    assert _rows(packed, "labels") == cut
    batch = packed.batch(0, len(cut), seed=5)
    assert sorted(batch["labels"].tolist()) == sorted(cut)
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_every_epoch_has_every_sequence_once_in_an_order_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(33, 33 + 60)))
    packed = _pack(tmp_path / "a.txt", tokenizer, tmp_path / "cache", 5)
    assert len(packed) == 12

    def epoch(number: int, seed: int) -> list[list[int]]:
        return [row for step in range(4) for row in packed.batch(4 * number + step, 3, seed)["input_ids"].tolist()]

    assert sorted(epoch(0, 1)) == sorted(epoch(7, 1)) == sorted(_rows(packed))
    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(1, 1)
    assert epoch(0, 1) != epoch(0, 2)


def test_directories_are_searched_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name in ("z.txt", "a/b.md", ".git/config", "a/__pycache__/c.py", "a/.hidden", "d.jsonl", "e.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    files = find_files(tmp_path)
    assert [path.name for path in files.text] == ["b.md", "z.txt"]
    assert [path.name for path in files.jsonl] == ["d.jsonl"]
    assert [path.name for path in files.parquet] == ["e.parquet"]
    assert [path.name for path in files.skipped] == ["image.png", "latin.txt"]
    assert [path.name for path in find_files(tmp_path, "*.txt").text] == ["z.txt"]
    assert [path.name for path in find_files(tmp_path, but=tmp_path / "a").text] == ["z.txt"]
    for elsewhere in (tmp_path, tmp_path.parent, tmp_path / "z", Path("/nowhere")):
        assert [path.name for path in find_files(tmp_path, but=elsewhere).text] == ["b.md", "z.txt"]


def test_what_is_no_text_by_its_name_is_no_text_in_a_directory_either(tmp_path: Path) -> None:
    for name in ("a.csv", "b.JSON", "c.arrow", "d.ndjson", "e.txt"):
        (tmp_path / name).write_text("words, words")
    files = find_files(tmp_path)
    assert [path.name for path in files.text] == ["e.txt"]
    assert [path.name for path in files.skipped] == ["a.csv", "b.JSON", "c.arrow", "d.ndjson"]
    assert data_module.name_some(files.skipped).endswith("b.JSON, " + str(tmp_path / "c.arrow") + ", ...")


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "closed", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("words")
    scan = os.scandir

    def closed(path: Any) -> Any:  # permissions do not hold for root, whom tests may run as
        if Path(path).name in ("closed", ".hidden"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"cannot read the directory .*closed: Permission denied"):
        find_files(tmp_path)
    (tmp_path / "closed").rename(tmp_path / "open")
    assert [path.parent.name for path in find_files(tmp_path).text] == ["a", "open"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("words")

    def closed(path: Path, *_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(data_module, "open", closed, raising=False)
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=rf"cannot read .*{name}: Permission denied"):
            find_files(data)


def test_linked_directories_are_not_searched_and_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("words")
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.txt").write_text("words")
    (data / "sub" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "file").symlink_to(tmp_path / "elsewhere" / "b.txt")
    files = find_files(data)
    assert [path.name for path in files.text] == ["a.txt", "file"]
    assert files.links == [data / "sub" / "link"]
    files = find_files(data, "sub/link/**/*.txt")
    assert [path.name for path in files.text] == ["b.txt"]
    assert files.links == []


def test_what_is_no_utf8_is_counted_and_located(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(data_module, "_SNIFFED_BYTES", 4)
    good = "héé\ufffd€😀" * 9
    (tmp_path / "a.txt").write_text(good, encoding="utf-8")
    assert data_module.find_invalid(tmp_path / "a.txt") is None
    (tmp_path / "b.txt").write_bytes(b"x" + good.encode() + b"\xe9!" + good.encode() + b"\xe2\x82")
    packed = _pack(tmp_path, tokenizer, tmp_path / "cache")
    (found,) = packed.invalid
    assert (found.path.name, found.count, found.offset) == ("b.txt", 2, 1 + len(good.encode()))


def _write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("d/empty.txt", "", "is empty"),
        ("blank.jsonl", "\n\n", "no text in it"),
        ("short.txt", "abc", "4 tokens, fewer than one sequence of 8"),
        ("image.png", b"\0\1", "unknown format"),
        ("a.json", "[]", "a format that is not read"),
        ("a.csv", "a,b", "a format that is not read"),
        ("d/image.png", b"\0\1", "can be read"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[" * 200_000, "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", '{"prompt": "x", "answer": "y"}\n', "it has: answer, prompt"),
        ("a.jsonl", '{"text": 3}\n', "line 1 has neither"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "no chat template"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', "line 1: message 1 has no `content`"),
        ("a.jsonl", '\n{"messages": [{"role": "user", "content": ""}, {"role": "user"}]}\n', "line 2: message 2 has"),
        ("a.jsonl", '{"messages": ["hello"]}\n', "line 1: message 1 has no `content`"),
        ("a.ndjson", '{"text": "x"}\n', "of a format that is not read"),
        ("d/a.json", '{"text": "x"}', r"can be read as text, JSON Lines or Parquet \(1 others: .*a\.json\)"),
        ("a.parquet", "not parquet", r"cannot read .*a\.parquet"),
    ],
)
def test_bad_data_is_a_clear_error(
    name: str, content: bytes | str, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = _write(tmp_path / "data" / name, content)
    with pytest.raises(InputError, match=message) as error:
        _pack(path.parent if name.startswith("d/") else path, tokenizer, tmp_path / "cache")
    assert error.value.hint


def test_absent_data_and_globs_without_a_match_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data at"):
        find_files(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"no file that matches '\*\.md'"):
        find_files(tmp_path, "*.md")
    with pytest.raises(InputError, match="--glob"):
        find_files(tmp_path, "/absolute/*")


def test_a_parquet_file_without_text_names_its_columns(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="it has: a, b"):
        _pack(tmp_path / "a.parquet", tokenizer, tmp_path / "cache")


def test_templates_that_cannot_do_what_is_asked_are_clear_errors(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="does not mark the assistant's tokens"):
        _pack(tmp_path / "a.jsonl", chat_tokenizer, tmp_path / "c1", assistant_only=True)
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"line 1: the chat template cannot render.*roles must alternate"):
        _pack(tmp_path / "a.jsonl", chat_tokenizer, tmp_path / "c2")


def test_a_tokenizer_without_an_end_is_a_clear_error(tokenizer: Any, tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(InputError, match="no end-of-sequence token"):
        _pack(tmp_path / "a.txt", tokenizer, tmp_path / "cache")


def _chats(path: Path, *turns: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"messages": [{"role": r, "content": c}]}) + "\n" for r, c in turns))
    return path


def test_sequences_without_loss_are_left_out_and_counted(chat_tokenizer: Any, tmp_path: Path) -> None:
    # Of 7 tokens for the role, the content, one mark and the end: the user's 16, the assistant's 12 and 4, the user's.
    source = _chats(tmp_path / "a.jsonl", ("user", "u" * 15), ("assistant", "yes"), ("user", "u" * 31))
    everything = _pack(source, chat_tokenizer, tmp_path / "c1", 8)
    assert everything.left_out == 0
    packed = _pack(source, chat_tokenizer, tmp_path / "c2", 8, assistant_only=True)
    carrying = [row for row in _rows(everything) if b"yes" in bytes(t for t in row if t < 256)]
    assert _rows(packed) == carrying
    assert 0 < len(packed) < len(everything)
    assert packed.left_out == len(everything) - len(packed)
    assert packed.tokens == everything.tokens
    assert all((packed.batch(step, 1, 0)["labels"][:, 1:] != -100).any() for step in range(len(packed)))


def test_a_label_that_nothing_predicts_is_no_loss(chat_tokenizer: Any, tmp_path: Path) -> None:
    # "<assistant>" is not marked, so that the answer's only token, "|", begins the second of two sequences.
    source = _chats(tmp_path / "a.jsonl", ("assistant", ""), ("user", "u" * 20))
    with pytest.raises(InputError, match="no token of the data carries loss"):
        _pack(source, chat_tokenizer, tmp_path / "c1", len("<assistant>"), assistant_only=True)
    packed = _pack(source, chat_tokenizer, tmp_path / "c2", len("<assistant>|"), assistant_only=True)
    assert len(packed) == 1


def test_data_without_any_loss_is_a_clear_error(chat_tokenizer: Any, tmp_path: Path) -> None:
    source = _chats(tmp_path / "a.jsonl", *[("user", "u" * 30)] * 3)
    with pytest.raises(InputError, match="no token of the data carries loss") as error:
        _pack(source, chat_tokenizer, tmp_path / "cache", assistant_only=True)
    assert "--assistant-only" in error.value.hint
