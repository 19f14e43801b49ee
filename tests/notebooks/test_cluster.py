"""Ranks in a notebook: labelled output, failures that name the rank, hangs that end, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys_edu.notebook.cluster import Cluster
from recsys_edu.notebook.magics import parse_options
from recsys_edu.notebook.rank_results import CellOutput, RankError, RankOutput

pytest.importorskip("ipyparallel")
nbformat = pytest.importorskip("nbformat")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    with Cluster(world_size=2, hosts=2, timeout=60) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """Two ranks on two hosts, whatever the test before did to them."""
    if "ready" not in repr(shared):
        shared.restart()
    return shared


def test_each_ranks_output_is_labelled(cluster: Cluster) -> None:
    output = cluster.run("total = torch.tensor([rank + 1])\ndist.all_reduce(total)\nprint('sum')\ntotal")
    assert repr(output).splitlines() == [
        "[rank 0] sum",
        "[rank 0] tensor([3])",
        "[rank 1] sum",
        "[rank 1] tensor([3])",
    ]
    assert re.findall(r"rank \d", output._repr_html_()) == ["rank 0", "rank 1"]


def test_hosts_are_simulated_through_the_environment(cluster: Cluster) -> None:
    output = cluster.run(
        "from recsys_edu.distributed import comm\n"
        "comm.get_group_rank(), comm.get_local_rank(), comm.get_num_groups(), dist.get_rank(), torch.get_num_threads()"
    )
    assert repr(output).splitlines() == ["[rank 0] (0, 0, 2, 0, 1)", "[rank 1] (1, 0, 2, 1, 1)"]


def test_variables_go_in_and_out_and_stay(cluster: Cluster) -> None:
    cluster.push(base=10)
    cluster.push(only=[1], base=20)
    cluster.run("value = torch.tensor([base + rank])")
    assert [value.tolist() for value in cluster.pull("value")] == [[10], [21]]
    assert [value.tolist() for value in cluster.pull("value", only=[1])] == [[21]]
    with pytest.raises(NameError, match="rank 0 has no variable 'missing'"):
        cluster.pull("missing")
    with pytest.raises(ValueError, match="between 0 and 1"):
        cluster.run("1", only=[2])


def test_displayed_html_is_kept(cluster: Cluster) -> None:
    output = cluster.run("from IPython.display import HTML, display\ndisplay(HTML('<b>bold</b>'))", only=[1])
    assert "<b>bold</b>" in output._repr_html_()


def test_the_failing_ranks_traceback_comes_first_and_the_others_do_not_hang(cluster: Cluster) -> None:
    with pytest.raises(RankError, match="rank 1 of 2: ZeroDivisionError") as caught:
        cluster.run("kept = 5\nif rank == 1:\n    1 / 0\ndist.barrier()", timeout=60)
    assert caught.value.rank == 1
    shown = caught.value._render_traceback_()
    assert "ZeroDivisionError" in shown[0] and "1" in shown[0]
    assert "then rank 0: RuntimeError" in shown[1]
    assert repr(CellOutput(caught.value.outputs, first=1)).startswith("[rank 1] ZeroDivisionError")
    assert cluster.pull("kept") == [5, 5], "variables are kept"
    assert "tensor([2.])" in repr(cluster.run("ones = torch.ones(1)\ndist.all_reduce(ones)\nones"))


def test_an_error_on_every_rank_leaves_the_process_group_as_it_is(cluster: Cluster) -> None:
    cluster.run("before = dist.group.WORLD")
    with pytest.raises(RankError) as caught:
        cluster.run("undefined_name")
    assert "new process group" not in str(caught.value)
    assert repr(cluster.run("before is dist.group.WORLD")) == "[rank 0] True\n[rank 1] True"


def test_a_hang_names_rank_collective_and_exchange(cluster: Cluster) -> None:
    code = """
        from recsys_edu.distributed.exchange import GroupExchange
        if rank == 0:
            GroupExchange(dist.group.WORLD).start(torch.ones(2), [1, 1], [1, 1], "pooled rows").wait()
        else:
            import time; time.sleep(600)
    """
    begun = time.monotonic()
    with pytest.raises(RankError) as caught:
        cluster.run(textwrap.dedent(code).strip(), timeout=1)
    assert time.monotonic() - begun < 30
    message = str(caught.value)
    assert "time limit of 1 s: rank 0 waited in all_to_all_single; rank 1 did not come to it" in message
    assert "rank 0 waits in all_to_all_single (exchange 'pooled rows'), at line 3 of the cell" in message
    assert "rank 1 runs, at line 5 of the cell: import time; time.sleep(600)" in message
    assert caught.value.rank == 1
    assert len(cluster.pull("rank")) == 2, "both ranks are free again"


def test_ranks_in_different_collectives_are_told_so(cluster: Cluster) -> None:
    with pytest.raises(RankError, match="waited in all_reduce and barrier; every rank is in one, but not in the same"):
        cluster.run("dist.all_reduce(torch.ones(1)) if rank else dist.barrier()", timeout=1)


def test_a_collective_that_a_rank_leaves_out(cluster: Cluster) -> None:
    with pytest.raises(RankError, match="rank 0 waited in all_reduce; rank 1 did not run this cell"):
        cluster.run("dist.all_reduce(torch.ones(1))", only=[0], timeout=1)
    with pytest.raises(RankError, match="rank 0 waited in all_reduce; rank 1 ended the cell without it"):
        cluster.run("if rank == 0: dist.all_reduce(torch.ones(1))", timeout=1)


def test_a_killed_rank_is_named_within_30_seconds_and_restart_recovers(cluster: Cluster) -> None:
    cluster.run("import os\npid = os.getpid()")
    ranks = [psutil.Process(pid) for pid in cluster.pull("pid")]
    begun = time.monotonic()
    with pytest.raises(RankError) as caught:
        cluster.run("import os\nif rank == 1: os.kill(os.getpid(), 9)\nfor _ in range(10**9): dist.barrier()")
    assert time.monotonic() - begun < 30
    assert str(caught.value).startswith("rank 1 of 2: its process ended (SIGKILL)")
    assert "then rank 0: RuntimeError" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"ranks \[1\] have ended: cluster.restart\(\)"):
        cluster.run("1")
    cluster.restart()
    _, left = psutil.wait_procs(ranks, timeout=10)  # a process that has ended is there until its parent looks
    assert not left
    assert repr(cluster.run("rank")) == "[rank 0] 0\n[rank 1] 1"


def test_interrupting_the_notebook_interrupts_the_ranks(cluster: Cluster) -> None:
    # A test run in the background of a shell starts with interrupts ignored; a notebook's kernel does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt, match="interrupted"):
            cluster.run("import time\ntime.sleep(600)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert repr(cluster.run("rank")) == "[rank 0] 0\n[rank 1] 1"


def test_everything_listens_on_loopback_only(cluster: Cluster) -> None:
    cluster.run("group = dist.new_group([0, 1])")
    processes = psutil.Process().children(recursive=True)
    listening = [one for process in processes for one in process.net_connections("tcp") if one.status == "LISTEN"]
    assert listening and {one.laddr.ip for one in listening} == {"127.0.0.1"}


def test_processes_end_with_a_killed_kernel() -> None:
    script = (
        "import psutil, sys\nfrom recsys_edu.notebook.cluster import Cluster\ncluster = Cluster(world_size=1)\n"
        "print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)\nsys.stdin.readline()"
    )
    kernel = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in kernel.stdout.readline().split()]
    assert len(pids) >= 2
    kernel.kill()
    kernel.communicate(timeout=30)
    assert still_running(pids) == []


def still_running(pids: list[int]) -> list[int]:
    """Which of the processes are there after 20 seconds, or none as soon as all have ended."""
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", (None, None, "")),
        ("--only 0,2 --timeout 5", ([0, 2], 5.0, "")),
        ("--only=3 tensor.shape", ([3], None, "tensor.shape")),
    ],
)
def test_options_of_the_magic(line: str, expected: tuple) -> None:
    assert parse_options(line, 4) == expected


@pytest.mark.parametrize("line", ["--only 4", "--only x", "--timeout -1", "--ranks 2"])
def test_options_that_make_no_sense_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        parse_options(line, 4)


def test_output_is_escaped() -> None:
    assert "<i>" not in RankOutput(0, 0, stdout="<i>").html()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of hosts"):
        Cluster(world_size=3, hosts=2)


@pytest.mark.notebook
def test_cells_on_ranks_run_under_papermill(tmp_path: Path) -> None:
    from recsys_edu.notebook.runner import run_notebooks

    cells = [
        "from recsys_edu.notebook.cluster import Cluster\ncluster = Cluster(world_size=2)",
        "%%ranks\nprint('hello from', rank)\nrank * 100",
        "%ranks --only 1 rank + 7",
        "import psutil\nprint(*[child.pid for child in psutil.Process().children(recursive=True)])",
        "%%ranks --timeout 30\nif rank == 1:\n    raise KeyError('no such table')\ndist.barrier()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    source = tmp_path / "ranks.ipynb"
    nbformat.write(notebook, source)
    (run,) = run_notebooks([source], {}, tmp_path / "out", timeout_s=200)
    executed = [cell for cell in nbformat.read(run.executed, as_version=4).cells if cell.cell_type == "code"][-5:]
    texts = ["".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs) for cell in executed]
    assert texts[1] == "[rank 0] hello from 0\n[rank 0] 0\n[rank 1] hello from 1\n[rank 1] 100"
    assert texts[2] == "[rank 1] 8"
    (error,) = [output for output in executed[4].outputs if output.output_type == "error"]
    assert error.ename == "RankError" and "KeyError" in error.traceback[0]
    assert error.evalue.startswith("rank 1 of 2: KeyError: 'no such table'")
    assert run.error is not None and "no such table" in run.error
    pids = [int(pid) for pid in executed[3].outputs[0].text.split()]
    assert len(pids) >= 3 and still_running(pids) == []
