"""load_pretrained against from_pretrained: the same weights, from the same directory."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import transformers
from safetensors.torch import load_file, save_file
from slidecore.errors import InputError
from slidecore.loading import Checkpoint, load_pretrained

_SIZES: dict[str, Any] = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
_LLAMA_SIZES: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**_LLAMA_SIZES),
        "llama-tied": t.LlamaConfig(**_LLAMA_SIZES, tie_word_embeddings=True),
        "qwen3-tied": t.Qwen3Config(**_LLAMA_SIZES, head_dim=8, tie_word_embeddings=True),
        "gemma2": t.Gemma2Config(**_LLAMA_SIZES, head_dim=8),
        "gpt2": t.GPT2Config(vocab_size=67, n_embd=24, n_layer=3, n_head=3, n_positions=32),
        # Stores every expert by itself; the model has them fused.
        "mixtral": t.MixtralConfig(**_LLAMA_SIZES, num_local_experts=3, num_experts_per_tok=2),
        "qwen3-moe": t.Qwen3MoeConfig(
            **_LLAMA_SIZES, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    }


def _save(path: Path, config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are otherwise all alike
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(path, **options)
    return model


def _check_equal(loaded: Any, path: Path, dtype: torch.dtype) -> None:
    slidecore.synchronize(loaded)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name].cpu(), value, rtol=0, atol=0, msg=name)
    for (name, ours_buffer), (_, theirs_buffer) in zip(loaded.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(ours_buffer.cpu(), theirs_buffer, rtol=0, atol=0, msg=name)


def _load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_pretrained(path, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", sorted(_configs()))
def test_weights_equal_from_pretrained(name: str, tmp_path: Path) -> None:
    _save(tmp_path, _configs()[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no fallback, nothing missing, nothing left over
        loaded = _load(tmp_path)
    _check_equal(loaded, tmp_path, torch.float32)
    assert not loaded.training


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_sharded_checkpoint_loads(name: str, tmp_path: Path) -> None:
    _save(tmp_path, _configs()[name], max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _check_equal(_load(tmp_path), tmp_path, torch.float32)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_every_float_dtype_loads(stored: torch.dtype, compute: torch.dtype, tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"], stored)
    loaded = _load(tmp_path, compute)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {compute}
    # The masters keep every bit of the file, whatever is computed with.
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(slidecore.master_parameter(loaded, name), value.float(), rtol=0, atol=0, msg=name)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    for name in ("llama-tied", "mixtral"):
        _save(tmp_path / name, _configs()[name])
        loaded = _load(tmp_path / name)
        loaded.save_pretrained(tmp_path / "again" / name)
        _check_equal(loaded, tmp_path / "again" / name, torch.float32)
        # Under the names that the files had, not only under those of the model.
        original = load_file(tmp_path / name / "model.safetensors")
        assert original.keys() == load_file(tmp_path / "again" / name / "model.safetensors").keys()


def _edit(path: Path, change: Any) -> None:
    """Rewrites model.safetensors after `change` has worked on its dictionary."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_keys_without_the_base_models_prefix_load(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama-tied"])
    expected = load_file(tmp_path / "model.safetensors")

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    _edit(tmp_path, strip)
    _check_equal(loaded := _load(tmp_path), tmp_path, torch.float32)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], expected["model.norm.weight"])


def test_a_tied_weight_stored_under_its_other_name_loads(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama-tied"])
    expected = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    loaded = _load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.model.embed_tokens.weight, expected)


def test_a_tied_weight_stored_twice_is_tied_if_equal_and_not_otherwise(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama-tied"])
    _edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    loaded = _load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    _edit(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        loaded = _load(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    _check_equal(loaded, tmp_path, torch.float32)


def test_unexpected_keys_warn_and_are_not_used(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"])
    _edit(tmp_path, lambda tensors: tensors.update({"model.adapter.weight": torch.ones(3)}))
    with pytest.warns(UserWarning, match=r"model\.adapter\.weight"):
        loaded = _load(tmp_path)
    _check_equal(loaded, tmp_path, torch.float32)


def test_a_missing_key_is_named_before_planes_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, _configs()["llama"])
    _edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    monkeypatch.setattr(slidecore, "offload", lambda *_, **__: pytest.fail("offloaded"))
    with pytest.raises(InputError, match=r"without weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(tmp_path)


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"])
    _edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}))
    with pytest.raises(InputError, match=re.escape("model.norm.weight (file [23], model [24])")):
        _load(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"])
    _edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}))
    with pytest.raises(InputError, match=r"floats: model\.norm\.weight"):
        _load(tmp_path)


def test_a_conversion_that_fails_falls_back_to_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, _configs()["mixtral"])
    from slidecore import loading

    def refuse(filling: Any, *_: Any) -> Any:
        if filling.converter is not None:
            raise loading._ConversionUnsupportedError("experts")
        return original(filling, *_)

    original = loading._convert
    monkeypatch.setattr(loading, "_convert", refuse)
    with pytest.warns(UserWarning, match="into host memory first"):
        loaded = _load(tmp_path)
    _check_equal(loaded, tmp_path, torch.float32)


def test_the_generation_config_is_kept(tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 17}))
    assert _load(tmp_path).generation_config.max_new_tokens == 17


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _replace_by_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _index_of_nothing(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))


def _broken_index(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("{")


def _edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"no config\.json"),
        (lambda path: (path / "config.json").write_text("{"), r"cannot read .*config\.json"),
        (lambda path: _edit_config(path, model_type="no-such-model"), r"cannot read .*config\.json"),
        (lambda path: _edit_config(path, quantization_config={"quant_method": "fp8"}), "quantized"),
        (lambda path: _edit_config(path, hidden_size="wide"), r"cannot read .*config\.json: .*'hidden_size'"),
        (lambda path: _edit_config(path, num_attention_heads=0), r"cannot read .*config\.json"),
        (lambda path: _edit_config(path, model_type="vit"), "not a causal language model"),
        (lambda path: _edit_config(path, hidden_act="no-such"), "can build: KeyError: 'no-such'"),
        (lambda path: (path / "generation_config.json").write_text("{"), r"cannot read .*generation_config\.json"),
        (lambda path: (path / "model.safetensors").unlink(), r"neither model\.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), r"cannot read .*model\.safetensors"),
        (_truncate, r"cannot read .*model\.safetensors"),
        (_replace_by_pickle, "pickled"),
        (_index_of_nothing, r"not there: model-00001\.safetensors"),
        (_broken_index, r"cannot read .*index\.json"),
    ],
)
def test_a_damaged_directory_is_a_clear_error(damage: Any, message: str, tmp_path: Path) -> None:
    _save(tmp_path, _configs()["llama"])
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        _load(tmp_path)
    assert error.value.hint


def test_a_path_that_is_no_directory_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a model directory"):
        Checkpoint(tmp_path / "absent")


def test_loading_holds_little_beyond_the_planes(tmp_path: Path) -> None:
    sizes = {**_LLAMA_SIZES, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**{**sizes, "intermediate_size": 2048, "num_hidden_layers": 12})
    _save(tmp_path / "model", config, torch.bfloat16)
    _load_small(tmp_path)  # what is imported and started on the way is no part of what loading holds
    before = _anonymous_bytes()
    model = load_pretrained(tmp_path / "model", compute_dtype=torch.float32, device="cpu")
    state = slidecore.stats(model)
    grown = _anonymous_bytes() - before
    checkpoint = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert grown < state.host_memory + state.device_memory + checkpoint // 4


def _load_small(tmp_path: Path) -> None:
    _save(tmp_path / "small", _configs()["llama"])
    _load(tmp_path / "small")


def _anonymous_bytes() -> int:
    """What the process holds now, without mapped files."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match
    return int(match[1]) * 1024
