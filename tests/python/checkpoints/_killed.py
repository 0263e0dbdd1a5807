"""A process that is killed again and again while it trains and saves, and goes on each time from its last checkpoint.

    python _killed.py DIRECTORY KILLS SECONDS

It forks a child for every life, so that an interpreter with everything imported is there at once, and kills it with
SIGKILL at a random moment. A run that has reached its end is compared with one that was never killed, and the next
begins. Ends after KILLS kills or SECONDS seconds with one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import slidecore
import torch
import torch._dynamo  # what an optimizer imports when it is made: a life should not begin with it
import torch.nn.functional as F
from slidecore.checkpoints import directories
from slidecore.offloading import engine_of
from torch import nn

STEPS = 12
# What a life is doing, in memory that outlives it.
NOTHING, SAVING, PUBLISHING = 0, 1, 2
doing = mmap.mmap(-1, 1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(x))))


def live(directory: Path) -> None:
    """Trains from the last checkpoint to the end, saves after every step, and writes down what came out."""
    torch.manual_seed(1)
    model = slidecore.offload(nn.Sequential(*(Block(48) for _ in range(6))), device="cpu", threads=1)
    optimizer = slidecore.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    data = torch.randn(STEPS, 3, 48, generator=torch.Generator().manual_seed(2))
    done = 0
    latest = slidecore.latest_checkpoint(directory)
    if latest is not None:
        done = slidecore.load_checkpoint(model, optimizer, latest, scheduler=scheduler)
        assert latest.name == f"step-{done:02}", (latest, done)
    for step in range(done, STEPS):
        loss = (model(data[step]) ** 2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        doing[0] = SAVING
        slidecore.save_checkpoint(
            model, optimizer, directory / f"step-{step + 1:02}", scheduler=scheduler, extra=step + 1, keep=2
        )
        doing[0] = NOTHING
    engine = engine_of(model)
    planes = [bytes(plane.view(torch.uint8).numpy()) for c in engine.chunks for plane in engine.planes.of(c).values()]
    steps = [entry.step for chunk in engine.chunks for entry in chunk.entries]
    result = {"planes": hashlib.sha256(b"".join(planes)).hexdigest(), "steps": steps, "lr": scheduler.get_last_lr()}
    (directory / "result.json").write_text(
        json.dumps([result, hashlib.sha256(torch.get_rng_state().numpy()).hexdigest()])
    )


def noted(inner: Any) -> Any:
    """Marks the part of a save in which directories get their names."""

    def publish(*arguments: Any) -> None:
        doing[0] = PUBLISHING
        inner(*arguments)
        doing[0] = SAVING

    return publish


def born(directory: Path) -> int:
    """Forks a life; returns its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(directory)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main() -> None:
    base, kills, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    from slidecore.checkpoints import saving

    saving.publish = noted(directories.publish)
    began = time.monotonic()
    results, whole = set(), float("inf")
    for name in ("whole", "again"):
        (base / name).mkdir(parents=True)
        started = time.monotonic()
        assert os.waitpid(born(base / name), 0)[1] == 0, "the run that is not killed failed"
        whole = min(whole, time.monotonic() - started)
        results.add((base / name / "result.json").read_text())
    (expected,) = results

    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    killed, runs, lives = {NOTHING: 0, SAVING: 0, PUBLISHING: 0}, 0, 0
    while sum(killed.values()) < kills and time.monotonic() - began < seconds:
        directory = base / f"run-{runs}"
        directory.mkdir()
        while True:
            doing[0] = NOTHING
            lives += 1
            child = born(directory)
            if sum(killed.values()) < kills:
                time.sleep(chance.uniform(0, whole / 2))
                # Most of them inside a save, and many while names change: that is where it could hurt.
                wanted, width = chance.choice([(NOTHING, 0), (SAVING, whole / STEPS / 2), (PUBLISHING, 5e-4)])
                while doing[0] < wanted and alive(child):
                    pass
                time.sleep(chance.uniform(0, width))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL
                killed[doing[0]] += 1
                continue
            assert os.WEXITSTATUS(status) == 0, "a life failed"
            break
        assert (directory / "result.json").read_text() == expected, "a run that was killed came out otherwise"
        # Older ones, too, if it was killed between a save and the removal of what the save makes superfluous.
        left = sorted(path.name for path in directory.glob("step-*"))
        assert left[-2:] == [f"step-{STEPS - 1}", f"step-{STEPS}"], left
        shutil.rmtree(directory)
        runs += 1
    print(
        json.dumps(
            {
                "kills": sum(killed.values()),
                "while training": killed[NOTHING],
                "while saving": killed[SAVING],
                "while publishing": killed[PUBLISHING],
                "runs": runs,
                "lives": lives,
                "seconds of a whole run": round(whole, 3),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
