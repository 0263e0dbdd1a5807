"""A training process that is killed at random moments comes to the same end as one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import slidecore

# SLIDECORE_KILLS=1000 for a night; each takes a fraction of a second.
KILLS = int(os.environ.get("SLIDECORE_KILLS", "50"))
# On a machine so busy that the time runs out there may be fewer, but not so few that passing says nothing: two busy
# cores make 50 in half a minute.
LEAST = (KILLS + 1) // 2
SECONDS = max(90, KILLS)


def test_a_run_survives_being_killed_at_random_moments(tmp_path: Path) -> None:
    package = Path(next(iter(slidecore.__path__))).parent
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "_killed.py"), str(tmp_path), str(KILLS), str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=200 + 2 * KILLS,
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"},
    )
    assert answer.returncode == 0, answer.stderr
    counted = json.loads(answer.stdout)
    print(counted)
    assert counted["kills"] == KILLS or counted["seconds"] >= SECONDS, counted
    assert counted["kills"] >= LEAST, f"fewer than {LEAST} of {KILLS} kills: {counted}"
    assert counted["while saving"] + counted["while publishing"] > 0, counted
