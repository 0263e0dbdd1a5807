"""Bad input is a clear error, before work is lost where that can be told, and never a hang or a crash."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import slidecore
import torch
from _models import (
    Residual,
    Stack,
    clone,
    distance,
    feature_batches,
    loss_of,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from slidecore.offloading import engine_of
from torch import nn

Offload = Callable[..., nn.Module]


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """`model` is as it was and can still be offloaded and trained."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all("forward" not in module.__dict__ for module in model.modules())
    with pytest.raises(slidecore.UsageError, match="not offloaded"):
        slidecore.stats(model)
    slidecore.offload(model, device="cpu")
    assert all(map(math.isfinite, train_offloaded(model, feature_batches(2))))
    slidecore.close(model)


def assert_trains_like(
    model: nn.Module, optimizer: Any, plain: nn.Module, plain_optimizer: Any, steps: int = 3
) -> None:
    """From here on both train alike: same losses and weights."""
    for batch in feature_batches(steps, seed=77):
        losses = []
        for m, o in ((model, optimizer), (plain, plain_optimizer)):
            loss = loss_of(m, batch)
            loss.backward()
            o.step()
            o.zero_grad()
            losses.append(loss.item())
        assert math.isfinite(losses[0])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    slidecore.synchronize(model)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < 1e-5, name


def pair(offload: Offload, plain: nn.Module, **options: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    model = offload(clone(plain), **options)
    return (
        model,
        slidecore.AdamW(model.parameters(), lr=1e-2),
        plain,
        torch.optim.AdamW(plain.parameters(), lr=1e-2),
    )


# --- offload()


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LayerNorm(3)),
        nn.ModuleList([nn.Linear(3, 3)]),
        nn.Sequential(nn.ReLU(), nn.ReLU()),
    ],
    ids=["one layer", "different layers", "a run of one", "no parameters"],
)
def test_no_blocks(model: nn.Module) -> None:
    with pytest.raises(slidecore.ModelError, match=r"no repeated blocks.*blocks=\["):
        slidecore.offload(model, device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window=0.*at least 1"),
        ({"window": -2}, ValueError, "window=-2"),
        ({"window": 2.5}, ValueError, "window=2.5"),
        ({"window": "2"}, ValueError, "window="),
        ({"micro_batch": 0}, ValueError, "micro_batch=0.*at least 1"),
        ({"micro_batch": -1}, ValueError, "micro_batch=-1"),
        ({"micro_batch": 1.5}, ValueError, "micro_batch=1.5"),
        ({"micro_batch": "all"}, ValueError, "micro_batch='all'"),
        ({"micro_batch": None}, ValueError, "micro_batch=None"),
        ({"keep_graphs": -1}, ValueError, "keep_graphs=-1.*at least 0"),
        ({"keep_graphs": "some"}, ValueError, "keep_graphs='some'"),
        ({"compute_dtype": torch.float16}, ValueError, "float16 is refused: its range needs loss scaling"),
        ({"compute_dtype": torch.float64}, ValueError, "float64.*use torch.bfloat16 or torch.float32"),
        ({"compute_dtype": torch.int8}, ValueError, "int8"),
        ({"compute_dtype": "bfloat16"}, ValueError, "compute_dtype=.*use torch.bfloat16"),
        ({"device": "xpu"}, slidecore.UsageError, "device='xpu' is not supported; use 'auto'"),
        ({"device": "graphics card"}, slidecore.UsageError, "device='graphics card' is not supported; use 'auto'"),
        ({"device": "cuda:99"}, slidecore.UsageError, "device='cuda:99', but"),
        ({"device_memory": "lots"}, ValueError, "device_memory='lots' is not a size"),
        ({"device_memory": "3 parsecs"}, ValueError, "device_memory='3 parsecs' is not a size"),
        ({"device_memory": -1}, ValueError, "device_memory=-1"),
        ({"device_memory": math.nan}, ValueError, "device_memory=nan"),
        ({"device_memory": 1000}, slidecore.BudgetError, r"device_memory=1000 B .* is too small"),
        ({"kernels": "fast"}, ValueError, "kernels='fast'"),
        ({"kernels": "liger"}, slidecore.UsageError, "kernels='liger': .*need a card"),
        ({"threads": -1}, ValueError, "threads"),
        ({"piece_bytes": 0}, ValueError, "piece_bytes"),
        ({"piece_bytes": 5000}, ValueError, "piece_bytes=5000 must be a multiple of 4096"),
        ({"ring_pieces": 1}, ValueError, "ring_pieces=1 must be .auto. or a whole number of at least 2"),
        ({"blocks": ["blocks.7"]}, slidecore.ModelError, "no module named 'blocks.7'"),
        ({"blocks": ["blocks.0", "blocks.0.up"]}, slidecore.ModelError, "'blocks.0.up' lies inside 'blocks.0'"),
        ({"blocks": [nn.Linear(2, 2)]}, slidecore.ModelError, "a Linear given there is not a module of this model"),
        ({"blocks": ["blocks.0.dropout"]}, slidecore.ModelError, "'blocks.0.dropout' has no parameters"),
        ({"blocks": []}, slidecore.ModelError, "no repeated blocks"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    if "device" in options and torch.cuda.device_count() > 99:
        pytest.skip("this machine has a card number 99")
    model = Stack()
    before = weights(model)
    with pytest.raises(error, match=message):
        slidecore.offload(model, **{"device": "cpu", **options})
    assert_untouched(model, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, so that device='cuda' is right")
def test_cuda_without_a_card() -> None:
    model = Stack()
    before = weights(model)
    with pytest.raises(slidecore.UsageError, match=r"PyTorch sees no card.*device='cpu'"):
        slidecore.offload(model, device="cuda")
    assert_untouched(model, before)


def test_parameter_shared_between_blocks_is_named() -> None:
    model = Stack()
    model.blocks[1].up.weight = model.blocks[3].up.weight
    with pytest.raises(slidecore.ModelError, match=r"shared between 'blocks.1' and 'blocks.3'.*Untie them"):
        slidecore.offload(model, device="cpu")
    model.blocks[1].up.weight = nn.Parameter(model.blocks[3].up.weight.detach().clone())
    assert_untouched(model, weights(model))


def test_parameter_shared_between_block_and_edge_is_named() -> None:
    model = Stack(width=7)
    model.blocks[2].norm.weight = model.norm.weight
    with pytest.raises(slidecore.ModelError, match=r"shared between 'blocks.2' and .*norm.*Untie them"):
        slidecore.offload(model, device="cpu")


def test_parameter_shared_within_one_block_works(offload: Offload) -> None:
    plain = Stack(width=9, inner=9)
    for block in plain.blocks:
        block.up.weight = block.down.weight
    assert_trains_like(*pair(offload, plain))


def test_integer_parameter_is_named() -> None:
    model = Stack()
    model.blocks[1].table = nn.Parameter(torch.arange(5), requires_grad=False)
    with pytest.raises(slidecore.ModelError, match=r"'blocks.1.table' has dtype torch.int64"):
        slidecore.offload(model, device="cpu")


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_are_not_contiguous_work(offload: Offload, frozen: bool) -> None:
    plain = Stack()
    for block in plain.blocks:
        block.up.weight = nn.Parameter(torch.randn(13, 29).t() / 4, requires_grad=not frozen)
        block.down.weight = nn.Parameter(torch.randn(13, 58)[:, ::2] / 4, requires_grad=not frozen)
        block.norm.bias = nn.Parameter(torch.randn(1).expand(13).detach())
    reference = clone(plain)
    for block in reference.blocks:  # AdamW cannot update an expanded parameter in place
        block.norm.bias = nn.Parameter(block.norm.bias.detach().clone())
    model, optimizer, _, _ = pair(offload, plain)
    for name, value in weights(reference).items():
        assert torch.equal(model.get_parameter(name), value)
    assert_trains_like(model, optimizer, reference, torch.optim.AdamW(reference.parameters(), lr=1e-2))


def test_float64_and_float16_models_are_taken_to_the_compute_dtype(offload: Offload) -> None:
    for dtype in (torch.float64, torch.float16):
        plain = Stack().to(dtype)
        model = offload(clone(plain), compute_dtype=torch.float32)
        for name, value in weights(plain).items():
            assert model.get_parameter(name).dtype == torch.float32
            assert torch.equal(model.get_parameter(name), value.float())
        assert_trains_like(
            model,
            slidecore.AdamW(model.parameters(), lr=1e-2),
            plain.float(),
            torch.optim.AdamW(plain.parameters(), lr=1e-2),
        )


def test_offloading_twice(offload: Offload) -> None:
    plain = Stack()
    model = offload(clone(plain))
    with pytest.raises(
        slidecore.ModelError, match=r"this model is offloaded already; slidecore.close\(model\) undoes it"
    ):
        slidecore.offload(model, device="cpu")
    outer = nn.Sequential(nn.Linear(7, 7), model)
    with pytest.raises(slidecore.ModelError, match="parameters of this model are offloaded already"):
        slidecore.offload(outer, device="cpu", blocks=["0"])
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    assert_trains_like(model, optimizer, plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))


def test_offloading_a_part_of_an_offloaded_model(offload: Offload) -> None:
    model = offload(Stack())
    with pytest.raises(slidecore.ModelError, match="parameters of this model are offloaded already"):
        slidecore.offload(model.blocks, device="cpu")


def test_dtype_of_an_offloaded_model_is_fixed(offload: Offload) -> None:
    model = offload(Stack())
    before = weights(model)
    for change in (lambda: model.half(), lambda: model.to(torch.bfloat16), lambda: model.double()):
        with pytest.raises(slidecore.UsageError, match="compute_dtype="):
            change()
    assert model.to("cpu") is model
    assert model.float() is model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# --- functions that take an offloaded model


@pytest.mark.parametrize(
    "function",
    [
        slidecore.stats,
        slidecore.close,
        slidecore.synchronize,
        slidecore.trace,
        lambda m: slidecore.master_parameter(m, "enter.weight"),
        lambda m: slidecore.assign_parameter(m, "enter.weight", torch.zeros(13, 7)),
    ],
)
def test_functions_refuse_a_plain_model(offload: Offload, function: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(slidecore.UsageError, match="not offloaded"):
        function(Stack())
    model = offload(Stack())
    slidecore.close(model)
    with pytest.raises(slidecore.UsageError, match="not offloaded"):
        function(model)


def test_parameter_names_and_shapes(offload: Offload) -> None:
    model = offload(Stack())
    before = weights(model)
    for name in ("enter.missing", "nowhere.weight", "enter", ""):
        with pytest.raises(slidecore.ModelError, match="no parameter named"):
            slidecore.master_parameter(model, name)
        with pytest.raises(slidecore.ModelError, match="no parameter named"):
            slidecore.assign_parameter(model, name, torch.zeros(1))
    with pytest.raises(slidecore.ModelError, match=r"enter.weight: expected shape \(13, 7\), got \(7, 13\)"):
        slidecore.assign_parameter(model, "enter.weight", torch.zeros(7, 13))
    with pytest.raises(slidecore.ModelError, match=r"enter.weight: expected a floating-point tensor"):
        slidecore.assign_parameter(model, "enter.weight", torch.zeros(13, 7, dtype=torch.int32))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# --- the optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
    ids=str,
)
def test_optimizer_options_out_of_range(offload: Offload, options: dict[str, Any], message: str) -> None:
    plain = Stack()
    model = offload(clone(plain))
    with pytest.raises(ValueError, match=message):
        slidecore.AdamW(model.parameters(), **options)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)  # the refused one has left nothing behind
    assert_trains_like(model, optimizer, plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))


def test_optimizer_over_wrong_parameters(offload: Offload) -> None:
    model, other, plain = offload(Stack()), offload(Stack()), Stack()
    with pytest.raises(ValueError, match="empty"):
        slidecore.AdamW([])
    with pytest.raises(slidecore.UsageError, match=r"shape \(13, 7\) does not belong to an offloaded model"):
        slidecore.AdamW(plain.parameters())
    with pytest.raises(slidecore.UsageError, match="several offloaded models"):
        slidecore.AdamW([*model.parameters(), *other.parameters()])
    with pytest.raises(slidecore.UsageError, match="train=False"):
        slidecore.AdamW(offload(Stack(), train=False).parameters())
    closed = offload(Stack())
    slidecore.close(closed)
    with pytest.raises(slidecore.UsageError, match="does not belong to an offloaded model"):
        slidecore.AdamW(closed.parameters())
    first = slidecore.AdamW(model.parameters())
    with pytest.raises(slidecore.UsageError, match=r"already has a slidecore.AdamW"):
        slidecore.AdamW(model.parameters())
    del first
    slidecore.AdamW(model.parameters())


def test_an_optimizer_after_another(offload: Offload) -> None:
    """As in torch.optim, the second one starts without moments."""
    plain = Stack()
    model = offload(clone(plain))
    for lr in (1e-2, 3e-3):
        optimizer = slidecore.AdamW(model.parameters(), lr=lr)
        assert_trains_like(model, optimizer, plain, torch.optim.AdamW(plain.parameters(), lr=lr))
        del optimizer


def test_backward_without_optimizer(offload: Offload) -> None:
    plain = Stack()
    model = offload(clone(plain))
    for _ in range(2):
        with pytest.raises(slidecore.UsageError, match=r"no optimizer; create\s+slidecore.AdamW"):
            loss_of(model, feature_batches(1)[0]).backward()
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    assert_trains_like(model, optimizer, plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))


def test_training_a_model_offloaded_for_inference(offload: Offload) -> None:
    model = offload(Stack(), train=False)
    x = torch.randn(2, 3, 7)
    with torch.no_grad():
        assert torch.allclose(model(x), Stack()(x), atol=1e-6)
    model(x)  # nothing has a graph, so nothing is wrong
    assert not model(x).requires_grad


# --- backward


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 5}, {"micro_batch": 2}], ids=str)
def test_backward_twice_over_one_graph(offload: Offload, options: dict[str, Any]) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack(), **options)
    batch = feature_batches(1)[0]
    loss_of(plain, batch).backward()
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|second time"):
        loss.backward()
    for o in (optimizer, plain_optimizer):  # the first backward counts
        o.step()
        o.zero_grad()
    with pytest.raises(RuntimeError, match=r"twice|second time|updated after this forward"):
        loss.backward()
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_second_backward_before_step(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack())
    first, second = feature_batches(2)
    loss_of(plain, first).backward()
    loss_of(model, first).backward()
    loss = loss_of(model, second)
    with pytest.raises(slidecore.UsageError, match=r"twice without optimizer.step\(\).*give it in one call"):
        loss.backward()
    for o in (optimizer, plain_optimizer):
        o.step()
        o.zero_grad()
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_backward_of_a_forward_before_the_update(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack())
    first, second = feature_batches(2)
    early = loss_of(model, second)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        loss_of(m, first).backward()
        o.step()
        o.zero_grad()
    with pytest.raises(slidecore.UsageError, match="weights were updated after this forward"):
        early.backward()
    del early
    assert_trains_like(model, optimizer, plain, plain_optimizer)


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 3}, {"micro_batch": 2}], ids=str)
def test_one_backward_over_two_forwards(offload: Offload, options: dict[str, Any]) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack(), **options)
    first, second = feature_batches(2)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        (loss_of(m, first) + 0.3 * loss_of(m, second)).backward()
        o.step()
        o.zero_grad()
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_forwards_that_get_no_backward(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack(), keep_graphs=2)
    first, second = feature_batches(2)
    kept = loss_of(model, first)  # looked at, and dropped later
    loss_of(model, second)
    assert_trains_like(model, optimizer, plain, plain_optimizer, steps=1)
    del kept
    loss_of(model, second)
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_backward_that_reaches_half_of_the_blocks(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack())
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        taken = []
        handle = m.blocks[2].register_forward_hook(lambda _, __, out, taken=taken: taken.append(out))
        m(feature_batches(1)[0]["x"])
        handle.remove()
        taken[0].square().mean().backward()
        o.step()
        o.zero_grad()
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_step_without_backward(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack())
    before = weights(model)
    optimizer.step()
    loss_of(model, feature_batches(1)[0])
    optimizer.step()
    optimizer.zero_grad()
    slidecore.synchronize(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert_trains_like(model, optimizer, plain, plain_optimizer)


@pytest.mark.parametrize("name", ["enter.weight", "blocks.1.up.bias", "leave.weight"])
def test_requires_grad_changed_after_offload(offload: Offload, name: str) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack())
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(slidecore.UsageError, match=f"{name}.requires_grad was changed to False after offload"):
        loss_of(model, feature_batches(1)[0])
    model.get_parameter(name).requires_grad_(True)
    assert_trains_like(model, optimizer, plain, plain_optimizer)


# --- failures of user code


class Fails(Residual):
    """Raises once, when armed, at a forward of the wanted kind."""

    armed = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        armed = type(self).armed
        if self.chosen and armed and (armed == "forward" or torch.is_grad_enabled()):
            type(self).armed = ""
            raise RuntimeError("a fault of the test")
        return super().forward(x)


def failing_stack(at: int) -> Stack:
    Fails.armed = ""
    model = Stack(block=lambda: Fails(13, 29))
    for i, block in enumerate(model.blocks):
        block.chosen = i == at
    return model


@pytest.mark.parametrize("call_step", [True, False], ids=["step", "straight on"])
@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_block_that_fails_in_recomputation(offload: Offload, at: int, micro_batch: Any, call_step: bool) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, failing_stack(at), micro_batch=micro_batch)
    assert_trains_like(model, optimizer, plain, plain_optimizer, steps=2)
    batch = feature_batches(1, seed=5)[0]
    # In plain PyTorch: backward stops behind the block, and what has a gradient by then is updated.
    out = []
    handle = plain.blocks[at].register_forward_hook(lambda _, __, o: out.append(o.detach().requires_grad_()) or out[-1])
    loss_of(plain, batch).backward()
    handle.remove()
    plain_optimizer.step()
    plain_optimizer.zero_grad()

    loss = loss_of(model, batch)
    Fails.armed = "recomputation"
    with pytest.raises(RuntimeError, match="a fault of the test"):
        loss.backward()
    assert not Fails.armed
    if call_step:
        optimizer.step()
        optimizer.zero_grad()
        assert_trains_like(model, optimizer, plain, plain_optimizer)
    else:
        with pytest.warns(UserWarning, match="last backward pass did not finish"):
            assert_trains_like(model, optimizer, plain, plain_optimizer)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("options", [{}, {"keep_graphs": 5}, {"micro_batch": 3}], ids=str)
def test_tensor_hook_that_fails(offload: Offload, options: dict[str, Any], at: int) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack(), **options)
    assert_trains_like(model, optimizer, plain, plain_optimizer, steps=2)
    batch = feature_batches(1, seed=5)[0]

    def fault(gradient: torch.Tensor) -> None:
        raise RuntimeError("a fault of the test")

    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        handle = m.blocks[at].register_forward_hook(lambda _, __, out: out.register_hook(fault) and None)
        loss = loss_of(m, batch)
        handle.remove()
        with pytest.raises(RuntimeError, match="a fault of the test"):
            loss.backward()
        del loss
        o.step()
        o.zero_grad()
    assert_trains_like(model, optimizer, plain, plain_optimizer)


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 5}, {"micro_batch": 2}], ids=str)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_block_that_fails_in_forward(offload: Offload, at: int, options: dict[str, Any]) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, failing_stack(at), **options)
    for _ in range(2):
        assert_trains_like(model, optimizer, plain, plain_optimizer, steps=2)
        Fails.armed = "forward"
        with pytest.raises(RuntimeError, match="a fault of the test"):
            loss_of(model, feature_batches(1)[0])
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_block_that_fails_in_inference(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, failing_stack(1))
    Fails.armed = "forward"
    with torch.no_grad(), pytest.raises(RuntimeError, match="a fault of the test"):
        loss_of(model, feature_batches(1)[0])
    assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_interrupt_in_recomputation(offload: Offload) -> None:
    """Ctrl-C is not an Exception."""
    model = offload(Stack())
    optimizer = slidecore.AdamW(model.parameters())
    loss = loss_of(model, feature_batches(1)[0])
    forward = model.blocks[4].up.forward

    def interrupted(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    model.blocks[4].up.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    model.blocks[4].up.forward = forward
    optimizer.step()
    assert all(map(math.isfinite, [loss_of(model, b).item() for b in feature_batches(2)]))
    slidecore.close(model)


class ModifiesAfterUse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(Residual(13, 29) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for block in self.blocks:
            previous = h
            h = block(h)
            previous += 1.0
        return h


@pytest.mark.parametrize("rows", [3, 211], ids=["saved on the device", "saved on the host"])
@pytest.mark.parametrize("keep_graphs", [0, 4])
def test_input_modified_after_the_block(offload: Offload, keep_graphs: int, rows: int) -> None:
    model = offload(ModifiesAfterUse(), keep_graphs=keep_graphs)
    optimizer = slidecore.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        model(torch.randn(rows, 7)).square().mean().backward()
    optimizer.step()


class ModifiesInput(Residual):
    """Legal in plain PyTorch, but the input is gone when it is wanted for recomputation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        return super().forward(x)


@pytest.mark.parametrize("micro_batch", ["auto", 1])
def test_input_modified_by_the_block(offload: Offload, micro_batch: Any) -> None:
    model = offload(Stack(block=lambda: ModifiesInput(13, 29)), micro_batch=micro_batch)
    optimizer = slidecore.AdamW(model.parameters())
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        model(torch.randn(3, 7))
    optimizer.step()
    slidecore.synchronize(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_does_not_hang(offload: Offload, value: float, compute_dtype: torch.dtype) -> None:
    model = offload(Stack(), compute_dtype=compute_dtype)
    optimizer = slidecore.AdamW(model.parameters())
    x = torch.randn(3, 4, 7, dtype=compute_dtype)
    x[1, 2, 3] = value
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert not math.isfinite(loss.item())
    slidecore.synchronize(model)
    assert slidecore.master_parameter(model, "blocks.0.up.weight").isnan().any()


# --- batches that cannot be split


@pytest.mark.parametrize("options", [{}, {"keep_graphs": 3}, {"device_memory": "1GiB", "keep_graphs": 0}], ids=str)
def test_batch_norm_is_not_split(offload: Offload, options: dict[str, Any]) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(13, 13), nn.BatchNorm1d(13), nn.Tanh())

    plain = Stack(block=block).train()
    model = offload(clone(plain), micro_batch=1, blocks=[f"blocks.{i}" for i in range(5)], **options)
    batches = feature_batches(3, shape=(8,))
    assert train_offloaded(model, batches) == pytest.approx(train_plain(plain, batches), abs=1e-5)
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    for (name, mine), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5), name


class Positional(nn.Module):
    """Blocks that get a vector over positions, which looks like one over samples if both are equally many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(PositionalBlock() for _ in range(3))
        self.leave = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1]) / x.shape[1]
        for block in self.blocks:
            x = block(x, positions)
        return self.leave(x)


class PositionalBlock(Residual):
    def __init__(self) -> None:
        super().__init__(7, 11)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(x + positions[:, None])


def test_batch_as_long_as_the_sequence_is_not_split(offload: Offload) -> None:
    plain = Positional()
    model = offload(clone(plain), micro_batch=2)
    for shape in ((5, 5), (4, 6), (6, 3)):
        batches = feature_batches(2, shape=shape)
        if shape == (5, 5):
            with pytest.warns(UserWarning, match="batch and sequence are both 5 long.*run whole"):
                mine = [loss_of(model, batch).item() for batch in batches]
        else:
            mine = [loss_of(model, batch).item() for batch in batches]
        assert mine == pytest.approx([loss_of(plain, batch).item() for batch in batches], abs=1e-5)
    plans = engine_of(model).activations._plans.values()
    assert {plan.micro_batches for plan in plans} == {1, 2, 3}  # as for a run that never saw the first shape
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    assert_trains_like(model, optimizer, plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))


class Router(Residual):
    """Returns an auxiliary loss beside its output, as mixtures of experts do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = super().forward(x)
        return out, out.square().mean()


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(Router(7, 11) for _ in range(4))
        self.leave = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for block in self.blocks:
            x, auxiliary = block(x)
            total = total + auxiliary
        return self.leave(x) + total


@pytest.mark.parametrize("keep_graphs", [0, 2])
def test_outputs_without_a_batch_dimension_run_whole(offload: Offload, keep_graphs: int) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Routed(), micro_batch=2, keep_graphs=keep_graphs)
    with pytest.warns(UserWarning, match="Router returns a tensor that has no batch dimension"):
        assert_trains_like(model, optimizer, plain, plain_optimizer)


def test_empty_batch_does_not_hang(offload: Offload) -> None:
    model, optimizer, plain, plain_optimizer = pair(offload, Stack(), micro_batch=2)
    empty = torch.zeros(0, 4, 7)
    assert model(empty).shape == (0, 4, 3)
    for m, o in ((model, optimizer), (plain, plain_optimizer)):
        m(empty).sum().backward()
        o.step()
        o.zero_grad()
    assert_trains_like(model, optimizer, plain, plain_optimizer)
