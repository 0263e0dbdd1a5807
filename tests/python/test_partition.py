"""Chunks found by structure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import slidecore
import torch
from _architectures import KINDS
from _models import LANGUAGE_MODELS, Residual, Stack, language_model
from slidecore.partition import Chunk, partition
from slidecore.planes import ENTRY_ALIGNMENT, lay_out, state_bytes
from torch import nn


def kinds(chunks: list[Chunk]) -> list[tuple[str, str]]:
    return [(chunk.kind, chunk.name) for chunk in chunks]


def assert_covers(model: nn.Module, chunks: list[Chunk]) -> None:
    """Every parameter is in exactly one chunk, with all of its places."""
    entries = [entry for chunk in chunks for entry in chunk.entries]
    assert sorted(id(e.parameter) for e in entries) == sorted(id(p) for p in model.parameters())
    places = {
        (id(module), name): parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    assert sum(len(e.owners) for e in entries) == len(places)
    for entry in entries:
        assert all(places[id(module), name] is entry.parameter for module, name in entry.owners)
        assert model.get_parameter(entry.name) is entry.parameter
        assert entry.trainable == entry.parameter.requires_grad
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models(kind: str, tied: bool) -> None:
    model = language_model(kind, tied=tied)
    chunks = partition(model)
    assert_covers(model, chunks)
    prefix = "transformer.h" if kind == "gpt2" else "model.layers"
    assert [c.name for c in chunks if c.kind == "block"] == [f"{prefix}.{i}" for i in range(4)]
    edges = [c for c in chunks if c.kind == "edge"]
    head = model.get_output_embeddings()
    assert len(edges) == (1 if tied else 2)
    assert any(module is head for _, module in edges[-1].uses)
    assert any(module is model.get_input_embeddings() for _, module in edges[0].uses)
    assert not any(c.kind == "resident" for c in chunks)


def test_stack() -> None:
    model = Stack(depth=3)
    chunks = partition(model)
    assert_covers(model, chunks)
    assert kinds(chunks) == [
        ("edge", "enter"),
        ("block", "blocks.0"),
        ("block", "blocks.1"),
        ("block", "blocks.2"),
        ("edge", "norm+leave"),
    ]


class TwoRuns(nn.Module):
    """An encoder and a decoder, something between them, and parameters held by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.encoder = nn.ModuleList(Residual(5, 7) for _ in range(2))
        self.between = nn.Linear(5, 5)
        self.decoder = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
        self.register_parameter("absent", None)


def test_two_runs_and_resident_parameters() -> None:
    model = TwoRuns()
    chunks = partition(model)
    assert_covers(model, chunks)
    assert kinds(chunks) == [
        ("block", "encoder.0"),
        ("block", "encoder.1"),
        ("edge", "between"),
        ("block", "decoder.0"),
        ("block", "decoder.1"),
        ("block", "decoder.2"),
        ("resident", "resident"),
    ]
    assert [e.name for e in chunks[-1].entries] == ["scale"]


def test_outermost_run_wins() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)))
    assert [c.name for c in partition(model)] == ["0", "1"]


def test_longest_run_of_a_sequential() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3), nn.GELU()
    )
    chunks = partition(model)
    assert_covers(model, chunks)
    assert kinds(chunks) == [("edge", "0+1"), ("block", "2"), ("block", "4"), ("block", "5")]


def test_blocks_of_several_classes_in_a_list() -> None:
    model = nn.Sequential()
    model.layers = nn.ModuleList([Residual(3, 5), Residual(3, 5), nn.Linear(3, 3), Residual(3, 5)])
    assert [c.name for c in partition(model) if c.kind == "block"] == [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize("kinds_in_turn", ["ab", "abc", "abac"])
def test_blocks_of_several_classes_in_turn(kinds_in_turn: str) -> None:
    """No two neighbours are of one class (hybrid models)."""
    made = {"a": lambda: Residual(3, 5), "b": lambda: nn.Linear(3, 3), "c": lambda: nn.LayerNorm(3)}
    model = nn.Module()
    model.layers = nn.ModuleList(made[kind]() for kind in kinds_in_turn * 2)
    model.heads = nn.ModuleList([nn.Linear(3, 2), nn.LayerNorm(3)])  # nothing repeats: no run
    chunks = partition(model)
    assert_covers(model, chunks)
    assert [c.name for c in chunks if c.kind == "block"] == [f"layers.{i}" for i in range(2 * len(kinds_in_turn))]
    assert [c.name for c in chunks if c.kind == "edge"] == ["heads"]


def test_kept_parameters_are_in_no_chunk() -> None:
    model = Stack(depth=4)
    kept = {id(p) for p in [*model.leave.parameters(), *model.blocks[1].parameters(), model.blocks[2].up.weight]}
    chunks = partition(model, kept=kept)
    assert kinds(chunks) == [
        ("edge", "enter"),
        ("block", "blocks.0"),
        ("block", "blocks.2"),
        ("block", "blocks.3"),
        ("edge", "norm"),
    ]
    assert "blocks.2.up.weight" not in [e.name for c in chunks for e in c.entries]
    assert sum(len(c.entries) for c in chunks) + len(kept) == len(list(model.parameters()))
    with pytest.raises(slidecore.ModelError, match=r"'blocks.1' has no parameters but kept ones"):
        partition(model, ["blocks.0", "blocks.1"], kept)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_runs_of_an_encoder_decoder(kind: str) -> None:
    model = KINDS[kind].build()
    chunks = partition(model)
    assert_covers(model, chunks)
    names = [c.name for c in chunks if c.kind == "block"]
    assert sum("encoder" in name for name in names) == 3
    assert sum("decoder" in name for name in names) == len(names) - 3 == (3 if kind == "t5" else 2)


@pytest.mark.parametrize("by_module", [False, True])
def test_blocks_given(by_module: bool) -> None:
    model = Stack(depth=4)
    blocks = [model.blocks[3], model.blocks[1]] if by_module else ["blocks.3", "blocks.1"]
    chunks = partition(model, blocks)
    assert_covers(model, chunks)
    assert kinds(chunks) == [
        ("edge", "enter+blocks.0"),
        ("block", "blocks.1"),
        ("edge", "blocks.2"),
        ("block", "blocks.3"),
        ("edge", "norm+leave"),
    ]


def test_ties_among_edges() -> None:
    model = Stack(width=7, features=7, outputs=7)
    model.leave.weight = model.enter.weight
    chunks = partition(model)
    assert_covers(model, chunks)
    edge = chunks[0]
    assert edge.name == "enter+norm+leave"
    assert [e.name for e in edge.entries if len(e.owners) == 2] == ["enter.weight"]


def test_layout() -> None:
    model = Stack(depth=3)
    model.blocks[1].up.weight.requires_grad_(False)
    model.blocks[2].requires_grad_(False)
    chunks = partition(model)
    lay_out(chunks)
    for chunk in chunks:
        assert [e.trainable for e in chunk.entries] == sorted((e.trainable for e in chunk.entries), reverse=True)
        for entry, following in pairwise(chunk.entries):
            assert entry.offset + entry.numel <= following.offset
        assert all(e.offset % ENTRY_ALIGNMENT == 0 for e in chunk.entries)
        trained = [e for e in chunk.entries if e.trainable]
        assert chunk.trainable_numel >= (trained[-1].offset + trained[-1].numel if trained else 0)
        assert all(e.offset >= chunk.trainable_numel for e in chunk.entries if not e.trainable)
        assert chunk.numel >= chunk.entries[-1].offset + chunk.entries[-1].numel
    assert chunks[3].trainable_numel == 0


@pytest.mark.parametrize(("moments", "bytes_of_moments"), [("float32", 8), ("8bit", 2)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_take_what_the_layout_says(
    offload: Callable[..., nn.Module], dtype: torch.dtype, train: bool, moments: Any, bytes_of_moments: int
) -> None:
    model = Stack(depth=3)
    model.blocks[1].requires_grad_(False)
    chunks = partition(model)
    if not train:
        for chunk in chunks:
            for entry in chunk.entries:
                entry.trainable = False
    lay_out(chunks)
    expected = state_bytes(chunks, dtype, train, moments)
    offload(model, compute_dtype=dtype, train=train, moments=moments)
    assert slidecore.stats(model).planes_bytes == expected
    # Per parameter: bf16 weight + residual and both moments, or as many bytes of float32.
    if train:
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert expected > parameters * (4 + bytes_of_moments)
