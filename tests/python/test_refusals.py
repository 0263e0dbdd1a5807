"""What would be silently wrong for offloaded parameters is refused, by name; what is kept on the device may do it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import (
    VOCABULARY,
    Residual,
    Stack,
    clone,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    train_offloaded,
    weights,
)
from torch import nn

Offload = Callable[..., nn.Module]
HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


class Embedded(nn.Module):
    """Blocks over an embedding of 20 rows, (batch, length) -> (batch, length, 8)."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8, **options)
        self.blocks = nn.ModuleList(Residual(8, 9) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return h


@pytest.mark.parametrize("kind", HOOKS)
def test_hook_before_offload(offload: Offload, kind: str) -> None:
    model = Stack()
    handle = getattr(model.blocks[2].up.weight, kind)(lambda g: None)
    before = weights(model)
    with pytest.raises(slidecore.ModelError, match=r"'blocks\.2\.up\.weight' has a hook.*update='deferred'.*keep="):
        offload(model)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    offload(clone(model), train=False)  # where no gradient is wanted
    handle.remove()
    train_offloaded(offload(model), feature_batches(1))


@pytest.mark.parametrize("kind", HOOKS)
def test_hook_after_offload(offload: Offload, kind: str) -> None:
    model, batches = offload(Stack()), feature_batches(2)
    optimizer = slidecore.AdamW(model.parameters())
    train_offloaded(model, batches, optimizer=lambda _: optimizer)
    handle = getattr(model.enter.weight, kind)(lambda g: None)
    with pytest.raises(slidecore.UsageError, match=r"enter\.weight has a hook"):
        model(batches[0]["x"])
    with torch.no_grad():
        model(batches[0]["x"])
    handle.remove()
    train_offloaded(model, batches, optimizer=lambda _: optimizer)


def test_hook_on_a_kept_parameter_runs(offload: Offload) -> None:
    model, seen = Stack(), []
    model.blocks[1].up.weight.register_hook(lambda g: seen.append(g))
    offload(model, keep=["blocks.1.up.weight"])
    optimizer = slidecore.AdamW([p for p in model.parameters() if p is not model.blocks[1].up.weight])
    loss_of(model, feature_batches(1)[0]).backward()
    optimizer.step()
    assert len(seen) == 1


def test_what_the_message_says_trains_chosen_rows_only(offload: Offload) -> None:
    model = offload(language_model("llama").train())
    weight = model.get_input_embeddings().weight
    mask = (torch.arange(VOCABULARY) >= 95).float()[:, None]
    before = weight.detach().clone()
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, update="deferred")
    batch = token_batches(1)[0]
    batch["input_ids"][0, :5] = 99
    loss_of(model, batch).backward()
    weight.grad.mul_(mask)
    optimizer.step()
    slidecore.synchronize(model)
    assert torch.equal(weight[:95], before[:95])
    assert not torch.equal(weight[99], before[99])


def test_sparse_embedding(offload: Offload) -> None:
    model = Embedded(sparse=True)
    with pytest.raises(slidecore.ModelError, match=r"embedding is an Embedding\(sparse=True\)"):
        offload(model)
    ids = torch.randint(0, 20, (2, 3))
    offload(model, keep=["embedding.weight"])
    optimizer = slidecore.AdamW(model.blocks.parameters())
    model(ids).square().mean().backward()
    optimizer.step()
    assert model.embedding.weight.grad.is_sparse


def test_lazy_module(offload: Offload) -> None:
    model = Stack()
    model.leave = nn.LazyLinear(3)
    with pytest.raises(slidecore.ModelError, match=r"'leave\.weight' is not initialized.*call the model once"):
        offload(model)
    batches = feature_batches(1)
    with torch.no_grad():
        model(batches[0]["x"])
    train_offloaded(offload(model), batches)


def test_tying_after_offload(offload: Offload) -> None:
    model = offload(language_model("llama").train())
    tied = model.lm_head.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(slidecore.UsageError, match=r"lm_head\.weight was tied to"):
            model(**token_batches(1)[0])
    model.lm_head.weight = tied
    train_offloaded(model, token_batches(1))


def test_replacing_after_offload(offload: Offload) -> None:
    model, batch = offload(Stack()), feature_batches(1)[0]
    model.enter.weight = nn.Parameter(torch.zeros(13, 7))
    with pytest.raises(slidecore.UsageError, match=r"enter\.weight \(attribute 'weight' of a Linear\) was replaced"):
        F.mse_loss(model(batch["x"]), batch["target"])


@pytest.mark.parametrize("how", ["assigned", "converted"])
def test_replacing_the_data(offload: Offload, how: str) -> None:
    model, batch = offload(Stack()), feature_batches(1)[0]
    if how == "assigned":
        model.enter.weight.data = torch.zeros(13, 7)
    else:
        model.enter.double()
    for called in (model, model.enter):  # a part may be called by itself
        with pytest.raises(slidecore.UsageError, match=r"enter\.weight\.data was replaced after .*assign_parameter"):
            called(batch["x"])


class Renormalised(nn.Module):
    """A block that divides its weight by its norm, in place, where that is more than 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(13, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.div_(self.linear.weight.norm().clamp_min(1))
        return x + torch.tanh(self.linear(x))


class Scaled(Stack):
    """Changes a parameter that a module around the blocks holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return super().forward(x) * self.scale


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"keep_graphs": 9}, {"device_memory": "1MiB"}])
def test_block_that_changes_its_weight(offload: Offload, options: dict[str, object], gradients: bool) -> None:
    model, batch = offload(Stack(block=Renormalised), **options), feature_batches(1)[0]
    match = r"forward of a Linear changed its parameter blocks\.0\.linear\.weight in place"
    before = weights(model)
    for _ in range(2):  # the slot that holds the change is not taken for the weight
        with torch.set_grad_enabled(gradients), pytest.raises(slidecore.UsageError, match=match):
            model(batch["x"])
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_module_around_the_blocks_that_changes_its_parameter(offload: Offload) -> None:
    with pytest.raises(slidecore.UsageError, match=r"a Scaled changed its parameter scale in place.*keep=\['scale'\]"):
        offload(Scaled())(feature_batches(1)[0]["x"])


def test_embedding_with_max_norm(offload: Offload) -> None:
    plain, ids = Embedded(max_norm=1.0), torch.randint(0, 20, (2, 3))
    with pytest.raises(slidecore.UsageError, match=r"Embedding changed its parameter embedding\.weight.*keep="):
        offload(clone(plain))(ids)
    model = offload(clone(plain), keep=["embedding.weight"])
    optimizer = slidecore.AdamW(model.blocks.parameters(), lr=1e-3)
    reference = torch.optim.AdamW(plain.blocks.parameters(), lr=1e-3)
    for m, o in ((plain, reference), (model, optimizer)):
        for _ in range(3):
            m(ids).square().mean().backward()
            o.step()
            o.zero_grad()
    slidecore.synchronize(model)
    assert torch.equal(model.embedding.weight, plain.embedding.weight)
    assert all(torch.allclose(w, weights(plain)[name], atol=1e-6) for name, w in weights(model).items())


@pytest.mark.parametrize("keep_graphs", [0, 3])
@pytest.mark.parametrize("trainable", [False, True])
def test_second_derivatives(offload: Offload, trainable: bool, keep_graphs: int) -> None:
    """A gradient penalty would otherwise be a constant."""
    model = offload(Stack().requires_grad_(trainable), keep_graphs=keep_graphs)
    optimizer = slidecore.AdamW(model.parameters()) if trainable else None
    x = torch.randn(3, 7, requires_grad=True)
    with pytest.raises(slidecore.UsageError, match="create_graph=True"):
        model(x).sum().backward(create_graph=True)
    model(x).sum().backward()  # goes on as if nothing had been
    assert x.grad is not None
    if optimizer is not None:
        optimizer.step()


def test_second_derivatives_of_a_head(offload: Offload) -> None:
    model = offload(language_model("llama").train())
    slidecore.AdamW(model.parameters())
    with pytest.raises(slidecore.UsageError, match="create_graph=True"):
        loss_of(model, token_batches(1)[0]).backward(create_graph=True)
