"""Ranks for a notebook: real processes that stay, each with a process group, driven by `%%ranks` cells.

    from recsys_edu.notebook.cluster import Cluster

    cluster = Cluster(world_size=4, hosts=2)

    %%ranks
    total = torch.tensor([rank])
    dist.all_reduce(total)
    total

    [rank 0] tensor([6])
    [rank 1] tensor([6])
    ...

Everything stays on this machine: engines, switchboard and process group listen on 127.0.0.1 only.

                   notebook kernel --- controller (ipyparallel) --- engine = rank 0 --+
                        |                        |                                    | gloo / NCCL
                        |                        +----------------- engine = rank 1 --+
                        +--- a second line to every rank: is it alive, and where does it wait?
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from recsys_edu.notebook.magics import register
from recsys_edu.notebook.rank_process import LOOPBACK, Place, World, join, listen
from recsys_edu.notebook.rank_results import CellOutput, RankError, RankOutput

# Once a rank has failed: how long the others may go on by themselves, and how long after each push to end.
GRACE_SECONDS = 2.0
START_SECONDS = 60.0
ANSWER_SECONDS = 5.0
DIED = "its process ended"


class Cluster:
    """`world_size` ranks on `hosts` simulated hosts (`LOCAL_WORLD_SIZE` is their quotient), started at once.

    In every rank `rank`, `world_size`, `local_rank`, `device`, `torch` and `dist` are there from the beginning, and
    variables stay from cell to cell. `%%ranks` runs a cell on the ranks of the cluster made last; `timeout` is its
    limit in seconds unless the cell has its own (`%%ranks --timeout 5`). With a GPU for every rank the process group
    has NCCL beside gloo; `use_gpu=False` keeps to the CPU. Ends with `close()`, a `with` block, or the kernel.

    >>> with Cluster(world_size=2) as cluster:
    ...     cluster.run("rank * 10")
    [rank 0] 0
    [rank 1] 10

    Raises:
        ValueError: `world_size` is not a positive multiple of `hosts`.
        ImportError: ipyparallel is not installed.
    """

    def __init__(
        self, world_size: int = 4, hosts: int = 1, *, timeout: float = 60.0, use_gpu: bool | None = None
    ) -> None:
        if world_size < 1 or hosts < 1 or world_size % hosts:
            raise ValueError(f"world_size={world_size}, hosts={hosts}: expected a positive multiple of hosts")
        self.world_size, self.hosts, self.timeout = world_size, hosts, timeout
        self.use_gpu = _gpu_for_every_rank(world_size) if use_gpu is None else use_gpu
        self._start()
        register(self)

    def run(
        self,
        code: str,
        only: Iterable[int] | None = None,
        timeout: float | None = None,
        progress: Callable[[CellOutput], None] | None = None,
    ) -> CellOutput:
        """Run `code` on all ranks (or `only` on some) at the same time and return what each printed and returned.

        `progress` is called with the outputs so far while the ranks run.

        Raises:
            RankError: a rank raised, died, or did not end within `timeout` seconds. The message names the rank and,
                for ranks that hang, the collective; `.outputs` has what there is. Ranks that waited for the one that
                failed have been freed; where that took new process groups or lost a rank, the message says so.
            KeyboardInterrupt: the kernel was interrupted; so were the ranks.
        """
        ranks = self._ranks(only)
        cell = _Cell(self._processes, ranks, code, self.world_size // self.hosts)
        return self._finish(cell, self.timeout if timeout is None else timeout, progress)

    def push(self, only: Iterable[int] | None = None, **variables: Any) -> None:
        """Set variables in the ranks: `cluster.push(learning_rate=0.1)`. Values are pickled."""
        ranks = self._ranks(only)
        for pending in [self._processes.view(rank).push(variables, block=False) for rank in ranks]:
            pending.get(START_SECONDS)

    def pull(self, name: str, only: Iterable[int] | None = None) -> list[Any]:
        """The value of the variable `name` in every rank, in rank order.

        Raises:
            NameError: a rank has no such variable.
        """
        ranks = self._ranks(only)
        pending = [self._processes.view(rank).pull(name, block=False) for rank in ranks]
        values = []
        for rank, value in zip(ranks, pending):
            try:
                values.append(value.get(START_SECONDS))
            except Exception as error:
                if getattr(error, "ename", "") == "NameError":
                    raise NameError(f"rank {rank} has no variable {name!r}") from None
                raise
        return values

    def interrupt(self) -> None:
        """Interrupt what the ranks run, as Ctrl-C would. (Interrupting the kernel during a cell does it by itself.)"""
        for rank in self._processes.alive():
            self._processes.ask(rank, "interrupt")

    def restart(self) -> None:
        """End all ranks and start new ones: variables are gone."""
        self.close()
        self._start()

    def close(self) -> None:
        """End all processes of the cluster."""
        self._finalizer()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if not self._finalizer.alive else "broken, restart() it" if self._broken() else "ready"
        return f"Cluster(world_size={self.world_size}, hosts={self.hosts}): {state}"

    def _start(self) -> None:
        self._processes = _Processes(self.world_size)
        self._finalizer = weakref.finalize(self, self._processes.stop)
        try:
            self._processes.start()
            self._join_world()
        except BaseException:
            self.close()
            raise

    def _join_world(self) -> None:
        store, port = self._processes.new_store(), _free_port()
        limit = timedelta(minutes=30)  # cells have limits of their own, which name the rank that hangs
        pending = []
        for rank in range(self.world_size):
            world = World(rank, self.world_size, self.hosts, store, port, self.use_gpu, limit)
            pending.append(self._processes.view(rank).apply_async(join, world))
        for result in pending:
            result.get(START_SECONDS)

    def _broken(self) -> bool:
        return len(self._processes.alive()) < self.world_size

    def _ranks(self, only: Iterable[int] | None) -> list[int]:
        if not self._finalizer.alive:
            raise RuntimeError("this cluster is closed: make a new one, or restart() it")
        if self._broken():
            dead = sorted(set(range(self.world_size)) - set(self._processes.alive()))
            raise RuntimeError(f"ranks {dead} have ended: cluster.restart() starts all ranks anew")
        ranks = list(range(self.world_size)) if only is None else sorted(set(only))
        if not ranks or ranks[0] < 0 or ranks[-1] >= self.world_size:
            raise ValueError(f"only={ranks}: expected ranks between 0 and {self.world_size - 1}")
        return ranks

    def _finish(self, cell: _Cell, timeout: float, progress: Callable[[CellOutput], None] | None) -> CellOutput:
        interrupted = False
        try:
            hung = cell.wait(timeout, progress)
        except KeyboardInterrupt:
            interrupted, hung = True, cell.places()
        if cell.running:
            cell.break_up()
        outputs = cell.outputs()
        lost = sorted(set(range(self.world_size)) - set(self._processes.alive()))
        failed = [output for output in outputs if output.failure]
        if not (failed or lost or hung is not None):
            return CellOutput(outputs)
        renewed = not lost and (cell.broken_up or self._out_of_step())
        if renewed:
            self._join_world()
        message, first = cell.diagnosis(timeout, hung, interrupted)
        if lost:
            message += f"\nRanks {lost} are gone: cluster.restart() starts all ranks anew."
        elif renewed:
            message += "\nThe ranks have a new process group; variables are kept. Make sharded modules and DDP anew."
        if progress is not None:
            progress(CellOutput(outputs, first))
        if interrupted:
            raise KeyboardInterrupt(message)
        raise RankError(message, first, outputs)

    def _out_of_step(self) -> bool:
        return len({self._processes.ask(rank, "sequence") for rank in range(self.world_size)}) > 1


class _Cell:
    """One piece of code on its way through the ranks."""

    def __init__(self, processes: _Processes, ranks: Sequence[int], code: str, local_size: int) -> None:
        self.processes, self.ranks, self.local_size = processes, ranks, local_size
        self.pending = {rank: processes.view(rank).execute(code, silent=False, block=False) for rank in ranks}
        self.running = set(ranks)
        self.failed_first: int | None = None
        self.broken_up = False

    @property
    def died(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.processes.lines]

    def wait(self, timeout: float, progress: Callable[[CellOutput], None] | None) -> dict[int, Place] | None:
        """Wait until every rank has ended; at the time limit return where the others are, after a failure None."""
        deadline = time.monotonic() + timeout
        shown, next_show = "", time.monotonic() + 0.5
        while self.running:
            self.look()
            now = time.monotonic()
            if self.failed_first is not None:
                deadline = min(deadline, now + GRACE_SECONDS)
            if now > deadline:
                return self.places() if self.failed_first is None else None
            if progress is not None and now > next_show:
                output = CellOutput(self.outputs())
                if repr(output) != shown:
                    progress(output)
                shown, next_show = repr(output), now + 0.5
        return None

    def look(self) -> None:
        """Note who has ended or died, after a short wait."""
        self.processes.notice_dead(0.02)
        ended = {rank for rank in self.running if rank in self.died or self.pending[rank].done()}
        self.running -= ended
        died = [rank for rank in self.died if rank in ended]
        failed = [rank for rank in sorted(ended - set(died)) if self.pending[rank].exception() is not None]
        failed.sort(key=lambda rank: self.pending[rank].metadata["completed"].timestamp())
        if died and self.failed_first not in self.died:
            self.failed_first = died[0]  # errors of others, even if they arrived first, come from its silence
        elif failed and self.failed_first is None:
            self.failed_first = failed[0]

    def places(self) -> dict[int, Place]:
        """Where the running ranks are."""
        asked = {rank: self.processes.ask(rank, "place") for rank in sorted(self.running)}
        return {rank: place for rank, place in asked.items() if isinstance(place, Place)}

    def break_up(self) -> None:
        """End what still runs: collectives by closing connections, Python by an interrupt, the rest by killing."""
        self.broken_up = True
        deadline = time.monotonic() + 3 * GRACE_SECONDS
        places = self.places()  # read before: an interrupt must not hit a rank that reports its broken collective
        for rank in self.processes.alive():
            self.processes.ask(rank, "hang up")
        while self.running and time.monotonic() < deadline:
            for rank, place in places.items():
                if place.collective is None and rank in self.running:
                    self.processes.ask(rank, "interrupt")
            next_interrupt = time.monotonic() + GRACE_SECONDS
            while self.running and time.monotonic() < next_interrupt:
                self.look()
            places = self.places()
        for rank in sorted(self.running):
            self.processes.kill(rank)
        self.running.clear()

    def outputs(self) -> list[RankOutput]:
        return [self._output(rank) for rank in self.ranks]

    def _output(self, rank: int) -> RankOutput:
        pending = self.pending[rank]
        if rank not in self.running and rank not in self.died:
            pending.wait_for_output(1.0)
        seen = pending.metadata
        shown = [output["data"] for output in seen["outputs"] if "data" in output]
        if seen["execute_result"]:
            shown.append(seen["execute_result"]["data"])
        failure, traceback = None, ""
        if rank in self.died:
            failure = DIED
        elif rank not in self.running and (error := pending.exception()) is not None:
            failure, traceback = f"{error.ename}: {_without_gloo_noise(error.evalue)}", error.traceback or ""
        return RankOutput(
            rank,
            rank // self.local_size,
            seen["stdout"] or "",
            seen["stderr"] or "",
            tuple(shown),
            failure,
            traceback,
            finished=rank not in self.running,
        )

    def diagnosis(self, timeout: float, hung: Mapping[int, Place] | None, interrupted: bool) -> tuple[str, int | None]:
        """What happened, in words, and the rank to look at first."""
        if hung is not None:
            return self._diagnose_hang("interrupted" if interrupted else f"time limit of {timeout:g} s", hung)
        failures = {output.rank: output.failure for output in self.outputs() if output.failure}
        first = self.failed_first
        if first is None:  # a rank that had no part in this cell
            return "a rank that did not run this cell has ended", None
        lines = [f"rank {first} of {self.processes.world_size}: {failures.get(first, DIED)}"]
        if first in self.died:
            lines[0] += self.processes.cause_of_death(first)
        lines += [f"  then rank {rank}: {text}" for rank, text in failures.items() if rank != first]
        return "\n".join(lines), first

    def _diagnose_hang(self, reason: str, hung: Mapping[int, Place]) -> tuple[str, int | None]:
        away = [rank for rank, place in hung.items() if place.collective is None]
        waiting = {rank: place for rank, place in hung.items() if place.collective is not None}
        ended = [rank for rank in self.ranks if rank not in hung]
        absent = [rank for rank in range(self.processes.world_size) if rank not in self.ranks]
        headline = reason
        if waiting:
            missing = "; ".join(
                f"{_names(ranks)} {words}"
                for ranks, words in (
                    (away, "did not come to it"),
                    (ended, "ended the cell without it"),
                    (absent, "did not run this cell (--only)"),
                )
                if ranks
            )
            collectives = sorted({place.collective or "" for place in waiting.values()})
            headline += f": {_names(list(waiting))} waited in {' and '.join(collectives)}"
            headline += f"; {missing}" if missing else "; every rank is in one, but not in the same"
        lines = [headline, *(f"  rank {rank} {place}" for rank, place in hung.items())]
        first = (away or ended or list(waiting) or [None])[0]
        return "\n".join(lines), first


class _Processes:
    """The processes of a cluster, the client that runs code in them, and the second line to every rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="recsys_edu_cluster_")
        self.num_stores = self.num_requests = 0
        self.cluster: Any = None
        self.client: Any = None
        self.engine_ids: list[int] = []
        self.pids: list[int] = []
        self.lines: dict[int, Connection] = {}

    def start(self) -> None:
        import ipyparallel
        from traitlets.config import Config

        command = [sys.executable, "-m", "recsys_edu.notebook.rank_process"]
        config = Config()
        config.LocalControllerLauncher.controller_cmd = [*command, "controller"]
        # schedulers as threads of one process instead of eight processes
        config.LocalControllerLauncher.controller_args = [
            "--IPController.use_threads=True",
            "--nodb",
            # engines are admitted by the beat, which by default comes every 3 s; the second line notices the dead
            "--HeartMonitor.period=200",
            "--HeartMonitor.max_heartmonitor_misses=1000",
        ]
        config.LocalEngineSetLauncher.engine_cmd = [*command, "engine"]
        # the second line does what ipyparallel's nanny processes are for
        config.LocalEngineSetLauncher.engine_args = ["--IPEngine.enable_nanny=False"]
        config.LocalEngineSetLauncher.delay = 0.0
        self.cluster = ipyparallel.Cluster(
            n=self.world_size,
            controller_ip=LOOPBACK,
            profile_dir=self.folder.name,
            cluster_id="",
            config=config,
            shutdown_atexit=False,
            log_level=50,
        )
        with _environment(_rank_environment()):
            self.cluster.start_cluster_sync()
            self.client = self.cluster.connect_client_sync()
            self.client.wait_for_engines(self.world_size, timeout=START_SECONDS, interactive=False)
        self.engine_ids = sorted(self.client.ids)
        key = secrets.token_bytes(32)
        with Listener((LOOPBACK, 0), authkey=key) as listener:
            pending = [self.view(rank).apply_async(listen, listener.address, key) for rank in range(self.world_size)]
            by_pid = {}
            for _ in pending:
                line = listener.accept()
                by_pid[line.recv()] = line
            self.pids = [result.get(START_SECONDS) for result in pending]
        self.lines = {rank: by_pid[pid] for rank, pid in enumerate(self.pids)}

    def view(self, rank: int) -> Any:
        return self.client[self.engine_ids[rank]]

    def new_store(self) -> str:
        self.num_stores += 1
        return str(Path(self.folder.name) / f"store{self.num_stores}")

    def alive(self) -> list[int]:
        self.notice_dead(0.0)
        return list(self.lines)

    def notice_dead(self, timeout: float) -> None:
        """Drop the lines that have closed. An answer that came too late keeps its line."""
        for line in wait(list(self.lines.values()), timeout):
            try:
                line.recv()
            except (EOFError, OSError):
                rank = next(rank for rank, one in self.lines.items() if one is line)
                self.lines.pop(rank).close()

    def ask(self, rank: int, request: str) -> Any:
        """A rank's answer, None from a dead one. One that cannot answer holds the interpreter's lock: it is killed."""
        self.num_requests += 1
        try:
            line = self.lines[rank]
            line.send((self.num_requests, request))
            while line.poll(ANSWER_SECONDS):
                number, answer = line.recv()
                if number == self.num_requests:  # not the answer to a question that an interrupt cut short
                    return answer
            self.kill(rank)
        except (KeyError, EOFError, OSError):
            pass
        return None

    def kill(self, rank: int) -> None:
        import psutil

        for process in _tree(self.pids[rank]):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if rank in self.lines:
            self.lines.pop(rank).close()

    def cause_of_death(self, rank: int) -> str:
        """ " (SIGKILL)", " (exit code 3)", or nothing where the system does not say."""
        import psutil

        for launcher in self.launchers():
            if launcher.pid == self.pids[rank]:
                with suppress(psutil.Error):
                    code = launcher.process.wait(2.0)
                    with suppress(ValueError, TypeError):
                        return f" ({signal.Signals(-code).name})"
                    return f" (exit code {code})" if code is not None else ""
        return ""

    def launchers(self) -> list[Any]:
        """Of engines and controller, started or starting."""
        if self.cluster is None:
            return []
        engines = [launcher for engines in self.cluster.engines.values() for launcher in engines.launchers.values()]
        return engines if self.cluster.controller is None else [*engines, self.cluster.controller]

    def stop(self) -> None:
        """End every process, in any state of starting or running; may be called from the kernel's exit."""
        import psutil

        if self.client is not None:
            self.client.close()
        for line in self.lines.values():
            line.close()
        processes = [process for launcher in self.launchers() for process in _tree(launcher.pid)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5.0)
        self.folder.cleanup()


def _tree(pid: int | None) -> list[Any]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while processes start that inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank_environment() -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH")
    variables = {
        "OMP_NUM_THREADS": "1",  # several ranks share the cores
        "PYTHONPATH": f"{package_root}{os.pathsep}{rest}" if rest else package_root,
    }
    loopback_interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback_interface is not None:
        variables.update(GLOO_SOCKET_IFNAME=loopback_interface, NCCL_SOCKET_IFNAME=loopback_interface)
    return variables


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _gpu_for_every_rank(world_size: int) -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= world_size


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _without_gloo_noise(message: str) -> str:
    """Gloo's errors begin with a path of its build and end with advice that does not apply here."""
    if "/gloo/" not in message:
        return message
    return re.sub(r"\[\S*/gloo/\S*\] |\.? This is typically caused by[^.)]*(\. ?(?=\)|$))?", "", message)
