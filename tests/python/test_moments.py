"""8-bit moments: the kernel and whole trainings against a reference in NumPy, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import slidecore
import torch
from _models import (
    Batch,
    Stack,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    train_offloaded,
    weights,
)
from _moments8 import GROUP, Moments8
from slidecore import _core
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
NAMES = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


def moments_of(model: nn.Module, parameter: nn.Parameter) -> dict[str, np.ndarray]:
    """Codes and scales of one parameter, copied."""
    engine = engine_of(model)
    state = engine.planes.state_of(*engine.entries[id(parameter)])
    return {name: state[name].flatten().numpy().copy() for name in NAMES}


def all_planes(model: nn.Module) -> dict[str, torch.Tensor]:
    engine = engine_of(model)
    engine.drain()
    return {f"{c.name} {name}": p.clone() for c in engine.chunks for name, p in engine.planes.of(c).items()}


def assert_same_planes(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, plane in mine.items():
        assert torch.equal(plane, expected[name]), name


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("isa", _core.available_instruction_sets())
def test_kernel_equals_the_formulas(isa: str, n: int) -> None:
    """Sizes that change from group to group, groups of zeros, and gradients as sparse as an embedding's."""
    generator = np.random.default_rng(n)
    reference = Moments8(n)
    master = generator.normal(size=n).astype(np.float32)
    weight = master.copy()
    planes = {name: getattr(reference, name).copy() for name in NAMES}
    pool = _core.ThreadPool(2)
    sizes = np.repeat(10.0 ** generator.integers(-30, 10, -(-n // GROUP)), GROUP)[:n]
    _core.force_instruction_set(isa)
    try:
        for step in range(1, 12):
            gradient = (generator.normal(size=n) * sizes * (generator.random(n) < 0.7)).astype(np.float32)
            gradient[: GROUP * (step % 3)] = 0
            master = reference.update(master, gradient, OPTIONS)
            _core.adamw(
                pool,
                _core.AdamWHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=step),
                n=n,
                gradient=gradient.ctypes.data,
                gradient_float32=True,
                weight32=weight.ctypes.data,
                **{name: plane.ctypes.data for name, plane in planes.items()},
            )
            np.testing.assert_array_equal(weight, master)
            for name, plane in planes.items():
                np.testing.assert_array_equal(plane, getattr(reference, name), err_msg=name)
    finally:
        _core.force_instruction_set("")


class Half(nn.Module):
    """Uses one of two layers, so that the other's parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(13, 13), nn.Linear(13, 13)])
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers[self.turn % 2](x)


def build() -> nn.Module:
    """Groups, partial groups, frozen and skipped entries: 29 x 13 weights and biases of 13 and 29."""
    model = Stack()
    model.blocks[3] = Half()
    model.blocks[1].requires_grad_(False)
    model.blocks[2].up.weight.requires_grad_(False)
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.dim() == 1 and p.requires_grad]
    return [
        {"params": matrices, "weight_decay": 0.3, "lr": 3e-3},
        {"params": vectors, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-4, "maximize": True},
    ]


def batches(compute_dtype: torch.dtype, count: int = 6) -> Iterator[Batch]:
    for batch in feature_batches(count):
        yield {name: value.to(compute_dtype) for name, value in batch.items()}


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_training_equals_the_reference(offload: Offload, compute_dtype: torch.dtype) -> None:
    """Deferred updates show the gradients that they use: with these the reference does the same steps, to the bit."""
    names = [f"blocks.{i}" for i in range(5)]
    model = offload(build(), compute_dtype=compute_dtype, moments="8bit", blocks=names, piece_bytes=4096)
    optimizer = slidecore.AdamW(groups(model), lr=1e-2, update="deferred")
    references = {name: Moments8(p.numel()) for name, p in model.named_parameters() if p.requires_grad}
    updated = 0
    for turn, batch in enumerate(batches(compute_dtype)):
        model.blocks[3].turn = turn
        before = {name: slidecore.master_parameter(model, name).numpy() for name in references}
        loss_of(model, batch).backward()
        gradients = {n: model.get_parameter(n).grad for n in references}
        seen = {n: torch.empty(g.shape).copy_(g).flatten().numpy() for n, g in gradients.items() if g is not None}
        optimizer.step()
        slidecore.synchronize(model)
        for group in optimizer.param_groups:
            for name in references:
                parameter = model.get_parameter(name)
                if any(parameter is p for p in group["params"]) and name in seen:
                    expected = references[name].update(before[name].flatten(), seen[name], group)
                    before[name] = expected.reshape(before[name].shape)
                    updated += 1
        for name, reference in references.items():
            np.testing.assert_array_equal(slidecore.master_parameter(model, name).numpy(), before[name], name)
            for plane, value in moments_of(model, model.get_parameter(name)).items():
                np.testing.assert_array_equal(value, getattr(reference, plane), f"{name} {plane}")
    assert updated == 6 * len(references) - 6 * 2, "one layer of two was skipped in each step"


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_when_where_and_in_which_pieces_does_not_matter(offload: Offload, compute_dtype: torch.dtype) -> None:
    results = []
    for options, update in [
        ({}, "overlap"),
        ({}, "deferred"),
        ({"piece_bytes": 4096, "threads": 3}, "overlap"),
        ({"piece_bytes": 8192, "threads": 2}, "deferred"),
    ]:
        plain = Stack(width=96, inner=131, depth=3)
        model = offload(plain, compute_dtype=compute_dtype, moments="8bit", **options)
        train_offloaded(
            model,
            batches(compute_dtype, 4),
            optimizer=lambda m, update=update: slidecore.AdamW(m.parameters(), lr=1e-2, update=update),
        )
        results.append(all_planes(model))
        slidecore.close(model)
    for other in results[1:]:
        assert_same_planes(other, results[0])


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_losses_stay_close_to_float32_moments(offload: Offload, compute_dtype: torch.dtype) -> None:
    """A language model learns four batches by heart: the losses fall by a multiple of what the moments change."""
    runs = {}
    for moments in ("float32", "8bit"):
        model = offload(language_model("llama"), compute_dtype=compute_dtype, moments=moments)
        runs[moments] = train_offloaded(model, token_batches(4) * 15, lr=3e-3)
        slidecore.close(model)
    fall = runs["float32"][0] - runs["float32"][-1]
    assert fall > 2
    assert runs["8bit"][0] == runs["float32"][0]
    assert runs["8bit"] != runs["float32"]
    difference = max(abs(a - b) for a, b in zip(runs["8bit"], runs["float32"], strict=True))
    assert difference < 0.05 * fall


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_bytes(offload: Offload, compute_dtype: torch.dtype) -> None:
    model = offload(Stack(width=256, inner=512), compute_dtype=compute_dtype, moments="8bit")
    parameters = sum(p.numel() for p in model.parameters())
    stats = slidecore.stats(model)
    per_parameter = 4 + 2 + 2 * 4 / 128  # bf16 weight and residual, or float32; codes; scales
    padding = 1.02  # of small entries, and of chunks to whole pages
    assert parameters * per_parameter <= stats.planes_bytes < parameters * per_parameter * padding
    assert stats.host_memory >= stats.planes_bytes


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_state_resumes_to_the_bit(offload: Offload, compute_dtype: torch.dtype) -> None:
    def optimizer(model: nn.Module) -> slidecore.AdamW:
        return slidecore.AdamW(groups(model), lr=1e-2)

    model = offload(build(), compute_dtype=compute_dtype, moments="8bit")
    made = optimizer(model)
    for turn in range(2):  # what has never been updated has no state
        model.blocks[3].turn = turn
        train_offloaded(model, batches(compute_dtype), optimizer=lambda _: made)
    model.blocks[3].turn = 0
    saved = copy.deepcopy(dict(model.state_dict()))
    state = copy.deepcopy(made.state_dict())
    assert {name: t.dtype for name, t in state["state"][0].items() if name in NAMES} == {
        "exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "exp_avg_scale": torch.float32,
        "exp_avg_sq_scale": torch.float32,
    }  # fmt: skip
    other = offload(build(), compute_dtype=compute_dtype, moments="8bit")
    other.load_state_dict(saved)
    resumed = optimizer(other)
    resumed.load_state_dict(state)
    for m, o in ((model, made), (other, resumed)):
        train_offloaded(m, batches(compute_dtype), optimizer=lambda _, o=o: o)
    assert_same_planes(all_planes(other), all_planes(model))


def test_state_of_other_moments_is_refused(offload: Offload) -> None:
    models = {moments: offload(Stack(), moments=moments) for moments in ("float32", "8bit")}
    optimizers = {}
    for moments, model in models.items():
        optimizers[moments] = slidecore.AdamW(model.parameters())
        train_offloaded(model, feature_batches(1), optimizer=lambda _, o=optimizers[moments]: o)
    for mine, theirs in (("float32", "8bit"), ("8bit", "float32")):
        before = all_planes(models[mine])
        with pytest.raises(ValueError, match="exp_avg"):
            optimizers[mine].load_state_dict(optimizers[theirs].state_dict())
        assert_same_planes(all_planes(models[mine]), before)


def test_an_optimizer_after_another_starts_from_nothing(offload: Offload) -> None:
    runs = []
    for first in (True, False):
        model = offload(Stack(), moments="8bit")
        before = weights(model)
        if first:
            train_offloaded(model, feature_batches(3, seed=9))
            for name, value in before.items():
                slidecore.assign_parameter(model, name, value)
        train_offloaded(model, feature_batches(3))
        runs.append(all_planes(model))
    assert_same_planes(*runs)


def test_planes_list_the_scales(offload: Offload) -> None:
    model = offload(build(), compute_dtype=torch.bfloat16, moments="8bit")
    for chunk in engine_of(model).chunks:
        planes = engine_of(model).planes.of(chunk)
        assert planes["weight"].numel() == chunk.numel
        if chunk.trainable_numel == 0:
            assert list(planes) == ["weight"]
            continue
        assert list(planes) == ["weight", "residual", *NAMES]
        assert chunk.trainable_numel % GROUP == 0
        for name in NAMES:
            assert planes[name].data_ptr() % 4096 == 0
            wanted = chunk.trainable_numel // (GROUP if name.endswith("scale") else 1)
            assert planes[name].shape == (wanted,)


@pytest.mark.parametrize("moments", ["8-bit", "int8", None, 8])
def test_unknown_moments(moments: Any) -> None:
    with pytest.raises(ValueError, match="'float32', '8bit'"):
        slidecore.offload(Stack(), device="cpu", moments=moments)


def test_inference_has_no_moments(offload: Offload) -> None:
    sizes = {slidecore.stats(offload(Stack(), train=False, moments=m)).planes_bytes for m in ("float32", "8bit")}
    assert len(sizes) == 1
