"""train, eval, no_grad and generate while offloaded; several models in one process; what close() leaves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
import torch.nn.functional as F
from _models import (
    Stack,
    clone,
    distance,
    feature_batches,
    language_model,
    loss_of,
    token_batches,
    train_offloaded,
    train_plain,
    weights,
    worst,
)
from _threads import assert_no_more_threads, native_threads
from torch import nn
from torch.utils.data import DataLoader

Offload = Callable[..., nn.Module]


def assert_same_weights(model: nn.Module, plain: nn.Module, tolerance: float = 1e-5) -> None:
    slidecore.synchronize(model)
    value, name = worst(distance(weights(model), weights(plain)))
    assert value < tolerance, name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_generation_between_steps(offload: Offload, kind: str, window: int) -> None:
    plain = language_model(kind).train()
    model = offload(clone(plain), window=window)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    prompt = torch.randint(3, 101, (2, 5))
    mask = torch.ones_like(prompt)
    for batch in token_batches(3):
        for m, o in ((model, optimizer), (plain, reference)):
            m.train()
            loss_of(m, batch).backward()
            o.step()
            o.zero_grad()
            m.eval()
        with torch.no_grad():
            assert torch.allclose(model(prompt).logits, plain(prompt).logits, atol=1e-4)
        options: list[dict[str, Any]] = [
            {"do_sample": False},
            {"do_sample": False, "use_cache": False},
            {"do_sample": True, "top_k": 20},
            {"do_sample": False, "num_beams": 3},
        ]
        for option in options:
            outputs = []
            for m in (model, plain):
                torch.manual_seed(4)
                outputs.append(m.generate(prompt, attention_mask=mask, max_new_tokens=6, **option))
            assert torch.equal(*outputs), option
    assert_same_weights(model, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_between_forward_and_backward(offload: Offload, mode: Any) -> None:
    plain = Stack().train()
    model = offload(clone(plain))
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    other = torch.randn(4, 7)
    for batch in feature_batches(4):
        losses = [loss_of(m, batch) for m in (model, plain)]
        with mode():
            assert torch.allclose(model(other), plain(other), atol=1e-5)
        for loss, o in zip(losses, (optimizer, reference), strict=True):
            loss.backward()
            o.step()
            o.zero_grad()
        with mode():
            assert torch.allclose(model(other), plain(other), atol=1e-5)
    assert_same_weights(model, plain)


def test_train_and_eval_switch_dropout(offload: Offload) -> None:
    plain = Stack(dropout=0.5)
    model = offload(clone(plain))
    x = torch.randn(3, 7)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(x), model(x))
        assert torch.allclose(model(x), plain.eval()(x), atol=1e-6)
        model.train()
        assert not torch.equal(model(x), model(x))
    # In eval mode with gradients, too.
    model.eval()
    assert torch.equal(model(x), model(x))
    assert model(x).requires_grad


def test_parameters_between_visits_are_cpu_views(offload: Offload) -> None:
    model = offload(language_model("llama", tied=True))
    train_offloaded(model, token_batches(2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for parameter in model.parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.device.type == "cpu"
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.data.isfinite().all()
        assert parameter.grad is None


def test_policy_and_reference(offload: Offload) -> None:
    """Two offloaded models in one loss, of which one is trained."""
    policy, frozen = language_model("llama", seed=1).train(), language_model("llama", seed=2).eval()
    models = offload(clone(policy)), offload(clone(frozen), train=False)
    optimizer = slidecore.AdamW(models[0].parameters(), lr=1e-3)
    reference = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for batch in token_batches(5):
        losses = []
        for (p, r), o in (((models[0], models[1]), optimizer), ((policy, frozen), reference)):
            with torch.no_grad():
                target = r(input_ids=batch["input_ids"], use_cache=False).logits.log_softmax(-1)
            mine = p(input_ids=batch["input_ids"], use_cache=False).logits.log_softmax(-1)
            loss = F.kl_div(mine, target, log_target=True, reduction="batchmean")
            loss.backward()
            o.step()
            o.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same_weights(models[0], policy)
    for name, value in weights(frozen).items():
        assert torch.equal(models[1].get_parameter(name), value)


def test_two_models_in_turn(offload: Offload) -> None:
    """Forwards and backwards of two models, interleaved."""
    plains = [Stack(seed=1), Stack(seed=2, depth=3, width=17)]
    models = [offload(clone(plain)) for plain in plains]
    optimizers = [slidecore.AdamW(m.parameters(), lr=1e-2) for m in models]
    references = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in plains]
    for batch in feature_batches(5):
        for pair, steps in ((models, optimizers), (plains, references)):
            first, second = loss_of(pair[0], batch), loss_of(pair[1], batch)
            first.backward()
            steps[0].step()
            second.backward()
            steps[1].step()
            for o in steps:
                o.zero_grad()
    for model, plain in zip(models, plains, strict=True):
        assert_same_weights(model, plain)


def test_one_backward_through_two_models(offload: Offload) -> None:
    """The output of one is the input of the other."""
    plains = [Stack(seed=1, outputs=7), Stack(seed=2)]
    models = [offload(clone(plain)) for plain in plains]
    optimizers = [slidecore.AdamW(m.parameters(), lr=1e-2) for m in models]
    references = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in plains]
    for batch in feature_batches(5):
        losses = []
        for pair, steps in ((models, optimizers), (plains, references)):
            loss = F.mse_loss(pair[1](pair[0](batch["x"])), batch["target"])
            loss.backward()
            for o in steps:
                o.step()
                o.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for model, plain in zip(models, plains, strict=True):
        assert_same_weights(model, plain)


@pytest.mark.parametrize("kind", ["llama", "stack"])
def test_close_leaves_a_plain_model(kind: str) -> None:
    plain = (Stack() if kind == "stack" else language_model(kind)).train()
    batches = feature_batches(9) if kind == "stack" else token_batches(9)
    model = clone(plain)
    own = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    threads = native_threads()
    slidecore.offload(model, device="cpu")
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    train_offloaded(model, batches[:3])
    train_plain(plain, batches[:3], optimizer=lambda _: reference)
    assert native_threads() - threads
    slidecore.close(model)
    assert_no_more_threads(threads)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == own
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert worst(distance(weights(model), weights(plain)))[0] < 1e-5
    assert [loss_of(model, b).item() for b in batches] == pytest.approx(
        [loss_of(plain, b).item() for b in batches], abs=1e-5
    )
    # It trains like any other model, with gradients where PyTorch puts them, and can be offloaded again.
    fresh = clone(plain)
    assert train_plain(model, batches[3:6]) == pytest.approx(train_plain(fresh, batches[3:6]), abs=1e-5)
    slidecore.offload(model, device="cpu")
    assert train_offloaded(model, batches[6:]) == pytest.approx(train_plain(fresh, batches[6:]), abs=1e-5)
    slidecore.close(model)
    if kind == "llama":
        prompt = torch.randint(3, 101, (2, 5))
        assert model.eval().generate(prompt, max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_close_in_bfloat16_leaves_the_weights(offload: Offload) -> None:
    model = offload(Stack(), compute_dtype=torch.bfloat16)
    before = weights(model)
    slidecore.close(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])


def test_close_between_forward_and_backward(offload: Offload) -> None:
    model = offload(Stack())
    optimizer = slidecore.AdamW(model.parameters())
    loss = loss_of(model, feature_batches(1)[0])
    slidecore.close(model)
    with pytest.raises(RuntimeError):
        loss.backward()
    del optimizer
    assert loss_of(model, feature_batches(1)[0]).item() == pytest.approx(loss.item(), rel=1e-6)


def test_step_after_close(offload: Offload) -> None:
    model = offload(Stack())
    optimizer = slidecore.AdamW(model.parameters())
    slidecore.close(model)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_dropped_models_leave_no_threads_and_no_memory() -> None:
    model = Stack(width=130)
    loss_of(model, feature_batches(1)[0]).backward()
    model.zero_grad()
    gc.collect()
    threads, mapped = native_threads(), slidecore._core.HostBuffer.mapped_now()
    for _ in range(3):
        model = slidecore.offload(Stack(width=130), device="cpu")
        optimizer = slidecore.AdamW(model.parameters())
        for batch in feature_batches(2):
            loss_of(model, batch).backward()
            optimizer.step()
        seen = weakref.ref(model)
        del model, optimizer
        gc.collect()
        assert seen() is None
        assert_no_more_threads(threads)
        assert slidecore._core.HostBuffer.mapped_now() == mapped


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(7, generator=torch.Generator().manual_seed(i))


def test_data_loader_workers_fork_while_offloaded(offload: Offload) -> None:
    plain = Stack().train()
    model = offload(clone(plain))
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(2):  # the second time, after updates have run
        loader = DataLoader(Numbers(), batch_size=3, num_workers=2, multiprocessing_context="fork")
        for x in loader:
            for m, o in ((model, optimizer), (plain, reference)):
                m(x).square().mean().backward()
                o.step()
                o.zero_grad()
    assert_same_weights(model, plain)


def test_save_and_load_pretrained(offload: Offload, tmp_path: Path) -> None:
    model = offload(language_model("llama", tied=True))
    train_offloaded(model, token_batches(2))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in weights(again).items():
        assert torch.equal(value, model.get_parameter(name))


SCRIPT = """
import sys
import torch
from torch import nn
import slidecore

model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
slidecore.offload(model, device="cpu", threads=2)
optimizer = slidecore.AdamW(model.parameters())
for _ in range(3):
    loss = model(torch.randn(9, 300)).square().mean()
    loss.backward()
    optimizer.step()
if sys.argv[1] == "in backward":
    loss = model(torch.randn(9, 300)).square().mean()
    loss.backward()  # updates are under way
if sys.argv[1] == "exception":
    raise ValueError("the script's own")
if sys.argv[1] == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("in backward", 0), ("exception", 1), ("exit", 3)])
def test_programs_end_without_close(how: str, code: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(slidecore.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    if how == "exception":
        assert done.stderr.endswith("ValueError: the script's own\n")
    else:
        assert not done.stderr


@pytest.mark.parametrize("keep_graphs", [0, 4])
def test_eval_between_forward_and_backward_changes_nothing(offload: Offload, keep_graphs: int) -> None:
    """Backward belongs to the forward that was made: its dropout is repeated, whatever the mode is by then."""
    plain = language_model("gpt2", dropout=0.3).train()
    model = offload(clone(plain), keep_graphs=keep_graphs)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-3)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for step, batch in enumerate(token_batches(3)):
        for m, o in ((model, optimizer), (plain, reference)):
            m.train()
            torch.manual_seed(step)
            loss = loss_of(m, batch)
            m.eval()
            loss.backward()
            o.step()
            o.zero_grad()
            assert not any(part.training for part in m.modules())
    assert_same_weights(model, plain)


def test_gradients_pass_through_a_frozen_model(offload: Offload) -> None:
    plain = Stack().requires_grad_(False)
    model = offload(clone(plain))
    batch = feature_batches(1)[0]
    for _ in range(2):
        inputs = [next(v for v in batch.values() if v.is_floating_point()).clone().requires_grad_() for _ in range(2)]
        for m, x in zip((model, plain), inputs, strict=True):
            m(x).pow(2).mean().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-6)
    assert_same_weights(model, plain, tolerance=1e-30)
