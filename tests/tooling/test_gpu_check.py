"""`make gpu-check`: says plainly that it checked nothing where there is no GPU; its checks hold on the CPU, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/gpu_check.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_nothing_was_checked(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert "needs an NVIDIA GPU" in done.stderr and "Nothing was checked, nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_its_checks_pass_on_the_cpu(tmp_path: Path) -> None:
    done = gpu_check("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed  ") == 5 and "FAILED" not in done.stdout
    assert list(tmp_path.iterdir()) == []
