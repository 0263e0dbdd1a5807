"""Parameters that are changed in place while the model is offloaded, against plain PyTorch doing the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import slidecore
import torch
from _models import (
    Stack,
    clone,
    distance,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from torch import nn

BF16 = torch.bfloat16
Edit = Callable[[nn.Module], object]
Offload = Callable[..., nn.Module]


@torch.no_grad()
def _clamp(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.2, 0.2)


@torch.no_grad()
def _row(model: nn.Module) -> None:
    model.enter.weight[0].zero_()


EDITS: dict[str, Edit] = {
    "init": lambda m: (nn.init.zeros_(m.enter.weight), nn.init.constant_(m.leave.weight, 0.01)),
    "clamp": _clamp,
    "row": _row,
    "detached": lambda m: m.blocks[2].up.weight.detach().mul_(0.5),
}


@pytest.mark.parametrize("update", ["overlap", "deferred"])
@pytest.mark.parametrize("kind", EDITS)
def test_training_goes_on_from_the_edit(offload: Offload, kind: str, update: str) -> None:
    """Before the first step, and between steps, with frozen parameters among those that are changed."""
    plain = Stack().train()
    plain.blocks[1].requires_grad_(False)
    model, batches = offload(clone(plain)), feature_batches(6)
    ours = slidecore.AdamW(model.parameters(), lr=1e-2, update=update)
    theirs = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        EDITS[kind](plain)
        EDITS[kind](model)
        expected = train_plain(plain, [batch], optimizer=lambda _: theirs)
        assert train_offloaded(model, [batch], optimizer=lambda _: ours) == pytest.approx(expected, abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-4


def test_prefetched_and_resident_weights_are_not_stale(offload: Offload) -> None:
    model, batch = offload(Stack().train()), feature_batches(1)[0]
    train_offloaded(model, [batch])
    nn.init.zeros_(model.enter.weight)
    nn.init.zeros_(model.enter.bias)
    with torch.no_grad():
        assert torch.equal(model(batch["x"]), model(batch["x"] * 5))
    nn.init.ones_(model.enter.bias)
    with torch.no_grad():
        assert torch.equal(model.enter(batch["x"]), torch.ones(5, 11, 13))  # a part, called by itself


@pytest.mark.parametrize("look", ["master", "state", "checkpoint"])
def test_the_weight_becomes_the_master_in_bf16(offload: Offload, look: str, tmp_path: Path) -> None:
    """Of a product with zero, the residual was a denormal or NaN."""
    model = offload(Stack().train(), compute_dtype=BF16)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    batches = [{k: v.to(BF16) for k, v in batch.items()} for batch in feature_batches(3)]
    train_offloaded(model, batches, optimizer=lambda _: optimizer)
    before = slidecore.master_parameter(model, "enter.weight")
    assert not torch.equal(before, before.to(BF16).float())  # it has a residual
    with torch.no_grad():
        model.leave.weight.mul_(0)
    if look == "state":
        names = [name for name, _ in model.named_parameters()]
        assert not optimizer.state_dict()["state"][names.index("leave.weight")]["residual"].any()
    elif look == "checkpoint":
        slidecore.save_checkpoint(model, optimizer, tmp_path / "saved")
        model = offload(Stack(seed=3).train(), compute_dtype=BF16)
        optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
        slidecore.load_checkpoint(model, optimizer, tmp_path / "saved")
    assert not slidecore.master_parameter(model, "leave.weight").any()
    assert torch.equal(slidecore.master_parameter(model, "enter.weight"), before)  # of the others nothing changed
    losses = train_offloaded(model, batches, optimizer=lambda _: optimizer)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert torch.isfinite(slidecore.master_parameter(model, "leave.weight")).all()


def test_edit_of_tied_weights(offload: Offload) -> None:
    plain = language_model("llama", tied=True).train()
    model = offload(clone(plain))
    for m in (plain, model):
        with torch.no_grad():
            m.get_input_embeddings().weight[:7].zero_()
    batches = token_batches(3)
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-4


@pytest.mark.parametrize("update", ["overlap", "deferred"])
def test_edit_between_forward_and_backward_is_refused(offload: Offload, update: str) -> None:
    """As in PyTorch, whose graph would differentiate with other weights than the forward's."""
    model, batch = offload(Stack().train()), feature_batches(1)[0]
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3, update=update)
    loss = loss_of(model, batch)
    nn.init.zeros_(model.blocks[0].up.weight)
    with pytest.raises(slidecore.UsageError, match="updated after this forward"):
        loss.backward()
    train_offloaded(model, [batch], optimizer=lambda _: optimizer)


def test_edit_between_backward_and_step(offload: Offload) -> None:
    """Deferred updates start from it, as in PyTorch; overlapping ones are at work already."""
    plain = Stack().train()
    batch = feature_batches(1)[0]
    for update in ("deferred", "overlap"):
        reference, model = clone(plain), offload(clone(plain))
        ours, theirs = slidecore.AdamW(model.parameters(), update=update), torch.optim.AdamW(reference.parameters())
        for m, optimizer in ((reference, theirs), (model, ours)):
            loss_of(m, batch).backward()
            nn.init.constant_(m.leave.weight, 0.5)
            if update == "overlap" and m is model:
                with pytest.raises(slidecore.UsageError, match=r"leave\.weight was changed in place between"):
                    optimizer.step()
            else:
                optimizer.step()
        slidecore.synchronize(model)
        if update == "deferred":
            assert worst(distance(weights(model), weights(reference), least_dim=1))[0] < 1e-6


def test_edit_beside_overlapping_updates_is_told_whatever_came_between(offload: Offload) -> None:
    model, batch = offload(Stack().train()), feature_batches(1)[0]
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    loss_of(model, batch).backward()
    nn.init.constant_(model.leave.weight, 0.5)
    with torch.no_grad():
        model(batch["x"])
    with pytest.raises(slidecore.UsageError, match=r"leave\.weight was changed in place between"):
        optimizer.step()
    train_offloaded(model, [batch], optimizer=lambda _: optimizer)


@pytest.mark.parametrize("train", [True, False])
def test_models_that_were_made_in_inference_mode(offload: Offload, train: bool) -> None:
    batch = feature_batches(1)[0]
    with torch.inference_mode():
        model = Stack().train(train)
        expected = model(batch["x"])
    offload(model, train=train)
    with torch.no_grad():
        assert torch.equal(model(batch["x"]), expected)


def test_what_is_loaded_after_an_edit_stays(offload: Offload) -> None:
    """The residuals of an optimizer's state, and of an assigned master, are not taken for those of before the edit."""
    model = offload(Stack().train(), compute_dtype=BF16)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    train_offloaded(
        model, [{k: v.to(BF16) for k, v in b.items()} for b in feature_batches(2)], optimizer=lambda _: optimizer
    )
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    state["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()}
    masters = {name: slidecore.master_parameter(model, name) for name, _ in model.named_parameters()}
    nn.init.zeros_(model.enter.weight)
    model.load_state_dict(saved)
    optimizer.load_state_dict(state)
    nn.init.zeros_(model.leave.weight)
    slidecore.assign_parameter(model, "leave.weight", masters["leave.weight"])
    with torch.no_grad():
        model(feature_batches(1)[0]["x"].to(BF16))
    for name, master in masters.items():
        assert torch.equal(slidecore.master_parameter(model, name), master), name


def test_edits_beside_weights_on_disk(offload: Offload, tmp_path: Path) -> None:
    """Some weights cannot be edited, as they are not in memory; others can, whose residual is not."""
    plain = Stack(width=256, inner=512, depth=4).train()
    everything = slidecore.stats(offload(clone(plain), compute_dtype=BF16)).host_memory
    model = offload(
        clone(plain), compute_dtype=BF16, disk=[tmp_path], host_memory=int(everything * 0.12), piece_bytes=4096
    )
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    batches = [{k: v.to(BF16) for k, v in batch.items()} for batch in feature_batches(2)]
    train_offloaded(model, batches, optimizer=lambda _: optimizer)
    edited = []
    for name, parameter in model.named_parameters():
        try:
            nn.init.zeros_(parameter)
        except slidecore.UsageError:
            continue
        edited.append(name)
    assert 0 < len(edited) < len(list(model.parameters()))
    train_offloaded(model, batches, optimizer=lambda _: optimizer)
    for name in edited:
        assert slidecore.master_parameter(model, name).abs().max() <= 3e-3, name
    slidecore.close(model)
