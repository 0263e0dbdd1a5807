"""Other programs that move the same bytes to and from the same drives: fio, or a plain C loop where fio is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from slidecore.drives import Rate

_ALIGNMENT = 4096


class Peer:
    """Files of its own beside the swap files, written once, and removed at the end of the `with` block."""

    name = ""
    modes: tuple[str, ...] = ("read", "write", "both")

    def __init__(self, directories: list[str], nbytes: int) -> None:
        self.each = nbytes // len(directories) // _ALIGNMENT * _ALIGNMENT
        self.files = [str(Path(directory, f"disk-bench.{os.getpid()}.bin")) for directory in directories]

    def __enter__(self) -> Peer:
        noise = os.urandom(1 << 20)
        for name in self.files:
            with open(name, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.each)
                for at in range(0, self.each, len(noise)):
                    file.write(noise[: self.each - at])
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.files:
            Path(name).unlink(missing_ok=True)

    def run(self, mode: str, block: int, depth: int) -> Rate:
        raise NotImplementedError


class Fio(Peer):
    """fio with io_uring, or libaio where io_uring is forbidden: one job for each drive, direct, sequential."""

    def __init__(self, directories: list[str], nbytes: int, engine: str) -> None:
        super().__init__(directories, nbytes)
        self.engine = engine
        version = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        self.name = f"{version} {engine}"

    def run(self, mode: str, block: int, depth: int) -> Rate:
        shared = [
            f"--rw={'rw' if mode == 'both' else mode}", f"--bs={block}", f"--iodepth={depth}", "--direct=1",
            f"--ioengine={self.engine}", f"--size={self.each}", "--thread", "--group_reporting",
            "--output-format=json", "--overwrite=1", "--fallocate=none",
        ]  # fmt: skip
        jobs = [part for i, name in enumerate(self.files) for part in (f"--name=job{i}", f"--filename={name}")]
        answer = subprocess.run(["fio", *shared, *jobs], capture_output=True, text=True, timeout=600)
        if answer.returncode != 0:
            raise RuntimeError(f"fio failed: {answer.stderr.strip() or answer.stdout.strip()}")
        group = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"][0]
        moved = group["read"]["io_bytes"] + group["write"]["io_bytes"]
        seconds = max(group["read"]["runtime"], group["write"]["runtime"]) / 1e3
        # CPU shares are of the time that each job ran.
        busy = (group["usr_cpu"] + group["sys_cpu"]) / 100 * group["job_runtime"] / 1e3
        return Rate(moved, seconds, busy)


class Loop(Peer):
    """`_disk_loop.c`: pread and pwrite by as many threads as requests may be in flight."""

    modes = ("read", "write")

    def __init__(self, directories: list[str], nbytes: int, compiler: str) -> None:
        super().__init__(directories, nbytes)
        self.name = "C loop of pread and pwrite"
        self._folder = tempfile.TemporaryDirectory()
        self._program = str(Path(self._folder.name, "disk_loop"))
        source = Path(__file__).with_name("_disk_loop.c")
        subprocess.run([compiler, "-O2", "-pthread", "-o", self._program, str(source)], check=True, timeout=120)

    def run(self, mode: str, block: int, depth: int) -> Rate:
        answer = subprocess.run(
            [self._program, mode, str(block), str(depth), str(self.each), *self.files],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if answer.returncode != 0:
            raise RuntimeError(f"the C loop failed: {answer.stderr.strip()}")
        moved, seconds, cpu = answer.stdout.split()
        return Rate(int(moved), float(seconds), float(cpu))


def find(directories: list[str], nbytes: int, io_uring: bool, wanted: str = "auto") -> Peer | str:
    """The peer to compare with, or why there is none."""
    if wanted in ("auto", "fio") and shutil.which("fio"):
        return Fio(directories, nbytes, "io_uring" if io_uring else "libaio")
    if wanted == "fio":
        return "fio is not installed"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "neither fio nor a C compiler is installed"
    return Loop(directories, nbytes, compiler)
