"""GPU kernels against float64. Without a card they run in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _kernels import CARD, DEVICE
from slidecore.triton.cross_entropy import cross_entropy

# Loss: what float32 sums of that many exponentials keep. Gradient: one rounding to the logits' dtype, for which the
# interpreter truncates bf16.
TOLERANCE = {
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2e-6, 2**-8 if CARD else 2**-7),
    torch.float16: (2e-6, 2**-10),
}
VOCABULARIES = [1, 2, 31, 101, 128, 1000, 8192, 8193, 20011]


def reference(
    logits: torch.Tensor, labels: torch.Tensor, divisor: float, ignore_index: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = logits.double().cpu().requires_grad_()
    loss = (
        F.cross_entropy(exact, labels.cpu(), reduction="sum", ignore_index=ignore_index, label_smoothing=smoothing)
        / divisor
    )
    (gradient,) = torch.autograd.grad(loss, exact)
    return loss.detach(), gradient


def poisoned(tokens: int, vocabulary: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as rows of a wider buffer whose rest is NaN, and that buffer."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((tokens, vocabulary + 5), math.nan, dtype=dtype, device=DEVICE)
    buffer[:, :vocabulary] = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(DEVICE, dtype)
    return buffer[:, :vocabulary], buffer


def check(
    logits: torch.Tensor,
    labels: torch.Tensor,
    divisor: float,
    *,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    in_place: bool = False,
) -> None:
    expected_loss, expected = reference(logits, labels, divisor, ignore_index, smoothing)
    before = logits.clone()
    loss, gradient = cross_entropy(
        logits,
        labels.to(DEVICE),
        torch.tensor(divisor, dtype=torch.float32, device=DEVICE),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        in_place=in_place,
    )
    for_loss, for_gradient = TOLERANCE[logits.dtype]
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    assert loss.item() == pytest.approx(expected_loss.item(), rel=for_loss * max(1, len(labels)) ** 0.5, abs=1e-6)
    assert torch.allclose(gradient.double().cpu(), expected, rtol=for_gradient, atol=1e-7 / divisor + 1e-8)
    if in_place:
        assert gradient.data_ptr() == logits.data_ptr()
    else:
        assert torch.equal(logits, before)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _filled(empty_like(*a, **k)))


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_loss_and_gradient(vocabulary: int, dtype: torch.dtype, in_place: bool) -> None:
    for seed, tokens in ((0, 1), (1, 7)):
        logits, buffer = poisoned(tokens, vocabulary, dtype, seed)
        labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
        labels[0] = vocabulary - 1
        check(logits, labels, 3.7, in_place=in_place)
        assert buffer[:, vocabulary:].isnan().all()  # nothing is written beside the rows


@pytest.mark.parametrize("smoothing", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("vocabulary", [2, 101, 8193])
def test_label_smoothing(vocabulary: int, smoothing: float) -> None:
    logits, _ = poisoned(5, vocabulary, torch.float32, 3)
    labels = torch.tensor([0, 1, vocabulary - 1, -100, 1])
    check(logits, labels, 4.0, smoothing=smoothing)
    check(logits, labels, 4.0, smoothing=smoothing, in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7])
def test_ignored_labels(ignore_index: int, in_place: bool) -> None:
    for labels in ([ignore_index] * 4, [3, ignore_index, 7, 0], [ignore_index, 1, 1, ignore_index]):
        logits, buffer = poisoned(4, 101, torch.bfloat16, 2)
        check(logits, torch.tensor(labels), 2.0, ignore_index=ignore_index, in_place=in_place)
        assert buffer[:, 101:].isnan().all()


def test_large_and_equal_logits() -> None:
    """Far apart, far from zero, or all the same: the sum neither overflows nor vanishes."""
    rows = torch.stack(
        [
            torch.linspace(-3e4, 3e4, 300),
            torch.full((300,), 1e4),
            torch.full((300,), -1e4),
            torch.zeros(300).index_fill(0, torch.tensor(17), 80.0),
        ]
    ).to(DEVICE)
    for labels in ([299, 0, 299, 17], [0, 5, 5, 3]):
        check(rows.clone(), torch.tensor(labels), 1.0)


def test_forbidden_tokens() -> None:
    """Some logits are -inf, as masks make them: no NaN, and no gradient there."""
    logits = torch.randn(3, 9000).to(DEVICE)
    logits[:, 100:8500] = -math.inf
    loss, gradient = cross_entropy(logits, torch.tensor([3, 99, 8999]).to(DEVICE), torch.tensor(1.0, device=DEVICE))
    expected_loss, expected = reference(logits, torch.tensor([3, 99, 8999]), 1.0, -100, 0.0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert torch.allclose(gradient.double().cpu(), expected, atol=1e-6)
    # A whole first block of the row, too.
    logits = torch.randn(2, 9000).to(DEVICE)
    logits[:, :8192] = -math.inf
    loss, gradient = cross_entropy(logits, torch.tensor([8192, 8999]).to(DEVICE), torch.tensor(1.0, device=DEVICE))
    expected_loss, expected = reference(logits, torch.tensor([8192, 8999]), 1.0, -100, 0.0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert torch.allclose(gradient.double().cpu(), expected, atol=1e-6)


def test_no_tokens() -> None:
    loss, gradient = cross_entropy(
        torch.zeros(0, 11, device=DEVICE),
        torch.zeros(0, dtype=torch.long, device=DEVICE),
        torch.ones((), device=DEVICE),
    )
    assert loss.item() == 0
    assert gradient.shape == (0, 11)


def test_infinite_divisor_of_nothing() -> None:
    """No label counts: zero losses over zero are NaN, as PyTorch's mean over nothing is; gradients are not."""
    logits, _ = poisoned(3, 50, torch.float32, 1)
    _, gradient = cross_entropy(logits, torch.full((3,), -100).to(DEVICE), torch.zeros((), device=DEVICE))
    assert not gradient.any()
