"""The head's loss and gradients without whole logits, against the same over whole logits in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _kernels import CARD, DEVICE, check_operator, poison, reference_path
from slidecore.triton.cross_entropy import LossOptions, cross_entropy
from slidecore.triton.linear_cross_entropy import (
    _narrowed,
    add_product,
    choose_tile,
    linear_cross_entropy,
    linear_cross_entropy_into,
    linear_cross_entropy_of_pieces,
)

__all__ = ["reference_path"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy

# Loss and log-probabilities; relative norm of the gradients' error. Rounding logits to bf16 is part of the reference,
# rounding their gradient (which the interpreter truncates) is not.
TOLERANCE = {torch.float32: (3e-6, 3e-6), torch.bfloat16: (1e-5, 1.2e-2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "scale": {"scale": -1.5},
    "all": {"z_loss": 0.01, "label_smoothing": 0.3, "softcap": 5.0, "ignore_index": 7},
}
TILES: dict[str, dict[str, Any]] = {
    "one tile": {"tile": 64},
    "tiles": {"tile": 8},
    "tiles, narrow sums": {"tile": 8, "accumulate": None},
    "pieces": {"tile": 64, "piece": 70},
    "tiles and pieces": {"tile": 8, "piece": 70},
    "own choice": {"prefer": "speed"},
}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # without, matmul on a card is an error
    yield
    torch.use_deterministic_algorithms(False)


def data(dtype: torch.dtype, tokens: int = 23, width: int = 24, vocabulary: int = 137) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    weight = (0.3 * torch.randn(vocabulary, width, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)
    labels[-1] = vocabulary - 1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities, both gradients; float64 on the CPU."""
    h, w = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    labels = labels.cpu()
    logits = h @ w.T
    if hidden.dtype != torch.float32:
        logits = logits + (logits.detach().to(hidden.dtype).double() - logits.detach())
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = labels != ignore_index
    losses = F.cross_entropy(
        logits, labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    losses = losses + z_loss * logits.logsumexp(-1).square() * counts
    if weights is not None:
        losses = losses * weights.cpu().double()
    loss = losses.sum() / (counts.sum() if num_items is None else num_items)
    gradients = torch.autograd.grad(loss, [h, w])
    at_label = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return loss.detach(), torch.where(counts, at_label, 0.0).detach(), *gradients


def error(mine: torch.Tensor | None, exact: torch.Tensor) -> float:
    assert mine is not None
    return ((mine.double().cpu() - exact).norm() / exact.norm()).item()


def check(dtype: torch.dtype, options: dict[str, Any], tiles: dict[str, Any], factor: float = 1.0) -> None:
    hidden, weight, labels = data(dtype)
    ignored = options.get("ignore_index", -100)
    labels[::5] = ignored
    labels[8:16] = ignored  # a whole tile
    loss, log_probabilities, of_hidden, of_weight = reference(hidden, weight, labels, **options)
    mine = linear_cross_entropy(hidden, weight, labels, **options, **tiles)
    (mine.loss * factor).backward()
    for_loss, for_gradient = TOLERANCE[dtype]
    assert mine.loss.dtype == mine.log_probabilities.dtype == torch.float32
    assert mine.loss.item() == pytest.approx(loss.item(), rel=for_loss)
    assert torch.allclose(mine.log_probabilities.double().cpu(), log_probabilities, atol=for_loss, rtol=for_loss)
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert error(hidden.grad, factor * of_hidden) < for_gradient
    assert error(weight.grad, factor * of_weight) < for_gradient


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, "plain"), (torch.float32, "softcap"), (torch.float32, "all"), (torch.bfloat16, "smoothing")],
    ids=str,
)
def test_loss_and_gradients(dtype: torch.dtype, options: str, tiles: str) -> None:
    check(dtype, OPTIONS[options], TILES[tiles])


@pytest.mark.usefixtures("reference_path")
@pytest.mark.skipif(CARD, reason="a card has no reference path")
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reference_path(dtype: torch.dtype, options: str, tiles: str) -> None:
    check(dtype, OPTIONS[options], TILES[tiles])


@pytest.mark.parametrize("tiles", ["tiles", "tiles and pieces"])
def test_weights_items_and_factor(tiles: str) -> None:
    weights = torch.rand(23, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights[3] = 0
    for num_items in (17.0, None):
        check(torch.float32, {"weights": weights, "num_items": num_items, "z_loss": 0.1}, TILES[tiles], factor=-1.75)


@pytest.mark.parametrize("vocabulary", [1, 2, 64, 65, 1000, 9001])
@pytest.mark.parametrize("tokens", [1, 5])
def test_odd_sizes(tokens: int, vocabulary: int) -> None:
    hidden, weight, labels = data(torch.float32, tokens, 8, vocabulary)
    loss, _, of_hidden, of_weight = reference(hidden, weight, labels)
    for piece in (None, 63 if vocabulary < 5000 else 5000):
        hidden.grad = weight.grad = None
        mine = linear_cross_entropy(hidden, weight, labels, tile=3, piece=piece)
        mine.loss.backward()
        assert mine.loss.item() == pytest.approx(loss.item(), rel=3e-6, abs=1e-6)
        for gradient, exact in ((hidden.grad, of_hidden), (weight.grad, of_weight)):
            assert gradient is not None
            assert torch.allclose(gradient.double().cpu(), exact, rtol=1e-5, atol=1e-6)


def test_nothing_counts() -> None:
    """PyTorch's mean over nothing is NaN, with gradients of zero."""
    hidden, weight, labels = data(torch.float32)
    for piece in (None, 50):
        hidden.grad = weight.grad = None
        mine = linear_cross_entropy(hidden, weight, labels.fill_(-100), tile=16, piece=piece)
        assert mine.loss.isnan() or mine.loss.item() == 0
        mine.loss.backward()
        assert hidden.grad is not None
        assert not hidden.grad.any()
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize("piece", [None, 50])
@pytest.mark.usefixtures("poisoned_memory")
def test_no_tokens(piece: int | None) -> None:
    hidden, weight, labels = data(torch.float32)
    hidden = hidden.detach()[:0].requires_grad_()
    mine = linear_cross_entropy(hidden, weight, labels[:0], num_items=3, piece=piece)
    mine.loss.backward()
    assert mine.loss.item() == 0
    assert mine.log_probabilities.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("label", [-1, 137])
@pytest.mark.parametrize("piece", [None, 50])
def test_labels_outside_the_vocabulary(label: int, piece: int | None) -> None:
    """They are seen: the loss is NaN, and so is the token's gradient."""
    hidden, weight, labels = data(torch.float32)
    labels[4] = label
    mine = linear_cross_entropy(hidden, weight, labels, tile=16, piece=piece)
    mine.loss.backward()
    assert mine.loss.isnan()
    assert hidden.grad is not None
    assert hidden.grad[4].isnan().all()
    assert hidden.grad[5].isfinite().all()


def test_large_logits() -> None:
    """Far from zero and far apart, in pieces as in one: nothing overflows, nothing vanishes."""
    width = 4
    weight = torch.zeros(300, width)
    weight[:, 0] = torch.linspace(-3e4, 3e4, 300)
    weight[:, 1] = 1e4
    hidden = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, -1.0, 0, 0], [1e-4, 0, 0, 0]])
    labels = torch.tensor([299, 5, 299, 150])
    inputs = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    exact = reference(*inputs, labels)
    for piece in (None, 64):
        mine = linear_cross_entropy(*inputs, labels.to(DEVICE), piece=piece, tile=3)
        gradients = torch.autograd.grad(mine.loss, inputs)
        assert mine.loss.item() == pytest.approx(exact[0].item(), rel=1e-5)
        for gradient, expected in zip(gradients, exact[2:], strict=True):
            assert torch.allclose(gradient.double().cpu(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("piece", [None, 50])
def test_frozen(frozen: str, piece: int | None) -> None:
    hidden, weight, labels = data(torch.float32)
    exact = reference(hidden, weight, labels)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    mine = linear_cross_entropy(hidden, weight, labels, tile=16, piece=piece)
    assert mine.loss.item() == pytest.approx(exact[0].item(), rel=3e-6)
    assert mine.loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    mine.loss.backward()
    for tensor, gradient in ((hidden, exact[2]), (weight, exact[3])):
        if tensor.requires_grad:
            assert error(tensor.grad, gradient) < 3e-6
        else:
            assert tensor.grad is None


def test_second_backward_is_refused() -> None:
    hidden, weight, labels = data(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()


def test_weight_that_arrives_in_pieces() -> None:
    """The pieces of the weight and of its gradient share one buffer each: no two exist at the same time."""
    hidden, weight, labels = data(torch.float32)
    exact = reference(hidden, weight, labels)
    slot, sums = torch.zeros(40, 24, device=DEVICE), torch.zeros(40, 24, device=DEVICE)
    of_weight = torch.zeros_like(weight).detach()
    passes = []

    def pieces() -> Any:
        passes.append(1)
        for first in range(0, len(weight), 40):
            rows = min(40, len(weight) - first)
            poison(slot)[:rows] = weight.detach()[first : first + rows]
            yield slot[:rows]

    def take(first: int) -> torch.Tensor:
        return poison(sums)[: min(40, len(weight) - first)]

    def took(first: int) -> None:
        rows = min(40, len(weight) - first)
        of_weight[first : first + rows] = sums[:rows]

    of_hidden = torch.zeros_like(hidden).detach()
    with torch.no_grad():
        losses, _ = linear_cross_entropy_of_pieces(
            hidden, pieces, labels, torch.tensor(23.0, device=DEVICE), LossOptions(), vocabulary=len(weight), tile=16,
            hidden_gradient=poison(of_hidden), take=take, took=took,
        )  # fmt: skip
    assert len(passes) == 2
    assert losses.sum().item() == pytest.approx(exact[0].item(), rel=3e-6)
    assert error(of_hidden, exact[2]) < 3e-6
    assert error(of_weight, exact[3]) < 3e-6
    with pytest.raises(ValueError, match="the pieces have 137 rows, not 138"), torch.no_grad():
        linear_cross_entropy_of_pieces(
            hidden, pieces, labels, torch.tensor(1.0, device=DEVICE), LossOptions(), vocabulary=138, tile=16
        )


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_add_product(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    narrow, wide = dtypes
    left, right = torch.randn(33, 70).to(DEVICE, narrow), torch.randn(33, 9).to(DEVICE, narrow)
    out = poison(torch.zeros(70, 9, dtype=wide, device=DEVICE))
    exact = left.double().t() @ right.double()
    add_product(out, left.t(), right, fresh=True)
    limit = 1e-6 if wide == torch.float32 and (narrow == wide or not CARD or torch.version.hip is None) else 4e-3
    assert error(out, exact.cpu()) < limit
    add_product(out, left.t(), right, fresh=False)
    assert error(out, 2 * exact.cpu()) < limit


@pytest.mark.parametrize("n", [1, 5, 1 << 20, (1 << 20) + 1, 5_000_003])
def test_narrowed_in_place(n: int) -> None:
    wide = torch.randn(n, device=DEVICE)
    expected, address = wide.to(torch.bfloat16), wide.data_ptr()
    narrow = _narrowed(wide, torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == address


@pytest.mark.parametrize(
    ("tokens", "accumulate", "memory", "speed"),
    [
        (4096, None, 192, 2048), (16384, None, 512, 2048), (65536, None, 1536, 8192), (100, None, 100, 100),
        (4096, torch.float32, 1024, 4096), (16384, torch.float32, 1024, 4096), (65536, torch.float32, 2560, 16384),
    ],
)  # fmt: skip
def test_choice_of_tiles(tokens: int, accumulate: torch.dtype | None, memory: int, speed: int) -> None:
    assert choose_tile(tokens, 4096, 128256, accumulate) == memory
    assert choose_tile(tokens, 4096, 128256, accumulate, "speed") == speed
    assert choose_tile(1, 8, 128256, accumulate) == choose_tile(1, 8, 1, accumulate, "speed") == 1


def test_refuses() -> None:
    hidden, weight, labels = data(torch.float32)
    for change, message in (
        ({"label_smoothing": 1.5}, r"not in \[0, 1\]"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"weights": torch.ones(3)}, "3 weights for 23 tokens"),
        ({"prefer": "both"}, "prefer='both' must be"),
        ({"accumulate": torch.bfloat16}, r"accumulate=torch.bfloat16 must be torch.float32, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, labels, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"they must be \(..., width\)"):
        linear_cross_entropy(hidden, weight[:, :-1], labels)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        linear_cross_entropy(hidden, weight.double(), labels)


def test_shapes_are_kept_apart() -> None:
    hidden, weight, labels = data(torch.float32, tokens=12)
    exact = reference(hidden, weight, labels)
    mine = linear_cross_entropy(hidden.view(3, 4, 24), weight, labels.view(3, 4), tile=5)
    assert mine.loss.item() == pytest.approx(exact[0].item(), rel=3e-6)
    mine.loss.backward()
    assert error(hidden.grad, exact[2]) < 3e-6


@pytest.mark.usefixtures("reference_path")
def test_operators() -> None:
    hidden, weight, labels = data(torch.float32, 6, 8, 20)
    divisor, ops = torch.tensor(6.0, device=DEVICE), torch.ops.slidecore
    logits = (hidden @ weight.t()).detach()
    check_operator(ops.cross_entropy, logits, labels, None, divisor, -100, 0.1, 0.0, 1.0, None)
    check_operator(ops.cross_entropy_, logits, labels, None, divisor, -100, 0.0, 0.1, 1.0, 3.0, True)
    options = (-100, 0.1, 0.01, 1.0, None, torch.float32)
    # Not test_autograd_registration's second backward, nor gradients against numbers: `loss` is differentiable once.
    for pieces in ((6, 20), (4, 20), (4, 7)):
        torch.library.opcheck(
            ops.linear_cross_entropy.default, (hidden, weight, labels, divisor, None, *options, *pieces, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.usefixtures("reference_path")
def test_compiled() -> None:
    hidden, weight, labels = data(torch.float32)
    exact = reference(hidden, weight, labels)

    def step(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(2 * (hidden / 2), weight, labels, tile=16).loss

    compiled = torch.compile(step, backend="inductor" if CARD else "aot_eager")
    loss = compiled(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(exact[0].item(), rel=3e-6)
    assert error(hidden.grad, exact[2]) < 3e-6
    assert error(weight.grad, exact[3]) < 3e-6


def test_tile_of_logits_in_a_wider_buffer() -> None:
    """Strides of the logits are respected, nothing is written beside the rows."""
    buffer = torch.full((3, 64), math.nan, device=DEVICE)
    buffer[:, :50] = torch.randn(3, 50)
    logits = buffer[:, :50]
    exact = torch.autograd.functional.jacobian(
        lambda x: F.cross_entropy(x, torch.tensor([0, 49, 7])), logits.double().cpu()
    )
    _, gradient = cross_entropy(
        logits, torch.tensor([0, 49, 7], device=DEVICE), torch.tensor(3.0, device=DEVICE), in_place=True
    )
    assert torch.allclose(gradient.double().cpu(), exact, rtol=1e-5, atol=1e-7)
    assert buffer[:, 50:].isnan().all()


def test_labels_and_weights_between_others() -> None:
    """Such as a column of a batch, whose reshape(-1) is a view."""
    hidden, weight, labels = (x.detach() for x in data(torch.float32))
    factors = torch.rand(len(labels), device=DEVICE)
    grid, wide = labels.new_full((len(labels), 3), 5), factors.new_full((len(labels), 3), 7.0)
    grid[:, 1], wide[:, 1] = labels, factors
    between, beside = grid[:, 1:2].reshape(-1), wide[:, 1:2].reshape(-1)
    assert not between.is_contiguous()
    divisor = torch.tensor(3.0, device=DEVICE)
    logits = hidden @ weight.t()
    assert torch.equal(cross_entropy(logits, between, divisor)[0], cross_entropy(logits, labels, divisor)[0])
    assert torch.equal(
        cross_entropy(logits.clone(), between, divisor, in_place=True)[1], cross_entropy(logits, labels, divisor)[1]
    )
    for run in (
        lambda y, w: linear_cross_entropy_into(
            hidden, weight, y, divisor, LossOptions(), tile=8, hidden_gradient=None, weight_gradient=None, weights=w
        ),
        lambda y, w: linear_cross_entropy_of_pieces(
            hidden, lambda: weight.split(50), y, divisor, LossOptions(), vocabulary=len(weight), tile=8, weights=w
        ),
    ):
        for mine, expected in zip(run(between, beside), run(labels, factors), strict=True):
            assert torch.equal(mine, expected)


def test_softcap_far_above_the_logits() -> None:
    """Where tanh is nearly its argument, both the loss and the slope keep float32's digits."""
    hidden, weight, labels = data(torch.float32)
    for softcap in (30.0, 1e3, 1e5):
        exact = reference(hidden, weight, labels, softcap=softcap)
        mine = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
        gradients = torch.autograd.grad(mine.loss, (hidden, weight))
        assert mine.loss.item() == pytest.approx(exact[0].item(), rel=1e-6)
        for gradient, expected in zip(gradients, exact[2:], strict=True):
            assert error(gradient, expected) < 1e-6
