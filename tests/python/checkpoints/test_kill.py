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


def test_a_run_survives_being_killed_at_random_moments(tmp_path: Path) -> None:
    package = Path(next(iter(slidecore.__path__))).parent
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "_killed.py"), str(tmp_path), str(KILLS), str(max(90, KILLS))],
        capture_output=True,
        text=True,
        timeout=200 + 2 * KILLS,
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"},
    )
    assert answer.returncode == 0, answer.stderr
    counted = json.loads(answer.stdout)
    print(counted)
    # On a machine so busy that time ran out, fewer; every one that was made has been checked.
    assert counted["kills"] == KILLS or counted["seconds"] >= 90, counted
    assert counted["while saving"] + counted["while publishing"] > 0, counted
