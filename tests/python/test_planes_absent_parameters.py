"""Parameters whose weights are not in memory: what reads and writes masters works, what would need them says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import transformers
from _deferred import everything, same_bits
from _models import Stack
from _shelf import CHOICES, Shelf, choices, partly_frozen, settings, shelve
from slidecore import _core
from slidecore.loading import load_pretrained
from slidecore.offloading import engine_of
from slidecore.parameters import move_into_planes, visit_weights
from slidecore.partition import partition
from slidecore.planes import Planes, lay_out
from torch import nn

Offload = Callable[..., nn.Module]


@choices
@settings
def test_masters(offload: Offload, choice: str, options: dict[str, Any]) -> None:
    models = [offload(partly_frozen(), **options) for _ in range(2)]
    shelf = shelve(models[0], CHOICES[choice])
    for seed, name in enumerate(dict(models[0].named_parameters())):
        absent, present = [slidecore.master_parameter(model, name) for model in models]
        assert torch.equal(absent, present), name
        torch.manual_seed(seed)
        value = torch.randn_like(present).to([torch.float32, torch.bfloat16, torch.float64][seed % 3])
        for model in models:
            slidecore.assign_parameter(model, name, value)
    assert same_bits(everything(models[0]), everything(models[1]))
    shelf.fetched.clear()
    shelf.stored.clear()
    with pytest.raises(slidecore.ModelError, match="expected shape"):
        slidecore.assign_parameter(models[0], "enter.weight", torch.zeros(2))
    assert not shelf.stored


def test_visiting_weights(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16, keep=["leave"])
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shelf = shelve(model, CHOICES["some"])
    found = {}
    with shelf.watched():
        visit_weights(model, engine_of(model), lambda name, weight: found.update({name: weight.clone()}))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert max(shelf.fetched.values()) == 1


def test_parameters_keep_their_form(offload: Offload, tmp_path: Path) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    shelf = shelve(model, lambda chunk, name: name == "weight" and chunk.index != 3)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.shape, parameter.dtype, parameter.device.type) == (values[name].shape, torch.bfloat16, "cpu")
        assert (parameter.requires_grad, parameter.grad, parameter.is_leaf) == (True, None, True)
        assert parameter.numel() == values[name].numel()
        assert parameter.element_size() == 2
    weight = model.enter.weight
    assert "enter.weight" in repr(weight)
    reads: list[Callable[[], object]] = [
        lambda: weight.sum(), lambda: weight.detach(), lambda: weight.data, lambda: weight.clone(), lambda: weight[0],
        lambda: weight.tolist(), lambda: weight.float(), lambda: weight == weight, lambda: weight.data_ptr(),
        lambda: weight.untyped_storage(), lambda: torch.stack([weight]), lambda: torch._foreach_norm([weight]),
        lambda: torch.empty(13, 7).copy_(weight), lambda: nn.functional.linear(torch.ones(2, 7), weight),
        lambda: torch.save(weight, tmp_path / "weight.pt"), lambda: weight.T, lambda: torch.ops.aten.add(weight, 1),
    ]  # fmt: skip
    writes: list[Callable[[], object]] = [
        lambda: nn.init.zeros_(weight), lambda: weight.copy_(torch.ones(13, 7)), lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", torch.ones(13, 7)), lambda: weight.data.zero_(),
    ]  # fmt: skip
    for action in [*reads, *writes]:
        with pytest.raises(slidecore.UsageError, match=r"enter\.weight.*not in host memory"):
            action()
    with torch.inference_mode(), pytest.raises(slidecore.UsageError, match="not in host memory"):
        weight.add_(1)
    with torch._C.DisableTorchFunctionSubclass():  # as C++ code would see it
        assert weight.detach().isnan().all()
        assert weight.detach().untyped_storage().nbytes() == 2
        with pytest.raises(RuntimeError, match="single memory location"):
            weight.detach().copy_(torch.ones(13, 7))
    engine = engine_of(model)
    for chunk in engine.chunks:
        if not engine.planes.weight.present(chunk):
            engine.planes.bring(chunk, "weight")
        engine.point_parameters(chunk)
    assert max(shelf.fetched.values()) == 1
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, values[name])
        chunk, entry = engine.entries[id(parameter)]
        assert parameter.data_ptr() == engine.planes.weight.view(chunk, entry).data_ptr()


def test_state_dicts_are_refused(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    shelve(model, lambda chunk, name: name == "weight" and chunk.index == 4)
    before = everything(model)
    with pytest.raises(slidecore.UsageError, match=r"blocks\.3.*save_checkpoint"):
        model.state_dict()
    with pytest.raises(slidecore.UsageError, match=r"blocks\.3.*load_checkpoint"):
        model.load_state_dict(state)
    assert same_bits(everything(model), before)
    part = model.blocks[0].state_dict()  # all of it is in memory
    assert torch.equal(part["up.weight"], state["blocks.0.up.weight"])


def test_loading_a_state_clears_residuals_elsewhere(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    shelve(model, CHOICES["state"])
    state = {name: torch.randn(p.shape).bfloat16() for name, p in model.named_parameters()}
    model.load_state_dict(state)
    for name, value in state.items():
        assert torch.equal(slidecore.master_parameter(model, name), value.float())


def test_closing_brings_weights_back(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shelve(model, CHOICES["some"])
    slidecore.close(model)
    assert model.state_dict().keys() == values.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])


def test_closing_where_weights_cannot_be_brought(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    shelf = shelve(model, CHOICES["weights"])

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    shelf.planes.fetch = fail
    with pytest.raises(OSError, match="the disk is gone"):
        slidecore.close(model)
    with pytest.raises(slidecore.UsageError, match="not offloaded"):
        slidecore.stats(model)
    with pytest.raises(slidecore.UsageError, match="not in host memory"):
        model.enter.weight.sum()


@pytest.mark.parametrize("meta", [False, True])
def test_planes_made_without_memory(meta: bool) -> None:
    """A chunk's parameters can move straight into parts that are not in memory."""
    pool, device = _core.ThreadPool(1), _core.Device("host", 0)
    found = []
    for absent in (False, True):
        model = partly_frozen()
        model.blocks[3].up.bias = nn.Parameter(torch.empty(29, device="meta"))
        if meta:
            model = model.to("meta")
        chunks = partition(model)
        lay_out(chunks)
        planes = Planes(
            device, pool, chunks, torch.bfloat16, True, absent=lambda c, _, absent=absent: absent and c.index % 2 == 0
        )
        shelf = Shelf(planes)
        assert [planes.weight.present(chunk) for chunk in chunks] == [not absent or c.index % 2 == 1 for c in chunks]
        with shelf.watched():
            for chunk in chunks:
                move_into_planes(planes, chunk, lambda entry: None)
        assert not shelf.fetched
        moved = [] if meta or not absent else [chunk for chunk in chunks if chunk.index % 2 == 0]
        assert shelf.stored == {(c.index, n): 1 for c in moved for n in planes.names(c) if n in ("weight", "residual")}
        content = {}
        for chunk in chunks:
            with planes.borrowed(chunk) as parts:
                content |= {f"{chunk.name} {name}": part.clone() for name, part in parts.items()}
            for entry in chunk.entries:
                for module, attribute in entry.owners:
                    assert getattr(module, attribute) is entry.parameter
                assert entry.parameter.requires_grad == entry.trainable
                assert not entry.parameter.is_meta
        found.append(content)
    assert same_bits(*found)


@pytest.mark.parametrize("choice", ["everything", "some"])
@pytest.mark.parametrize("config", ["llama", "mixtral"])
def test_load_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, config: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 1, "intermediate_size": 40,
    }  # fmt: skip
    kinds = {"llama": transformers.LlamaConfig, "mixtral": transformers.MixtralConfig}
    torch.manual_seed(2)
    plain = transformers.AutoModelForCausalLM.from_config(kinds[config](**sizes))
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = load_pretrained(tmp_path, device="cpu")
    shelves, offload = [], slidecore.offload

    def offload_and_shelve(model: nn.Module, **options: Any) -> nn.Module:
        offload(model, **options)
        shelves.append(shelve(model, CHOICES[choice]))
        return model

    monkeypatch.setattr(slidecore, "offload", offload_and_shelve)
    model = load_pretrained(tmp_path, device="cpu")
    (shelf,) = shelves
    assert same_bits(everything(model), everything(expected))
    masters = {part for part in shelf.bytes if part[1] in ("weight", "residual")}
    assert shelf.stored == dict.fromkeys(masters, 1)
    for each in (model, expected):
        slidecore.close(each)
