"""The real cuFile, on a card: what comes back from disk, and training through it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import slidecore
import torch
from _models import language_model, token_batches
from _runs import Run, differences
from slidecore import _core, cufile
from slidecore.backend import Backend
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Offload = Callable[..., nn.Module]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="cuFile needs an NVIDIA card"),
]
SMALL = {"piece_bytes": 4096, "ring_pieces": 4}


@pytest.fixture(autouse=True)
def usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "cufile.log"
    monkeypatch.delenv(cufile.VARIABLE, raising=False)
    monkeypatch.setenv("CUFILE_LOGFILE_PATH", str(log))
    if cufile.nvidia_fs() is None:
        monkeypatch.setenv("CUFILE_FORCE_COMPAT_MODE", "true")
    paths = cufile.library_paths()
    try:
        _core.inspect_cufile(paths)
    except _core.UnsupportedError as error:
        pytest.skip(str(error))
    facts = _core.inspect_directory(str(tmp_path))
    if not facts.direct:
        pytest.skip(f"direct transfers are needed: {facts.why_not_direct}")
    answer = plain_file(paths[0] if paths else "libcufile.so.0", tmp_path)
    if answer != "ok":
        reasons = [line for line in log.read_text().splitlines() if "ERROR" in line] if log.exists() else []
        pytest.skip(f"cuFile refuses any file here: {answer}; its log: {reasons[-4:]}")


def plain_file(library: str, directory: Path) -> str:
    """What cuFile says to a file that slidecore has no part in."""
    probe = Path(__file__).with_name("_cufile_probe.py")
    command = [sys.executable, str(probe), library, str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "no answer within a minute"
    return done.stdout.strip() or f"the process ended with code {done.returncode}: {done.stderr[-300:]}"


def test_any_size_and_address_comes_back(tmp_path: Path) -> None:
    """Also of device memory that is not aligned, over two striped files, and with the driver opened a second time."""
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    backend = Backend("cuda")
    for _ in range(2):
        storage = _core.Storage([str(directory) for directory in directories], stripe_bytes=1 << 16)
        direct = cufile.connect(backend.core, storage)
        print(direct.describe())
        transfers = _core.Transfers(storage)
        for nbytes in (1, 4095, 4096, 4097, 65536, 1_000_003, 9 << 20, (33 << 20) + 5):
            for shift in (0, 512, 3):
                region = storage.allocate("an input", nbytes)
                saved = torch.randint(0, 256, (nbytes + shift,), dtype=torch.uint8, device="cuda")[shift:]
                seen = torch.zeros(nbytes + shift + 1, dtype=torch.uint8, device="cuda")
                torch.cuda.synchronize()
                direct.write(region, saved.data_ptr(), nbytes)
                direct.read(region, seen.data_ptr() + shift, nbytes)
                assert torch.equal(seen[shift:-1], saved), (nbytes, shift)
                assert seen[-1] == 0
                on_host = torch.zeros(nbytes, dtype=torch.uint8)
                transfers.wait(transfers.read(region, 0, on_host.data_ptr(), nbytes))
                assert torch.equal(on_host, saved.cpu()), (nbytes, shift)
                del region
        direct.close()
        transfers.close()
        storage.close()


def least_of(attempt: Callable[[], None]) -> int:
    """The least device_memory, as the error of `attempt` says it."""
    with pytest.raises(slidecore.BudgetError) as error:
        attempt()
    least = re.search(r"at least (\d+) bytes", str(error.value))
    assert least is not None
    return int(least[1])


def test_training_is_the_same_bit_by_bit(offload: Offload, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return language_model("llama", layers=9, seed=4)

    disk = tmp_path / "disk"
    disk.mkdir()
    common = {"device": "cuda", "compute_dtype": torch.float32, "micro_batch": 4, "kernels": "torch", **SMALL}
    batches = [{name: value.cuda() for name, value in batch.items()} for batch in token_batches(4, batch=8, length=59)]

    def attempt(device_memory: int) -> None:
        run = Run(build(), offload, device_memory=device_memory, **common)
        try:
            run.train(batches[:1])
        finally:
            run.close()

    # The least that works has no room for all blocks' inputs: first offload() says it, then the first forward.
    # The other kernels of attention need not add up in the same order twice.
    with sdpa_kernel(SDPBackend.MATH):
        common["device_memory"] = least_of(lambda: attempt(least_of(lambda: attempt(1))))
    probe = offload(build(), disk=disk, **common)
    fixed = slidecore.stats(probe).host_memory
    slidecore.close(probe)
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for gpu_direct in (False, True):
            run = Run(build(), offload, host_memory=fixed, disk=disk, gpu_direct=gpu_direct, **common)
            losses = run.train(batches)
            counters = slidecore.stats(run.model).disk_counters
            results.append((losses, run.state()))
            run.close()
            assert list(disk.iterdir()) == []
    assert counters["gpu_direct_bytes"] > 0
    assert results[0][0] == results[1][0]
    assert differences(results[0][1], results[1][1]) == []
