"""A tokenizer of bytes and tiny model directories, made once per session."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """Python's own handlers: what nohup or a shell's background job inherits as ignored, a run leaves ignored."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from slidecore.finetune.demo import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def _model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model_dir(_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of its own: tests damage it."""
    return Path(shutil.copytree(_model_dir, tmp_path / "model"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {i}: {'abc' * (i % 7)}\n" for i in range(200)), encoding="utf-8")
    return path
