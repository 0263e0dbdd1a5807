"""keep=: parameters that stay ordinary ones on the device, trained by an optimizer of torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import Residual, Stack, distance, feature_batches, language_model, loss_of, token_batches, weights, worst
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
OPTIONS = [{}, {"window": 3}, {"micro_batch": 2}, {"keep_graphs": 2}, {"device_memory": "1GiB"}]


class Adapted(Residual):
    """A block with an adapter that is held in two places, and a scale of its own."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.adapter = nn.Sequential(nn.Linear(13, 3, bias=False), nn.Linear(3, 13, bias=False))
        self.again = nn.ModuleDict({"down": self.adapter[0]})
        self.adapter_scale = nn.Parameter(torch.full((13,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x) + self.adapter_scale * self.adapter(x)
        return out + self.again["down"](x).mean(-1, keepdim=True)


def adapted() -> Stack:
    model = Stack(block=Adapted, depth=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)
    return model.train()


def named(*parts: str) -> Callable[[str, nn.Parameter], bool]:
    return lambda name, parameter: any(part in name for part in parts)


def train(model: nn.Module, batches: list[dict[str, torch.Tensor]], *optimizers: torch.optim.Optimizer) -> list[float]:
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapters_on_a_frozen_model(offload: Offload, options: dict[str, Any]) -> None:
    plain = adapted()
    model = offload(copy.deepcopy(plain), keep=named("adapter"), **options)
    batches = feature_batches(20)
    mine = train(model, batches, torch.optim.AdamW(trained(model), lr=3e-3, eps=1e-5))
    theirs = train(plain, batches, torch.optim.AdamW(trained(plain), lr=3e-3, eps=1e-5))
    assert mine == pytest.approx(theirs, abs=1e-5)
    assert mine[-1] != mine[0]
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    # Frozen parameters have a weight plane only, and adapters none.
    assert slidecore.stats(model).parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    inference = offload(adapted(), keep=named("adapter"), train=False)
    assert slidecore.stats(model).planes_bytes == slidecore.stats(inference).planes_bytes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_ordinary_ones(offload: Offload, options: dict[str, Any]) -> None:
    """Accumulated over backwards, clipped, asked for by autograd.grad, seen by hooks."""
    plain = adapted()
    model = offload(copy.deepcopy(plain), keep=named("adapter"), **options)
    first, second = feature_batches(2)
    seen: list[tuple[str, float]] = []
    for m in (model, plain):
        m.get_parameter("blocks.1.adapter.0.weight").register_hook(lambda g: seen.append(("tensor", g.sum().item())))
        (loss_of(m, first) * 3).backward()
        loss_of(m, second).backward()
    assert [name for name, _ in seen] == ["tensor"] * 4
    for name, parameter in plain.named_parameters():
        mine = model.get_parameter(name)
        assert (mine.grad is None) == (parameter.grad is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-4, atol=1e-7)
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1).item() for m in (model, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    before = [p.grad.clone() for p in trained(model)]
    asked = [torch.autograd.grad(loss_of(m, first), trained(m)) for m in (model, plain)]
    for mine, theirs in zip(*asked, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(p.grad, b) for p, b in zip(trained(model), before, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beside_a_model_that_is_trained_itself(offload: Offload, options: dict[str, Any]) -> None:
    """Two optimizers: one for what is offloaded, one for what is kept."""
    plain = Stack(depth=4).train()
    keep = named("norm", "leave", "blocks.2.up")
    model = offload(copy.deepcopy(plain), keep=keep, **options)
    settings = {"lr": 3e-3, "eps": 1e-5}
    kept = [p for n, p in model.named_parameters() if keep(n, p)]
    ours = [p for n, p in model.named_parameters() if not keep(n, p)]
    batches = feature_batches(10)
    optimizers = slidecore.AdamW(ours, **settings), torch.optim.AdamW(kept, **settings)
    mine = train(model, batches, *optimizers)
    assert mine == pytest.approx(train(plain, batches, torch.optim.AdamW(plain.parameters(), **settings)), abs=1e-5)
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_clipping_counts_both(offload: Offload) -> None:
    plain = Stack(depth=3).train()
    model = offload(copy.deepcopy(plain), keep=["leave", "blocks.1.up"])
    kept = [*model.leave.parameters(), *model.blocks[1].up.parameters()]
    ours = [p for p in model.parameters() if all(p is not k for k in kept)]
    optimizers = slidecore.AdamW(ours, lr=1e-2, update="deferred"), torch.optim.AdamW(kept, lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for batch in feature_batches(5):
        for m in (model, plain):
            (loss_of(m, batch) * 10).backward()
        mine = slidecore.clip_grad_norm_(model, 0.3)
        assert mine.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3).item(), rel=1e-5)
        for optimizer in (*optimizers, theirs):
            optimizer.step()
            optimizer.zero_grad()
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


@pytest.mark.parametrize("keep", [["lm_head"], ["model.layers.1", "model.norm.weight"], "modules"], ids=str)
def test_parts_of_a_language_model(offload: Offload, keep: Any) -> None:
    plain = language_model("llama").train().requires_grad_(False)
    model = copy.deepcopy(plain)
    chosen = [model.lm_head, model.model.layers[3].mlp.up_proj.weight] if keep == "modules" else keep
    offload(model, keep=chosen, window=2)
    names = ["lm_head", "model.layers.3.mlp.up_proj"] if keep == "modules" else keep
    for m in (model, plain):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(any(name.startswith(n) for n in names))
    batches = token_batches(5)
    mine = train(model, batches, torch.optim.AdamW(trained(model), lr=1e-2))
    assert mine == pytest.approx(train(plain, batches, torch.optim.AdamW(trained(plain), lr=1e-2)), abs=1e-4)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    assert any(p.numel() for p in trained(model))


def test_a_tied_parameter_is_kept_in_all_its_places(offload: Offload) -> None:
    plain = language_model("llama", tied=True).train().requires_grad_(False)
    model = offload(copy.deepcopy(plain), keep=["lm_head.weight"])
    for m in (model, plain):
        m.lm_head.weight.requires_grad_()
    batches = token_batches(4)
    mine = train(model, batches, torch.optim.AdamW([model.lm_head.weight], lr=1e-2))
    assert mine == pytest.approx(train(plain, batches, torch.optim.AdamW([plain.lm_head.weight], lr=1e-2)), abs=1e-4)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_what_blocks_share_can_be_kept(offload: Offload) -> None:
    plain = Stack(depth=4)
    plain.blocks[3].up = plain.blocks[1].up
    with pytest.raises(
        slidecore.ModelError, match=r"shared between .* keep the parameter .*keep=\['blocks.1.up.weight'\]"
    ):
        slidecore.offload(copy.deepcopy(plain), device="cpu")
    model = offload(copy.deepcopy(plain), keep=["blocks.1.up"])
    kept, others = list(model.blocks[1].up.parameters()), [p for n, p in model.named_parameters() if "1.up" not in n]
    batches = feature_batches(6)
    mine = train(model, batches, slidecore.AdamW(others, lr=3e-3), torch.optim.AdamW(kept, lr=3e-3))
    assert mine == pytest.approx(train(plain, batches, torch.optim.AdamW(plain.parameters(), lr=3e-3)), abs=1e-5)
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_added_after_offload(offload: Offload) -> None:
    plain = Stack().requires_grad_(False)
    model = offload(copy.deepcopy(plain))
    for m in (model, plain):
        torch.manual_seed(7)
        m.blocks[0].up = nn.Sequential(m.blocks[0].up, nn.Linear(29, 29))
        m.blocks[0].norm.shift = nn.Parameter(torch.zeros(3))  # not used
    batches = feature_batches(3)
    mine = train(model, batches, torch.optim.AdamW(trained(model), lr=1e-2))
    assert mine == pytest.approx(train(plain, batches, torch.optim.AdamW(trained(plain), lr=1e-2)), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5


def test_requires_grad_may_change(offload: Offload) -> None:
    plain = adapted()
    model = offload(copy.deepcopy(plain), keep=named("adapter"))
    for wanted in (False, True, False):
        for m in (model, plain):
            m.zero_grad()
            m.blocks[1].adapter.requires_grad_(wanted)
            loss_of(m, feature_batches(1)[0]).backward()
        for name, parameter in plain.named_parameters():
            mine = model.get_parameter(name)
            assert (mine.grad is None) == (parameter.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_changed_between_forward_and_backward(offload: Offload) -> None:
    model = offload(adapted(), keep=named("adapter"))
    loss = loss_of(model, feature_batches(1)[0])
    with torch.no_grad():
        model.blocks[2].adapter_scale.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place after"):
        loss.backward()


@pytest.mark.parametrize(("train", "times"), [(True, 4), (False, 1)])
def test_kept_parameters_count_as_device_memory(offload: Offload, train: bool, times: int) -> None:
    """When they are trained, with their gradients and two moments."""
    kept = sum(p.numel() * 4 for p in trained(adapted()))
    options = {"keep": named("adapter"), "train": train}
    with pytest.raises(slidecore.BudgetError, match=r"kept parameters .* \d.* at least") as error:
        slidecore.offload(adapted(), device="cpu", device_memory=1, **options)
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    with pytest.raises(slidecore.BudgetError):
        slidecore.offload(adapted(), device="cpu", device_memory=smallest - 1, **options)
    model = offload(adapted(), device_memory=smallest, **options)
    assert engine_of(model).needs.kept == times * kept
    slots = slidecore.stats(model).device_memory - kept
    assert slots + times * kept <= smallest


def test_states_hold_both(offload: Offload) -> None:
    model = offload(adapted(), keep=named("adapter"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(state) == {n for n, _ in adapted().state_dict().items()}
    train(model, feature_batches(2), torch.optim.AdamW(trained(model), lr=1e-2))
    with torch.no_grad():
        moved = model(feature_batches(1)[0]["x"])
        model.load_state_dict(state)
        assert not torch.equal(model(feature_batches(1)[0]["x"]), moved)
        assert torch.allclose(model(feature_batches(1)[0]["x"]), adapted()(feature_batches(1)[0]["x"]), atol=1e-6)
    slidecore.close(model)
    assert torch.allclose(model(feature_batches(1)[0]["x"]), adapted()(feature_batches(1)[0]["x"]), atol=1e-6)


def test_checkpoints_hold_both(offload: Offload, tmp_path: Path) -> None:
    """With the state of the optimizer of what is kept as the caller's own; the run goes on bit by bit."""

    def start() -> tuple[nn.Module, Any, Any]:
        model = offload(Stack(depth=3).train(), keep=["leave", "blocks.1.up"])
        kept = [*model.leave.parameters(), *model.blocks[1].up.parameters()]
        ours = [p for p in model.parameters() if all(p is not k for k in kept)]
        return model, slidecore.AdamW(ours, lr=1e-2), torch.optim.AdamW(kept, lr=1e-2)

    batches = feature_batches(6)
    model, first, second = start()
    train(model, batches[:3], first, second)
    slidecore.save_checkpoint(model, first, tmp_path / "run", extra=second.state_dict())
    expected = train(model, batches[3:], first, second)
    slidecore.synchronize(model)
    again, first, second = start()
    with torch.no_grad():
        again.leave.weight.zero_()
    second.load_state_dict(slidecore.load_checkpoint(again, first, tmp_path / "run"))
    assert train(again, batches[3:], first, second) == expected
    slidecore.synchronize(again)
    for name, value in weights(model).items():
        assert torch.equal(again.get_parameter(name), value), name
    other = offload(Stack(depth=3))
    with pytest.raises(slidecore.CheckpointError, match="of another model; it has no parameter"):
        slidecore.load_checkpoint(other, slidecore.AdamW(other.parameters()), tmp_path / "run")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["blocks.9"], "no parameter and no module named 'blocks.9'"),
        (["blocks.0.dropout"], "'blocks.0.dropout' has no parameters"),
        ([nn.Linear(2, 2)], "a Linear given there is not of this model"),
        ([nn.Parameter(torch.zeros(2))], "a Parameter given there is not of this model"),
        ("leave", "keep must be a list"),
        (nn.Linear(2, 2), "keep must be a list"),
        (3, "keep must be a list"),
        (["blocks"], "no repeated blocks"),
    ],
)
def test_bad_choices(keep: Any, message: str) -> None:
    model = Stack()
    with pytest.raises(slidecore.ModelError, match=message):
        slidecore.offload(model, device="cpu", keep=keep)
    slidecore.close(slidecore.offload(model, device="cpu"))


def test_kept_parameters_have_no_masters(offload: Offload) -> None:
    model = offload(Stack(), keep=["leave"])
    with pytest.raises(slidecore.ModelError, match=r"'leave.weight' is kept on the device"):
        slidecore.master_parameter(model, "leave.weight")
    with pytest.raises(slidecore.ModelError, match=r"'leave.weight' is kept on the device"):
        slidecore.assign_parameter(model, "leave.weight", torch.zeros(3, 13))
    with pytest.raises(slidecore.UsageError, match=r"use torch.optim for parameters that are not offloaded"):
        slidecore.AdamW(model.parameters())
    meta = Stack()
    meta.leave = nn.Linear(13, 3, device="meta")
    with pytest.raises(slidecore.ModelError, match=r"'leave.weight' is on the meta device"):
        slidecore.offload(meta, device="cpu", keep=["leave"])
