"""Random sequences of calls of a training loop end where the same calls end in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slidecore
import torch
from _deferred import Side, assert_alike, everything, same_bits, sides
from _models import Residual, Stack, feature_batches, loss_of
from torch import nn

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'slidecore[test]'")
st = hypothesis.strategies

# A call and what it is made with.
CALLS = st.one_of(
    st.tuples(st.just("backward"), st.integers(0, 5)),
    st.tuples(st.just("backward inside no_sync"), st.integers(0, 5)),
    st.tuples(st.just("backward of a part"), st.integers(0, 4)),
    st.tuples(st.just("forward"), st.integers(0, 5)),
    st.tuples(st.just("backward of the oldest forward"), st.just(0)),
    st.tuples(st.just("drop forwards"), st.just(0)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("zero_grad"), st.booleans()),
    st.tuples(st.just("model.zero_grad"), st.booleans()),
    st.tuples(st.just("clip"), st.sampled_from([1e-3, 0.1, 10.0])),
    st.tuples(st.just("clip by value"), st.sampled_from([1e-4, 1e-2])),
    st.tuples(st.just("clip inf"), st.sampled_from([1e-3, 1.0])),
    st.tuples(st.just("edit"), st.integers(0, 20)),
    st.tuples(st.just("view"), st.integers(0, 20)),
    st.tuples(st.just("drop one"), st.integers(0, 20)),
    st.tuples(st.just("rate"), st.sampled_from([1e-3, 3e-3, 1e-2])),
    st.tuples(st.just("evaluate"), st.integers(0, 5)),
    st.tuples(st.just("failing forward"), st.integers(0, 3)),
    st.tuples(st.just("failing backward"), st.integers(0, 3)),
    st.tuples(st.just("state"), st.just(0)),
)
OPTIONS = st.fixed_dictionaries(
    {
        "window": st.integers(1, 3),
        "micro_batch": st.sampled_from(["auto", 2]),
        "keep_graphs": st.integers(0, 4),
        "piece_bytes": st.sampled_from([4096, 1 << 20]),
        "Max_grad_norm": st.sampled_from([None, 0.05]),
        "Skip_nonfinite": st.booleans(),
    }
)


class Fails(Residual):
    armed = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed == "forward":
            raise RuntimeError("a fault of the test")
        out = super().forward(x)
        if self.armed == "backward" and out.requires_grad:
            out.register_hook(self.fault)
        return out

    def fault(self, gradient: torch.Tensor) -> None:
        if self.armed == "backward":
            raise RuntimeError("a fault of the test")


class Loop:
    """Makes the calls on one side."""

    def __init__(self, side: Side, max_grad_norm: float | None) -> None:
        self.side, self.max_grad_norm = side, max_grad_norm
        self.forwards: list[torch.Tensor] = []
        self.batches = feature_batches(6, shape=(3, 4))
        loss_of(side.model, self.batches[0])  # whether a batch may be split is tried out in the first forward

    def make(self, call: str, value: Any) -> Any:
        """The call; returns what the other side must return, too."""
        model, optimizer = self.side.model, self.side.optimizer
        parameters = list(model.parameters())
        chosen = parameters[value % len(parameters)] if isinstance(value, int) else None
        if call == "backward":
            return self.side.backward(self.batches[value])
        if call == "backward inside no_sync":
            with self.side.no_sync():
                return self.side.backward(self.batches[value])
        if call == "backward of a part":
            h = model.enter(self.batches[value]["x"])
            for block in model.blocks[: value + 1]:
                h = block(h)
            h.square().mean().backward()
            return None
        if call == "forward":
            self.forwards.append(loss_of(model, self.batches[value]))
            return self.forwards[-1].item()
        if call == "backward of the oldest forward" and self.forwards:
            self.forwards.pop(0).backward()
        elif call == "drop forwards":
            self.forwards.clear()
        elif call == "step":
            self.step()
        elif call == "zero_grad":
            optimizer.zero_grad(set_to_none=value)
        elif call == "model.zero_grad":
            model.zero_grad(set_to_none=value)
        elif call == "clip":
            return torch.nn.utils.clip_grad_norm_(parameters, value).item()
        elif call == "clip inf":
            return torch.nn.utils.clip_grad_norm_(parameters, value, math.inf).item()
        elif call == "clip by value" and any(p.grad is not None for p in parameters):  # PyTorch refuses to clip nothing
            torch.nn.utils.clip_grad_value_(parameters, value)
        elif call == "edit" and chosen is not None and chosen.grad is not None:
            chosen.grad.add_(chosen.detach(), alpha=0.01)
        elif call == "view" and chosen is not None and chosen.grad is not None:
            chosen.grad.view(-1)[::2].mul_(0.5)
        elif call == "drop one" and chosen is not None:
            chosen.grad = None
        elif call == "rate":
            optimizer.param_groups[0]["lr"] = value
        elif call == "evaluate":
            with torch.no_grad():
                return loss_of(model, self.batches[value]).item()
        elif call == "failing forward":
            model.blocks[value].armed = "forward"
            with pytest.raises(RuntimeError, match="a fault of the test"):
                loss_of(model, self.batches[0])
            model.blocks[value].armed = ""
        elif call == "failing backward":
            self.failing_backward(model.blocks[value])
        elif call == "state":
            optimizer.load_state_dict(optimizer.state_dict())
        return None

    def step(self) -> None:
        if not self.side.offloaded and self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.side.model.parameters(), self.max_grad_norm)
        self.side.optimizer.step()
        # A step uses gradients up, and forwards of before are then of other weights.
        self.side.optimizer.zero_grad()
        self.forwards.clear()

    def failing_backward(self, block: Any) -> None:
        """Drops all gradients that wait, which in plain PyTorch is the user's to do."""
        self.forwards.clear()
        block.armed = "backward"
        loss = loss_of(self.side.model, self.batches[0])
        if self.side.offloaded:
            before = everything(self.side.model)
            with pytest.raises(RuntimeError, match="a fault of the test"):
                loss.backward()
            with pytest.warns(UserWarning, match="nothing was updated"):
                self.side.optimizer.step()
            assert same_bits(everything(self.side.model), before)
        block.armed = ""
        self.side.model.zero_grad()


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(calls=st.lists(CALLS, min_size=1, max_size=14), options=OPTIONS)
def test_any_calls_end_where_pytorch_ends(calls: list[tuple[str, Any]], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    models: list[nn.Module] = []

    def offload(model: nn.Module, **given: Any) -> nn.Module:
        models.append(slidecore.offload(model, device="cpu", **given))
        return models[0]

    max_grad_norm = options["Max_grad_norm"]
    mine, theirs = sides(offload, Stack(depth=4, block=lambda: Fails(13, 17)), **options)
    try:
        loops = [Loop(side, max_grad_norm) for side in (mine, theirs)]
        for call, value in [*calls, ("step", 0)]:
            found = [loop.make(call, value) for loop in loops]
            if found[1] is None:
                assert found[0] is None
            else:
                assert found[0] == pytest.approx(found[1], rel=2e-5, abs=1e-7), call
            for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), call
        assert_alike(mine, theirs, rtol=2e-5, atol=4e-6)
    finally:
        slidecore.close(models[0])
