"""Device budgets: training stays below them, and those that are too small are refused with the smallest that works.

On the host backend slidecore counts what it places on its device: slots, gradients, saved inputs, graphs, logits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _models import (
    Batch,
    Residual,
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
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def deep(kind: str) -> nn.Module:
    """Many blocks: the state of all is several times what a window needs."""
    if kind == "stack":
        return Stack(width=33, inner=67, depth=24).train()
    return language_model(kind, layers=20, tied=kind == "qwen3").train()


def batches_of(kind: str, count: int, batch: int) -> list[Batch]:
    return feature_batches(count, shape=(batch, 21)) if kind == "stack" else token_batches(count, batch=batch)


def smallest_named(error: pytest.ExceptionInfo[BaseException]) -> int:
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found, str(error.value)
    return int(found[1])


def smallest_for(build: Callable[[], nn.Module], batch: Batch | None, **options: Any) -> int:
    """The budget that the errors lead to: first that of offload(), then that of the batch."""
    with pytest.raises(slidecore.BudgetError) as error:
        slidecore.offload(build(), device="cpu", device_memory=1, **options)
    budget = smallest_named(error)
    if batch is None:
        return budget
    model = slidecore.offload(build(), device="cpu", device_memory=budget, **options)
    with pytest.raises(slidecore.BudgetError) as error:
        loss_of(model, batch)
    slidecore.close(model)
    return smallest_named(error)


@pytest.mark.parametrize(
    ("room", "batch", "micro_batch"),
    [(1.0, 2, "auto"), (1.0, 7, "auto"), (1.0, 7, 1), (1.3, 2, 1), (1.3, 7, "auto"), (2.5, 2, "auto"), (2.5, 7, 1)],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "stack"])
def test_training_stays_below_the_budget(
    offload: Offload, kind: str, room: float, batch: int, micro_batch: Any
) -> None:
    batches = batches_of(kind, 3, batch)
    budget = int(smallest_for(lambda: deep(kind), batches[0]) * room)
    plain = deep(kind)
    model = offload(clone(plain), device_memory=budget, micro_batch=micro_batch)
    losses = train_offloaded(model, batches)
    stats = slidecore.stats(model)
    assert stats.device_memory_peak <= budget
    assert stats.device_memory <= stats.device_memory_peak
    if room < 2:
        assert stats.planes_bytes > 2 * budget
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-4)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_state_many_times_the_budget(offload: Offload, compute_dtype: torch.dtype) -> None:
    model = deep("llama").to(compute_dtype)
    batches = token_batches(4, batch=2)
    budget = smallest_for(lambda: deep("llama"), batches[0], compute_dtype=compute_dtype)
    offload(model, compute_dtype=compute_dtype, device_memory=budget)
    losses = train_offloaded(model, batches)
    assert all(map(math.isfinite, losses))
    stats = slidecore.stats(model)
    assert stats.device_memory_peak <= budget
    assert stats.planes_bytes > 4 * budget
    assert stats.ordinary_training_bytes > 4 * budget


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "stack"])
def test_smallest_budget_for_the_window(offload: Offload, kind: str, window: int) -> None:
    budget = smallest_for(lambda: deep(kind), None, window=window)
    with pytest.raises(slidecore.BudgetError, match="too small"):
        slidecore.offload(deep(kind), device="cpu", device_memory=budget - 1, window=window)
    model = offload(deep(kind), device_memory=budget, window=window)
    assert slidecore.stats(model).device_memory <= budget
    # Enough for inference, which has neither gradients nor graphs.
    with torch.no_grad():
        assert math.isfinite(loss_of(model, batches_of(kind, 1, 2)[0]).item())


def test_smaller_window_is_offered(offload: Offload) -> None:
    with pytest.raises(slidecore.BudgetError, match="or window=2 with at least") as error:
        slidecore.offload(deep("llama"), device="cpu", device_memory="100KiB", window=6)
    assert smallest_named(error) > smallest_for(lambda: deep("llama"), None)


def test_a_slot_for_each_block_is_the_largest_window(offload: Offload) -> None:
    plain, batches = deep("stack"), batches_of("stack", 5, 4)
    blocks = sum(isinstance(module, Residual) for module in plain.modules())
    uploads, memory = {}, {}
    for window in (2, blocks, 10**6):
        model = offload(clone(plain), window=window, keep_graphs=0)
        train_offloaded(model, batches)
        stats = slidecore.stats(model)
        uploads[window], memory[window] = stats.counters["uploads"], stats.device_memory
    # Backward finds the weights that forward brought. How many come at the end, for a forward that does not, depends on
    # when it is counted: at most all.
    assert max(uploads[blocks], uploads[10**6]) <= uploads[2] - (len(batches) - 2) * (blocks - 2)
    assert memory[10**6] == memory[blocks]


@pytest.mark.parametrize("kind", ["llama", "stack"])
def test_smallest_budget_for_the_batch(offload: Offload, kind: str) -> None:
    batches = batches_of(kind, 2, 4)
    budget = smallest_for(lambda: deep(kind), batches[0])
    model = offload(deep(kind), device_memory=budget - 1)
    before = weights(model)
    optimizer = slidecore.AdamW(model.parameters())
    for _ in range(2):  # refused each time, without harm
        with pytest.raises(slidecore.BudgetError, match=r"too small for this batch.*or a smaller batch"):
            loss_of(model, batches[0])
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    smaller = {name: value[:1] for name, value in batches[0].items()}
    loss_of(model, smaller).backward()
    optimizer.step()
    assert slidecore.stats(model).device_memory_peak <= budget - 1
    slidecore.close(model)
    model = offload(deep(kind), device_memory=budget)
    assert all(map(math.isfinite, train_offloaded(model, batches)))
    assert slidecore.stats(model).device_memory_peak <= budget


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_does_not_size_the_window(offload: Offload, tied: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return language_model("llama", tied=tied, layers=6, vocab_size=4096)

    model = build()
    embedding = 4 * model.lm_head.weight.numel()
    block = 4 * max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert embedding > 8 * block
    offload(model, window=3)
    # One slot for the edges, three for blocks; layouts pad each parameter to at most 127 elements more.
    assert slidecore.stats(model).device_memory < 1.1 * embedding + 3 * 1.1 * block
    sizes = {window: smallest_for(build, None, window=window) for window in (2, 3, 4)}
    assert sizes[3] - sizes[2] <= 1.1 * block
    assert sizes[4] - sizes[3] <= 1.1 * block


class Counted(nn.Module):
    """Notes the batch of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(33, 330)
        self.down = nn.Linear(330, 33)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(x.shape[0])
        return x + self.down(torch.tanh(self.up(x)))


def counted() -> nn.Module:
    return Stack(width=33, depth=4, block=Counted).train()


def test_micro_batches_follow_the_budget(offload: Offload) -> None:
    batches = feature_batches(2, shape=(12, 40))
    smallest = smallest_for(counted, batches[0])
    plain = counted()
    expected = train_plain(plain, batches)
    largest = []
    for room in (1.0, 1.2, 1.6, 4.0):
        budget = int(smallest * room)
        model = offload(counted(), device_memory=budget, keep_graphs=0)
        assert train_offloaded(model, batches) == pytest.approx(expected, abs=1e-4)
        assert slidecore.stats(model).device_memory_peak <= budget
        for block in model.blocks:
            sizes = block.sizes
            assert sum(sizes) >= 2 * 2 * 12  # two steps, forward and recomputation
        # The first call of the first block measures a graph with one sample.
        largest.append(max(model.blocks[1].sizes))
        slidecore.close(model)
    assert largest == sorted(largest)
    assert largest[0] == 1
    assert largest[-1] == 12


@pytest.mark.parametrize(("asked", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (7, [7]), (99, [7])])
def test_micro_batches_asked_for(offload: Offload, asked: int, sizes: list[int]) -> None:
    model = offload(counted(), micro_batch=asked)
    loss_of(model, feature_batches(1, shape=(7, 3))[0])
    # Before a batch is split, the first block is asked whether samples are independent: with the first one twice, the
    # second twice, the first alone, and both.
    first = [2, 2, 1, 2] if len(sizes) > 1 else []
    assert model.blocks[0].sizes == first + sizes
    for block in model.blocks[1:]:
        assert block.sizes == sizes


def test_kept_graphs_follow_the_budget(offload: Offload) -> None:
    """What the budget leaves saves recomputation: with enough of it every block runs once."""
    batch = feature_batches(1, shape=(12, 40))[0]
    smallest = smallest_for(counted, batch)
    calls = []
    for room in (1, 3, 6, 40):
        model = offload(counted(), device_memory=smallest * room)
        optimizer = slidecore.AdamW(model.parameters())
        for _ in range(2):
            before = sum(sum(block.sizes) for block in model.blocks)
            loss_of(model, batch).backward()
            optimizer.step()
        calls.append(sum(sum(block.sizes) for block in model.blocks) - before)
        assert slidecore.stats(model).device_memory_peak <= smallest * room
        slidecore.close(model)
    assert calls == sorted(calls, reverse=True)
    assert calls[0] == 2 * 4 * 12
    assert calls[-1] == 4 * 12


def uneven() -> nn.Module:
    """Blocks of two classes in turn, and of one class with different sizes: the last ones are the largest."""
    sizes = iter(range(20, 20 + 12 * 9, 9))

    def block() -> nn.Module:
        inner = next(sizes)
        return Residual(33, inner) if inner % 2 else nn.Sequential(nn.Linear(33, inner), nn.Linear(inner, 33))

    return Stack(width=33, depth=12, block=block).train()


@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("room", [1.0, 1.3, 2.5, 20.0])
def test_blocks_of_different_sizes_stay_below_the_budget(offload: Offload, room: float, micro_batch: Any) -> None:
    batches = feature_batches(4, shape=(6, 21))
    with pytest.raises(slidecore.BudgetError) as error:
        slidecore.offload(uneven(), device="cpu", device_memory=1)
    budget = smallest_named(error)
    for _ in range(20):  # each block that has not been seen before may ask for more
        model = slidecore.offload(uneven(), device="cpu", device_memory=budget, micro_batch=micro_batch)
        try:
            loss_of(model, batches[0])
        except slidecore.BudgetError as error:
            budget = int(re.search(r"at least (\d+) bytes", str(error))[1])
        else:
            break
        finally:
            slidecore.close(model)
    budget = int(budget * room)
    plain = uneven()
    model = offload(clone(plain), device_memory=budget, micro_batch=micro_batch)
    losses = train_offloaded(model, batches)
    assert slidecore.stats(model).device_memory_peak <= budget
    assert losses == pytest.approx(train_plain(plain, batches), abs=1e-4)
    # With room for it, from the second step on no input leaves the device and graphs are kept.
    if room > 10:
        loss = loss_of(model, batches[0])
        assert sum(r.keep_graph for r in engine_of(model)._live if r.use.chunk.kind == "block") == 12
        del loss


def test_graphs_dropped_without_backward_are_given_back(offload: Offload) -> None:
    model = offload(deep("stack"), device_memory="4MiB")
    batch = batches_of("stack", 1, 5)[0]
    loss_of(model, batch)
    rest = slidecore.stats(model).device_memory
    loss = loss_of(model, batch)
    assert slidecore.stats(model).device_memory > rest
    del loss
    assert slidecore.stats(model).device_memory == rest


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"keep_graphs": 3}], ids=str)
def test_nothing_accumulates_over_steps(offload: Offload, options: dict[str, Any]) -> None:
    model = offload(deep("llama"), **options)
    optimizer = slidecore.AdamW(model.parameters())
    use = []
    for batch in token_batches(6, batch=4):
        loss_of(model, batch).backward()
        optimizer.step()
        slidecore.synchronize(model)
        stats = slidecore.stats(model)
        use.append((stats.device_memory, stats.host_memory))
    assert use[1:] == use[1:2] * 5


def test_budget_as_text(offload: Offload) -> None:
    for text in ("1GiB", "0.5 gb", "512MiB", 2**29, 5e8):
        model = offload(Stack(), device_memory=text)
        plain = Stack()
        batches = feature_batches(2)
        assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
        assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
        slidecore.close(model)
