"""Finds a model's chunks by its structure.

The model's repeated blocks are the longest runs of same-class modules in a container; each block is a chunk. What
lies before a run, between runs and after them is one chunk each ("edge" chunks: embeddings, final norm and head).
Parameters held directly by a module that contains a run cannot be seen at any call of a smaller module; they stay on
the device while that module runs (a "resident" chunk).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from slidecore.errors import ModelError

ChunkKind = Literal["block", "edge", "resident"]


@dataclass(eq=False)
class Entry:
    """One parameter of a chunk. `owners` are all places that hold it: more than one if it is tied."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    shape: torch.Size
    numel: int
    trainable: bool
    offset: int = 0  # in the chunk's planes, in elements
    step: int = 0  # updates so far
    version: int = 0  # of the parameter, when its value was last known (see `edits`)


@dataclass(eq=False)
class Chunk:
    """Parameters that travel together, and the modules whose calls are their visits."""

    name: str
    kind: ChunkKind
    uses: list[tuple[str, nn.Module]]
    entries: list[Entry] = field(default_factory=list)
    index: int = -1
    numel: int = 0  # elements of the weight plane, padding included
    trainable_numel: int = 0  # elements of residual, moments and gradient: the trainable entries come first


Ids = Collection[int]  # of parameters


def _has_parameters(module: nn.Module, kept: Ids) -> bool:
    return any(id(p) not in kept for p in module.parameters())


def _run_of(children: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The longest run of same-class modules; empty if there are not two of them."""
    best: list[tuple[str, nn.Module]] = []
    start = 0
    for i in range(1, len(children) + 1):
        if i == len(children) or type(children[i][1]) is not type(children[start][1]):
            if i - start > len(best):
                best = children[start:i]
            start = i
    return best if len(best) >= 2 else []


def _find_runs(module: nn.Module, prefix: str, kept: Ids) -> list[tuple[str, nn.Module]]:
    """All blocks below `module`, outermost runs only, in the order in which they are registered."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        run = children = [(n, m) for n, m in module.named_children() if _has_parameters(m, kept)]
        # A ModuleList is a list of peers: blocks of several classes in it (hybrid models, where attention and other
        # blocks take turns) are one run.
        peers = isinstance(module, nn.ModuleList) and len({type(m) for _, m in children}) < len(children)
        if not peers:
            run = _run_of(children)
        # What has no forward (a ModuleList) is never called itself: the blocks are in it.
        if run and type(run[0][1]).forward is not nn.Module.forward:
            return [(f"{prefix}{n}", m) for n, m in run]
    blocks: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        blocks += _find_runs(child, f"{prefix}{name}.", kept)
    return blocks


def _explicit_blocks(model: nn.Module, blocks: Sequence[str | nn.Module], kept: Ids) -> list[tuple[str, nn.Module]]:
    names = {id(m): n for n, m in model.named_modules()}
    found: list[tuple[str, nn.Module]] = []
    for block in blocks:
        if isinstance(block, str):
            try:
                module = model.get_submodule(block)
            except AttributeError as error:
                raise ModelError(f"blocks: the model has no module named {block!r}") from error
            found.append((block, module))
        elif id(block) in names:
            found.append((names[id(block)], block))
        else:
            raise ModelError(f"blocks: a {type(block).__name__} given there is not a module of this model")
    for name, module in found:
        if not _has_parameters(module, kept):
            raise ModelError(f"blocks: {name!r} has no parameters" + (" but kept ones" if kept else ""))
        inside = [n for n, _ in found if n.startswith(name + ".")]
        if inside:
            raise ModelError(f"blocks: {inside[0]!r} lies inside {name!r}; a parameter can be in one chunk only")
    order = {n: i for i, (n, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda item: order[item[0]])


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                owners.setdefault(id(parameter), []).append((name, module, attribute))
    return owners


def _groups(model: nn.Module, blocks: list[tuple[str, nn.Module]], kept: Ids) -> list[Chunk]:
    """Chunks in registration order: blocks, the edges around them, and what modules around the blocks hold directly."""
    block_ids = {id(m) for _, m in blocks}
    around = {
        id(module)
        for module in model.modules()
        if id(module) not in block_ids and any(id(m) in block_ids for m in module.modules())
    }
    chunks: list[Chunk] = []
    resident: list[tuple[str, nn.Module]] = []
    edge: list[tuple[str, nn.Module]] = []

    def close_edge() -> None:
        if edge:
            chunks.append(Chunk(name="+".join(n for n, _ in edge), kind="edge", uses=list(edge)))
            edge.clear()

    walked: set[int] = set()  # a module with several parents is used once for each, and wrapped once

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in walked:
            return
        walked.add(id(module))
        if id(module) in block_ids:
            close_edge()
            chunks.append(Chunk(name=name, kind="block", uses=[(name, module)]))
        elif id(module) in around:
            if any(p is not None and id(p) not in kept for p in module._parameters.values()):
                resident.append((name, module))
            for child_name, child in module.named_children():
                walk(child, f"{name}.{child_name}" if name else child_name)
        elif _has_parameters(module, kept):
            edge.append((name, module))

    walk(model, "")
    close_edge()
    if resident:
        chunks.append(Chunk(name="resident", kind="resident", uses=resident))
    return chunks


def _own_parameters(chunk: Chunk, kept: Ids) -> Iterable[nn.Parameter]:
    for _, module in chunk.uses:
        yield from (p for p in module.parameters(recurse=chunk.kind != "resident") if id(p) not in kept)


def _merge_tied(model: nn.Module, chunks: list[Chunk], kept: Ids) -> list[Chunk]:
    """Edges that share a parameter become one chunk with several uses; a block shares with nobody."""
    holder: dict[int, Chunk] = {}
    merged = list(chunks)
    for chunk in chunks:
        current = chunk
        for parameter in list(_own_parameters(chunk, kept)):
            other = holder.setdefault(id(parameter), current)
            if other is current:
                continue
            if "block" in (other.kind, current.kind) or other.kind != current.kind:
                name = next(n for n, p in model.named_parameters() if p is parameter)
                raise ModelError(
                    f"a parameter of shape {tuple(parameter.shape)} is shared between {other.name!r} and "
                    f"{current.name!r}; a block cannot share parameters with another chunk. Untie them, keep the "
                    f"parameter on the device (keep=[{name!r}]), or give `blocks=` such that they lie in one block"
                )
            other.uses += [use for use in current.uses if all(use[1] is not u[1] for u in other.uses)]
            other.name = "+".join(n for n, _ in other.uses)
            merged.remove(current)
            for key, value in holder.items():
                if value is current:
                    holder[key] = other
            current = other
    return merged


def partition(model: nn.Module, blocks: Sequence[str | nn.Module] | None = None, kept: Ids = ()) -> list[Chunk]:
    """Returns the model's chunks in registration order, with their entries; `index` and layout are not yet set.

    Args:
        model: any module; not changed.
        blocks: names or modules to take as blocks instead of the runs found by structure.
        kept: ids of parameters that are left out.

    Raises:
        ModelError: no blocks were found, `blocks` does not fit the model, or a block shares a parameter with
            another chunk (both are named).
    """
    found = _find_runs(model, "", kept) if blocks is None else _explicit_blocks(model, blocks, kept)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no repeated blocks (two or more modules of one class in a ModuleList or "
            f"Sequential), so there is nothing to slide through the window. Give them by name: "
            f"slidecore.offload(model, blocks=['stage1', 'stage2'])"
        )
    chunks = _merge_tied(model, _groups(model, found, kept), kept)
    owners = _owners(model)
    for index, chunk in enumerate(chunks):
        chunk.index = index
        seen: set[int] = set()
        for parameter in _own_parameters(chunk, kept):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            places = owners[id(parameter)]
            if not parameter.is_floating_point():
                raise ModelError(
                    f"parameter {places[0][0]!r} has dtype {parameter.dtype}; only floating-point parameters can be "
                    f"offloaded (keep quantised weights in buffers)"
                )
            chunk.entries.append(
                Entry(
                    name=places[0][0],
                    parameter=parameter,
                    owners=[(m, a) for _, m, a in places],
                    shape=parameter.shape,
                    numel=parameter.numel(),
                    trainable=parameter.requires_grad,
                )
            )
    return chunks
