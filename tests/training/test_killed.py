"""A training program that is killed outright goes on from its checkpoint to the same numbers, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "-m recsys_edu.examples.train_dlrm --dataset synthetic-criteo --batch-size 64 --steps 40 --no-progress"
SCHEDULE = "--checkpoint-every 5 --evaluate-every 20 --log-every 3 --keep 9"
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL"),
]


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, *TRAIN.split(), *SCHEDULE.split(), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_trainer_resumes_bit_for_bit(tmp_path) -> None:
    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.communicate(timeout=90) and undisturbed.returncode == 0

    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 90
    while not (tmp_path / "killed" / "step_10" / "recsys_edu.json").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and not (tmp_path / "killed" / "step_40").exists()

    again = start(tmp_path / "killed")
    told, _ = again.communicate(timeout=90)
    assert again.returncode == 0 and any(f"steps {step} to 40 on 1 rank" in told for step in range(10, 40, 5))
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("undisturbed", "killed"))
    assert first == second and first.count('"loss"') == 40 and first.count('"auc"') == 2
