"""Training with the kernels in place: the head without autograd, gradients added by launches of many tensors.

Without a card the host backend runs them in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _kernels import CARD, DEVICE
from _models import clone, distance, language_model, token_batches, train_offloaded, weights, worst
from slidecore import gradients, head, kernels
from slidecore.head import Elementwise, scale_and_cap
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels run for tensors of the host backend, too. The list gets the tokens of each run of the fused head."""
    if not CARD:
        monkeypatch.setattr(kernels, "run_for", lambda tensor: True)
    runs: list[int] = []
    inner = head._run_fused

    def run(record: Any, entry: Any, flat: torch.Tensor, *rest: Any) -> Any:
        runs.append(len(flat))
        return inner(record, entry, flat, *rest)

    monkeypatch.setattr(head, "_run_fused", run)
    return runs


def train(
    offload: Offload, plain: nn.Module, tile: int | None, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    device = "cuda" if CARD else "cpu"
    model = offload(clone(plain), device=device, **options)
    if tile is not None:
        engine_of(model).activations.head_tile = lambda vocabulary: tile  # type: ignore[method-assign]
    losses = train_offloaded(model, token_batches(4 if CARD else 2))  # the interpreter is slow
    result = weights(model)
    slidecore.close(model)
    return losses, result


@pytest.mark.parametrize(
    ("kind", "config", "micro_batch", "tile"),
    [
        ("llama", {}, "auto", 7),
        ("llama", {"tied": True}, "auto", None),
        ("llama", {"tied": True}, 1, 7),
        ("gemma2", {"final_logit_softcapping": 3.0}, 1, None),
        ("granite", {"logits_scaling": 0.3, "tied": True}, "auto", 7),
    ],
    ids=["llama", "tied", "tied in parts", "softcap", "scaled"],
)
def test_same_as_without(
    offload: Offload,
    fused: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    config: dict[str, Any],
    micro_batch: int | str,
    tile: int | None,
) -> None:
    plain = language_model(kind, layers=2, seed=5, **config).train()
    options = {"compute_dtype": torch.float32, "micro_batch": micro_batch}
    losses, mine = train(offload, plain, tile, **options)
    assert fused
    count = len(fused)
    monkeypatch.setattr(kernels, "run_for", lambda tensor: False)
    expected_losses, expected = train(offload, plain, tile, **options)
    assert len(fused) == count
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    value, name = worst(distance(mine, expected))
    assert value < 1e-3, name


def test_bfloat16(offload: Offload, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = language_model("llama", layers=2, seed=5).train()
    losses, _ = train(offload, plain, 7, compute_dtype=torch.bfloat16, micro_batch=1)
    assert fused
    monkeypatch.setattr(kernels, "run_for", lambda tensor: False)
    expected, _ = train(offload, plain, 7, compute_dtype=torch.bfloat16, micro_batch=1)
    assert losses == pytest.approx(expected, rel=1e-2)


def test_small_gradients_wait_for_one_launch(
    offload: Offload, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slidecore.triton import accumulate

    launches: list[int] = []
    inner = accumulate.accumulate

    def counted(total: torch.Tensor, own: Any, *rest: Any, **options: Any) -> None:
        launches.append(len(own))
        inner(total, own, *rest, **options)

    monkeypatch.setattr(accumulate, "accumulate", counted)
    plain = language_model("llama", layers=2, seed=5).train()
    train(offload, plain, None, compute_dtype=torch.float32, micro_batch=1)
    assert max(launches) > 1
    launches.clear()
    monkeypatch.setattr(gradients, "_PENDING_BYTES", 0)
    train(offload, plain, None, compute_dtype=torch.float32, micro_batch=1)
    assert set(launches) == {1}


def tail(function: Callable[[Any], Any]) -> tuple[Elementwise, ...]:
    """What a model's own expression leaves on deferred logits."""
    made: list[Elementwise] = []

    class Recorder(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(Elementwise(func, tuple(args[1:]), kwargs or {}))
            return args[0]

    function(torch.zeros(1).as_subclass(Recorder))
    return tuple(made)


def test_what_is_recognised() -> None:
    x = torch.linspace(-5, 5, 31)
    for function in (
        lambda x: x,
        lambda x: x * 0.5,
        lambda x: (3 * x.float()) / 4,
        lambda x: torch.tanh(x / 3.0) * 3.0,
        lambda x: 2 * (x * 0.1).div(2.0).tanh().to(torch.float32) * 7,
    ):
        found = scale_and_cap(tail(function))
        assert found is not None
        inner, outer = found
        mine = inner * x if outer is None else outer * torch.tanh(inner * x)
        assert torch.allclose(mine, function(x))
    for function in (
        lambda x: torch.tanh(torch.tanh(x)),
        lambda x: x / 0,
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        lambda x: x.sigmoid(),
    ):
        assert scale_and_cap(tail(function)) is None


def test_not_for_every_head(offload: Offload, fused: list[int]) -> None:
    """A head with a bias, or with a forward of its own, runs as it is."""
    plain = language_model("llama", layers=2, seed=5).train()
    biased = clone(plain)
    biased.lm_head.bias = nn.Parameter(torch.zeros(biased.lm_head.weight.shape[0]))
    losses, _ = train(offload, biased, None, compute_dtype=torch.float32)
    assert not fused
    expected, _ = train(offload, plain, None, compute_dtype=torch.float32)
    assert fused
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert DEVICE.type in ("cpu", "cuda")
