"""The weight files of a checkpoint are those that other tools expect: safetensors, under the names they know."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import VOCABULARY, Stack
from _runs import Run, batches_for, differences
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from slidecore.checkpoints.layout import TensorSpec, lay_out_file
from slidecore.errors import ModelError
from torch import nn

transformers = pytest.importorskip("transformers")
Offload = Callable[..., nn.Module]

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
_LLAMA: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _config(name: str) -> Any:
    t = transformers
    return {
        "llama": lambda: t.LlamaConfig(**_LLAMA),
        "llama-tied": lambda: t.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
        "gpt2": lambda: t.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=3, n_head=3, n_positions=32),
        # Files hold every expert by itself; the model has them as one parameter.
        "mixtral": lambda: t.MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=2),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(
            **_LLAMA, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    }[name]()


def _model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(_config(name))


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe"])
def test_the_files_are_those_of_save_pretrained(
    name: str, dtype: torch.dtype, offload: Offload, tmp_path: Path
) -> None:
    run = Run(_model(name), offload, compute_dtype=dtype)
    run.train(batches_for(run.model, 2))
    run.save(tmp_path / "ours", shard_size=8_000)
    run.model.save_pretrained(tmp_path / "theirs", max_shard_size=8_000)  # type: ignore[operator]

    ours, theirs = _tensors(tmp_path / "ours"), _tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        mine, other = ((tmp_path / which / file).read_text() for which in ("ours", "theirs"))
        assert mine == other
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in theirs.values())

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == dtype
    state = run.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key

    other = Run(_model(name, seed=1), offload, compute_dtype=dtype)
    other.load(tmp_path / "ours")
    assert differences(other.state(), run.state()) == []


def test_a_model_loaded_from_a_checkpoint_directory_goes_on(offload: Offload, tmp_path: Path) -> None:
    """load_pretrained takes the directory, too, and keeps the form that the files had."""
    run = Run(_model("mixtral"), offload)
    batches = batches_for(run.model, 3)
    run.train(batches[:1])
    run.save(tmp_path / "first")
    run.train(batches[1:])
    model = slidecore.load_pretrained(tmp_path / "first", compute_dtype=torch.float32, device="cpu")
    again = Run(model, lambda model, **_: model)
    again.load(tmp_path / "first")
    again.train(batches[1:])
    assert differences(again.state(), run.state()) == []
    again.save(tmp_path / "second")
    assert _tensors(tmp_path / "second").keys() == _tensors(tmp_path / "first").keys()
    again.close()


def test_one_file_and_the_tokenizer(offload: Offload, tmp_path: Path) -> None:
    from slidecore.finetune.demo import make_tokenizer

    run = Run(_model("llama"), offload)
    run.save(tmp_path / "c", tokenizer=make_tokenizer())
    assert [path.name for path in (tmp_path / "c").glob("model*")] == ["model.safetensors"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "c")("ab")["input_ids"] == [97, 98]
    with safe_open(tmp_path / "c" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_invalid_generation_settings_do_not_cost_a_checkpoint(offload: Offload, tmp_path: Path) -> None:
    run = Run(_model("llama"), offload)
    run.model.generation_config.temperature = 0.3  # type: ignore[union-attr, assignment]
    run.model.generation_config.do_sample = False  # type: ignore[union-attr, assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.save(tmp_path / "c")
    refused = [str(w.message) for w in caught if "without generation_config.json" in str(w.message)]
    assert bool(refused) == (not (tmp_path / "c" / "generation_config.json").exists())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")


class Tied(Stack):
    """A module of nobody's library: the first block's matrix is used by the second, and one is not contiguous."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed, features=13, outputs=13, width=13)
        self.leave.weight = self.enter.weight
        self.norm.weight = nn.Parameter(torch.randn(13, 3)[:, 1])
        self.register_buffer("seen", torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_plain_modules_load_with_safetensors_alone(offload: Offload, tmp_path: Path) -> None:
    run = Run(Tied(), offload)
    batches = [{name: tensor.expand(5, 11, 13) for name, tensor in b.items()} for b in _features(2)]
    run.train(batches)
    run.save(tmp_path / "c")
    assert not (tmp_path / "c" / "config.json").exists()
    fresh = Tied(seed=3)
    fresh.norm.weight = nn.Parameter(torch.zeros(13))  # the library refuses to fill a part of a storage
    missing, unexpected = load_model(fresh, tmp_path / "c" / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    slidecore.synchronize(run.model)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    assert "leave.weight" not in load_file(tmp_path / "c" / "model.safetensors")


def _features(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(5, 11, 1, generator=generator), "target": torch.zeros(1, 1, 1)} for _ in range(count)]


def test_every_dtype_of_the_format_is_read_back(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool float8_e4m3fn"
    made: dict[str, torch.Tensor] = {}
    for name in names.split():
        raw = torch.randint(0, 2, (7 * 8,), dtype=torch.uint8)
        made[name] = raw.view(getattr(torch, name)).reshape(7, -1)
    made["empty"] = torch.empty(0, 3)
    made["scalar"] = torch.tensor(2.5)
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in made.items()]
    specs.sort(key=lambda spec: -spec.dtype.itemsize)
    layout = lay_out_file(specs, {"format": "pt", "é": "ü"})
    content = layout.header + b"".join(bytes(made[s.name].reshape(-1).view(torch.uint8).numpy()) for s in specs)
    assert len(content) == layout.nbytes
    (tmp_path / "all.safetensors").write_bytes(content)
    back = load_file(tmp_path / "all.safetensors")
    assert back.keys() == made.keys()
    for name, tensor in made.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        offset = layout.offsets[name]
        assert offset % tensor.element_size() == 0, "aligned"
        assert content[offset : offset + tensor.nbytes] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    with pytest.raises(ModelError, match="cannot hold"):
        lay_out_file([TensorSpec("x", torch.complex128, (2,))], {})
    with pytest.raises(ModelError, match="two tensors"):
        lay_out_file([TensorSpec("x", torch.float32, (2,))] * 2, {})
