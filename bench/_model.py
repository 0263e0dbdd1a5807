"""The model and the data that all systems of one comparison share.

The model is built without storage; every parameter's initial value comes from a generator seeded by the parameter's
name, so each system can make them one at a time, in any order, and all start from the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like model. Sizes in elements; `sequence` in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    sequence: int

    def flops_per_step(self, batch: int) -> float:
        """Floating-point operations of one step's forward and backward, recomputation not counted.

        Six per weight of a matrix product and token; attention scores and values of a causal mask: half of the square.
        """
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        weights = self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary
        tokens = batch * self.sequence
        return 6.0 * weights * tokens + 6.0 * self.layers * tokens * self.sequence * self.hidden


def build_empty(shape: Shape) -> nn.Module:
    """The transformers model with its parameters on the meta device and its buffers in memory."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(shape.sequence, 2048),
        use_cache=False,
    )
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.tie_weights()
    model.train()
    return model  # type: ignore[no-any-return]


def use_kernels(model: nn.Module, kernels: str, device: torch.device) -> None:
    """Gives a peer's layers the kernels that slidecore's get: "liger", "torch", or "auto" (Liger if installed)."""
    from slidecore.integrations import liger

    liger.apply(model, kernels, on_card=device.type == "cuda")  # type: ignore[arg-type]


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def initial_value(name: str, size: torch.Size, seed: int, device: torch.device) -> torch.Tensor:
    """The float32 starting value of a parameter: ones for norms, else normal with a deviation of 0.02."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.float32, device=device)
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(size, dtype=torch.float32, device=device).normal_(0.0, 0.02, generator=generator)


def initial_values(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's name and starting value, made when asked for."""
    for name, parameter in list(model.named_parameters()):
        yield name, initial_value(name, parameter.size(), seed, device)


def fill(model: nn.Module, seed: int, device: torch.device) -> None:
    """Sets the starting values of an offloaded model, chunk by chunk: what lies on disk is written once."""
    import slidecore
    from slidecore.offloading import engine_of

    engine = engine_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for chunk in engine.chunks:
        with engine.planes.borrowed_masters(chunk, fresh=True):
            for entry in chunk.entries:
                name = names[id(entry.parameter)]
                slidecore.assign_parameter(model, name, initial_value(name, entry.shape, seed, device))


def tokens(shape: Shape, batch: int, seed: int, device: torch.device) -> torch.Tensor:
    """The token ids of a batch: the same for every system, and the same in every step, so that the loss must fall."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(zlib.crc32(f"{seed}/tokens/{batch}".encode()))
    ids = torch.randint(0, shape.vocabulary, (batch, shape.sequence), generator=generator)
    return ids.to(device)


def shifted_labels(ids: torch.Tensor) -> torch.Tensor:
    """Next-token labels of the same size; -100 where there is no next token."""
    return nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def finite(values: list[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def describe(shape: Shape) -> dict[str, Any]:
    return dataclasses.asdict(shape)
