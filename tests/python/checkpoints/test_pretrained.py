"""`save_pretrained` of an offloaded model writes what transformers would, and needs one chunk in memory for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import clone
from _runs import Run, batches_for, language_model
from _shelf import CHOICES, Shelf, chunk_bytes, shelve
from safetensors.torch import load_file
from slidecore.checkpoints import files
from slidecore.errors import CheckpointError, UsageError
from slidecore.offloading import engine_of
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'slidecore[hf]'")

Offload = Callable[..., nn.Module]


def experts() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.Qwen3MoeConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=40, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_directories(mine: Path, theirs: Path) -> None:
    """The same files with the same content; of weights: the same tensors, whatever shard they are in."""
    ours, expected = weights_in(mine), weights_in(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    small = [{p.name: p.read_text() for p in d.iterdir() if "safetensors" not in p.name} for d in (mine, theirs)]
    assert small[0] == small[1]
    assert not list(mine.rglob(".*"))


@pytest.mark.parametrize("choice", [None, "everything", "weights", "one chunk"])
@pytest.mark.parametrize("make", [lambda: language_model("llama", tied=True, layers=3), experts], ids=["tied", "moe"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 10_000}], ids=str)
def test_what_is_written_is_what_transformers_writes(
    make: Callable[[], nn.Module], options: dict[str, Any], choice: str | None, offload: Offload, tmp_path: Path
) -> None:
    run = Run(make(), offload, compute_dtype=torch.float32)
    run.train(batches_for(run.model, 2))
    plain = clone(make())
    plain.load_state_dict(run.model.state_dict())
    plain.save_pretrained(tmp_path / "plain", **options)  # type: ignore[operator]
    shelf: Shelf | None = None
    if choice is not None:
        shelf = shelve(run.model, CHOICES[choice])
        with pytest.raises(UsageError, match=r"save_pretrained\(directory\)"):
            run.model.state_dict()
        with shelf.watched():
            run.model.save_pretrained(tmp_path / "mine", **options)
        assert 0 < shelf.most_memory <= chunk_bytes(engine_of(run.model).chunks, shelf.planes)
        assert set(shelf.fetched) == {part for part in shelf.bytes if part[1] == "weight"}
    else:
        run.model.save_pretrained(tmp_path / "mine", **options)
    assert_same_directories(tmp_path / "mine", tmp_path / "plain")
    assert (tmp_path / "mine" / "model.safetensors.index.json").exists() == bool(options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_weights_of_an_earlier_model_are_replaced_and_nothing_else(offload: Offload, tmp_path: Path) -> None:
    model = offload(language_model("llama"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    model.save_pretrained(str(tmp_path), max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-0*-of-*.safetensors"))) > 2
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*safetensors*")) == ["adapter_model.safetensors", "model.safetensors"]
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"


def test_a_save_that_fails_leaves_the_earlier_model(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload(language_model("llama"))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    slidecore.assign_parameter(model, "model.norm.weight", torch.full((48,), 7.0))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwritev", full)
        with pytest.raises(CheckpointError, match="No space left"):
            model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path)
    assert torch.equal(weights_in(tmp_path)["model.norm.weight"], torch.full((48,), 7.0))


def test_arguments_keep_their_meaning(offload: Offload, tmp_path: Path) -> None:
    model = offload(language_model("llama"))
    only = {"model.norm.weight": torch.full((48,), 3.0)}
    model.save_pretrained(tmp_path / "given", state_dict=dict(only))
    assert weights_in(tmp_path / "given").keys() == only.keys()
    model.save_pretrained(tmp_path / "positional", True, dict(only))
    assert weights_in(tmp_path / "positional").keys() == only.keys()
    model.save_pretrained(tmp_path / "another", is_main_process=False)
    assert not list((tmp_path / "another").iterdir())
    model.save_pretrained(tmp_path / "variant", variant="new")
    assert (tmp_path / "variant" / "model.new.safetensors").exists()
    with pytest.raises(ValueError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "x", max_shard_size="many")
    model.config.name_or_path = "kept"
    model.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_needs_a_state_dict_says_so_when_there_is_none(offload: Offload, tmp_path: Path) -> None:
    model = offload(language_model("llama"))
    shelve(model, CHOICES["weights"])
    with pytest.raises(UsageError, match="not in host memory"):
        model.save_pretrained(tmp_path, variant="new")


def test_a_closed_model_saves_as_before(offload: Offload, tmp_path: Path) -> None:
    model = language_model("llama")
    own = type(model).save_pretrained
    offload(model)
    assert "save_pretrained" in model.__dict__
    slidecore.close(model)
    assert "save_pretrained" not in model.__dict__
    assert model.save_pretrained.__func__ is own


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_trainer_saves_with_weights_on_disk(offload: Offload, tmp_path: Path, compute_dtype: torch.dtype) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'slidecore[hf]'")
    options = {"compute_dtype": compute_dtype, "piece_bytes": 4096, "ring_pieces": 4, "disk": tmp_path / "disk"}
    (tmp_path / "disk").mkdir()
    with pytest.raises(slidecore.BudgetError, match=r"at least \d+ bytes") as error:
        offload(language_model("llama", layers=5), host_memory=1, **options)
    least = re.search(r"at least (\d+) bytes", str(error.value))
    assert least is not None
    model = language_model("llama", layers=5)
    gradients = compute_dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    offload(model, host_memory=int(least[1]) + gradients + (1 << 16), **options)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3, update="deferred")
    ids = torch.arange(13)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, save_steps=2, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8, optimizers=(optimizer, None)
    )
    try:
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    finally:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    assert "weight" in {part.name for part in engine_of(model).tiers.on_disk}
    for name in ("checkpoint-2", "checkpoint-3", "final"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {compute_dtype}
    final, before = weights_in(tmp_path / "final"), weights_in(tmp_path / "checkpoint-2")
    assert not torch.equal(final["lm_head.weight"], before["lm_head.weight"])
    slidecore.close(model)  # which brings the weights back
    assert all(torch.equal(final[name], parameter) for name, parameter in model.named_parameters())
