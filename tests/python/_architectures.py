"""Tiny models of other kinds than dense causal language models, with batches for them, and runs of plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import slidecore
import torch
from _models import VOCABULARY, Batch, distance, weights, worst
from torch import nn

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "intermediate_size": 24, **TOKENS,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# Every second block is dense: blocks of one class with different parameters.
QWEN3_MOE = {
    **DECODER, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 2,
}  # fmt: skip
# Blocks of two classes in turn, and one in two with experts.
JAMBA = {
    **DECODER, "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 3,
}  # fmt: skip
HYBRID = {**DECODER, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Later blocks take keys and values from earlier ones, through a mapping that all are given.
GEMMA4 = {
    **HYBRID, "global_head_dim": 16, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "d_model": 32, "dropout": 0.0, "decoder_start_token_id": 0, "forced_eos_token_id": None, **TOKENS,
    "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A class of transformers with its configuration, and what it is trained on."""

    model: str
    config: str
    options: dict[str, Any]
    task: str = "language"

    def build(self, seed: int = 0, **options: Any) -> nn.Module:
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        return getattr(transformers, self.model)(config).train()


KINDS = {
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", {**DECODER, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE),
    "jamba": Kind("JambaForCausalLM", "JambaConfig", JAMBA),
    "gemma3": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", HYBRID),
    "gemma4": Kind("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4),
    "t5": Kind("T5ForConditionalGeneration", "T5Config", T5, "sequences"),
    "bart": Kind("BartForConditionalGeneration", "BartConfig", BART, "sequences"),
    "vit": Kind("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}, "images"),
    "siglip": Kind(
        "SiglipForImageClassification", "SiglipConfig", {"vision_config": VISION, "num_labels": 5}, "images"
    ),
}


def batches_for(task: str, count: int, *, batch: int = 4, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

    made = []
    for _ in range(count):
        if task == "images":
            pixels = torch.randn(batch, 3, 12, 12, generator=generator)
            made.append({"pixel_values": pixels, "labels": torch.randint(0, 5, (batch,), generator=generator)})
            continue
        ids = tokens(9)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = tokens(7) if task == "sequences" else ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


Loss = Callable[[nn.Module, Batch], torch.Tensor]


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], loss_of: Loss = own_loss
) -> list[float]:
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class Reference:
    """The same steps in plain PyTorch, in float32 and, as the truth, in float64."""

    single: dict[str, torch.Tensor]
    losses: list[float]
    double: dict[str, torch.Tensor]

    @staticmethod
    def of(
        plain: nn.Module, batches: Sequence[Batch], make_loss: Callable[[], Loss] = lambda: own_loss, **options: Any
    ) -> Reference:
        import copy

        exact = copy.deepcopy(plain).double()
        if hasattr(exact, "set_experts_implementation"):
            exact.set_experts_implementation("eager")  # the grouped kernel knows no float64
        losses = train(plain, torch.optim.AdamW(plain.parameters(), **options), batches, make_loss())
        doubles = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
        train(exact, torch.optim.AdamW(exact.parameters(), **options), doubles, make_loss())
        return Reference(weights(plain), losses, weights(exact))

    def check(self, model: nn.Module, losses: Sequence[float], *, same_order: bool) -> None:
        """`same_order`: sums were made in the order of plain PyTorch; otherwise errors about as large as its own, seen
        from the truth, are right."""
        slidecore.synchronize(model)
        assert list(losses) == pytest.approx(self.losses, abs=1e-4)
        assert len(set(losses)) > 1
        mine, error = weights(model), worst(distance(self.single, self.double))[0]
        if same_order:
            value, name = worst(distance(mine, self.single))
            assert value < max(1e-5, error), name
            return
        value, name = worst(distance(mine, self.double))
        assert value <= 4 * error + 1e-6, name


@functools.cache
def reference(kind: str, steps: int) -> Reference:
    task = KINDS[kind].task
    return Reference.of(KINDS[kind].build(), batches_for(task, steps), lr=1e-3, weight_decay=0.1)
