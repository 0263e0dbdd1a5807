"""Adapters of PEFT on a frozen, offloaded model, against PEFT on plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _architectures import KINDS, batches_for
from _models import Batch, distance, language_model, token_batches, weights, worst
from slidecore.head import DeferredLogits
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'slidecore[test]'")
Offload = Callable[..., nn.Module]


def adapted(model: nn.Module | None = None, seed: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    chosen = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **chosen)
    return peft.get_peft_model(model or language_model("llama"), config).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, batches: list[Batch], lr: float = 3e-3) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model), lr=lr, eps=1e-5)  # damps rounding in gradients near zero
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)  # of dropout
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_trains_like_peft(offload: Offload, plain: nn.Module, batches: list[Batch], **options: Any) -> nn.Module:
    model = offload(copy.deepcopy(plain), **options)
    before = weights(model)
    mine, theirs = train(model, batches), train(plain, batches)
    assert mine == pytest.approx(theirs, abs=1e-5)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    return model


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"micro_batch": 1}, {"keep_graphs": 2}, {"device_memory": "1GiB"}], ids=str
)
@pytest.mark.parametrize(
    "lora",
    [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"target_modules": "all-linear", "bias": "all"}],
    ids=str,
)
def test_adapters_train_like_peft(offload: Offload, lora: dict[str, Any], options: dict[str, Any]) -> None:
    steps = 6 if lora else 20
    assert_trains_like_peft(offload, adapted(**lora), token_batches(steps, batch=4), **options)


def test_adapters_with_dropout(offload: Offload) -> None:
    assert_trains_like_peft(offload, adapted(lora_dropout=0.3), token_batches(5))


def test_adapters_on_embedding_and_head(offload: Offload) -> None:
    """Where a gradient would be made in forward (the fused loss), the head makes its logits instead."""
    plain = adapted(target_modules=["embed_tokens", "lm_head", "o_proj"])
    assert_trains_like_peft(offload, plain, token_batches(5), micro_batch=2)


def test_adapters_on_an_encoder_decoder(offload: Offload) -> None:
    plain = adapted(KINDS["t5"].build(), target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    assert_trains_like_peft(offload, plain, batches_for("sequences", 5))


def test_the_head_makes_no_logits_for_the_loss(offload: Offload) -> None:
    model = offload(adapted())
    output = model(**token_batches(1)[0])
    assert isinstance(output.logits, DeferredLogits)


def test_adapters_in_float32_on_a_bfloat16_model(offload: Offload) -> None:
    plain = adapted(language_model("llama").to(torch.bfloat16))
    assert {p.dtype for p in trained(plain)} == {torch.float32}
    model = offload(copy.deepcopy(plain), compute_dtype=torch.bfloat16)
    batches = token_batches(5)
    assert train(model, batches) == pytest.approx(train(plain, batches), abs=0.02)
    for mine, theirs in zip(trained(model), trained(plain), strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, theirs, atol=2e-3)


def test_saving_and_loading_adapters(offload: Offload, tmp_path: Path) -> None:
    model = offload(adapted())
    train(model, token_batches(3))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(language_model("llama"), tmp_path)
    batch = {"input_ids": token_batches(1)[0]["input_ids"]}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    offload(again)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    slidecore.close(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_several_adapters(offload: Offload) -> None:
    """Chosen, switched off and trained in turn; those that are not chosen are kept, too."""
    plain = adapted()
    plain.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model = offload(copy.deepcopy(plain))
    batch = token_batches(1)[0]
    for name in ("second", "default", "second"):
        for m in (model, plain):
            m.set_adapter(name)
        assert train(model, token_batches(3)) == pytest.approx(train(plain, token_batches(3)), abs=1e-5)
        with torch.no_grad():
            for m in (model, plain):
                m.eval()
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
            with model.disable_adapter(), plain.disable_adapter():
                torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
        for m in (model, plain):
            m.train()
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


@pytest.mark.parametrize("train_first", [False, True])
def test_generation_with_adapters(offload: Offload, train_first: bool) -> None:
    plain = adapted()
    model = offload(copy.deepcopy(plain), train=train_first)
    if train_first:
        train(model, token_batches(2)), train(plain, token_batches(2))
    prompt = torch.randint(3, 101, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for m in (model, plain):
        m.eval()
    expected = plain.generate(input_ids=prompt, **options)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    before = slidecore.stats(model).counters
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    after = slidecore.stats(model).counters
    assert after["hits"] - before["hits"] == after["visits"] - before["visits"] > 8 * 4


def test_adapters_trained_by_slidecore(offload: Offload) -> None:
    """keep=[] offloads adapters as any other parameter."""
    plain = adapted()
    model = offload(copy.deepcopy(plain), keep=[])
    optimizer = slidecore.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    for batch in token_batches(3):
        model(**batch).loss.backward()
        optimizer.step()
    train(plain, token_batches(3))
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_adapters_added_to_an_offloaded_model(offload: Offload) -> None:
    plain = language_model("llama").requires_grad_(False)
    base = offload(copy.deepcopy(plain))
    model, plain = adapted(base), adapted(plain)
    assert train(model, token_batches(4)) == pytest.approx(train(plain, token_batches(4)), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    slidecore.close(base)


def test_adapters_added_to_a_model_that_is_trained(offload: Offload) -> None:
    base = offload(language_model("llama"))
    with pytest.raises(slidecore.UsageError, match="requires_grad was changed to False after offload"):
        adapted(base)(**token_batches(1)[0])


def test_prompt_tuning(offload: Offload) -> None:
    plain = language_model("llama")
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_trains_like_peft(offload, peft.get_peft_model(plain, config), token_batches(5))


def test_prefix_tuning_is_refused(offload: Offload) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = offload(peft.get_peft_model(language_model("llama"), config))
    with pytest.raises(slidecore.UsageError, match="key-value cache"):
        model(**token_batches(1)[0])
