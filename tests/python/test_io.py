"""The disk tier's bindings: what regions hold against what `os.pread` finds in the swap files."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from slidecore import _core

MIB = 1 << 20


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _directories(tmp_path: Path, count: int) -> list[str]:
    names = [tmp_path / f"drive{i}" for i in range(count)]
    for name in names:
        name.mkdir()
    return [str(name) for name in names]


@pytest.fixture(params=["uring", "threads"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize("drives", [1, 2, 3])
def test_the_files_hold_what_was_written(tmp_path: Path, backend: str, drives: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)  # shown when the test fails
    rng = random.Random(seed)
    stripe = 8192
    storage = _core.Storage(_directories(tmp_path, drives), stripe_bytes=stripe)
    storage.reserve(MIB)
    transfers = _core.Transfers(storage, backend=backend, block_bytes=4096 * rng.choice([1, 2, 5]), queue_depth=3)
    assert transfers.backend == backend
    sizes = [1, 4095, 40_001, 8192, 123_456]
    regions = [storage.allocate(f"region {i}", size) for i, size in enumerate(sizes)]
    assert [(region.name, len(region)) for region in regions] == [(f"region {i}", s) for i, s in enumerate(sizes)]
    expected = [bytearray(rng.randbytes(size)) for size in sizes]
    for region, content in zip(regions, expected, strict=True):
        transfers.write(region, 0, _address(content), len(content))
    transfers.synchronize()
    for _ in range(30):
        which = rng.randrange(len(sizes))
        begin = rng.randrange(sizes[which])
        size = rng.randint(1, sizes[which] - begin)
        part = bytearray(rng.randbytes(size))
        transfers.wait(transfers.write(regions[which], begin, _address(part), size))
        expected[which][begin : begin + size] = part
    # Regions lie one behind the other, each beginning at a multiple of the alignment; stripes go round the files.
    files = [os.open(name, os.O_RDONLY) for name in storage.files]
    base = 0
    for content in expected:
        found = bytearray()
        for at in range(base, base + len(content)):
            if at == base or at % stripe == 0:
                number, within = divmod(at, stripe)
                length = min(stripe - within, base + len(content) - at)
                found += os.pread(files[number % drives], length, number // drives * stripe + within)
        assert found == content
        base += -(-len(content) // storage.alignment) * storage.alignment
    for file in files:
        os.close(file)
    for region, content in zip(regions, expected, strict=True):
        seen = bytearray(len(content))
        ticket = transfers.read(region, 0, _address(seen), len(seen))
        transfers.wait(ticket)
        assert transfers.done(ticket)
        assert seen == content
    assert transfers.counters()["reads"] == len(sizes)
    transfers.close()
    with pytest.raises(_core.StateError, match="closed"):
        transfers.synchronize()
    storage.close()
    storage.close()
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_errors_are_the_built_in_ones_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mkdir"):
        _core.Storage([str(tmp_path / "missing")])
    storage = _core.Storage([str(tmp_path)])
    with pytest.raises(_core.StateError, match=f"in use by process {os.getpid()}"):
        _core.Storage([str(tmp_path)])
    with pytest.raises(OSError, match=r"needs .* free"):
        storage.reserve(1 << 52)
    with pytest.raises(ValueError, match="aio"):
        _core.Transfers(storage, backend="aio")
    storage.close()
    _core.Storage([str(tmp_path)]).close()


def test_the_variable_chooses_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _core.Storage([str(tmp_path)])
    monkeypatch.setenv("SLIDECORE_IO", "threads")
    transfers = _core.Transfers(storage)
    assert transfers.backend == "threads"
    assert "SLIDECORE_IO" in transfers.describe()
    transfers.close()


@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_files_go_with_the_process_or_with_the_next(tmp_path: Path, end: str) -> None:
    program = f"""
import builtins
from slidecore import _core
builtins.storage = _core.Storage([{str(tmp_path)!r}])  # outlives every module
builtins.region = builtins.storage.allocate("plane", 1000)
builtins.transfers = _core.Transfers(builtins.storage)
{end}
"""
    paths = [str(Path(_core.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        timeout=120,
        check=False,
    )
    if not end:
        assert answer.returncode == 0
        assert list(tmp_path.iterdir()) == []
        return
    assert answer.returncode < 0
    assert len(list(tmp_path.iterdir())) == 2
    storage = _core.Storage([str(tmp_path)])
    assert "removed 1 file" in storage.describe()
    storage.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_says_what_it_is(tmp_path: Path) -> None:
    facts = _core.inspect_directory(str(tmp_path))
    status = os.statvfs(tmp_path)
    assert facts.total_bytes == status.f_blocks * status.f_frsize
    assert (facts.device_major, facts.device_minor) == (
        os.major(tmp_path.stat().st_dev),
        os.minor(tmp_path.stat().st_dev),
    )
    assert facts.direct == (facts.why_not_direct == "")
    assert list(tmp_path.iterdir()) == []
