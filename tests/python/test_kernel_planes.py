"""Splitting and merging, accumulation and the sum of squares, against PyTorch's own operations and float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _kernels import CARD, DEVICE, SIZES, any_bits, bits_of, check_operator, poisoned, reference_path
from slidecore import _core
from slidecore.triton import tuning
from slidecore.triton._launch import launch, work_table
from slidecore.triton.accumulate import accumulate
from slidecore.triton.merge import merge
from slidecore.triton.scale import scale_
from slidecore.triton.split import split
from slidecore.triton.square_sum import square_sum
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["reference_path"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy

CONFIGS = [None, tuning.Config(128), tuning.Config(512, steps=2)]


def planes_of(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the CPU's kernel."""
    weight, residual = torch.empty(len(master), dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int16)
    _core.split(_core.ThreadPool(1), master.data_ptr(), weight.data_ptr(), residual.data_ptr(), len(master))
    return weight, residual


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_split_and_merge(n: int, config: tuning.Config | None) -> None:
    master = any_bits(n, n)
    on_device = master.to(DEVICE)
    # The ends of larger buffers, so that what is written beside them shows.
    weights, residuals = poisoned(n + 9, dtype=torch.bfloat16), poisoned(n + 9, dtype=torch.int16)
    split(on_device, weights[:n], residuals[:n], config=config)
    weight, residual = planes_of(master)
    assert torch.equal(bits_of(weights[:n]), bits_of(weight))
    assert torch.equal(bits_of(residuals[:n]), residual)
    assert weights[n:].isnan().all()
    assert (residuals[n:] == 99).all()
    back = poisoned(n + 9, dtype=torch.float32)
    merge(weights[:n], residuals[:n], back[:n], config=config)
    assert torch.equal(bits_of(back[:n]), bits_of(master))
    assert back[n:].isnan().all()


@pytest.mark.usefixtures("reference_path")
def test_references_of_split_and_merge() -> None:
    master = any_bits(3001, 5)
    weight, residual = torch.empty(3001, dtype=torch.bfloat16), torch.empty(3001, dtype=torch.int16)
    split(master, weight, residual)
    expected = planes_of(master)
    assert torch.equal(bits_of(weight), bits_of(expected[0]))
    assert torch.equal(residual, expected[1])
    back = torch.empty(3001)
    merge(weight, residual, back)
    assert torch.equal(bits_of(back), bits_of(master))


def test_split_refuses() -> None:
    weight, residual = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"split of 9 elements into 8 weights"):
        split(torch.zeros(9), weight, residual)
    with pytest.raises(ValueError, match=r"master is torch.float64"):
        split(torch.zeros(8, dtype=torch.float64), weight, residual)
    with pytest.raises(ValueError, match="flat contiguous"):
        merge(weight, residual, torch.zeros(16)[::2])


def gradients(sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        exponents = torch.randint(-30, 20, size, generator=generator)
        made.append(torch.ldexp(torch.randn(size, generator=generator), exponents).to(dtype).to(DEVICE))
    return made


SHAPES: list[tuple[int, ...]] = [(3,), (129,), (40, 77), (1,), (2048,), (7, 3, 11)]
OFFSETS = [0, 128, 384, 3584, 3712, 5888]
LENGTH = 6200


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_accumulate(dtype: torch.dtype, config: tuning.Config | None, aligned: bool) -> None:
    """Three micro-batches, whose sums are PyTorch's to the bit; what lies between the tensors stays as it is."""
    total = poisoned(LENGTH, dtype=torch.float32)
    expected = total.clone()
    out, square = poisoned(LENGTH, dtype=torch.bfloat16), torch.full((1,), 3.0, dtype=torch.float64, device=DEVICE)
    expected_out = out.clone()
    for index in range(3):
        own = gradients(SHAPES, dtype, index)
        if not aligned:
            own = [torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape) for g in own]
        own[2] = own[2].t().contiguous().t()  # as a product of matrices may leave it
        last = index == 2
        accumulate(
            total, own, OFFSETS, fresh=[index == 0] * len(own), config=config,
            **({"out": out, "square_sum": square} if last else {}),
        )  # fmt: skip
        for gradient, offset in zip(own, OFFSETS, strict=True):
            at = slice(offset, offset + gradient.numel())
            value = gradient.reshape(-1).float()
            if index:
                value = expected[at] + value
            if last:
                expected_out[at] = value.to(torch.bfloat16)
            else:
                expected[at] = value
    assert torch.equal(bits_of(total), bits_of(expected))
    assert torch.equal(bits_of(out), bits_of(expected_out))
    norm = 3 + expected_out[~expected_out.isnan()].double().square().sum().item()
    assert square.item() == pytest.approx(norm, rel=1e-6)


def test_accumulate_special_values() -> None:
    """Infinities, NaNs and denormals go through addition and rounding as in PyTorch."""
    a, b = any_bits(4000, 1).to(DEVICE), any_bits(4000, 2).roll(7).to(DEVICE)
    out = poisoned(4000, dtype=torch.bfloat16)
    accumulate(a, [b], [0], out=out)
    expected = (a + b).to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(bits_of(out.nan_to_num(1.0)), bits_of(expected.nan_to_num(1.0)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:overflow")
def test_square_sum_is_not_finite(value: float) -> None:
    plane = torch.ones(1000, dtype=torch.bfloat16, device=DEVICE)
    plane[900] = value
    total = torch.zeros(1, device=DEVICE)
    square_sum(plane, [(0, 899)], total)
    assert total.item() == 899
    square_sum(plane, [(896, 5)], total)
    assert not total.isfinite().item()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_square_sum(dtype: torch.dtype, config: tuning.Config | None) -> None:
    segments = [(0, 5), (128, 256), (640, 3001)]
    plane = poisoned(5000, dtype=dtype)
    expected = 1.5
    for index, (offset, length) in enumerate(segments):
        part = gradients([(length,)], dtype, index)[0]
        plane[offset : offset + length] = part
        expected += part.double().square().sum().item()
    results = []
    for _ in range(2):
        total = torch.full((1,), 1.5, dtype=torch.float64, device=DEVICE)
        square_sum(plane, segments, total, config=config)
        results.append(total.item())
    assert results[0] == pytest.approx(expected, rel=1e-6)
    assert results[0] == results[1]


@pytest.mark.usefixtures("reference_path")
@pytest.mark.skipif(CARD, reason="a card has no reference path")
def test_references_of_sums() -> None:
    first, second = gradients(SHAPES, torch.bfloat16, 1), gradients(SHAPES, torch.bfloat16, 2)
    total, out = poisoned(LENGTH, dtype=torch.float32), poisoned(LENGTH, dtype=torch.bfloat16)
    accumulate(total, first, OFFSETS, fresh=[True] * 6)
    square, again = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    accumulate(total, second, OFFSETS, out=out, square_sum=square)
    for a, b, offset in zip(first, second, OFFSETS, strict=True):
        expected = (a.float() + b.float()).to(torch.bfloat16).reshape(-1)
        assert torch.equal(out[offset : offset + a.numel()], expected)
    square_sum(out, [(offset, a.numel()) for a, offset in zip(first, OFFSETS, strict=True)], again)
    assert square.item() == pytest.approx(again.item(), rel=1e-12)
    assert again.item() > 0


def test_accumulate_refuses() -> None:
    total = torch.zeros(512, device=DEVICE)
    with pytest.raises(ValueError, match="multiples of 128"):
        accumulate(total, gradients([(5,)], torch.bfloat16, 0), [64])
    with pytest.raises(ValueError, match="513 elements from 0 on of 512"):
        accumulate(total, gradients([(513,)], torch.bfloat16, 0), [0])
    with pytest.raises(ValueError, match="all bfloat16 or all float32"):
        accumulate(total, gradients([(5,)], torch.float16, 0), [0])
    with pytest.raises(ValueError, match="give out, too"):
        accumulate(total, gradients([(5,)], torch.bfloat16, 0), [0], square_sum=torch.zeros(1, device=DEVICE))
    accumulate(total, [], [])
    accumulate(total, [torch.empty(0, dtype=torch.bfloat16, device=DEVICE)], [0])
    assert not total.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 1000, 70001])
def test_scale(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n).to(dtype).to(DEVICE)
    for factor in (1.0, 0.5, -4.0, 0.0):  # exact in bf16: the interpreter's rounding is not
        mine = x.clone()
        assert scale_(mine, torch.tensor(factor, device=DEVICE)) is mine
        assert torch.equal(mine, x * factor)


@pytest.mark.usefixtures("reference_path")
def test_operators() -> None:
    """Schemas, fake implementations and tracing are right."""
    n, ops = 500, torch.ops.slidecore
    master, weight = torch.randn(n, device=DEVICE), torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    residual, total = torch.zeros(n, dtype=torch.int16, device=DEVICE), torch.zeros(1, device=DEVICE)
    check_operator(ops.split, master, weight, residual, 512, 4)
    check_operator(ops.merge, weight, residual, master, 512, 4)
    check_operator(ops.scale_, master, total)
    table = torch.tensor([[0, n, 0, 0]], dtype=torch.int32, device=DEVICE)
    check_operator(ops.square_sum, master, table, total, 512, 1, 4)
    own = [torch.randn(10, 10, dtype=torch.bfloat16, device=DEVICE)]
    check_operator(ops.accumulate, master, own, [128], [False], None, None, 512, 1, 4)
    check_operator(ops.accumulate, master, own, [128], [False], weight, total, 512, 1, 4)


@pytest.mark.usefixtures("reference_path")
def test_compiled() -> None:
    """torch.compile takes the operators as they are."""

    def round_trip(master: torch.Tensor) -> torch.Tensor:
        weight = torch.empty(len(master), dtype=torch.bfloat16, device=master.device)
        residual = torch.empty(len(master), dtype=torch.int16, device=master.device)
        split(master * 2, weight, residual)
        back = torch.empty_like(master)
        merge(weight, residual, back)
        return back + 0.5 * weight.float()

    master = torch.randn(3001, device=DEVICE)
    compiled = torch.compile(round_trip, backend="inductor" if CARD else "aot_eager", fullgraph=True)
    assert torch.allclose(compiled(master), round_trip(master), rtol=1e-6)


@pytest.mark.usefixtures("reference_path")
def test_stored_choice_is_compiled(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile meets the file of choices on a card only; here the CPU plays one."""
    monkeypatch.setenv("SLIDECORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_stored", {})
    tuning.store("double", 5, torch.device("cpu"), tuning.Config(512, 4, 8))

    def function(x: torch.Tensor) -> torch.Tensor:
        found = tuning._found("double", len(x), str(x.device))
        missing = tuning._found("triple", len(x), str(x.device))
        return x * tuning.Config(*found).elements if found is not None and missing is None else x

    x = torch.randn(5)
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(x), x * 2048)


def test_choices_are_stored(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDECORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_stored", {})
    card, default, choice = torch.device("cuda:0"), tuning.Config(1024), tuning.Config(512, 4, 8)
    monkeypatch.setattr(tuning, "card", lambda device: "a card")
    assert tuning.lookup("adamw", 1000, card, default) == default
    tuning.store("adamw", 1000, card, choice)
    tuning.store("split", 1000, card, default)
    monkeypatch.setattr(tuning, "_stored", {})  # as a new process
    assert tuning.lookup("adamw", 1000, card, default) == choice
    assert tuning.lookup("adamw", 1024, card, default) == choice  # of the same power of two
    assert tuning.lookup("adamw", 1025, card, default) == default
    assert tuning.lookup("adamw", 1000, torch.device("cpu"), default) == default
    tuning.path().write_text("{")
    monkeypatch.setattr(tuning, "_stored", {})
    assert tuning.lookup("adamw", 1000, card, default) == default  # with a warning in the log


@pytest.mark.parametrize("value", ['{"block": 1000}', '{"block": 512, "warps": 3}', '{"block": 512, "steps": "x"}',
                                   '{"block": 512, "loads": "late"}', '{"block": 512, "registers": 300}',
                                   '{"block": 512, "wraps": 4}'])  # fmt: skip
def test_choices_that_cannot_be_are_not_taken(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLIDECORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_stored", {})
    monkeypatch.setattr(tuning, "card", lambda device: "a card")
    tuning.path().write_text('{"a card": {"adamw 2^10": ' + value + "}}")
    default = tuning.Config(1024)
    assert tuning.lookup("adamw", 1000, torch.device("cuda:0"), default) == default
    assert "kernels run with their defaults" in caplog.text


def test_choices_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A step must not end because a user has no directory: said once, defaults taken, choices of the process kept."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning, "path", homeless)
    monkeypatch.setattr(tuning, "_stored", {})
    monkeypatch.setattr(tuning, "card", lambda device: "a card")
    card, default, choice = torch.device("cuda:0"), tuning.Config(1024), tuning.Config(512, 4, 8)
    for _ in range(2):
        assert tuning.lookup("adamw", 1000, card, default) == default
    assert caplog.text.count("SLIDECORE_CACHE names a directory") == 1
    tuning.store("adamw", 1000, card, choice)
    assert "kept by this process only" in caplog.text
    assert tuning.lookup("adamw", 1000, card, default) == choice


def test_tables_made_while_tracing_are_not_kept() -> None:
    """A fake tensor among the kept ones would make every later call fail."""
    segments = ((0, 100), (128, 200))
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(work_table(segments, 128, torch.device("cpu")), FakeTensor)
        table = work_table(segments, 128, torch.device("cpu"))
        assert table.tolist() == [[0, 100, 0, 0], [1, 128, 1, 0], [2, 72, 1, 1]]


def test_launches_make_the_tensors_card_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current card, whatever card the arguments are on."""
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entered.append(chosen)
        yield

    class OnTheSecond:
        is_cuda, device = True, torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
            assert entered == [torch.device("cuda:1")]
            return lambda *arguments, **options: launched.append(programs)

    launch(Kernel(), 3, OnTheSecond(), 1, 2, BLOCK=4)  # type: ignore[arg-type]
    assert launched == [(3,)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(Kernel(), 3, OnTheSecond())  # type: ignore[arg-type]
    assert len(entered) == 1
