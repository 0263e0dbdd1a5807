"""Master values: the exact split into weight and residual, and what reads and writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import Stack, clone, distance, feature_batches, language_model, loss_of, train_offloaded, weights, worst
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same_bits(mine: torch.Tensor, expected: torch.Tensor) -> None:
    assert mine.dtype == expected.dtype
    assert torch.equal(bits(mine), bits(expected))


def patterns(shape: torch.Size, seed: int) -> torch.Tensor:
    """Random float32 bit patterns, specials among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    special = [
        0x00000000, -0x80000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, -0x00800001, 0x7F800000,
        -0x00800000, 0x3F808000, 0x3F807FFF, 0x3F808001, 0x3F818000, 0x7F7F8000, 0x7F7F7FFF, 0x7FC00000,
    ]  # fmt: skip
    flat = raw.flatten()
    count = min(len(special), flat.numel())
    flat[:count] = torch.tensor(special[:count], dtype=torch.int64).to(torch.int32)
    return flat.view(shape).view(torch.float32)


def halves(master: torch.Tensor) -> torch.Tensor:
    """The bf16 weight: rounded half up in the last kept bit, as DESIGN's split says."""
    raw = bits(master).to(torch.int64) & 0xFFFFFFFF
    return (((raw + 0x8000) >> 16) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("seed", range(4))
def test_split_is_exact(offload: Offload, seed: int) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    written = {name: patterns(p.shape, seed + i) for i, (name, p) in enumerate(model.named_parameters())}
    for name, value in written.items():
        slidecore.assign_parameter(model, name, value)
    for name, value in written.items():
        assert_same_bits(slidecore.master_parameter(model, name), value)
        assert_same_bits(model.get_parameter(name).detach(), halves(value))


@pytest.mark.parametrize("seed", range(2))
def test_weight_is_the_nearest_bf16(offload: Offload, seed: int) -> None:
    """For ordinary numbers, ties apart, PyTorch's own rounding."""
    model = offload(Stack(seed=seed), compute_dtype=torch.bfloat16)
    for name, value in weights(Stack(seed=seed)).items():
        ties = (bits(value) & 0xFFFF) == 0x8000
        assert torch.equal(model.get_parameter(name)[~ties], value.bfloat16()[~ties])
        assert_same_bits(slidecore.master_parameter(model, name), value)


def test_float32_planes_hold_any_bits(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.float32)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        value = patterns(parameter.shape, i)
        slidecore.assign_parameter(model, name, value)
        assert_same_bits(slidecore.master_parameter(model, name), value)
        assert_same_bits(parameter.detach(), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_can_be_assigned(offload: Offload, compute_dtype: torch.dtype, dtype: torch.dtype) -> None:
    model = offload(Stack(), compute_dtype=compute_dtype)
    value = torch.randn(13, 7, dtype=torch.float64).to(dtype)
    slidecore.assign_parameter(model, "enter.weight", value.t().contiguous().t())
    assert torch.equal(slidecore.master_parameter(model, "enter.weight"), value.float())


def test_frozen_parameters_are_rounded_once(offload: Offload) -> None:
    plain = Stack()
    plain.blocks[1].requires_grad_(False)
    model = offload(clone(plain), compute_dtype=torch.bfloat16)
    value = plain.blocks[1].up.weight.detach()
    assert torch.equal(slidecore.master_parameter(model, "blocks.1.up.weight"), value.bfloat16().float())
    train_offloaded(model, [{k: v.bfloat16() for k, v in b.items()} for b in feature_batches(2)])
    assert torch.equal(slidecore.master_parameter(model, "blocks.1.up.weight"), value.bfloat16().float())


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_planes_of_a_chunk(offload: Offload, compute_dtype: torch.dtype, train: bool) -> None:
    """What lists a chunk's state lists all of it: the views hold every entry, and the padding around them is zero."""
    plain = Stack()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    plain.blocks[1].requires_grad_(False)
    plain.blocks[2].up.weight.requires_grad_(False)
    model = offload(plain, compute_dtype=compute_dtype, train=train)
    if train:
        train_offloaded(model, inputs(compute_dtype, 2))
    engine = engine_of(model)
    engine.drain()
    update = {torch.float32: {}, torch.bfloat16: {"residual": torch.int16}}[compute_dtype]
    update |= {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    seen = 0
    for chunk in engine.chunks:
        trainable = train and any(e.parameter.requires_grad for e in chunk.entries)
        planes = engine.planes.of(chunk)
        assert {name: plane.dtype for name, plane in planes.items()} == {
            "weight": compute_dtype, **(update if trainable else {}),
        }  # fmt: skip
        for name, plane in planes.items():
            assert plane.shape == (chunk.numel if name == "weight" else chunk.trainable_numel,)
            assert plane.data_ptr() % 4096 == 0
            seen += plane.nbytes
            rest = torch.ones(len(plane), dtype=torch.bool)
            for entry in chunk.entries:
                if name == "weight" or (train and entry.parameter.requires_grad):
                    part = plane[entry.offset : entry.offset + entry.numel]
                    assert part.count_nonzero() > 0
                    if name == "weight":
                        assert part.data_ptr() == entry.parameter.data_ptr()
                    rest[entry.offset : entry.offset + entry.numel] = False
            assert plane[rest].count_nonzero() == 0
    assert seen <= slidecore.stats(model).planes_bytes


def test_a_copy_is_returned(offload: Offload) -> None:
    model = offload(Stack())
    before = slidecore.master_parameter(model, "enter.weight")
    slidecore.master_parameter(model, "enter.weight").fill_(7.0)
    assert torch.equal(slidecore.master_parameter(model, "enter.weight"), before)


def test_tied_parameter_has_one_master_and_two_names(offload: Offload) -> None:
    model = offload(language_model("llama", tied=True), compute_dtype=torch.bfloat16)
    value = torch.randn(101, 48)
    slidecore.assign_parameter(model, "lm_head.weight", value)
    assert torch.equal(slidecore.master_parameter(model, "model.embed_tokens.weight"), value)


def test_assignment_reaches_the_device(offload: Offload) -> None:
    """A weight that lies in a slot is uploaded again."""
    plain = Stack()
    model = offload(clone(plain), window=7)
    x = torch.randn(3, 7)
    for seed in range(3):
        with torch.no_grad():
            assert torch.allclose(model(x), plain(x), atol=1e-6)
        other = Stack(seed=seed + 5)
        for name, value in weights(other).items():
            slidecore.assign_parameter(model, name, value)
        plain = other
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-6)


def inputs(compute_dtype: torch.dtype, count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    return [{k: v.to(compute_dtype) for k, v in b.items()} for b in feature_batches(count, seed=seed)]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip(offload: Offload, tmp_path: Path, compute_dtype: torch.dtype) -> None:
    model = offload(Stack(), compute_dtype=compute_dtype)
    train_offloaded(model, inputs(compute_dtype, 3))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == Stack().state_dict().keys()
    for name, value in state.items():
        assert_same_bits(value, model.get_parameter(name).detach())
    other = offload(Stack(seed=8), compute_dtype=compute_dtype)
    other.load_state_dict(state)
    for name, value in state.items():
        assert_same_bits(other.get_parameter(name).detach(), value)
        assert torch.equal(slidecore.master_parameter(other, name), value.float())
    plain = Stack(seed=8).to(compute_dtype)
    plain.load_state_dict(state)
    x = torch.randn(2, 7).to(compute_dtype)
    with torch.no_grad():
        assert torch.allclose(other(x).float(), plain(x).float(), atol=1e-6)


def test_state_dict_waits_for_the_update(offload: Offload) -> None:
    """Taken right after step(), while updates may still be running."""
    plain = Stack(width=67, inner=131).train()
    model = offload(clone(plain))
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for batch in feature_batches(5):
        for m, o in ((model, optimizer), (plain, reference)):
            loss_of(m, batch).backward()
            o.step()
            o.zero_grad()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        assert worst(distance(state, plain.state_dict()))[0] < 1e-5


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_loading_between_steps(offload: Offload, compute_dtype: torch.dtype) -> None:
    """The residual is reset, and the next step computes with the loaded weights and starts from them."""
    model = offload(Stack(), compute_dtype=compute_dtype)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batches = inputs(compute_dtype, 4)
    for batch in batches[:3]:
        loss_of(model, batch).backward()
        optimizer.step()
    loaded = Stack(seed=3).to(compute_dtype)
    result = model.load_state_dict(copy.deepcopy(loaded.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in loaded.named_parameters():
        assert torch.equal(slidecore.master_parameter(model, name), value.float())
    loss = loss_of(model, batches[3])
    assert loss.item() == pytest.approx(
        loss_of(loaded, batches[3]).item(), rel=1e-6 if loaded.enter.weight.dtype == torch.float32 else 1e-2
    )
    loss.backward()
    optimizer.step()
    slidecore.synchronize(model)
    for name, value in loaded.named_parameters():
        # One AdamW step moves a weight by at most about lr / (1 - beta1), whatever the gradient.
        step = (slidecore.master_parameter(model, name) - value.float()).abs().max().item()
        assert 0 < step < 0.05, name


def test_loading_with_assign_is_refused(offload: Offload) -> None:
    """It would put other tensors in the parameters' places."""
    model = offload(Stack())
    before = weights(model)
    with pytest.raises(slidecore.UsageError, match="use assign=False"):
        model.load_state_dict(Stack(seed=4).state_dict(), assign=True)
    for name, value in before.items():
        assert torch.equal(slidecore.master_parameter(model, name), value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_model_on_meta(offload: Offload, compute_dtype: torch.dtype, tied: bool) -> None:
    plain = language_model("llama", tied=tied)
    with torch.device("meta"):
        empty = language_model("llama", tied=tied)
    assert all(p.is_meta for p in empty.parameters())
    # Buffers are no slidecore business: those of a model on meta have to be made, here as in any other loader.
    empty.model.rotary_emb = clone(plain.model.rotary_emb)
    model = offload(empty, compute_dtype=compute_dtype)
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta
        assert not parameter.any(), name
    for name, value in weights(plain).items():
        slidecore.assign_parameter(model, name, value)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, value in weights(plain).items():
        assert_same_bits(slidecore.master_parameter(model, name), value)
    ids = torch.randint(0, 101, (2, 9))
    tolerance = 1e-5 if compute_dtype == torch.float32 else 0.05
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.float(), plain(ids).logits, atol=tolerance)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    model.train()
    first = None
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first


def test_planes_outlive_the_model(offload: Offload) -> None:
    """A parameter's memory is valid as long as somebody holds it."""
    model = offload(Stack())
    held: Any = model.enter.weight.detach()
    expected = held.clone()
    slidecore.close(model)
    model = None
    assert torch.equal(held, expected)
