"""bfloat16 compute with float32 masters, against plain PyTorch doing the same by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import slidecore
import torch
from _models import Batch, Stack, clone, feature_batches, language_model, loss_of, samples, token_batches
from torch import nn

Offload = Callable[..., nn.Module]
Masters = dict[str, torch.Tensor]
STEPS = 50
WHOLE = ((0, 1, 2, 3),)
ORDERS: list[Sequence[Sequence[int]]] = [
    WHOLE,
    ((3, 1, 0, 2),),
    ((0,), (1,), (2,), (3,)),
    ((3,), (2,), (1,), (0,)),
    ((0, 1), (2, 3)),
    ((3, 0), (1, 2)),
]


def build(kind: str) -> nn.Module:
    """Masters in float32."""
    return (Stack(width=29) if kind == "stack" else language_model(kind, tied=kind != "llama")).train()


def narrowed(model: nn.Module) -> nn.Module:
    """A copy with parameters in bf16. Buffers keep their dtype: frequencies of a rotary embedding must."""
    copied = clone(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return copied


def batches_of(kind: str, count: int = STEPS) -> list[Batch]:
    """Learnable: the same few batches again and again."""
    if kind == "stack":
        made = feature_batches(5, shape=(4, 9))
        made = [{name: value.bfloat16() for name, value in batch.items()} for batch in made]
    else:
        made = token_batches(5, batch=4)
    return list(itertools.islice(itertools.cycle(made), count))


def train_by_hand(
    kind: str, lr: float, order: Sequence[Sequence[int]], count: int = STEPS
) -> tuple[list[float], Masters]:
    """float32 masters and moments, bf16 copies for compute; gradients of groups of samples summed in float32."""
    computing = narrowed(build(kind))
    masters = {name: p.detach().clone().requires_grad_() for name, p in build(kind).named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=lr)
    losses = []
    for batch in batches_of(kind, count):
        total = 0.0
        for group in order:
            loss = loss_of(computing, samples(batch, group)) * (len(group) / 4)
            loss.backward()
            total += loss.item()
            for name, parameter in computing.named_parameters():
                gradient = parameter.grad.float()
                masters[name].grad = gradient if masters[name].grad is None else masters[name].grad + gradient
                parameter.grad = None
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in computing.named_parameters():
                parameter.copy_(masters[name])
    return losses, {name: master.detach() for name, master in masters.items()}


@functools.cache
def runs(kind: str, lr: float) -> list[tuple[list[float], Masters]]:
    return [train_by_hand(kind, lr, order) for order in ORDERS]


def train_offloaded(model: nn.Module, batches: list[Batch], lr: float) -> tuple[list[float], Masters]:
    optimizer = slidecore.AdamW(model.parameters(), lr=lr)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: slidecore.master_parameter(model, name) for name, _ in model.named_parameters()}


def curves_apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def movement_apart(a: Masters, b: Masters, start: Masters) -> float:
    """How different the ways are that two runs moved all weights, relative to the way itself."""
    apart = torch.stack([(a[n] - b[n]).norm() for n in start]).norm()
    return (apart / torch.stack([(b[n] - start[n]).norm() for n in start]).norm()).item()


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 1}, {"micro_batch": 3, "window": 3}, {"keep_graphs": 2}, {"micro_batch": 2, "keep_graphs": 4}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "stack"])
def test_loss_curve(offload: Offload, kind: str, options: dict[str, Any]) -> None:
    lr = 2e-3
    references = runs(kind, lr)
    pairs = list(itertools.combinations(references, 2))
    start = {name: p.detach().clone() for name, p in build(kind).named_parameters()}
    model = offload(build(kind), compute_dtype=torch.bfloat16, **options)
    losses, masters = train_offloaded(model, batches_of(kind), lr)
    assert losses[-1] < losses[0] - 0.1
    # Within the spread of the plain runs: as near to one of them as they are to each other, at every step.
    spread = max(curves_apart(a[0], b[0]) for a, b in pairs)
    assert min(curves_apart(losses, other) for other, _ in references) <= spread
    # The way of all weights is more sensitive: a few runs do not show all that rounding can do to it.
    spread = max(movement_apart(a[1], b[1], start) for a, b in pairs)
    assert min(movement_apart(masters, other, start) for _, other in references) <= 1.5 * spread
    assert spread < 0.5  # the runs are comparable at all


@pytest.mark.parametrize("micro_batch", ["auto", 1])
def test_updates_smaller_than_bf16_are_kept(offload: Offload, micro_batch: Any) -> None:
    """At this rate a bf16 weight does not move in a step; the master does, as in float32 training."""
    lr, count = 2e-6, 10
    start = {name: p.detach().clone() for name, p in build("stack").named_parameters()}
    _, expected = train_by_hand("stack", lr, WHOLE, count)
    model = offload(build("stack"), compute_dtype=torch.bfloat16, micro_batch=micro_batch)
    _, masters = train_offloaded(model, batches_of("stack", count), lr)
    assert movement_apart(masters, expected, start) < 0.05
    moved = torch.cat([(masters[n] - start[n]).flatten().abs() for n in start])
    assert moved.mean().item() == pytest.approx(lr * count, rel=0.5)
    weight = model.get_parameter("blocks.0.up.weight")
    assert (weight == start["blocks.0.up.weight"].bfloat16()).float().mean() > 0.9


def test_weight_is_the_rounded_master(offload: Offload) -> None:
    model = offload(language_model("llama", tied=True), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    for batch in batches_of("llama", 5):
        loss_of(model, batch).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            master = slidecore.master_parameter(model, name)
            # Half up in the last bit that is kept; PyTorch's rounding except for ties.
            rounded = ((master.view(torch.int32).to(torch.int64) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
            slidecore.synchronize(model)
            assert torch.equal(parameter, rounded), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stack"])
def test_one_step_is_exact(offload: Offload, kind: str) -> None:
    """From equal bf16 gradients the float32 masters are those of torch.optim.AdamW: no rounding in between."""
    plain = narrowed(build(kind))
    for parameter in plain.parameters():  # no ties, which the planes round up and PyTorch to even
        parameter.data = parameter.data.float()
    model = offload(clone(plain), compute_dtype=torch.bfloat16)
    batch = batches_of(kind, 1)[0]
    _, masters = train_offloaded(model, [batch], 1e-2)
    computing = narrowed(plain)
    loss_of(computing, batch).backward()
    reference = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    for name, parameter in computing.named_parameters():
        reference[name].grad = parameter.grad.float()
    torch.optim.AdamW(reference.values(), lr=1e-2).step()
    for name, value in reference.items():
        assert torch.allclose(masters[name], value, rtol=2e-7, atol=1e-8), name


def test_gradients_of_micro_batches_are_summed_in_float32(offload: Offload) -> None:
    """256 equal contributions: a bf16 sum would stop growing on its way."""
    from _models import consumed_gradients

    torch.manual_seed(1)
    plain = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).to(torch.bfloat16)
    one = torch.randn(1, 5, dtype=torch.bfloat16)
    gradients = {}
    for count in (1, 512):
        model = offload(clone(plain), compute_dtype=torch.bfloat16, micro_batch=1)
        optimizer = slidecore.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.9))
        model(one.expand(count, 5).contiguous()).sum().backward()
        optimizer.step()
        gradients[count] = consumed_gradients(model)
    for name, gradient in gradients[1].items():
        # A factor of a power of two: exact in bf16, were it not for the sum.
        assert torch.equal(gradients[512][name], 512 * gradient), name


def test_compute_dtype_follows_the_model(offload: Offload) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = offload(Stack().to(dtype))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(torch.randn(2, 7, dtype=dtype)).dtype == dtype
