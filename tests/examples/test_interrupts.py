"""Ctrl-C in real programs: one line, status 130, nothing left running, whatever they are busy with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["-m", "recsys_edu.examples.train_dlrm", "--dataset", "synthetic-criteo", "--steps", "100000"]
INTERRUPTED = 130
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # a missing FBGEMM is said in a warning
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="a test cannot press Ctrl-C on Windows"),
    pytest.mark.timeout(120),
]

Condition = Callable[[psutil.Process], bool]


def loaded(library: str) -> Condition:
    """The process has a file of this name in its memory: it is at that point of its imports, or behind it."""
    return lambda process: any(library in area.path for area in process.memory_maps())


def interrupt(arguments: list[str], when: Condition, **environment: str) -> tuple[int, str, str, float]:
    """Start Python, wait for `when`, send SIGINT to the process group as a terminal does: status, output, seconds."""
    program = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=ROOT,
        env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process, deadline = psutil.Process(program.pid), time.monotonic() + 90
        while not when(process):
            assert program.poll() is None, program.communicate()
            assert time.monotonic() < deadline, "it did not get so far"
            time.sleep(0.02)
        family = [process, *process.children(recursive=True)]
        sent = time.monotonic()
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
        seconds = time.monotonic() - sent
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        return program.returncode, out, err, seconds
    finally:
        for each in psutil.Process(program.pid).children(recursive=True) if program.poll() is None else []:
            each.kill()
        program.kill()
        program.communicate()


@pytest.mark.parametrize("library", ["_posixsubprocess", "libtorch_cpu", "libtorch_python"])
def test_while_importing(library: str) -> None:
    when = loaded(library) if sys.platform == "linux" else lambda process: process.cpu_times().user > 0.5
    status, _, err, _ = interrupt(TRAIN, when)
    assert (status, err) == (INTERRUPTED, "\ntrain_dlrm: interrupted\n")


def test_while_training() -> None:
    started = time.monotonic()
    status, out, err, _ = interrupt([*TRAIN, "--no-progress"], lambda process: time.monotonic() - started > 6)
    assert (status, err.count("\n"), err.strip()) == (INTERRUPTED, 2, "train_dlrm: interrupted"), out


def test_a_rank_that_waits_for_another_one_in_cpp() -> None:
    """Nobody listens to Python's exceptions there: a thread ends the process after a few seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def waits(process: psutil.Process) -> bool:
        return any(each.laddr.port == port for each in process.net_connections())

    status, _, err, seconds = interrupt(TRAIN, waits, **ranks)
    assert (status, err) == (INTERRUPTED, "\ntrain_dlrm, rank 0: interrupted\n") and seconds < 30


@pytest.mark.ranks
def test_ranks_under_torchrun_say_one_line_each() -> None:
    """torchrun's own report is torch's; ours is a line per rank."""

    def ranks_import(process: psutil.Process) -> bool:
        children = process.children()
        return len(children) == 2 and all(loaded("libtorch_python")(each) for each in children)

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, _, err, seconds = interrupt([*torchrun, *TRAIN], ranks_import)
    assert status != 0 and seconds < 30
    for rank in range(2):
        assert err.count(f"train_dlrm, rank {rank}: interrupted") == 1
    assert "KeyboardInterrupt" not in err and "recsys_edu/" not in err.partition("Traceback")[0]


@pytest.mark.parametrize("name", ["recsys_edu", "recsys_edu.notebook.cli"])
def test_the_console_command_ends_its_children(name: str) -> None:
    has_child = lambda process: bool(process.children())  # noqa: E731
    status, _, err, _ = interrupt(["-m", name, "bench", "embedding_lookup"], has_child)
    assert status == INTERRUPTED and err.endswith(": interrupted\n") and "Traceback" not in err


def test_an_interrupt_lets_files_be_closed_and_hangs_do_not_last(tmp_path) -> None:
    script = (
        "import os, sys, time\n"
        "from recsys_edu.interrupts import ends_when_interrupted\n"
        "with ends_when_interrupted(0.5):\n"
        "    if os.fork() == 0:\n"
        "        try: open(sys.argv[1] + '.child', 'w').close(); time.sleep(60)\n"
        "        except KeyboardInterrupt: os._exit(0)\n"
        "    try:\n"
        "        while not os.path.exists(sys.argv[1] + '.child'): time.sleep(0.01)\n"
        "        print('begun', flush=True); open(sys.argv[1], 'w').close(); time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(0.2); print('closed', end=''); {}\n"
    )
    for index, ending in enumerate(("pass", "time.sleep(60)")):
        begun = tmp_path / str(index)
        status, out, err, seconds = interrupt(
            ["-c", script.format(ending), str(begun)], lambda process, begun=begun: begun.exists()
        )
        assert (status, out, err) == (INTERRUPTED, "begun\nclosed", "\n-c: interrupted\n") and seconds < 10
