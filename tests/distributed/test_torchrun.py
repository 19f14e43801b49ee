"""train_dlrm under torchrun: one process or several, a rank killed in mid-step, the way back from the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_criteo import write_small_criteo

from recsys_edu.training import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 12
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def criteo(tmp_path_factory) -> list[str]:
    """Arguments for a small data set in the form of Criteo's .npy files."""
    folder = write_small_criteo(tmp_path_factory.mktemp("criteo") / "days")
    arguments = ["--dataset", "criteo", "--data", str(folder), "--rows-per-table", "60", "--dim", "12"]
    return [*arguments, "--batch-size", "60", "--checkpoint-every", "5", "--log-every", "4", "--keep", "9"]


def launch(*arguments: str, ranks: int | None = None, program: str = "", options: tuple[str, ...] = ()):
    """Run train_dlrm (or another program) under torchrun on `ranks` ranks, or without torchrun."""
    what = [program] if program else ["-m", "recsys_edu.examples.train_dlrm"]
    command = [sys.executable]
    if ranks is not None:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *what, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    found = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


def test_survivors_name_the_broken_exchange_and_the_restart_goes_on_bit_for_bit(criteo, tmp_path):
    mixed = [*criteo, "--sharding", "row_wise,column_wise,table_wise,data_parallel", "--steps", str(STEPS)]
    done = launch(*mixed, "--out", str(tmp_path / "undisturbed"), ranks=3)
    assert done.returncode == 0, done.stderr

    clock = tmp_path / "clock"
    options = ("--max-restarts", "1", "--monitor-interval", "4")  # time for the others to say what they saw
    killed = ["1", "8", str(clock), *mixed, "--out", str(tmp_path / "disturbed")]
    done = launch(*killed, ranks=3, program=str(HERE / "faulty_trainer.py"), options=options)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert clock.exists(), "nobody was killed"

    assert "steps 0 to 12 on 3 ranks" in done.stdout and "steps 5 to 12 on 3 ranks" in done.stdout
    for survivor in (0, 2):
        assert f"rank {survivor} of 3: the exchange " in done.stderr and "broke off" in done.stderr
    assert ended - float(clock.read_text()) < 60  # its end and the whole second life: nobody waited for a time limit

    assert losses(tmp_path / "disturbed") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "undisturbed")) == STEPS
    assert lines(tmp_path / "disturbed")[-1] == lines(tmp_path / "undisturbed")[-1]


def test_without_restarts_the_run_ends_within_thirty_seconds_and_names_the_killed_rank(criteo, tmp_path):
    clock = tmp_path / "clock"
    arguments = ["1", "3", str(clock), *criteo, "--sharding", "row_wise", "--steps", str(STEPS)]
    done = launch(*arguments, ranks=2, program=str(HERE / "faulty_trainer.py"))
    assert time.time() - float(clock.read_text()) < 30
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr and "rank      : 1 (local_rank: 1)" in done.stderr


def test_one_process_without_torchrun_and_two_ranks_learn_the_same(criteo, tmp_path):
    start = launch(*criteo, "--steps", "5", "--out", str(tmp_path / "one"))
    assert start.returncode == 0, start.stderr
    subprocess.run(["cp", "-r", str(tmp_path / "one"), str(tmp_path / "two")], check=True)
    for name, ranks in (("one", None), ("two", 2)):
        plan = ["--sharding", "column_wise" if ranks is None else "row_wise,table_wise"]
        done = launch(*criteo, "--steps", str(STEPS), "--out", str(tmp_path / name), *plan, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert f"steps 5 to {STEPS} on {f'{ranks} ranks' if ranks else '1 rank'}\n" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = lines(tmp_path / "one")[-1], lines(tmp_path / "two")[-1]
    assert two == pytest.approx(one, rel=1e-4) and 0 < one["ne"] < 2


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_cut_off(tmp_path):
    folder = RunFolder(tmp_path, rank=0)
    folder.write([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 3, "loss": 0.3}])
    with open(folder.metrics, "a") as file:
        file.write('{"step": 2, "lo')  # killed while it wrote
    folder.cut_after(2)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]


def test_only_complete_checkpoints_count(tmp_path):
    for name, complete in (("step_5", True), ("step_20", True), ("step_30", False), ("step_40.saving", True)):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / "recsys_edu.json").write_text("{}")
    assert [path.name for path in RunFolder(tmp_path, rank=0).checkpoints()] == ["step_5", "step_20"]


def test_bad_arguments_are_refused_in_words(criteo, monkeypatch):
    from recsys_edu.examples import train_dlrm
    from recsys_edu.examples.command_line import CommandLineError

    with pytest.raises(ValueError, match=r"no sharding type \['diagonal'\]"):
        train_dlrm.main([*criteo, "--sharding", "row_wise,diagonal", "--steps", "1"])
    with pytest.raises(ValueError, match="needs --data FOLDER"):
        train_dlrm.main(["--dataset", "criteo", "--steps", "1"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with monkeypatch.context() as several, pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        several.setenv("RANK", "0")
        train_dlrm.main(["--steps", "1"])
    with pytest.raises(CommandLineError, match="of two days"):
        train_dlrm.main(["--dataset", "criteo", "--data", str(HERE), "--steps", "1"])
