"""Tensors that blocks hand out by other ways than their return value, and outputs without a batch dimension."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import slidecore
import torch
from _architectures import KINDS, batches_for
from _models import Batch, Residual, distance, feature_batches, weights, worst
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
OPTIONS = [{}, {"keep_graphs": 4}, {"micro_batch": 2}, {"device_memory": "1GiB", "window": 3}]


def losses_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], loss_of: Callable[..., torch.Tensor]
) -> Iterator[float]:
    for batch in batches:
        loss = loss_of(model, batch)
        yield loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trains_like_pytorch(
    offload: Offload, plain: nn.Module, batches: list[Batch], loss_of: Callable[..., torch.Tensor], **options: Any
) -> nn.Module:
    model = offload(copy.deepcopy(plain), **options)
    # eps damps what Adam makes of rounding in gradients near zero.
    settings = {"lr": 3e-3, "eps": 1e-5}
    mine = losses_of(model, slidecore.AdamW(model.parameters(), **settings), batches, loss_of)
    theirs = losses_of(plain, torch.optim.AdamW(plain.parameters(), **settings), batches, loss_of)
    assert list(mine) == pytest.approx(list(theirs), abs=1e-5)
    slidecore.synchronize(model)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name
    return model


def features(**shape: Any) -> list[Batch]:
    return feature_batches(5, features=13, **shape)


# --- attributes


class Penalized(Residual):
    """Keeps a penalty for each sample on a submodule, for the loss to find."""

    def __init__(self) -> None:
        super().__init__(13, 29)
        self.inner = nn.Module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.penalty = self.up(x).pow(2).mean(1)
        return super().forward(x)


class Blocks(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(13, 13)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


def with_penalties(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(batch["x"]).square().mean()
    return loss + sum(block.inner.penalty.mean() for block in model.blocks)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attributes_carry_gradients(offload: Offload, options: dict[str, Any]) -> None:
    model = assert_trains_like_pytorch(offload, Blocks(Penalized), features(), with_penalties, **options)
    assert all(block.inner.penalty.shape == (5, 29) for block in model.blocks)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attributes_are_those_of_the_forward(offload: Offload, options: dict[str, Any]) -> None:
    """Neither the recomputation nor a probe leaves its own."""
    model = offload(Blocks(Penalized), **options)
    optimizer = slidecore.AdamW(model.parameters())
    loss = with_penalties(model, features()[0])
    kept = [block.inner.penalty for block in model.blocks]
    assert sum(p.mean() for p in kept).item() < loss.item()
    loss.backward()
    optimizer.step()
    assert all(block.inner.penalty is p for block, p in zip(model.blocks, kept, strict=True))
    with torch.no_grad():
        model(features()[0]["x"])
    assert not any(block.inner.penalty.requires_grad for block in model.blocks)


class Detached(Residual):
    def __init__(self) -> None:
        super().__init__(13, 29)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        self.seen, self.calls = out.detach().mean(), getattr(self, "calls", 0) + 1
        return out


def test_attributes_without_a_gradient_are_left_alone(offload: Offload, recwarn: pytest.WarningsRecorder) -> None:
    plain = Blocks(Detached)
    assert_trains_like_pytorch(offload, plain, features(), lambda m, b: m(b["x"]).square().mean(), micro_batch=2)
    assert not [w for w in recwarn if "micro-batches" in str(w.message)]


# --- mappings that are given to every block


class Sharing(nn.Module):
    """The first of each kind sets keys and values that the others of its kind use; the last removes them."""

    def __init__(self, kind: str, first: bool, last: bool) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, first, last
        self.query = nn.Linear(13, 13)
        if first:
            self.key, self.value = nn.Linear(13, 13), nn.Linear(13, 13)

    def forward(self, x: torch.Tensor, shared: MutableMapping[str, Any]) -> torch.Tensor:
        if self.first:
            shared[self.kind] = self.key(x), {"value": self.value(x)}
        key, rest = shared[self.kind]
        if self.last:
            del shared[self.kind]
        return x + torch.softmax(self.query(x) @ key.transpose(-1, -2), -1) @ rest["value"]


class SharingModel(nn.Module):
    def __init__(self, mapping: Callable[[], MutableMapping[str, Any]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mapping = mapping
        self.blocks = nn.ModuleList(Sharing(k, i < 2, i in (3, 5)) for i, k in enumerate("abaabb"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.mapping()
        for i, block in enumerate(self.blocks):
            x = block(x, shared) if i % 2 else block(x, shared=shared)
        assert not shared
        return x


class OwnDict(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mapping", [dict, UserDict, OrderedDict, OwnDict, lambda: defaultdict(list)])
def test_mappings_carry_gradients(
    offload: Offload, mapping: Callable[[], MutableMapping[str, Any]], options: dict[str, Any]
) -> None:
    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch["x"]).square().mean()

    assert_trains_like_pytorch(offload, SharingModel(mapping), features(), loss_of, **options)


def test_what_blocks_share_is_saved_once(offload: Offload) -> None:
    """Long enough to be sent to host memory: four inputs that are shared, and one of each block."""
    model = offload(SharingModel(dict))
    optimizer = slidecore.AdamW(model.parameters())
    x = torch.randn(8, 40, 13, requires_grad=True)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    one = x.numel() * x.element_size()
    assert 6 * one <= slidecore.stats(model).saved_inputs_bytes <= (6 + 4) * one


# --- what transformers records


def recorded(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss over everything that can be asked for."""
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    loss = output.loss + sum(h[:, 1:].square().mean() for h in output.hidden_states)
    return loss + sum((a * torch.arange(a.shape[-1])).mean() for a in output.attentions)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "vit"])
def test_records_carry_gradients(offload: Offload, kind: str, options: dict[str, Any]) -> None:
    plain = KINDS[kind].build(attn_implementation="eager")
    model = assert_trains_like_pytorch(offload, plain, batches_for(KINDS[kind].task, 3), recorded, **options)
    batch = batches_for(KINDS[kind].task, 1)[0]
    names = {"output_hidden_states": True, "output_attentions": True}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outputs = [m(**batch, **names) for m in (model, plain)]
        for name in ("hidden_states", "attentions", "router_logits"):
            mine, theirs = (getattr(output, name, None) or () for output in outputs)
            assert len(mine) == len(theirs) == (0 if name == "router_logits" and kind != "mixtral" else len(theirs))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- outputs without a batch dimension


class Counting(Residual):
    """Beside its output: a row that broadcasts over the batch and is made from weights, a loss of shape (1,) and a
    vector with one number for each unit."""

    def __init__(self, extra: str) -> None:
        super().__init__(13, 12)
        self.extra = extra
        self.table = nn.Parameter(torch.randn(2, 3, 13))

    def forward(self, x: torch.Tensor, row: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = super().forward(x)
        row = self.table.sum(0)[None] if row is None else row
        units = self.up(x)
        others = {
            "rows": out.mean((1, 2)),
            "loss": units.square().mean()[None],
            "units": units.square().sum((0, 1)),
            "scalar": units.square().mean(),
        }
        return out * torch.sigmoid(row), row, others[self.extra]


class CountingModel(nn.Module):
    def __init__(self, extra: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Counting(extra) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row, total = None, x.new_zeros(())
        for block in self.blocks:
            x, row, other = block(x, row)
            total = total + other.square().sum()
        return x.square().mean() + 0.1 * total + row.sum()


@pytest.mark.parametrize("identical", [False, True], ids=["", "identical samples"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("extra", ["rows", "loss", "units", "scalar"])
def test_outputs_without_a_batch_dimension(
    offload: Offload, extra: str, micro_batch: int, identical: bool, recwarn: pytest.WarningsRecorder
) -> None:
    batches = features(shape=(4, 3))
    if identical:
        batches = [{"x": b["x"][:1].expand(4, -1, -1).contiguous()} for b in batches]

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch["x"].clone().requires_grad_())

    model = assert_trains_like_pytorch(offload, CountingModel(extra), batches, loss_of, micro_batch=micro_batch)
    refused = [w for w in recwarn if "Counting returns a tensor that has no batch dimension" in str(w.message)]
    assert bool(refused) == (extra != "rows")
    plans = {plan.micro_batches for plan in engine_of(model).activations._plans.values()}
    assert plans == {1 if refused else -(-4 // micro_batch)}


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}], ids=str)
def test_a_position_bias_does_not_keep_a_batch_whole(
    offload: Offload, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    """Without a mask, T5's first blocks make a bias of weights alone, which the others hand on."""

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    assert_trains_like_pytorch(offload, KINDS["t5"].build(), batches_for("sequences", 4), loss_of, **options)
    assert not [w for w in recwarn if "micro-batches" in str(w.message)]


# --- what stays an error


def test_caches_in_training(offload: Offload) -> None:
    import transformers

    model = offload(KINDS["mixtral"].build())
    optimizer = slidecore.AdamW(model.parameters())
    batch = batches_for("language", 1)[0]
    with pytest.raises(slidecore.UsageError, match=r"key-value cache.*use_cache=False.*torch.no_grad\(\)"):
        model(**batch, past_key_values=transformers.DynamicCache())
    with torch.no_grad():
        cache = transformers.DynamicCache()
        assert model(**batch, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 9
    model(**batch).loss.backward()
    optimizer.step()
