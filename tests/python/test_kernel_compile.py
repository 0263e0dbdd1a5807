"""Every kernel compiles for cards of two vendors; none is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("target", ["hip:gfx942", "hip:gfx1100", "cuda:90"])
def test_compiles(target: str, tmp_path: Path) -> None:
    slidecore = pytest.importorskip("slidecore")
    paths = [str(Path(path).parent) for path in slidecore.__path__] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_compile_kernels.py")), target],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line.split("\t") for line in answer.stdout.splitlines()]
    names = [name for _, name, _, _ in lines]
    for kernel in ("split", "merge", "adamw", "accumulate", "square_sum", "cross_entropy", "statistics", "scale"):
        assert any(name.startswith(kernel) for name in names), kernel
    assert len(set(names)) == len(names)
    assert all(int(size) > 0 for *_, size in lines)
