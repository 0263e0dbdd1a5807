"""Loops and models that are unusual but plausible, held to plain PyTorch: right, or a clear error, never silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import (
    Batch,
    Residual,
    Stack,
    distance,
    feature_batches,
    language_model,
    token_batches,
    weights,
    worst,
)
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def mse(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.mse_loss(model(batch["x"]), batch["target"])


def difference(
    offload: Offload, make: Callable[[], nn.Module], loss_of: Loss = mse, steps: int = 4, **options: Any
) -> float:
    """The largest relative distance of a weight matrix after the same steps in plain PyTorch."""
    plain = make()
    offloaded = offload(copy.deepcopy(plain), **options)
    for model, kind in ((plain, torch.optim.AdamW), (offloaded, slidecore.AdamW)):
        optimizer = kind(model.parameters(), lr=1e-3)
        for batch in feature_batches(steps):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    slidecore.synchronize(offloaded)
    return worst(distance(weights(offloaded), weights(plain)))[0]


# --- a module that returns its own weights


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, width))

    def forward(self, length: int) -> torch.Tensor:
        return self.weight[:length]


class WithPositions(nn.Module):
    """Learned positions, as a view of the parameter, are used after other edge chunks had the slot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(7, 13)
        self.positions = Positions(13)
        self.blocks = nn.ModuleList(Residual(13, 29) for _ in range(4))
        self.leave = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, positions = self.enter(x), self.positions(x.shape[1])
        for block in self.blocks:
            h = block(h) + positions * h
        return self.leave(h) + self.leave(positions)


@pytest.mark.parametrize("keep_graphs", [0, 4])
def test_weights_that_a_module_returns(offload: Offload, keep_graphs: int) -> None:
    assert difference(offload, WithPositions, keep_graphs=keep_graphs) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_a_module_returns_in_inference(offload: Offload, mode: Any) -> None:
    plain = WithPositions()
    model = offload(copy.deepcopy(plain))
    x = feature_batches(1)[0]["x"]
    with mode():
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x))


# --- checkpointing inside blocks, and gradients that go past the visits


class Checkpointed(Residual):
    def __init__(self, reentrant: bool, part: bool) -> None:
        super().__init__(13, 29)
        self.reentrant, self.part = reentrant, part

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        if self.part:
            return x + checkpoint(self.inner, self.norm(x), use_reentrant=self.reentrant)
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"keep_graphs": 0}, {"keep_graphs": 5}, {"micro_batch": 2}])
def test_checkpointing_inside_blocks(offload: Offload, reentrant: bool, part: bool, options: dict[str, Any]) -> None:
    assert difference(offload, lambda: Stack(block=lambda: Checkpointed(reentrant, part)), **options) < 1e-4


class Functional(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.leave.weight, self.leave.bias)


def penalized(model: nn.Module, batch: Batch) -> torch.Tensor:
    return mse(model, batch) + 1e-2 * sum(p.pow(2).sum() for p in model.parameters())


@pytest.mark.parametrize(("kind", "loss"), [(Functional, mse), (Stack, penalized)])
def test_gradients_past_the_visits_are_not_lost_in_silence(offload: Offload, kind: type[nn.Module], loss: Loss) -> None:
    model = offload(kind())
    optimizer = slidecore.AdamW(model.parameters())
    with pytest.raises(slidecore.UsageError, match=r"gradient reached .* past the offloaded modules"):
        loss(model, feature_batches(1)[0]).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    slidecore.close(model)
    loss(model, feature_batches(1)[0]).backward()  # a plain model again
    assert model.leave.weight.grad is not None


# --- tensors from inside a block


class Auxiliary(Residual):
    """Keeps a penalty on its input in a list, for the loss to find."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.penalties: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.penalties = [x.pow(2).mean()]
        return super().forward(x)


@pytest.mark.parametrize("keep_graphs", [0, 5])
def test_gradients_of_tensors_from_inside_a_block_are_not_lost_in_silence(offload: Offload, keep_graphs: int) -> None:
    model = offload(Stack(block=Auxiliary), keep_graphs=keep_graphs)
    optimizer = slidecore.AdamW(model.parameters())
    batch = feature_batches(1)[0]
    with pytest.raises(RuntimeError, match="outside its backward visit"):
        (mse(model, batch) + sum(block.penalties[0] for block in model.blocks)).backward()
    optimizer.step()
    mse(model, batch).backward()
    optimizer.step()


class Complex(Residual):
    """Parameters seen as complex numbers, one of them conjugated."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.a, self.b = nn.Parameter(torch.randn(13, 2)), nn.Parameter(torch.randn(13, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(self.a) * x.to(torch.complex64) * torch.view_as_complex(self.b).conj()
        return super().forward(x + 0.1 * (z * z).real)


@pytest.mark.parametrize("keep_graphs", [0, 5])
def test_weights_seen_as_complex_numbers(offload: Offload, keep_graphs: int) -> None:
    assert difference(offload, lambda: Stack(block=Complex), keep_graphs=keep_graphs) < 1e-4


# --- micro-batches


class SequenceFirst(nn.Module):
    """PyTorch's own encoder with its default layout: dimension 0 is the sequence."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.enter = nn.Linear(7, 16)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.leave = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.encoder(self.enter(x)))


def test_a_dimension_0_that_is_no_batch_is_not_split(offload: Offload) -> None:
    with pytest.warns(UserWarning, match=r"TransformerEncoderLayer .*depend on each other"):
        assert difference(offload, lambda: SequenceFirst(batch_first=False), micro_batch=2) < 1e-2


def test_a_batch_is_split(offload: Offload, recwarn: pytest.WarningsRecorder) -> None:
    assert difference(offload, lambda: SequenceFirst(batch_first=True), micro_batch=2) < 1e-2
    assert not [w for w in recwarn if "micro-batches" in str(w.message)]


class Streams(Residual):
    """Mixes four streams that lie along dimension 0: it cannot run with fewer."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.mix = nn.Parameter(torch.eye(4) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((self.mix @ x.flatten(1)).view_as(x))


class Streamed(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x).expand(4, *x.shape[:-1], -1) * torch.arange(1.0, 5.0).view(4, 1, 1, 1)
        h = h.flatten(1, 2)
        for block in self.blocks:
            h = block(h)
        return self.leave(self.norm(h.mean(0))).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"device_memory": "1GiB"}], ids=str)
def test_blocks_that_cannot_run_with_fewer_rows(offload: Offload, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"Streams cannot run with .* sample.*not split into micro-batches"):
        assert difference(offload, lambda: Streamed(block=Streams), **options) < 1e-4


# --- blocks that are called more often than there are blocks


def test_graphs_of_repeated_blocks_are_kept_as_asked(offload: Offload) -> None:
    def repeated() -> nn.Module:
        model = Stack(depth=2)
        model.blocks = nn.ModuleList([*model.blocks, *model.blocks])
        return model

    assert difference(offload, repeated, keep_graphs=0) < 1e-5
    model = offload(repeated(), keep_graphs=0)
    output = model(feature_batches(1)[0]["x"])
    kept = [r.keep_graph for r in engine_of(model)._live if r.use.chunk.kind == "block"]
    assert output.requires_grad
    assert kept == [False] * 4


# --- backward for some gradients only


@pytest.mark.parametrize("kind", ["grad", "inputs", "head"])
def test_gradients_of_inputs_alone_do_not_update(offload: Offload, kind: str) -> None:
    if kind == "head":
        model = offload(language_model("llama"))
        batch = token_batches(1)[0]
        x = torch.randn(3, 17, 48, requires_grad=True)
        loss = model(inputs_embeds=x, labels=batch["labels"]).loss
    else:
        model = offload(Stack())
        x = feature_batches(1)[0]["x"].requires_grad_()
        loss = model(x).sum()
    optimizer = slidecore.AdamW(model.parameters(), lr=0.1)
    before = weights(model)
    with pytest.raises(slidecore.UsageError, match=r"autograd\.grad"):
        loss.backward(inputs=[x]) if kind == "inputs" else torch.autograd.grad(loss, x)
    optimizer.step()
    slidecore.synchronize(model)
    assert worst(distance(weights(model), before, 1))[0] == 0


# --- many steps, and parts of a model by themselves


@pytest.mark.parametrize("order", [1, -1])
def test_saved_inputs_of_many_lengths_share_host_memory(offload: Offload, order: int) -> None:
    model = offload(Stack(width=64))
    optimizer = slidecore.AdamW(model.parameters())
    most = 0
    for length in range(20, 200, 15)[::order]:
        mse(model, feature_batches(1, shape=(5, length))[0]).backward()
        optimizer.step()
        most = max(most, length)
    assert slidecore.stats(model).saved_inputs_bytes <= 5 * (5 * most * 64 * 4)


def test_states_of_parts(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    optimizer = slidecore.AdamW(model.parameters(), lr=0.1)
    x = feature_batches(1)[0]["x"].bfloat16()
    model(x).sum().backward()
    optimizer.step()
    model.blocks.state_dict()  # waits for the updates
    masters = {n: slidecore.master_parameter(model, n) for n in ("enter.weight", "blocks.0.up.weight")}
    with torch.no_grad():
        before = model(x)
        model.blocks.load_state_dict({n: torch.zeros_like(t) for n, t in model.blocks.state_dict().items()})
        assert not torch.equal(model(x), before)  # no slot kept the old weights
    assert torch.equal(slidecore.master_parameter(model, "enter.weight"), masters["enter.weight"])
    assert not slidecore.master_parameter(model, "blocks.0.up.weight").any()


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("part", ["", "blocks", "blocks.0", "leave"])
def test_copies_are_refused(offload: Offload, take: Callable[[Any], Any], part: str) -> None:
    model = offload(Stack())
    with pytest.raises(slidecore.UsageError, match="cannot be copied or pickled"):
        take(model.get_submodule(part))
    slidecore.close(model)
    take(model.get_submodule(part))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}])
def test_inner_model_with_a_loss_of_ones_own(offload: Offload, options: dict[str, Any]) -> None:
    plain = language_model("llama")
    model = offload(copy.deepcopy(plain), **options)
    for each, kind in ((plain, torch.optim.AdamW), (model, slidecore.AdamW)):
        optimizer = kind(each.parameters(), lr=1e-3)
        for batch in token_batches(3):
            hidden = each.model(batch["input_ids"]).last_hidden_state
            F.cross_entropy(each.lm_head(hidden).flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    slidecore.synchronize(model)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-4


# --- logits modified in place, and a backward that failed without anybody noticing


@pytest.mark.parametrize("how", ["setitem", "method", "operator"])
def test_logits_modified_in_place(offload: Offload, how: str) -> None:
    plain = language_model("llama")
    model = offload(copy.deepcopy(plain))
    slidecore.AdamW(model.parameters())
    batch = token_batches(1)[0]
    for grad in (False, True):
        results = []
        for each in (plain, model):
            with torch.set_grad_enabled(grad):
                logits = each(**batch).logits
                if how == "setitem":
                    logits[..., 5] = -100.0
                elif how == "method":
                    logits.mul_(2.0)
                else:
                    logits *= 2.0
                results.append(F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten()))
        torch.testing.assert_close(*results)


def test_blocks_called_by_themselves_after_a_failed_backward(offload: Offload) -> None:
    model = offload(Stack())
    optimizer = slidecore.AdamW(model.parameters(), lr=0.1)
    batch = feature_batches(1)[0]

    def forward(fails: bool) -> torch.Tensor:
        h = model.enter(batch["x"])
        for i, block in enumerate(model.blocks):
            h = block(h)
            if fails and i == 2:
                h.register_hook(lambda _: 1 / 0)
        return model.leave(model.norm(h)).sum()

    with pytest.raises(ZeroDivisionError):
        forward(fails=True).backward()
    with pytest.warns(UserWarning, match="did not finish"):
        loss = forward(fails=False)
    loss.backward()
    assert engine_of(model).state == "updated"
    optimizer.step()
