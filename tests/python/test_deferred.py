"""Deferred updates and plain PyTorch do the same in whatever order their calls come."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import slidecore
import torch
from _deferred import SETTINGS, Offload, Side, assert_alike, everything, narrow, same_bits, sides
from _models import (
    Batch,
    Residual,
    Stack,
    clone,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    weights,
)
from slidecore.offloading import engine_of
from torch import nn

# --- steps that are skipped


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_step_changes_nothing(
    offload: Offload, compute_dtype: torch.dtype, value: float, passes: int, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(batch: Batch) -> Batch:
        x = batch["x"].clone()
        x[1, 2, 3] = value
        return {**batch, "x": x}

    model = offload(Stack(), compute_dtype=compute_dtype)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2, skip_nonfinite=True)
    twin = offload(Stack(), compute_dtype=compute_dtype)  # sees no broken batch at all
    twins = slidecore.AdamW(twin.parameters(), lr=1e-2, skip_nonfinite=True)
    for step in range(6):
        batches = [narrow(b) if compute_dtype == torch.bfloat16 else b for b in feature_batches(passes, seed=step)]
        before = everything(model)
        skips = step % 3 == 1
        for m, o in ((model, optimizer), (twin, twins)):
            if skips and m is twin:
                continue
            for i, batch in enumerate(batches):
                loss = loss_of(m, broken(batch) if skips and i == passes // 2 else batch)
                if i < passes - 1:
                    with m.no_sync():
                        loss.backward()
                else:
                    loss.backward()
            o.step()
            o.zero_grad()
        assert same_bits(everything(model), before) == skips
        assert same_bits(everything(model), everything(twin))
        assert (optimizer.grad_norm is not None and bool(optimizer.grad_norm.isfinite())) != skips
    assert optimizer.skipped_steps == 2
    assert twins.skipped_steps == 0
    assert len([r for r in caplog.records if "this step is skipped, nothing was changed" in r.message]) == 2


def test_a_skipped_step_leaves_graphs_valid(offload: Offload) -> None:
    """The weights have not changed, so a forward from before can still be differentiated."""
    mine, theirs = sides(offload, Stack(), Skip_nonfinite=True)
    good, bad = feature_batches(2)
    bad["x"][0, 0, 0] = math.inf
    kept = loss_of(mine.model, good)
    mine.backward(bad)
    mine.step()
    kept.backward()
    mine.step()
    theirs.backward(good)
    theirs.step()
    assert_alike(mine, theirs)


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_non_finite_gradients_without_skipping_do_what_pytorch_does(offload: Offload, max_norm: float | None) -> None:
    mine, theirs = sides(offload, Stack(), Max_grad_norm=max_norm)
    batch = feature_batches(1)[0]
    batch["x"][0, 0, 0] = math.inf
    for side in (mine, theirs):
        side.backward(batch)
        if side is theirs and max_norm is not None:
            torch.nn.utils.clip_grad_norm_(side.model.parameters(), max_norm)
        side.step()
    slidecore.synchronize(mine.model)
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_clip_raises_on_a_non_finite_norm_where_asked(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack())
    batch = feature_batches(1)[0]
    batch["x"][0, 0, 0] = math.inf
    for side in (mine, theirs):
        side.backward(batch)
    with pytest.raises(RuntimeError, match="non-finite"):
        slidecore.clip_grad_norm_(mine.model, 1.0, error_if_nonfinite=True)
    for side in (mine, theirs):
        side.optimizer.zero_grad()
        side.backward(feature_batches(1, seed=5)[0])
        side.step()
    assert_alike(mine, theirs)


# --- accumulation


@pytest.mark.parametrize("announced", [True, False], ids=["no_sync", "unannounced"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_passes_to_a_step_may_vary(
    offload: Offload, compute_dtype: torch.dtype, announced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slidecore")
    plain = Stack()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = offload(clone(plain), compute_dtype=compute_dtype)
    optimizer = slidecore.AdamW(model.parameters(), **SETTINGS, update="deferred")
    twin = offload(clone(plain), compute_dtype=compute_dtype)  # always announced
    twins = slidecore.AdamW(twin.parameters(), **SETTINGS, update="deferred")
    for step, passes in enumerate([1, 2, 5, 1, 3, 3, 1]):
        for m, o in ((model, optimizer), (twin, twins)):
            for i, batch in enumerate(feature_batches(passes, seed=step)):
                batch = narrow(batch) if compute_dtype == torch.bfloat16 else batch
                if i < passes - 1 and (announced or m is twin):
                    with m.no_sync():
                        loss_of(m, batch).backward()
                else:
                    loss_of(m, batch).backward()
            o.step()
            o.zero_grad()
    assert same_bits(everything(model), everything(twin))
    assert ("a second backward came" in caplog.text) != announced


@pytest.mark.parametrize("zero_grads", ["optimizer", "model", None])
def test_unannounced_passes_are_prefetched_like_announced_ones(offload: Offload, zero_grads: str | None) -> None:
    """Once a step has shown how many passes it has."""
    found = {}
    for announced in (True, False):
        model = offload(Stack(depth=6))
        optimizer = slidecore.AdamW(model.parameters(), update="deferred")
        for step in range(6):
            if step == 2:
                before = slidecore.stats(model).counters
            for i, batch in enumerate(feature_batches(3, seed=step)):
                if announced and i < 2:
                    with model.no_sync():
                        loss_of(model, batch).backward()
                else:
                    loss_of(model, batch).backward()
            optimizer.step()
            if zero_grads is not None:
                (optimizer if zero_grads == "optimizer" else model).zero_grad()
        slidecore.synchronize(model)
        after = slidecore.stats(model).counters
        found[announced] = {name: after[name] - before[name] for name in ("visits", "hits", "unscheduled_visits")}
    assert found[True] == found[False]
    assert found[True]["unscheduled_visits"] == 0


def test_auto_goes_over_to_deferred_at_the_first_no_sync(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), update="auto")
    engine = engine_of(mine.model)
    for step, passes in enumerate([1, 1, 3, 2, 1]):
        for side in (mine, theirs):
            batches = feature_batches(passes, seed=step)
            for batch in batches[:-1]:
                with side.no_sync():
                    side.backward(batch)
            side.backward(batches[-1])
            side.step()
        assert (engine.updates is engine.deferred) == (step >= 2)
    assert_alike(mine, theirs)


def test_no_sync_around_forward_only_or_backward_only(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), update="auto")
    first, second, third = feature_batches(3)
    for side in (mine, theirs):
        with side.no_sync():
            loss = loss_of(side.model, first)
        loss.backward()
        loss = loss_of(side.model, second)
        with side.no_sync():
            loss.backward()
        with side.no_sync(), side.no_sync():
            side.backward(third)
            side.step()  # inside: as in DDP it is the user's word that counts
    assert_alike(mine, theirs)


# --- several graphs alive


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 3}, {"micro_batch": 2}, {"window": 3}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 2, 0)])
def test_several_forwards_before_their_backwards(
    offload: Offload, order: tuple[int, ...], tied: bool, options: dict[str, Any]
) -> None:
    plain = language_model("llama", tied=tied).train()
    mine, theirs = sides(offload, plain, **options)
    for step in range(3):
        batches = token_batches(len(order), seed=step)
        for side in (mine, theirs):
            losses = [loss_of(side.model, batch) for batch in batches]
            for i in order:
                losses[i].backward()
            side.step()
    assert_alike(mine, theirs)


def test_gradients_go_down_while_other_graphs_are_alive(offload: Offload) -> None:
    """A chunk's sum leaves the device after its last visit of the pass, not at the pass's end."""
    model = offload(Stack(depth=8))
    optimizer = slidecore.AdamW(model.parameters(), update="deferred")
    engine = engine_of(model)
    most = calls = 0

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        def hook(gradient: torch.Tensor) -> None:
            nonlocal most, calls
            calls += 1
            most = max(most, len(engine._sums))

        if output.requires_grad:
            output.register_hook(hook)

    for block in model.blocks:
        block.register_forward_hook(watch)
    for _ in range(2):
        first, second = feature_batches(2)
        dropped = loss_of(model, first)
        losses = [loss_of(model, first), loss_of(model, second)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        del dropped, losses
    assert calls == 2 * 2 * 8
    assert most <= 1


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", ["optimizer", "model", "model, to zero", "optimizer, to zero"])
def test_gradients_dropped_between_the_backwards_of_two_graphs(
    offload: Offload, drop: str, compute_dtype: torch.dtype
) -> None:
    """A tied weight's two uses are both in the second pass, which must not count on the first."""
    plain = language_model("llama", tied=True).train()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    mine, theirs = sides(offload, plain, compute_dtype=compute_dtype)
    first, second = token_batches(2)
    for side in (mine, theirs):
        losses = [loss_of(side.model, first), loss_of(side.model, second)]
        losses[0].backward()
        dropping = side.model if drop.startswith("model") else side.optimizer
        dropping.zero_grad(set_to_none="zero" not in drop)
        losses[1].backward()
    for (name, a), (_, b) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        close = {"rtol": 0.1, "atol": 2e-4} if compute_dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
        if compute_dtype == torch.bfloat16:
            assert (a.grad.float() - b.grad).norm() < 0.03 * b.grad.norm(), name
        else:
            assert torch.allclose(a.grad, b.grad, **close), name
    if compute_dtype == torch.float32:
        for side in (mine, theirs):
            side.step()
        assert_alike(mine, theirs)


def half_way(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss that only the first blocks have a part in."""
    taken = []
    handle = model.blocks[2].register_forward_hook(lambda _, __, out: taken.append(out))
    model(batch["x"])
    handle.remove()
    return taken[0].square().mean()


@pytest.mark.parametrize("drop", ["model", "one", None])
def test_a_pass_over_half_of_the_blocks_leaves_the_others_as_they_were(offload: Offload, drop: str | None) -> None:
    """What was dropped stays dropped, what was not dropped counts."""
    mine, theirs = sides(offload, Stack())
    first, second = feature_batches(2)
    for side in (mine, theirs):
        side.backward(first)
        if drop == "model":
            side.model.zero_grad()
        elif drop == "one":
            side.model.blocks[4].up.weight.grad = None
            side.model.blocks[0].up.weight.grad = None
        half_way(side.model, second).backward()
        side.step()
    assert_alike(mine, theirs)


# --- evaluation, failures, and other things in between


@pytest.mark.parametrize("where", ["before step", "after step", "inside no_sync"])
def test_evaluation_in_between(offload: Offload, where: str) -> None:
    mine, theirs = sides(offload, Stack(dropout=0.1), Max_grad_norm=0.3)
    for step in range(4):
        seen = []
        batches = feature_batches(3, seed=step)
        for side in (mine, theirs):
            torch.manual_seed(step)
            for i, batch in enumerate(batches[:2]):
                side.model.train()
                if i == 0:
                    with side.no_sync():
                        side.backward(batch)
                        if where == "inside no_sync":
                            seen.append(evaluate(side, batches[2]))
                else:
                    side.backward(batch)
            if where == "before step":
                seen.append(evaluate(side, batches[2]))
            if side is theirs:
                torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.3)
            side.step()
            if where == "after step":
                seen.append(evaluate(side, batches[2]))
        assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert_alike(mine, theirs)


def evaluate(side: Side, batch: Batch) -> torch.Tensor:
    side.model.eval()
    with torch.no_grad():
        out = side.model(batch["x"])
    side.model.train()
    return out


class Fails(Residual):
    """Raises once in recomputation, when armed."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed and torch.is_grad_enabled():
            self.armed = False
            raise RuntimeError("a fault of the test")
        return super().forward(x)


@pytest.mark.parametrize("call_step", [True, False], ids=["step", "straight on"])
@pytest.mark.parametrize("passes_before", [0, 2])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_failed_backward_drops_the_steps_gradients(
    offload: Offload, at: int, passes_before: int, call_step: bool
) -> None:
    mine, theirs = sides(offload, Stack(block=lambda: Fails(13, 29)), Skip_nonfinite=True)
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
        side.step()
    before = everything(mine.model)
    for batch in feature_batches(passes_before, seed=1):
        with mine.no_sync():
            mine.backward(batch)
    loss = loss_of(mine.model, feature_batches(1, seed=2)[0])
    mine.model.blocks[at].armed = True
    with pytest.raises(RuntimeError, match="a fault of the test"):
        loss.backward()
    with pytest.raises(slidecore.UsageError, match="has failed, and its gradients will be dropped"):
        slidecore.clip_grad_norm_(mine.model, 1.0)
    with pytest.warns(UserWarning, match="those of earlier passes to the same step, are dropped"):
        mine.optimizer.step() if call_step else loss_of(mine.model, feature_batches(1)[0])
    assert all(p.grad is None for p in mine.model.parameters())
    assert same_bits(everything(mine.model), before)
    for side in (mine, theirs):
        for batch in feature_batches(2, seed=3):
            side.backward(batch)
        side.step()
    assert_alike(mine, theirs)


def test_zero_grad_drops_what_waits(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        for batch in feature_batches(2):
            side.backward(batch)
        side.optimizer.zero_grad()
        side.optimizer.step()
        side.backward(feature_batches(1, seed=4)[0])
        side.step()
    assert_alike(mine, theirs)


def test_closure(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), Max_grad_norm=0.1)
    for step in range(3):
        losses = []
        for side in (mine, theirs):

            def closure(side: Side = side, step: int = step) -> float:
                side.optimizer.zero_grad()
                for batch in feature_batches(2, seed=step):
                    loss = side.backward(batch)
                if side is theirs:
                    torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.1)
                return loss

            losses.append(side.optimizer.step(closure))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_alike(mine, theirs)


class Experts(nn.Module):
    """Each batch takes one of three experts; the others get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Residual(13, 17) for _ in range(3))
        self.chosen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[self.chosen](x)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_experts_that_get_a_gradient_in_some_passes_only(offload: Offload, compute_dtype: torch.dtype) -> None:
    mine, theirs = sides(
        offload, Stack(block=Experts), Max_grad_norm=0.2, blocks=[f"blocks.{i}" for i in range(5)],
        compute_dtype=compute_dtype,
    )  # fmt: skip
    before = weights(mine.model)
    for step, choices in enumerate([(0, 1), (1,), (0, 0, 1), (1, 1)]):
        for side in (mine, theirs):
            for choice, batch in zip(choices, feature_batches(len(choices), seed=step), strict=True):
                for block in side.model.blocks:
                    block.chosen = choice
                side.backward(narrow(batch) if side is mine and compute_dtype == torch.bfloat16 else batch)
            if side is theirs:
                torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.2)
            side.step()
    if compute_dtype == torch.float32:
        assert_alike(mine, theirs)
    slidecore.synchronize(mine.model)
    for name, parameter in mine.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".experts.2." in name), name


def test_parameters_in_no_group_keep_out_of_norm_and_update(offload: Offload) -> None:
    plain = Stack()
    model = offload(clone(plain))

    def half(m: nn.Module) -> list[nn.Parameter]:
        return [p for n, p in m.named_parameters() if "up" in n or "leave" in n]

    mine = Side(model, slidecore.AdamW(half(model), **SETTINGS, max_grad_norm=0.01))
    theirs = Side(plain, torch.optim.AdamW(half(plain), **SETTINGS))
    for side in (mine, theirs):
        for batch in feature_batches(3):
            side.backward(batch)
            if side is theirs:
                norm = torch.nn.utils.clip_grad_norm_(half(plain), 0.01)
            side.step()
            side.model.zero_grad()
            assert all(p.grad is None for p in side.model.parameters())
    assert mine.optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_alike(mine, theirs)


def test_the_norm_is_that_of_the_last_step(offload: Offload) -> None:
    mine, theirs = sides(offload, Stack(), Max_grad_norm=1e9)
    assert mine.optimizer.grad_norm is None
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs.model.parameters()])
    mine.optimizer.step()
    assert mine.optimizer.grad_norm.dtype == torch.float32
    assert mine.optimizer.grad_norm.item() == pytest.approx(expected.item(), rel=1e-6)
    mine.optimizer.step()  # had nothing to do
    assert mine.optimizer.grad_norm is None


def test_updates_start_in_the_order_of_the_next_forward(offload: Offload) -> None:
    model = offload(Stack(depth=4))
    optimizer = slidecore.AdamW(model.parameters(), update="deferred")
    for batch in feature_batches(2):
        loss_of(model, batch).backward()
        with slidecore.trace(model) as trace:
            optimizer.step()
            slidecore.synchronize(model)
        updated = [trace.chunk_names[chunk] for _, kind, chunk, *_ in trace.spans if kind == "update"]
        assert updated == ["enter", *(f"blocks.{i}" for i in range(4)), "norm+leave"]


def test_closing_drops_gradients_that_wait(offload: Offload, caplog: pytest.LogCaptureFixture) -> None:
    mine, theirs = sides(offload, Stack())
    for side in (mine, theirs):
        side.backward(feature_batches(1)[0])
        side.step()
    mine.backward(feature_batches(1)[0])
    handle = mine.model.enter.weight.grad
    assert_alike(mine, theirs)
    slidecore.close(mine.model)
    assert "gradients wait for optimizer.step()" in caplog.text
    assert all(p.grad is None for p in mine.model.parameters())
    with pytest.raises(slidecore.UsageError, match="this gradient is gone"):
        handle.norm()
    assert torch.allclose(mine.model.enter.weight, theirs.model.enter.weight, atol=1e-6)


def test_memory_of_the_grad_plane(offload: Offload) -> None:
    model = offload(Stack(width=64, inner=128), compute_dtype=torch.bfloat16)
    trainable = sum(c.trainable_numel for c in engine_of(model).chunks)
    planes = [slidecore.stats(model).planes_bytes]
    optimizer = slidecore.AdamW(model.parameters(), update="deferred")
    planes.append(slidecore.stats(model).planes_bytes)
    with model.no_sync():
        loss_of(model, narrow(feature_batches(1)[0])).backward()
    planes.append(slidecore.stats(model).planes_bytes)
    optimizer.step()
    pages = 4096 * len(engine_of(model).chunks)
    assert 0 <= planes[1] - planes[0] - 2 * trainable < pages
    assert 0 <= planes[2] - planes[0] - 4 * trainable < pages
