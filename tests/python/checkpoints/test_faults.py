"""Every call of the system that a save makes may fail: the error is reported, and the last checkpoint stays."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import Stack, language_model
from _runs import Run, batches_for, differences
from slidecore.checkpoints import directories, files, saving, side_files
from slidecore.errors import CheckpointError
from torch import nn

Offload = Callable[..., nn.Module]
CALLS = ("open", "pwritev", "fsync", "close", "rename", "mkdir", "makedirs", "read")


class FailingSystem:
    """Stands for the module `os` and lets one call fail, counted over all of `CALLS`."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.fail_at = -1
        self.how: Callable[[str, tuple[Any, ...]], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.log.append((name, arguments))
            if len(self.log) - 1 == self.fail_at and self.how is not None:
                return self.how(name, arguments)
            return real(*arguments, **options)

        return call


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingSystem]:
    proxy = FailingSystem()
    for module in (files, directories, saving, side_files):
        monkeypatch.setattr(module, "os", proxy)
    return proxy


def fails_with(code: int) -> Callable[[str, tuple[Any, ...]], Any]:
    def fail(name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "close":
            os.close(arguments[0])  # the descriptor is gone whatever close says
        raise OSError(code, os.strerror(code))

    return fail


def record(run: Run, system: FailingSystem, directory: Path) -> list[str]:
    """The calls of one save, which are the same in the next one: one thread, one order."""
    system.log.clear()
    run.save(directory, threads=1)
    return [name for name, _ in system.log]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("kind", ["stack", "llama"])
def test_whatever_call_fails_the_last_checkpoint_stays(
    kind: str, code: int, system: FailingSystem, offload: Offload, tmp_path: Path
) -> None:
    model = Stack(depth=2) if kind == "stack" else language_model("llama", layers=2)
    run = Run(model, offload, compute_dtype=torch.bfloat16)
    batches = batches_for(run.model, 2)
    run.train(batches[:1])
    calls = record(run, system, tmp_path / "step-1")
    good = run.state()
    run.train(batches[1:])
    after = run.state()
    assert {"open", "pwritev", "fsync", "close", "rename", "mkdir"} <= set(calls)

    unheard = []
    for index, name in enumerate(calls):
        system.log.clear()
        system.fail_at, system.how = index, fails_with(code)
        message = None
        try:
            run.save(tmp_path / "step-2", threads=1)
        except CheckpointError as raised:
            message = raised.message
        system.fail_at = -1
        assert not list(tmp_path.glob(".*")), (index, name, "leftovers")
        latest = slidecore.latest_checkpoint(tmp_path)
        if message is None:  # a descriptor of a directory: nothing can be lost with it
            unheard.append(name)
            assert latest == tmp_path / "step-2", (index, name)
        else:
            assert os.strerror(code) in message, (index, name)
            assert str(tmp_path) in message, (index, name)
            assert name != "pwritev" or re.search(r"cannot write /.* at byte \d+: ", message)
            # The last calls are the rename, and then what makes it last: open, fsync (and two closes).
            published = index >= len(calls) - 4
            assert latest == tmp_path / ("step-2" if published else "step-1"), (index, name)
        if latest == tmp_path / "step-2":
            run.load(latest)
            assert differences(run.state(), after) == [], (index, name)
            shutil.rmtree(latest)
        run.load(tmp_path / "step-1")
        assert differences(run.state(), good) == [], (index, name)
        run.train(batches[1:])
        assert differences(run.state(), after) == []
    assert set(unheard) == {"close"}
    assert len(unheard) == 4


def test_short_writes_are_completed(system: FailingSystem, offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(depth=2), offload, compute_dtype=torch.bfloat16)
    run.train(batches_for(run.model, 1))
    calls = record(run, system, tmp_path / "whole")
    state = run.state()

    def short(name: str, arguments: tuple[Any, ...]) -> int:
        fd, buffers, offset = arguments
        return os.pwritev(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    for number, index in enumerate(index for index, name in enumerate(calls) if name == "pwritev"):
        system.log.clear()
        system.fail_at, system.how = index, short
        run.save(tmp_path / f"short-{number}", threads=1)
        assert len(system.log) > len(calls)
        system.fail_at = -1
        run.load(tmp_path / f"short-{number}")
        assert differences(run.state(), state) == []


def test_a_write_of_nothing_is_an_error(system: FailingSystem, offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(depth=2), offload)
    calls = record(run, system, tmp_path / "whole")
    system.log.clear()
    system.fail_at, system.how = calls.index("pwritev"), lambda name, arguments: 0
    with pytest.raises(CheckpointError, match="took no bytes"):
        run.save(tmp_path / "next", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_several_threads_stop_when_one_fails(system: FailingSystem, offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(depth=2), offload)
    calls = record(run, system, tmp_path / "whole")
    for index in [i for i, name in enumerate(calls) if name == "pwritev"][:-1]:  # the last one is the manifest's
        system.log.clear()
        system.fail_at, system.how = index, fails_with(errno.EIO)
        with pytest.raises(CheckpointError, match="Input/output error"):
            run.save(tmp_path / "next", threads=4)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    system.fail_at = -1
    run.save(tmp_path / "next", threads=4)


def test_an_interrupt_leaves_nothing_behind(
    system: FailingSystem, offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Stack(depth=2), offload)
    calls = record(run, system, tmp_path / "whole")

    def interrupt(name: str, arguments: tuple[Any, ...]) -> Any:
        raise KeyboardInterrupt

    for index in range(0, len(calls) - 3, 5):
        system.log.clear()
        system.fail_at, system.how = index, interrupt
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path / "next", threads=1)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"], (index, calls[index])


def test_replacing_fails_whole_too(system: FailingSystem, offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(depth=2), offload)
    run.save(tmp_path / "c", threads=1)
    good = run.state()
    run.train(batches_for(run.model, 1))
    newer = run.state()
    system.log.clear()
    run.save(tmp_path / "c", threads=1, overwrite=True)
    calls = [name for name, _ in system.log]
    run.load(tmp_path / "c")
    assert differences(run.state(), newer) == []

    outcomes = set()
    for index in range(len(calls) - 4, len(calls)):
        system.log.clear()
        system.fail_at, system.how = index, fails_with(errno.EIO)
        try:
            run.save(tmp_path / "c", threads=1, overwrite=True)
        except CheckpointError:
            outcomes.add("refused")
        system.fail_at = -1
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        run.load(tmp_path / "c")
        assert differences(run.state(), newer) == []
    assert outcomes == {"refused"}
    assert differences(good, newer) != []


def test_a_file_system_that_cannot_exchange_is_found_before_writing(
    system: FailingSystem, offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Stack(depth=2), offload)
    run.save(tmp_path / "c")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(directories, "_exchange", refuse)
    system.log.clear()
    with pytest.raises(CheckpointError, match="cannot replace a checkpoint in one step"):
        run.save(tmp_path / "c", overwrite=True)
    assert "pwritev" not in [name for name, _ in system.log]
    run.load(tmp_path / "c")


def test_too_little_space_is_found_before_writing(
    system: FailingSystem, offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Stack(depth=2), offload)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="GiB free"):
        run.save(tmp_path / "c")
    assert "pwritev" not in [name for name, _ in system.log]
    assert not list(tmp_path.iterdir())


def test_an_old_one_that_cannot_be_removed_does_not_harm_the_new(
    system: FailingSystem, offload: Offload, tmp_path: Path
) -> None:
    run = Run(Stack(depth=2), offload)
    run.save(tmp_path / "step-1")
    calls = record(run, system, tmp_path / "step-2")
    system.log.clear()
    system.fail_at, system.how = len(calls), fails_with(errno.EACCES)  # the rename that takes step-1 out
    with pytest.raises(CheckpointError, match=r"cannot remove the old checkpoint .*step-1"):
        run.save(tmp_path / "step-3", keep=1, threads=1)
    assert slidecore.latest_checkpoint(tmp_path) == tmp_path / "step-3"
    run.load(tmp_path / "step-1")


def test_reads_that_fail_or_end_early_are_errors(
    system: FailingSystem, offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Stack(depth=2), offload)
    run.save(tmp_path / "c")
    before = run.state()
    for code in (errno.EIO, errno.EACCES):
        for call in ("open", "preadv"):

            def fail(*_: Any, code: int = code) -> Any:
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patch:
                patch.setitem(system.__dict__, call, fail)
                with pytest.raises(CheckpointError, match=f"cannot read .*{os.strerror(code)}"):
                    run.load(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setitem(system.__dict__, "preadv", lambda *_: 0)
        with pytest.raises(CheckpointError, match="it ends there"):
            run.load(tmp_path / "c")
    assert differences(run.state(), before) == []

    def short(fd: int, buffers: list[Any], offset: int) -> int:
        return os.preadv(fd, [buffers[0][:5]], offset)

    with monkeypatch.context() as patch:
        patch.setitem(system.__dict__, "preadv", short)
        run.load(tmp_path / "c")
    assert differences(run.state(), before) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("some library's")])
def test_files_that_libraries_write_may_fail_too(
    error: Exception, offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("llama", layers=2)
    run = Run(model, offload)
    run.save(tmp_path / "step-1")

    def fail(directory: Path, **_: Any) -> None:
        (directory / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="cannot write configuration and tokenizer"):
        run.save(tmp_path / "step-2")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
