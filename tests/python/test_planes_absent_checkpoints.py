"""Checkpoints of planes that are not in memory: the same files and bytes, each part moved once, one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import transformers
from _models import Stack, feature_batches
from _runs import Run, batches_for, differences, language_model
from _shelf import CHOICES, choices, chunk_bytes, partly_frozen, settings, shelve
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def files_of(directory: Path) -> dict[str, bytes]:
    """All but the manifest, which has a number that is of each checkpoint's own."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "slidecore_checkpoint.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@choices
@settings
@pytest.mark.parametrize("shard_size", ["4GB", 1500])
def test_saving(offload: Offload, tmp_path: Path, choice: str, options: dict[str, Any], shard_size: int | str) -> None:
    run = Run(partly_frozen(), offload, **options)
    run.train(feature_batches(2))
    run.save(tmp_path / "present", shard_size=shard_size)
    shelf = shelve(run.model, CHOICES[choice])
    with shelf.watched():
        run.save(tmp_path / "absent", shard_size=shard_size, threads=4)
    assert files_of(tmp_path / "absent") == files_of(tmp_path / "present")
    assert shelf.fetched == shelf.once()
    assert not shelf.stored
    assert 0 < shelf.most_memory <= chunk_bytes(engine_of(run.model).chunks, shelf.planes)


@choices
@settings
@pytest.mark.parametrize("shard_size", ["4GB", 1500])
@pytest.mark.parametrize("verify", [True, False])
def test_loading(
    offload: Offload, tmp_path: Path, choice: str, options: dict[str, Any], shard_size: int | str, verify: bool
) -> None:
    run = Run(partly_frozen(), offload, **options)
    run.train(feature_batches(2))
    run.save(tmp_path / "saved", shard_size=shard_size)
    expected = run.state()
    other = Run(partly_frozen(seed=5), offload, **options)
    shelf = shelve(other.model, CHOICES[choice])
    assert differences(other.state(), expected)
    with shelf.watched():
        other.load(tmp_path / "saved", threads=4, verify=verify)
    assert shelf.stored == shelf.once()
    assert not shelf.fetched
    assert 0 < shelf.most_memory <= chunk_bytes(engine_of(other.model).chunks, shelf.planes)
    assert differences(other.state(), expected) == []


@choices
@pytest.mark.parametrize("config", ["llama", "qwen3-moe"])
def test_models_of_transformers(offload: Offload, tmp_path: Path, choice: str, config: str) -> None:
    """Those with experts have another form in files than in memory; their blocks' own files hold the weights, too."""

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if config == "llama":
            return language_model("llama", seed=seed)
        experts = transformers.Qwen3MoeConfig(
            vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
            intermediate_size=40, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16,
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(experts)

    run = Run(model(1), offload, compute_dtype=torch.bfloat16)
    run.train(batches_for(run.model, 2))
    run.save(tmp_path / "present", shard_size=10_000)
    expected = run.state()
    shelf = shelve(run.model, CHOICES[choice])
    with shelf.watched():
        run.save(tmp_path / "absent", shard_size=10_000, threads=3)
    assert files_of(tmp_path / "absent") == files_of(tmp_path / "present")
    assert shelf.fetched == shelf.once()
    most = chunk_bytes(engine_of(run.model).chunks, shelf.planes)
    assert 0 < shelf.most_memory <= most
    assert differences(run.state(), expected) == []

    other = Run(model(2), offload, compute_dtype=torch.bfloat16)
    shelf = shelve(other.model, CHOICES[choice])
    with shelf.watched():
        other.load(tmp_path / "present")
    assert shelf.stored == shelf.once()
    assert shelf.most_memory <= most
    assert differences(other.state(), expected) == []


def test_a_damaged_file_stores_nothing_of_its_chunk(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload, compute_dtype=torch.bfloat16)
    run.train(feature_batches(1))
    directory = run.save(tmp_path / "saved")
    path = directory / "training" / "chunk-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    shelf = shelve(run.model, CHOICES["everything"])
    with shelf.watched(), pytest.raises(slidecore.CheckpointError, match=r"chunk-00003.*damaged"):
        run.load(directory, verify=False, threads=1)
    assert not any(chunk == 3 and name != "weight" for chunk, name in shelf.stored)
    assert 3 in {chunk for chunk, _ in shelf.bytes}
