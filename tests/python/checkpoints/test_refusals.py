"""What is not this run's whole, sound checkpoint is refused, by file and reason, before anything is changed."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slidecore
import torch
from _models import Residual, Stack, freeze_half
from _runs import Run, batches_for, differences
from slidecore.checkpoints import files
from slidecore.checkpoints.files import FileRecord, FileWriter, bytes_of, read_file, record_of
from slidecore.checkpoints.manifest import MANIFEST
from slidecore.errors import CheckpointError
from torch import nn

Offload = Callable[..., nn.Module]


def steps(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.fixture
def saved(offload: Offload, tmp_path: Path) -> Path:
    run = Run(Stack(dropout=0.1), offload, compute_dtype=torch.bfloat16, schedule=steps)
    run.train(batches_for(run.model, 2))
    path = run.save(tmp_path / "run" / "step-2", shard_size=2000)
    run.close()
    return path


def refuse(run: Run, directory: Path, message: str) -> None:
    before = run.state()
    with pytest.raises(CheckpointError, match=message) as error:
        run.load(directory)
    assert str(directory) in str(error.value)
    assert differences(run.state(), before) == []


def same_run(offload: Offload) -> Run:
    return Run(Stack(seed=1, dropout=0.1), offload, compute_dtype=torch.bfloat16, schedule=steps)


def test_every_damaged_file_is_named(saved: Path, offload: Offload) -> None:
    run = same_run(offload)
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert len(names) > 12
    for name in names:
        file = saved / name
        content = file.read_bytes()
        for position in (0, len(content) // 2, len(content) - 2):
            file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            refuse(run, saved, f"{name}.*damaged|damaged.*{name}")
        for shorter in (content[:-1], content[: len(content) // 2], b""):
            file.write_bytes(shorter)
            refuse(run, saved, f"{name} (has {len(shorter)} bytes|is damaged)")
        file.write_bytes(content + b" x")
        refuse(run, saved, f"{name} (has {len(content) + 2} bytes|is damaged)")
        file.unlink()
        refuse(run, saved, f"{name} is missing" if name != MANIFEST else "no complete checkpoint")
        file.write_bytes(content)
    run.load(saved)


def test_what_is_not_there_is_said_to_be_not_there(offload: Offload, tmp_path: Path) -> None:
    run = same_run(offload)
    refuse(run, tmp_path / "nowhere", "there is no checkpoint at")
    (tmp_path / "empty").mkdir()
    refuse(run, tmp_path / "empty", f"has no {MANIFEST}")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        run.load(tmp_path / "file")


def test_another_format_is_refused_with_the_version_that_wrote_it(saved: Path, offload: Offload) -> None:
    from slidecore.checkpoints import manifest

    document = json.loads((saved / MANIFEST).read_text())
    document["checkpoint"] |= {"format": 99, "slidecore": "7.8.9"}
    document["digest"] = manifest._digest(document["checkpoint"])
    (saved / MANIFEST).write_text(json.dumps(document))
    refuse(same_run(offload), saved, r"format 99.*7\.8\.9")


def frozen(model: nn.Module) -> nn.Module:
    freeze_half(model)
    return model


def with_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("more", torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: Stack(depth=6), {}, "another model; it has no parameter 'blocks.5"),
        (lambda: Stack(depth=4), {}, "another model; it has a parameter 'blocks.4"),
        (lambda: Stack(inner=30), {}, r"blocks\.0\.up\.weight has shape \[29, 13\] in the checkpoint and \[30, 13\]"),
        (lambda: frozen(Stack()), {}, "was trained in the run that was saved"),
        (lambda: with_buffer(Stack()), {}, r"'more' \(a buffer, .* is not there in the checkpoint"),
        (Stack, {"compute_dtype": torch.float32}, "saved with compute_dtype=bfloat16.*offloaded with float32"),
        (Stack, {"blocks": ["blocks.1", "blocks.2", "blocks.3"]}, "divided into other chunks"),
        (Stack, {"schedule": None}, "holds the state of a StepLR; give it as scheduler="),
        (
            Stack,
            {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
            "state of a StepLR, but scheduler= is a ExponentialLR",
        ),
        (
            Stack,
            {"groups": lambda m: [{"params": list(m.blocks.parameters())}, {"params": list(m.enter.parameters())}]},
            "2 parameter groups, the checkpoint 1",
        ),
        (Stack, {"groups": lambda m: list(m.blocks.parameters())}, "parameter group 0 is another one"),
    ],
)
def test_another_run_is_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str, saved: Path, offload: Offload
) -> None:
    run = Run(make(), offload, **{"compute_dtype": torch.bfloat16, "schedule": steps, **options})
    before = run.state()
    with pytest.raises(CheckpointError, match=message):
        run.load(saved)
    assert differences(run.state(), before) == []


def test_moments_of_another_format_are_refused(saved: Path, offload: Offload) -> None:
    model = Stack(seed=1, dropout=0.1)
    run = Run(model, offload, compute_dtype=torch.bfloat16, schedule=steps, moments="8bit")
    refuse(run, saved, "exp_avg plane of .* was saved as .*float32, the model has .*int8")


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "message"),
    [
        ({"max_grad_norm": 0.5}, {"max_grad_norm": 2}, r"max_grad_norm is 2\.0, but in the run .* is 0\.5"),
        ({"max_grad_norm": 0.5}, {}, r"max_grad_norm is None, .* is 0\.5.*max_grad_norm=0\.5"),
        ({}, {"skip_nonfinite": True}, "skip_nonfinite is True, .* is False"),
    ],
)
def test_another_clipping_is_refused_and_may_be_set_afterwards(
    saved_with: dict[str, Any], loaded_with: dict[str, Any], message: str, offload: Offload, tmp_path: Path
) -> None:
    run = Run(Stack(), offload, optimizer={"update": "deferred", **saved_with})
    run.train(batches_for(run.model, 2))
    run.save(tmp_path / "c")
    other = Run(Stack(seed=1), offload, optimizer={"update": "deferred", **loaded_with})
    before = other.state()
    with pytest.raises(CheckpointError, match=message):
        other.load(tmp_path / "c")
    assert differences(other.state(), before) == []
    for name in ("max_grad_norm", "skip_nonfinite"):
        setattr(other.optimizer, name, getattr(run.optimizer, name))
    other.load(tmp_path / "c")
    assert differences(other.state(), run.state()) == []
    for name, value in loaded_with.items():
        setattr(other.optimizer, name, value)
    other.train(batches_for(other.model, 1))


def test_checkpoints_from_before_clipping_was_saved_are_read(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slidecore.checkpoints import state

    run = Run(Stack(), offload, optimizer={"max_grad_norm": 0.5})
    collect = state._optimizer_state

    def earlier(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in collect(*arguments).items() if name != "settings"}

    with monkeypatch.context() as patch:
        patch.setattr(state, "_optimizer_state", earlier)
        run.save(tmp_path / "c")
    other = Run(Stack(seed=1), offload, optimizer={"max_grad_norm": 2.0})
    other.load(tmp_path / "c")
    assert differences(other.state(), run.state()) == []
    assert other.optimizer.max_grad_norm == 2.0


def test_a_scheduler_that_was_not_saved_is_refused(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload, schedule=steps)
    run.save(tmp_path / "c", scheduler=None)
    with pytest.raises(CheckpointError, match="no state of a scheduler"):
        run.load(tmp_path / "c")


class Own(Residual):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: Any) -> None:
        pass


def test_modules_with_other_states_of_their_own_are_refused(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    run.save(tmp_path / "c")
    other = Run(Stack(block=lambda: Own(13, 29)), offload)
    with pytest.raises(CheckpointError, match=r"extra state of module 'blocks\.0'"):
        other.load(tmp_path / "c")


def test_without_verification_damage_is_found_late_and_said_so(saved: Path, offload: Offload) -> None:
    file = saved / "training" / "chunk-00006.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"chunk-00006.*damaged.*Parts of the model have been overwritten"):
        same_run(offload).load(saved, verify=False)


def test_checksums_of_either_kind_are_read(offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xxhash")
    from slidecore.checkpoints import manifest

    run = Run(Stack(), offload)
    run.save(tmp_path / "fast")
    assert json.loads((tmp_path / "fast" / MANIFEST).read_text())["checkpoint"]["checksum"] == "xxh3-128"
    for module in (files, manifest):
        monkeypatch.setattr(module, "preferred_checksum", lambda: "blake2b-128")
    run.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / MANIFEST).read_text())["checkpoint"]["checksum"] == "blake2b-128"
    for name in ("fast", "plain"):
        run.load(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 128
        file.write_bytes(content)
        refuse(run, tmp_path / name, r"model\.safetensors is damaged")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    files.checksum.cache_clear()
    with pytest.raises(CheckpointError, match="pip install xxhash"):
        run.load(tmp_path / "fast")
    files.checksum.cache_clear()


# --- finding, replacing, keeping


def test_the_newest_complete_one_is_found(offload: Offload, tmp_path: Path) -> None:
    assert slidecore.latest_checkpoint(tmp_path / "nowhere") is None
    assert slidecore.latest_checkpoint(tmp_path) is None
    run = Run(Stack(), offload)
    for name in ("step-000009", "step-000010", "final"):  # by what was saved last, not by name
        run.save(tmp_path / name)
        assert slidecore.latest_checkpoint(tmp_path) == tmp_path / name
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "final" / "training" / "state.pt").write_bytes(b"")
    (tmp_path / "step-000010" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"final is left out.*state\.pt has 0 bytes"):
        assert slidecore.latest_checkpoint(str(tmp_path)) == tmp_path / "step-000009"
    # A branch that was left: what is saved later is newer, whatever its number.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.save(tmp_path / "step-000003")
        assert slidecore.latest_checkpoint(tmp_path) == tmp_path / "step-000003"


def test_the_last_few_are_kept(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    run.save(tmp_path / "other-1")
    (tmp_path / "step-0").mkdir()
    (tmp_path / "step-0" / "mine.txt").write_text("no checkpoint")
    for number in range(1, 6):
        run.save(tmp_path / f"step-{number}", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "step-0", "step-4", "step-5"]
    # A damaged one does not count, so that two good ones stay.
    (tmp_path / "step-5" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-5 is left out"):
        run.save(tmp_path / "step-6", keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0", "step-4", "step-5", "step-6"]


def test_nothing_is_replaced_unasked(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    batches = batches_for(run.model, 2)
    (tmp_path / "c").mkdir()
    run.save(tmp_path / "c")  # an empty directory is as good as none
    first = run.state()
    run.train(batches)
    with pytest.raises(CheckpointError, match="there is a checkpoint at"):
        run.save(tmp_path / "c")
    run.save(tmp_path / "c", overwrite=True)
    second = run.state()
    run.load(tmp_path / "c")
    assert differences(run.state(), second) == []
    assert differences(second, first) != []
    for target in (tmp_path / "mine", tmp_path / "file"):
        if target.name == "mine":
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")
        else:
            target.write_text("years of work")
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            run.save(target, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "file", "mine"]


def test_through_a_link_what_it_points_to_is_replaced(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    run.save(tmp_path / "there" / "step-1")
    for name, target in (("latest", "there/step-1"), ("new", "there/step-2"), ("itself", "itself")):
        (tmp_path / name).symlink_to(target)
    run.train(batches_for(run.model, 1))
    with pytest.raises(CheckpointError, match=r"there is a checkpoint at .*step-1"):
        run.save(tmp_path / "latest")
    assert run.save(tmp_path / "latest", overwrite=True) == tmp_path / "latest"
    run.save(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"cannot save at .*itself"):
        run.save(tmp_path / "itself")
    assert all((tmp_path / name).is_symlink() for name in ("latest", "new", "itself"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["itself", "latest", "new", "there"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["step-1", "step-2"]
    other = Run(Stack(seed=1), offload)
    for name in ("latest", "new", "there/step-1"):
        other.load(tmp_path / name)
        assert differences(other.state(), run.state()) == []


def test_names_that_no_file_can_have_are_refused(offload: Offload, tmp_path: Path) -> None:
    run = Run(Stack(), offload)
    for name in ("a\0b", "n" * 256, "n" * 256 + "/step-1", "a\0b/step-1"):
        for call in (run.save, run.load, lambda path: slidecore.latest_checkpoint(path)):
            with pytest.raises(CheckpointError):
                call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    # But every name that one can.
    for number in range(1, 4):
        run.save(tmp_path / ("é" * 127 + str(number)), keep=1)
    assert [path.name[-1] for path in tmp_path.iterdir()] == ["3"]


def test_leftovers_of_killed_saves_go_and_saves_under_way_stay(offload: Offload, tmp_path: Path) -> None:
    import fcntl
    import os

    run = Run(Stack(), offload)
    for name in (".slidecore-saving-step-1-abcd", ".slidecore-removing-step-0-abcd", ".slidecore-saving-alive"):
        (tmp_path / name / "training").mkdir(parents=True)
    alive = os.open(tmp_path / ".slidecore-saving-alive", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    run.save(tmp_path / "step-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".slidecore-saving-alive", "step-1"]
    os.close(alive)
    run.save(tmp_path / "step-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_copy_elsewhere_is_as_good(saved: Path, offload: Offload, tmp_path: Path) -> None:
    run, other = same_run(offload), same_run(offload)
    run.load(saved)
    moved = shutil.copytree(saved, tmp_path / "elsewhere")
    shutil.rmtree(saved)
    other.load(moved)
    assert differences(other.state(), run.state()) == []


# --- files of many pieces


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 5000, 12345])
def test_pieces_and_parts_of_any_size(nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    monkeypatch.setattr(files, "SYNC_BYTES", 3000)
    monkeypatch.setattr(files, "_IOV_MAX", 3)
    generator = torch.Generator().manual_seed(nbytes)
    content = bytes_of(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator))
    with FileWriter(tmp_path / "file") as file:
        at = 0
        while at < nbytes:
            length = int(torch.randint(1, 700, (), generator=generator))
            file.write(content[at : at + length])
            at += length
        record = file.finish()
    assert (tmp_path / "file").read_bytes() == bytes(content)
    assert record == record_of(bytes(content))
    assert len(record.pieces) == -(-nbytes // 1000)

    filled = torch.zeros(nbytes, dtype=torch.uint8)
    parts, expected = [], torch.zeros(nbytes, dtype=torch.uint8)
    at = 0
    while at < nbytes:
        gap, length = (int(n) for n in torch.randint(1, 1500, (2,), generator=generator))
        begin, end = min(nbytes, at + gap), min(nbytes, at + gap + length)
        parts.append((begin, bytes_of(filled)[begin:end]))
        bytes_of(expected)[begin:end] = content[begin:end]
        at = end
    read_file(tmp_path / "file", record, reversed(parts))
    assert torch.equal(filled, expected)
    if nbytes > 2000:
        broken = FileRecord(nbytes, (*record.pieces[:2], "00" * 16, *record.pieces[3:]), record.checksum)
        with pytest.raises(CheckpointError, match="bytes 2000 to 3000"):
            read_file(tmp_path / "file", broken)
