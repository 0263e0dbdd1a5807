"""Parts of planes that are not in memory: released, borrowed, brought back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _deferred import everything, same_bits
from _models import Stack, feature_batches, train_offloaded
from _shelf import CHOICES, chunk_bytes, partly_frozen, settings, shelve
from slidecore.errors import PlaneError
from slidecore.offloading import engine_of
from slidecore.planes import Planes
from torch import nn

Offload = Callable[..., nn.Module]


def planes_of(model: nn.Module) -> Planes:
    return engine_of(model).planes


def test_absent_parts_are_never_touched(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    planes, chunk = planes_of(model), engine_of(model).chunks[2]
    held = planes.weight.of(chunk)
    expected = held.clone()
    sizes = [slidecore.stats(model).planes_bytes]
    for name in planes.names(chunk):
        plane = planes.plane(name)
        plane.release(chunk)
        assert not plane.present(chunk)
        for call in (plane.of, plane.address, lambda c, plane=plane: plane.view(c, c.entries[0]), planes.of):
            with pytest.raises(PlaneError, match=f"{name} plane of 'blocks.1' is not in memory"):
                call(chunk)
        for options in ({}, {"write": True}, {"write": True, "fresh": True}):
            with pytest.raises(PlaneError, match="nothing was set to"), planes.borrowed(chunk, [name], **options):
                raise AssertionError("borrowed")
        sizes.append(slidecore.stats(model).planes_bytes)
        restored = plane.restore(chunk)
        assert not restored.any()
        assert restored.data_ptr() == plane.address(chunk)
        assert restored.data_ptr() % 4096 == 0
        with pytest.raises(PlaneError, match="in memory already"):
            plane.restore(chunk)
    assert torch.equal(held, expected)  # whoever holds a part has it until they let go
    assert slidecore.stats(model).planes_bytes == sizes[0]
    for name, size in zip(planes.names(chunk), sizes[1:], strict=True):
        assert sizes[0] - size == -(-planes.forms(chunk)[name].nbytes // 4096) * 4096
    with pytest.raises(PlaneError, match="no momentum plane"):
        planes.plane("momentum")


def test_parts_without_elements(offload: Offload) -> None:
    model = offload(partly_frozen(), compute_dtype=torch.bfloat16)
    planes = planes_of(model)
    chunk = next(c for c in engine_of(model).chunks if not c.trainable_numel)
    assert planes.residual is not None
    planes.residual.release(chunk)
    assert planes.residual.present(chunk)
    assert planes.residual.address(chunk) == 0
    assert planes.residual.restore(chunk).numel() == 0
    assert planes.names(chunk) == ["weight"]


def test_borrowing_again_moves_nothing(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    shelf = shelve(model, CHOICES["everything"])
    planes, chunk = planes_of(model), engine_of(model).chunks[1]
    with shelf.watched():
        with planes.borrowed(chunk, ["weight", "residual"]) as outer:
            with planes.borrowed(chunk, ["weight"], write=True) as inner:
                assert inner["weight"] is outer["weight"]
                inner["weight"].fill_(2)
            with pytest.raises(PlaneError, match="cannot change its tier"):
                planes.bring(chunk, "weight")
            assert not planes.weight.present(chunk)
            assert not shelf.stored
        assert shelf.fetched == {(1, "weight"): 1, (1, "residual"): 1}
        assert shelf.stored == {(1, "weight"): 1}  # though the outer one only read
        assert not outer
        with planes.borrowed(chunk, ["weight"]) as parts:
            assert (parts["weight"] == 2).all()


def test_what_fails_is_not_stored(offload: Offload) -> None:
    model = offload(Stack())
    shelf = shelve(model, CHOICES["everything"])
    planes, chunk = planes_of(model), engine_of(model).chunks[1]
    before = shelf.bytes[1, "weight"].clone()

    def fail() -> None:
        with planes.borrowed(chunk, write=True) as parts:
            parts["weight"].fill_(3)
            raise KeyError

    with shelf.watched(), pytest.raises(KeyError):
        fail()
    assert not shelf.stored
    assert torch.equal(shelf.bytes[1, "weight"], before)


def test_fresh_parts_are_not_fetched(offload: Offload) -> None:
    model = offload(Stack())
    shelf = shelve(model, lambda chunk, name: name != "exp_avg")
    planes, chunk = planes_of(model), engine_of(model).chunks[1]
    planes.moments["exp_avg"].of(chunk).fill_(4)
    with shelf.watched():
        with planes.borrowed(chunk, write=True, fresh=True) as parts:
            assert not parts["weight"].any()
            assert (parts["exp_avg"] == 4).all()  # a part in memory is as it is
            parts["weight"].fill_(5)
            del parts
        assert not shelf.fetched
    assert (shelf.bytes[1, "weight"].view(torch.float32) == 5).all()


def test_one_thread_borrows_at_a_time(offload: Offload) -> None:
    model = offload(Stack(depth=8), compute_dtype=torch.bfloat16)
    shelf = shelve(model, CHOICES["everything"])
    engine = engine_of(model)
    errors: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for i in range(3 * len(engine.chunks)):
                chunk = engine.chunks[(i + offset) % len(engine.chunks)]
                with engine.planes.borrowed(chunk, write=True) as parts:
                    torch._foreach_add_(list(parts.values()), 1)
        except BaseException as error:
            errors.append(error)

    before = everything(model)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with shelf.watched():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert set(shelf.stored.values()) == {12}
    assert shelf.most_memory <= chunk_bytes(engine.chunks, engine.planes)
    assert same_bits({n: t for n, t in everything(model).items() if n.endswith("residual")},
                     {n: t + 12 for n, t in before.items() if n.endswith("residual")})  # fmt: skip


@settings
def test_all_present_again(offload: Offload, options: dict[str, Any]) -> None:
    model = offload(partly_frozen(), **options)
    train_offloaded(model, [{n: t.to(options["compute_dtype"]) for n, t in b.items()} for b in feature_batches(2)])
    before, size = everything(model), slidecore.stats(model).planes_bytes
    shelf = shelve(model, CHOICES["everything"])
    assert slidecore.stats(model).planes_bytes == 0
    engine = engine_of(model)
    for chunk in engine.chunks:
        for name in engine.planes.names(chunk):
            engine.planes.bring(chunk, name)
        engine.point_parameters(chunk)
    assert shelf.fetched == shelf.once()
    assert slidecore.stats(model).planes_bytes == size
    assert same_bits(everything(model), before)
