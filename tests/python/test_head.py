"""The head without its logits, against the loss over whole logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import VOCABULARY, clone, consumed_gradients, distance, language_model, train_offloaded, weights, worst
from slidecore.head import DeferredLogits, linear_cross_entropy
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]
TILE = 128  # the smallest


def record_head(model: nn.Module) -> list[int]:
    """Makes tiles as small as they get. The list gets the number of tokens of every run of the head's own forward."""
    engine = engine_of(model)
    engine.activations.head_logits = 0
    head = model.get_output_embeddings()
    use = next(use for use in engine.uses if use.module is head)
    inner = use.forward
    tokens: list[int] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        tokens.append(hidden.numel() // hidden.shape[-1])
        return inner(hidden)

    use.forward = forward
    return tokens


def batch_of(shape: tuple[int, int], seed: int, ignored: str = "none") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    labels = ids.clone()
    if ignored == "some":
        labels[torch.rand(shape, generator=generator) < 0.6] = -100
    elif ignored == "a whole tile":
        labels.view(-1)[: TILE + 20] = -100
    elif ignored == "all":
        labels[:] = -100
    elif ignored == "all but one":
        labels[:] = -100
        labels[1, 3] = 17
    return {"input_ids": ids, "labels": labels}


def reference(
    plain: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients in float64."""
    double = clone(plain).double()
    loss = loss_of(double)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in double.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = slidecore.AdamW(model.parameters(), betas=(0.0, 0.999), lr=0.0)
    loss.backward()
    optimizer.step()
    return consumed_gradients(model)


def assert_same_gradients(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    scale = max(g.norm().item() for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(mine[name].double(), gradient, rtol=1e-4, atol=2e-6 * scale), name


SHAPES = [(5, 61), (1, 64), (7, 37), (2, 64)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "a whole tile", "all but one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(offload: Offload, shape: tuple[int, int], ignored: str, tied: bool) -> None:
    if ignored == "a whole tile" and math.prod(shape) < 2 * TILE:
        ignored = "some"
    if ignored == "all but one" and shape[0] == 1:
        ignored = "some"
    plain = language_model("llama", tied=tied, seed=2, layers=2).train()
    batch = batch_of(shape, 4, ignored)
    loss, gradients = reference(plain, lambda m: m(**batch, use_cache=False).loss)
    model = offload(clone(plain))
    tokens = record_head(model)
    mine = model(**batch).loss
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)
    count = math.prod(shape)
    assert tokens == [TILE] * (count // TILE) + [count % TILE] * (count % TILE > 0)


def test_no_label_counts(offload: Offload) -> None:
    """PyTorch's mean over no tokens is NaN; it is here, too, and nothing hangs or crashes."""
    plain = language_model("llama", layers=2).train()
    batch = batch_of((3, 50), 1, "all")
    assert plain(**batch).loss.isnan()
    model = offload(clone(plain))
    optimizer = slidecore.AdamW(model.parameters())
    loss = model(**batch).loss
    assert loss.isnan()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch(offload: Offload, as_tensor: bool) -> None:
    plain = language_model("llama", seed=3, layers=2).train()
    batch = batch_of((3, 50), 1, "some")
    items: Any = torch.tensor(571) if as_tensor else 571
    loss, gradients = reference(plain, lambda m: m(**batch, num_items_in_batch=items, use_cache=False).loss)
    model = offload(clone(plain))
    record_head(model)
    mine = model(**batch, num_items_in_batch=items).loss
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_no_label_counts_of_a_larger_batch(offload: Offload) -> None:
    """With num_items_in_batch a part without labels has loss and gradients of zero."""
    model = offload(language_model("llama", layers=2).train())
    loss = model(**batch_of((3, 50), 1, "all"), num_items_in_batch=99).loss
    assert loss.item() == 0
    assert not any(g.any() for g in gradients_of(model, loss).values())


@pytest.mark.parametrize("factor", [0.37, -2.0, 0.0])
def test_scaled_loss(offload: Offload, factor: float) -> None:
    plain = language_model("llama", seed=3, layers=2).train()
    batch = batch_of((3, 50), 1)
    loss, gradients = reference(plain, lambda m: m(**batch, use_cache=False).loss * factor)
    model = offload(clone(plain))
    record_head(model)
    mine = model(**batch).loss * factor
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_two_losses_in_one_backward(offload: Offload) -> None:
    plain = language_model("llama", seed=3, layers=2, tied=True).train()
    first, second = batch_of((3, 50), 1), batch_of((4, 37), 2, "some")

    def both(m: nn.Module) -> torch.Tensor:
        return 0.7 * m(**first, use_cache=False).loss + 0.3 * m(**second, use_cache=False).loss

    loss, gradients = reference(plain, both)
    model = offload(clone(plain))
    record_head(model)
    mine = both(model)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_other_ignore_index_and_shifted_labels(offload: Offload) -> None:
    plain = language_model("llama", seed=3, layers=2).train()
    batch = batch_of((3, 50), 1)
    shifted = torch.randint(0, VOCABULARY, (3, 50))
    shifted[:, ::3] = 7
    options = {"ignore_index": 7, "shift_labels": shifted}
    loss, gradients = reference(plain, lambda m: m(**batch, **options, use_cache=False).loss)
    model = offload(clone(plain))
    record_head(model)
    mine = model(**batch, **options).loss
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_function_itself(offload: Offload, smoothing: float) -> None:
    """Label smoothing, over logits that a model without a loss of its own would have."""
    plain = language_model("llama", seed=3, layers=2).train()
    batch = batch_of((3, 50), 1)
    labels = torch.randint(0, VOCABULARY, (3, 50))
    labels[1, 5:20] = -100

    def loss_of(m: nn.Module) -> torch.Tensor:
        logits = m(input_ids=batch["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), label_smoothing=smoothing)

    loss, gradients = reference(plain, loss_of)
    model = offload(clone(plain))
    tokens = record_head(model)
    logits = model(**batch).logits
    assert isinstance(logits, DeferredLogits)
    mine = linear_cross_entropy(logits, labels, label_smoothing=smoothing)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)
    assert max(tokens) == TILE


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_without_gradients(offload: Offload, mode: str) -> None:
    plain = language_model("llama", seed=3, layers=2).eval()
    batch = batch_of((5, 61), 1, "some")
    loss, _ = reference(plain, lambda m: m(**batch, use_cache=False).loss)
    model = offload(clone(plain))
    tokens = record_head(model)
    if mode == "eval":
        mine = model(**batch).loss
    else:
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            mine = model(**batch).loss
        assert not mine.requires_grad
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert max(tokens) == TILE


TAILS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 0.3},
    "cohere": {"logit_scale": 2.5},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", TAILS)
def test_models_that_change_their_logits(offload: Offload, kind: str, tied: bool) -> None:
    plain = language_model(kind, seed=3, layers=2, tied=tied, **TAILS[kind]).train()
    unchanged = language_model(kind, seed=3, layers=2, tied=tied, **dict.fromkeys(TAILS[kind], 1.0)).train()
    batch = batch_of((3, 50), 1, "some")
    loss, gradients = reference(plain, lambda m: m(**batch, use_cache=False).loss)
    # The option has an effect, or this test would show nothing.
    assert abs(loss.item() - reference(unchanged, lambda m: m(**batch, use_cache=False).loss)[0].item()) > 1e-4
    model = offload(clone(plain))
    tokens = record_head(model)
    out = model(**batch)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert max(tokens) == TILE  # whole logits were not made
    real = plain(**batch, use_cache=False).logits
    assert torch.allclose(out.logits.detach().clone(), real, atol=1e-4)
    assert_same_gradients(gradients_of(model, out.loss), gradients)


LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "argmax": lambda x: x.argmax(-1),
    "index": lambda x: x[:, -1],
    "float of a slice": lambda x: x[1:2].float(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "cpu": lambda x: x.cpu() + 0,
    "tensor arithmetic": lambda x: x + torch.ones(VOCABULARY),
    "scalar times": lambda x: (2 * x) / 3 + 0,
    "comparison": lambda x: x > 0,
    "reshape": lambda x: x.view(-1, VOCABULARY),
    "contiguous": lambda x: x.contiguous() + 0,
    "cat": lambda x: torch.cat([x, x]),
    "in place": lambda x: x.clone().mul_(2.0),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor(x[0, 0, 0].item()),
    "iteration": lambda x: torch.stack(list(x)),
    "to dtype": lambda x: x.to(torch.float64) + 0,
    "bool of a sum": lambda x: torch.tensor(bool(x.sum() > 0)),
    "cross-entropy": lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(9) % VOCABULARY),
    "unpacked": lambda x: torch.max(x, dim=-1).values,
}


@pytest.mark.parametrize("look", LOOKS)
def test_logits_can_be_looked_at(offload: Offload, look: str) -> None:
    plain = language_model("llama", seed=3, layers=2).eval()
    batch = batch_of((1, 9), 1)
    real = plain(**batch, use_cache=False).logits
    model = offload(clone(plain))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            logits = model(**batch).logits
            assert (logits.shape, logits.dtype, logits.ndim) == (real.shape, real.dtype, real.ndim)
            assert logits.device == real.device
            assert "shape=(1, 9, 101)" in repr(logits)
            mine, expected = LOOKS[look](logits), LOOKS[look](real)
            assert type(mine) is torch.Tensor
            assert mine.dtype == expected.dtype
            assert torch.allclose(mine, expected, atol=1e-5)


def test_loss_over_logits_and_labels_together(offload: Offload) -> None:
    """A regularizer over the logits, beside the loss: one backward through both."""
    plain = language_model("llama", seed=3, layers=2).train()
    batch = batch_of((3, 50), 1)

    def loss_of(m: nn.Module) -> torch.Tensor:
        out = m(**batch, use_cache=False)
        return out.loss + 0.01 * out.logits.logsumexp(-1).square().mean()

    loss, gradients = reference(plain, loss_of)
    model = offload(clone(plain))
    record_head(model)
    mine = loss_of(model)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_own_loss_over_logits(offload: Offload) -> None:
    """Without labels the logits are a plain tensor, which any loss can take."""
    plain = language_model("llama", seed=3, layers=2).train()
    ids = batch_of((3, 50), 1)["input_ids"]

    def loss_of(m: nn.Module) -> torch.Tensor:
        return m(input_ids=ids, use_cache=False).logits.sin().square().mean()

    loss, gradients = reference(plain, loss_of)
    model = offload(clone(plain))
    mine = loss_of(model)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_logits_after_backward(offload: Offload) -> None:
    model = offload(language_model("llama", layers=2).train())
    optimizer = slidecore.AdamW(model.parameters())
    batch = batch_of((2, 9), 1)
    out = model(**batch)
    assert out.logits.argmax(-1).shape == (2, 9)
    out.loss.backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"look at\s+output.logits before backward"):
            out.logits.argmax(-1)
        optimizer.step()
    again = model(**batch)
    assert again.logits.shape == (2, 9, VOCABULARY)
    again.loss.backward()


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts(offload: Offload, frozen: str) -> None:
    plain = language_model("llama", seed=3, layers=2).train()
    plain.requires_grad_(frozen == "head")
    plain.lm_head.requires_grad_(frozen == "body")
    batch = batch_of((3, 50), 1)
    loss, gradients = reference(plain, lambda m: m(**batch, use_cache=False).loss)
    assert ("lm_head.weight" in gradients) == (frozen == "body")
    model = offload(clone(plain))
    record_head(model)
    mine = model(**batch).loss
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients_of(model, mine), gradients)


def test_logits_to_keep_and_own_head_calls(offload: Offload) -> None:
    """What generation asks for: the last logits only."""
    plain = language_model("llama", seed=3, layers=2).eval()
    ids = batch_of((3, 20), 1)["input_ids"]
    model = offload(clone(plain))
    with torch.no_grad():
        mine, theirs = model(ids, logits_to_keep=2).logits, plain(ids, logits_to_keep=2).logits
    assert mine.shape == (3, 2, VOCABULARY)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_whole_logits_are_never_made_in_training(offload: Offload) -> None:
    plain = language_model("qwen3", seed=3, layers=2, tied=True).train()
    model = offload(clone(plain), device_memory="8MiB")
    tokens = record_head(model)
    batches = [batch_of((5, 61), seed) for seed in range(4)]
    losses = train_offloaded(model, batches)
    assert all(map(math.isfinite, losses))
    assert set(tokens) == {TILE, 5 * 61 % TILE}
    value, name = worst(distance(weights(model), weights(plain)))
    assert value > 1e-4, name  # trained


@pytest.mark.parametrize("shape", [(5, 61), (3, 9)], ids=str)
def test_bfloat16(offload: Offload, shape: tuple[int, int]) -> None:
    plain = language_model("llama", seed=3, layers=2).to(torch.bfloat16).train()
    batch = batch_of(shape, 1, "some")
    loss, gradients = reference(plain, lambda m: m(**batch, use_cache=False).loss)
    model = offload(clone(plain))
    record_head(model)
    mine = model(**batch).loss
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(loss.item(), rel=2e-3)
    head = gradients_of(model, mine)["lm_head.weight"]
    expected = gradients["lm_head.weight"]
    assert ((head - expected).norm() / expected.norm()).item() < 0.02
