"""Tiny models, and ordinary training of them with plain PyTorch: the reference that offloaded training is held to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import slidecore
import torch
import torch.nn.functional as F
from slidecore.offloading import engine_of
from torch import nn

VOCABULARY = 101
LANGUAGE_MODELS = ("llama", "qwen3", "gpt2", "gemma2", "gemma3")
Batch = dict[str, torch.Tensor]


def language_model(kind: str, *, tied: bool = False, seed: int = 0, layers: int = 4, **options: Any) -> nn.Module:
    """A random causal language model of transformers, four blocks of width 48."""
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": options.pop("vocab_size", VOCABULARY), "tie_word_embeddings": tied, "pad_token_id": 0}
    # Not the defaults of a large vocabulary, about which transformers would warn.
    common |= {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        drop = options.pop("dropout", 0.0)
        config = transformers.GPT2Config(
            n_embd=48, n_layer=layers, n_head=4, n_positions=64, attn_pdrop=drop, embd_pdrop=drop, resid_pdrop=drop,
            **common, **options,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    shape = {
        "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    names = {
        "llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3", "granite": "Granite",
        "cohere": "Cohere",
    }  # fmt: skip
    if kind in ("qwen3", "gemma2", "gemma3"):
        shape["head_dim"] = 12
    text = "Text" if kind == "gemma3" else ""
    config = getattr(transformers, f"{names[kind]}{text}Config")(**shape, **common, **options)
    return getattr(transformers, f"{names[kind]}ForCausalLM")(config)


def token_batches(count: int, *, batch: int = 3, length: int = 17, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
        batches.append({"input_ids": ids, "labels": ids.clone()})
    return batches


class Residual(nn.Module):
    """Normalization, two matrices and a skip connection; sizes as odd as they come."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """A run of blocks between two edges, and no language model: takes features, returns features."""

    def __init__(
        self,
        *,
        width: int = 13,
        inner: int = 29,
        depth: int = 5,
        features: int = 7,
        outputs: int = 3,
        seed: int = 0,
        block: Callable[[], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(block() if block else Residual(width, inner, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h)
        return self.leave(self.norm(h))


def feature_batches(
    count: int, *, shape: Sequence[int] = (5, 11), features: int = 7, outputs: int = 3, seed: int = 1
) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(*shape, features, generator=generator),
            "target": torch.randn(*shape, outputs, generator=generator),
        }
        for _ in range(count)
    ]


def freeze_half(model: nn.Module) -> None:
    """Every second parameter."""
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of either kind of model: a mean over the batch."""
    if "input_ids" in batch:
        return model(**batch, use_cache=False).loss
    return F.mse_loss(model(batch["x"]), batch["target"])


def samples(batch: Batch, chosen: Sequence[int]) -> Batch:
    return {name: tensor[list(chosen)] for name, tensor in batch.items()}


def train_plain(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    order: Sequence[Sequence[int]] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> list[float]:
    """Ordinary training, in place. `order` sums the gradient over these groups of samples, one after the other."""
    chosen = optimizer(model) if optimizer else torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    rates = torch.optim.lr_scheduler.LambdaLR(chosen, schedule) if schedule else None
    losses = []
    for batch in batches:
        if order is None:
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())
        else:
            count = sum(len(group) for group in order)
            total = 0.0
            for group in order:
                part = loss_of(model, samples(batch, group)) * (len(group) / count)
                part.backward()
                total += part.item()
            losses.append(total)
        chosen.step()
        chosen.zero_grad()
        if rates:
            rates.step()
    return losses


def train_offloaded(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> list[float]:
    """The same loop over an offloaded model."""
    chosen = optimizer(model) if optimizer else slidecore.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    rates = torch.optim.lr_scheduler.LambdaLR(chosen, schedule) if schedule else None
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        chosen.step()
        chosen.zero_grad()
        if rates:
            rates.step()
    slidecore.synchronize(model)
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], least_dim: int = 2) -> dict[str, float]:
    """Relative distance of each weight matrix (parameters of at least `least_dim` dimensions)."""
    assert a.keys() == b.keys()
    return {
        name: ((a[name].double() - b[name].double()).norm() / b[name].double().norm().clamp_min(1e-30)).item()
        for name in a
        if a[name].dim() >= least_dim
    }


def worst(distances: dict[str, float]) -> tuple[float, str]:
    return max((value, name) for name, value in distances.items())


def spread(runs: Sequence[dict[str, torch.Tensor]]) -> float:
    """The largest relative distance of a weight matrix between any two runs."""
    return max(worst(distance(a, b))[0] for a, b in itertools.combinations(runs, 2))


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def consumed_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of an offloaded model's last step, of an optimizer with betas=(0.0, ...): the first moment then
    is the gradient."""
    slidecore.synchronize(model)
    engine = engine_of(model)
    return {
        entry.name: engine.planes.moments["exp_avg"].view(chunk, entry).clone()
        for chunk, entry in engine.entries.values()
        if entry.trainable
    }
