"""Parameters that are kept on the device, and their optimizers, go on as the offloaded ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import Batch, Stack, language_model, loss_of, token_batches
from _runs import batches_for, seed_all
from slidecore.errors import CheckpointError
from torch import nn

Offload = Callable[..., nn.Module]
KEEP = ["norm", "blocks.1.up.bias"]


def kept_of(model: nn.Module) -> list[nn.Parameter]:
    return [*model.norm.parameters(), model.blocks[1].up.bias]  # type: ignore[union-attr, operator, index, list-item]


def step(model: nn.Module, batch: Batch, *optimizers: torch.optim.Optimizer) -> None:
    loss_of(model, batch).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    slidecore.synchronize(model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_kept_parameters_alone(offload: Offload, tmp_path: Path) -> None:
    """All that is offloaded is frozen: an optimizer of torch.optim trains the rest."""

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Stack(seed=seed, dropout=0.2).train()
        kept = {id(p) for p in kept_of(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        offload(model, keep=KEEP)
        return model, torch.optim.AdamW(kept_of(model), lr=1e-2)

    model, optimizer = build(0)
    batches = batches_for(model, 6)
    seed_all(1)
    for batch in batches[:3]:
        step(model, batch, optimizer)
    slidecore.save_checkpoint(model, optimizer, tmp_path / "c", extra=3)
    for batch in batches[3:]:
        step(model, batch, optimizer)

    resumed, again = build(1)
    seed_all(2)
    assert slidecore.load_checkpoint(resumed, again, tmp_path / "c") == 3
    for batch in batches[3:]:
        step(resumed, batch, again)
    assert_equal(values(resumed), values(model))

    for other, message in (
        (torch.optim.SGD(kept_of(resumed), lr=0.1), "state of a torch.optim.AdamW, the optimizer is a torch.optim.SGD"),
        (torch.optim.AdamW(kept_of(resumed)[:2]), "parameter group 0 is another one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            slidecore.load_checkpoint(resumed, other, tmp_path / "c")
    with pytest.raises(slidecore.UsageError, match="is a str"):
        slidecore.save_checkpoint(model, "adamw", tmp_path / "d")  # type: ignore[arg-type]


def test_kept_parameters_beside_offloaded_ones(offload: Offload, tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
        model = Stack(seed=seed).train()
        offload(model, keep=KEEP)
        kept = {id(p) for p in kept_of(model)}
        offloaded = [p for p in model.parameters() if id(p) not in kept]
        return model, slidecore.AdamW(offloaded, lr=1e-2), torch.optim.Adam(kept_of(model), lr=1e-2)

    model, mine, other = build(0)
    batches = batches_for(model, 5)
    for batch in batches[:2]:
        step(model, batch, mine, other)
    slidecore.save_checkpoint(model, mine, tmp_path / "c", extra={"kept": other.state_dict()})
    for batch in batches[2:]:
        step(model, batch, mine, other)

    resumed, again, another = build(1)
    another.load_state_dict(slidecore.load_checkpoint(resumed, again, tmp_path / "c")["kept"])
    for batch in batches[2:]:
        step(resumed, batch, again, another)
    assert_equal(values(resumed), values(model))
    with pytest.raises(slidecore.UsageError, match=r"not the slidecore\.AdamW of this model"):
        slidecore.save_checkpoint(model, other, tmp_path / "d")

    loss_of(model, batches[0]).backward()
    mine.step()
    with pytest.raises(slidecore.UsageError, match="which is kept on the device, has a gradient"):
        slidecore.save_checkpoint(model, mine, tmp_path / "d")
    other.step()
    other.zero_grad(set_to_none=False)
    slidecore.save_checkpoint(model, mine, tmp_path / "d")
    whole = offload(Stack())
    with pytest.raises(CheckpointError, match="another model; it has no parameter"):
        slidecore.load_checkpoint(whole, slidecore.AdamW(whole.parameters()), tmp_path / "c")


@pytest.mark.parametrize("inside", [False, True], ids=["wrapped", "added"])
def test_adapters_of_peft(inside: bool, offload: Offload, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'slidecore[test]'")

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model: Any = language_model("llama", seed=seed)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.2)
        if inside:
            try:
                model.add_adapter(config)
            except ValueError as error:
                if "version of PEFT" not in str(error):
                    raise
                pytest.skip(f"this transformers does not take this PEFT: {error}")
        else:
            model = peft.get_peft_model(model, config)
        offload(model.train(), compute_dtype=torch.bfloat16)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = build(0)
    batches = token_batches(5)
    seed_all(1)
    for batch in batches[:2]:
        step(model, batch, optimizer)
    slidecore.save_checkpoint(model, optimizer, tmp_path / "c")
    for batch in batches[2:]:
        step(model, batch, optimizer)
    resumed, again = build(1)
    slidecore.load_checkpoint(resumed, again, tmp_path / "c")
    for batch in batches[2:]:
        step(resumed, batch, again)
    assert_equal(values(resumed), values(model))
