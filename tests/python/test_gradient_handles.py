"""`p.grad` of an offloaded model: code written for PyTorch reads, clips and edits it, or is told why it cannot."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import slidecore
import torch
from _deferred import Offload, Side, assert_alike, sides
from _models import Stack, feature_batches, language_model, token_batches
from slidecore.gradient_handles import GradientHandle
from torch import nn

PASSES = [1, 3]


def backward(side: Side, passes: int, seed: int = 1) -> None:
    batches = feature_batches(passes, seed=seed)
    for batch in batches[:-1]:
        with side.no_sync():
            side.backward(batch)
    side.backward(batches[-1])


def train_with(
    offload: Offload, edit: Callable[[nn.Module], Any], passes: int, *, steps: int = 3, **options: Any
) -> tuple[Side, Side]:
    """Both sides run `edit` between backward and step; what it returns agrees, and so do the weights."""
    mine, theirs = sides(offload, Stack(), **options)
    for step in range(steps):
        found = []
        for side in (mine, theirs):
            backward(side, passes, seed=step)
            found.append(edit(side.model))
            side.step()
        if found[1] is not None:
            a, b = (torch.as_tensor(x).double().tolist() for x in found)
            assert a == pytest.approx(b, rel=1e-5)
    assert_alike(mine, theirs)
    return mine, theirs


# --- reading


@pytest.mark.parametrize("passes", PASSES)
def test_gradients_are_those_of_pytorch(offload: Offload, passes: int) -> None:
    mine, theirs = sides(offload, language_model("llama", tied=True).train())
    for side in (mine, theirs):
        for batch in token_batches(passes):
            side.backward(batch)
    for (name, a), (_, b) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        gradient = a.grad
        assert isinstance(gradient, torch.Tensor)
        assert gradient is a.grad
        assert (gradient.shape, gradient.dtype, gradient.device) == (b.grad.shape, b.grad.dtype, b.grad.device)
        assert torch.allclose(gradient.clone(), b.grad, rtol=1e-4, atol=1e-7), name
        assert gradient.norm().item() == pytest.approx(b.grad.norm().item(), rel=1e-4)
    for side in (mine, theirs):
        side.step()
    assert_alike(mine, theirs)


READINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "torch.norm": lambda g: torch.norm(g, 2),
    "norm over one dimension": lambda g: torch.linalg.vector_norm(g, 2, dim=0),
    "norm, kept dimensions": lambda g: torch.linalg.vector_norm(g, 2, keepdim=True),
    "norm in float64": lambda g: torch.linalg.vector_norm(g, dtype=torch.float64),
    "1-norm": lambda g: g.norm(1),
    "inf-norm": lambda g: torch.linalg.vector_norm(g, math.inf),
    "abs max": lambda g: g.abs().max(),
    "mean and sum": lambda g: torch.stack([g.abs().mean(), g.square().sum()]),
    "isnan": lambda g: g.isnan().any(),
    "flatten": lambda g: g.flatten(),
    "view": lambda g: g.view(-1),
    "index": lambda g: g[..., 0],
    "transpose": lambda g: g.t() if g.dim() == 2 else g,
    "product": lambda g: g * 2,
    "in a list": lambda g: torch.cat([g.flatten(), g.flatten()]),
    "foreach": lambda g: torch._foreach_norm([g, g])[0],
    "detach": lambda g: g.detach().clone(),
    "data": lambda g: g.data.clone(),
    "numpy": lambda g: g.numpy().copy(),
    "asarray": lambda g: np.asarray(g).copy(),
    "tolist": lambda g: g.tolist(),
    "item": lambda g: g.max().item(),
    "deepcopy": lambda g: copy.deepcopy(g),
    "to": lambda g: g.to(torch.float64),
    "cpu": lambda g: g.cpu().clone(),
    "out": lambda g: torch.mul(g, 3, out=torch.empty_like(g)),
    "compare": lambda g: (g == g.clone()).all(),
    "iterate": lambda g: [float(row.max()) for row in g],
}


@pytest.mark.parametrize("how", READINGS)
@pytest.mark.parametrize("passes", PASSES)
def test_reading_changes_nothing(offload: Offload, passes: int, how: str) -> None:
    read = READINGS[how]

    def edit(model: nn.Module) -> torch.Tensor:
        seen = [torch.as_tensor(read(p.grad)).double().flatten() for p in model.parameters()]
        return torch.cat([x.norm().reshape(1) for x in seen])

    train_with(offload, edit, passes, steps=2, Max_grad_norm=None)


def test_a_saved_gradient_is_an_ordinary_tensor(offload: Offload) -> None:
    mine, _ = sides(offload, Stack())
    backward(mine, 1)
    gradient = mine.model.enter.weight.grad
    file = io.BytesIO()
    torch.save({"grad": gradient}, file)
    file.seek(0)
    loaded = torch.load(file)["grad"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, gradient.clone())
    assert "in host memory" in repr(gradient)


# --- clipping


def torch_clip(norm_type: float, max_norm: float, **options: Any) -> Callable[[nn.Module], torch.Tensor]:
    return lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), max_norm, norm_type, **options)


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("passes", PASSES)
def test_clip_grad_norm(offload: Offload, passes: int, norm_type: float, max_norm: float) -> None:
    train_with(offload, torch_clip(norm_type, max_norm), passes)
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        backward(side, passes)
    total = slidecore.clip_grad_norm_(mine.model, max_norm, norm_type)
    assert total.item() == pytest.approx(torch_clip(norm_type, max_norm)(theirs.model).item(), rel=1e-5)
    assert total.dtype == torch.float32
    for side in (mine, theirs):
        side.step()
    assert_alike(mine, theirs)


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_value_": lambda m: torch.nn.utils.clip_grad_value_(m.parameters(), 1e-3),
    "clip twice": lambda m: [torch_clip(2, n)(m) for n in (0.1, 0.01)][1],
    "value, then norm": lambda m: (torch.nn.utils.clip_grad_value_(m.parameters(), 1e-3), torch_clip(2, 1e-3)(m))[1],
    "norm, then value": lambda m: (torch_clip(2, 0.1)(m), torch.nn.utils.clip_grad_value_(m.parameters(), 1e-3))[0],
    "clip half": lambda m: torch.nn.utils.clip_grad_norm_(m.blocks.parameters(), 1e-3),
    "get_total_norm": lambda m: torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]),
    "foreach, forced": lambda m: (torch._foreach_mul_([p.grad for p in m.parameters()], 0.5), None)[1],
}


def edit_each(change: Callable[[torch.Tensor, nn.Parameter], Any]) -> Callable[[nn.Module], Any]:
    def edit(model: nn.Module) -> torch.Tensor:
        for parameter in model.parameters():
            change(parameter.grad, parameter)
        return torch_clip(2, 1e9)(model)  # sees the change

    return edit


EDITS |= {
    "mul_": edit_each(lambda g, p: g.mul_(0.3)),
    "mul_ by a tensor": edit_each(lambda g, p: g.mul_(torch.tensor(0.3))),
    "mul_ elementwise": edit_each(lambda g, p: g.mul_(torch.linspace(0, 1, g.shape[-1]))),
    "negative": edit_each(lambda g, p: g.mul_(-1)),
    "div_": edit_each(lambda g, p: g.div_(4)),
    "div_ by zero": edit_each(lambda g, p: g.div_(torch.tensor(0.0)).nan_to_num_(0.0, 1.0, -1.0)),
    "scaled to nothing": edit_each(lambda g, p: g.mul_(0)),
    "zero_": edit_each(lambda g, p: g.zero_()),
    "fill_": edit_each(lambda g, p: g.fill_(0.01)),
    "copy_": edit_each(lambda g, p: g.copy_(torch.full_like(g, 0.02))),
    "add_": edit_each(lambda g, p: g.add_(p.detach(), alpha=0.1)),
    "data.add_": edit_each(lambda g, p: g.data.add_(p.data, alpha=0.1)),
    "setitem": edit_each(lambda g, p: g.__setitem__(0, 0.5)),
    "view, then write": edit_each(lambda g, p: g.view(-1)[1:].mul_(3)),
    "numpy, then write": edit_each(lambda g, p: np.multiply(g.numpy(), 2, out=g.numpy())),
    "sign_": edit_each(lambda g, p: g.sign_()),
    "scaled, then written, then scaled": edit_each(lambda g, p: g.mul_(0.5).clamp_(-1e-3, 1e-3).div_(7)),
    "scaled, then viewed, then scaled": edit_each(lambda g, p: (g.mul_(0.5), g.view(-1).add_(1e-3), g.mul_(2))),
    "out of another": edit_each(lambda g, p: torch.mul(g, 2, out=g)),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("passes", PASSES)
def test_edits_count(offload: Offload, passes: int, how: str) -> None:
    train_with(offload, EDITS[how], passes)


@pytest.mark.parametrize("how", ["mul_", "add_", "view, then write", "clip_grad_value_", "clip half"])
def test_edits_between_passes_count(offload: Offload, how: str) -> None:
    """And those of a pass that reached some of the parameters only."""
    mine, theirs = sides(offload, Stack())
    for step in range(2):
        for side in (mine, theirs):
            for batch in feature_batches(3, seed=step):
                side.backward(batch)
                EDITS[how](side.model)
            (side.model.enter(batch["x"]).square().mean() * 0.1).backward()
            norm = torch_clip(2, 0.05)(side.model)
            assert norm.isfinite()
            side.step()
    assert_alike(mine, theirs)


def test_edits_of_bfloat16_gradients(offload: Offload) -> None:
    """Scalar factors are applied by the update in float32; other edits round to bfloat16, as they do in PyTorch."""
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters(), update="deferred")
    batch = {name: value.bfloat16() for name, value in feature_batches(1)[0].items()}
    torch.nn.functional.mse_loss(model(batch["x"]), batch["target"]).backward()
    for parameter in model.parameters():
        before = parameter.grad.clone()
        assert before.dtype == torch.bfloat16
        parameter.grad.add_(1)
        assert torch.equal(parameter.grad, before + 1)
        assert parameter.grad.norm().item() == pytest.approx((before + 1).float().norm().item(), rel=1e-5)
    optimizer.step()


def test_views_outlive_the_step(offload: Offload) -> None:
    """As in PyTorch, where the next backward makes new gradients: what somebody holds of the last ones stays."""
    mine, theirs = sides(offload, Stack())
    held = []
    for step in range(3):
        for side in (mine, theirs):
            backward(side, 1, seed=step)
            held.append([p.grad.view(-1) for p in side.model.parameters()])
            side.step()
    slidecore.synchronize(mine.model)
    for a, b in zip(held[::2], held[1::2], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-7)
    assert_alike(mine, theirs)


# --- dropping and replacing


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("how", [".grad = None", "del"])
def test_parameters_without_a_gradient_are_skipped(offload: Offload, passes: int, how: str) -> None:
    def edit(model: nn.Module) -> torch.Tensor:
        for i, parameter in enumerate(model.parameters()):
            if i % 3 == 0 and how == "del":
                del parameter.grad
            elif i % 3 == 0:
                parameter.grad = None
        return torch_clip(2, 0.01)(model)

    train_with(offload, edit, passes)


def test_max_grad_norm_leaves_dropped_gradients_out(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), Max_grad_norm=0.01)
    for side in (mine, theirs):
        backward(side, 3)
        side.model.leave.weight.grad = None
        norm = torch_clip(2, 0.01)(side.model) if side is theirs else None
        side.step()
    assert mine.optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert_alike(mine, theirs)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_replaced_gradient_is_an_error_that_loses_nothing(offload: Offload, when: str) -> None:
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        backward(side, 1)
    weight = mine.model.blocks[1].up.weight
    handle = weight.grad
    weight.grad = weight.grad * 2
    with pytest.raises(slidecore.UsageError, match=r"blocks.1.up.weight.grad was replaced.*copy_"):
        mine.optimizer.step() if when == "step" else backward(mine, 1)
    weight.grad = handle
    handle.mul_(2)
    theirs.model.blocks[1].up.weight.grad *= 2
    for side in (mine, theirs):
        side.step()
    assert_alike(mine, theirs)


def test_gradients_are_gone_after_the_step(offload: Offload) -> None:
    mine, _ = sides(offload, Stack())
    weight = mine.model.enter.weight
    for drop in (mine.optimizer.step, mine.optimizer.zero_grad, mine.model.zero_grad):
        backward(mine, 1)
        handle = weight.grad
        drop()
        assert weight.grad is None
        for use in (handle.norm, handle.clone, lambda handle=handle: handle.mul_(2), handle.numpy):
            with pytest.raises(slidecore.UsageError, match="this gradient is gone"):
                use()
    backward(mine, 1)  # a new gradient is not reached through an old handle
    with pytest.raises(slidecore.UsageError, match="this gradient is gone"):
        handle.mul_(2)
    mine.step()


# --- overlapping updates


@pytest.mark.parametrize("how", ["norm", "clone", "mul_", "add_", "numpy", "view", "item", "zero_", "in a list"])
def test_consumed_gradients_say_so(offload: Offload, how: str) -> None:
    mine, theirs = sides(offload, Stack(), update="overlap")
    for side in (mine, theirs):
        backward(side, 1)
    gradient = mine.model.enter.weight.grad
    assert isinstance(gradient, GradientHandle)
    assert "consumed" in repr(gradient)
    uses: dict[str, Callable[[], Any]] = {
        "norm": gradient.norm,
        "clone": gradient.clone,
        "mul_": lambda: gradient.mul_(1.0),
        "add_": lambda: gradient.add_(1.0),
        "numpy": gradient.numpy,
        "view": lambda: gradient.view(-1),
        "item": lambda: gradient[0, 0].item(),
        "zero_": gradient.zero_,
        "in a list": lambda: torch._foreach_norm([gradient]),
    }
    with pytest.raises(slidecore.UsageError, match=r"consumed by its update during backward.*update='deferred'"):
        uses[how]()
    for side in (mine, theirs):
        side.step()
        assert side.model.enter.weight.grad is None
    assert_alike(mine, theirs)
