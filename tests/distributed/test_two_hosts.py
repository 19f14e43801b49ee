"""Two hosts, for real: two network namespaces with a cable between them, two ranks in each, torchrun on both.

Needs root on Linux and `ip`; skipped where namespaces cannot be made. They are taken down in any case.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_criteo import write_small_criteo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 8
# not row-wise: that keeps a number per row and column block, so a grid trains otherwise than whole rows
TRAINING = [
    "--dataset",
    "criteo",
    "--rows-per-table",
    "60",
    "--dim",
    "16",
    "--batch-size",
    "64",
    "--optimizer",
    "adagrad",
]
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(280)]


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface."""

    name: str
    interface: str
    address: str


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root on Linux and the program ip (package iproute2)")
    number = os.getpid() % 100_000  # interface names have at most 15 letters
    pair = [Host(f"recsysedu{number}{side}", f"re{number}{side}", f"10.213.77.{i}") for i, side in ((1, "a"), (2, "b"))]
    first, second = pair
    steps = [["netns", "add", host.name] for host in pair]
    ends = [[host.interface, "netns", host.name] for host in pair]
    steps.append(["link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]])
    for host in pair:
        steps.append(["-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface])
        steps += [["-n", host.name, "link", "set", device, "up"] for device in (host.interface, "lo")]
    try:
        for step in steps:
            done = ip(*step)
            if done.returncode != 0:
                pytest.skip(f"cannot make two hosts here: ip {' '.join(step)}: {done.stderr.strip()}")
        yield [first, second]
    finally:
        for host in pair:
            for pid in ip("netns", "pids", host.name).stdout.split():
                os.kill(int(pid), signal.SIGKILL)  # a rank left over in our own namespace
            ip("netns", "delete", host.name)


@pytest.fixture(scope="module")
def runs(hosts, tmp_path_factory) -> Path:
    """A folder with `one` (a single process) and `two` (both hosts), trained on from the same checkpoint."""
    folder = tmp_path_factory.mktemp("two_hosts")
    data = write_small_criteo(folder / "days")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    alone = [sys.executable, "-m", "recsys_edu.examples.train_dlrm", *TRAINING, "--data", str(data)]
    subprocess.run([*alone, "--steps", "1", "--out", str(folder / "one")], env=environment, check=True, timeout=120)
    shutil.copytree(folder / "one", folder / "two")
    end = ["--steps", str(STEPS)]
    subprocess.run([*alone, *end, "--out", str(folder / "one")], env=environment, check=True, timeout=120)
    arguments = [*TRAINING, *end, "--data", str(data), "--out", str(folder / "two")]
    arguments += ["--sharding", "table_row_wise,grid_shard", "--timeout", "60"]
    launched = []
    for host in hosts:
        # said outright: torchrun looks the address up under the machine's name, which knows nothing of namespaces
        is_host = ["--rdzv-conf", f"is_host={str(host is hosts[0]).lower()},join_timeout=90"]
        agent = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "two-hosts"]
        agent += ["--rdzv-endpoint", f"{hosts[0].address}:29417", "--local-addr", host.address, *is_host]
        program = [str(HERE / "two_hosts_worker.py"), str(folder), *arguments]
        command = ["ip", "netns", "exec", host.name, sys.executable, "-m", "torch.distributed.run", *agent, *program]
        log = open(folder / f"{host.interface}.log", "w")  # noqa: SIM115 - closed when the process is done
        own = environment | {"GLOO_SOCKET_IFNAME": host.interface}
        launched.append((subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT), log))
    for process, log in launched:
        try:
            code = process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        log.close()
        assert code == 0, Path(log.name).read_text()[-4000:]
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_across_two_hosts_the_model_learns_what_one_process_learns(runs):
    one, two = read_lines(runs / "one"), read_lines(runs / "two")
    assert len(one) == len(two) >= STEPS + 1
    for alone, spread in zip(one, two):
        assert spread == pytest.approx(alone, rel=1e-4)


def counted(runs: Path) -> dict[str, dict[str, float]]:
    """Bytes that crossed: exchange by exchange over all four ranks, and over both interfaces."""
    ranks = [json.loads((runs / f"{rank}.json").read_text()) for rank in range(4)]
    totals: dict[str, dict[str, float]] = {}
    for pattern in ("node", "flat"):
        labels = {label for rank in ranks for label in rank[pattern]["log"]}
        totals[pattern] = {label: sum(rank[pattern]["log"].get(label, 0) for rank in ranks) for label in labels}
        totals[pattern]["interface"] = ranks[0][pattern]["interface"] + ranks[2][pattern]["interface"]
    return totals


def test_sums_inside_hosts_send_local_size_times_fewer_vectors_between_hosts(runs):
    totals = counted(runs)
    ids = ("sizes", "lengths and ids", "interface")
    vectors = {p: sum(size for label, size in of.items() if label not in ids) for p, of in totals.items()}
    assert vectors["node"] > 0
    assert vectors["flat"] == 2 * vectors["node"]
    inside = [label for label in totals["node"] if "inside" in label]
    assert inside and all(totals["node"][label] == 0 for label in inside)


def test_the_network_interface_counts_what_the_exchanges_log(runs):
    for of in counted(runs).values():
        logged = sum(size for label, size in of.items() if label != "interface")
        # headers, acknowledgements and the ranks' keep-alives come on top
        assert logged <= of["interface"] <= 1.1 * logged
