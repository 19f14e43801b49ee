"""Real ranks for tests: processes that stay, so that a test on four ranks costs milliseconds and not four imports.

    def body(rank, world_size, group, rows):          # top level of the test file: it is pickled by name
        total = torch.full((rows,), float(rank))
        dist.all_reduce(total, group=group)
        return total

    def test_sum(ranks):                              # session fixture of tests/conftest.py
        assert ranks.run(body, 2, 3)[1].tolist() == [1.0, 1.0, 1.0]

For a cluster to experiment with in a notebook see recsys_edu.notebook.cluster.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long the other ranks may go on after one has failed: long enough to fail too, short enough for a test.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class _Failure:
    rank: int
    error: BaseException
    details: str
    time: float
    reusable: bool  # whether the process can take another call


class RankPool:
    """Processes that run a function as the ranks of a fresh gloo world, one world per call.

    Processes start when a call first needs them (spawned, one torch thread each) and stay until `close`. Every call
    gets a process group of exactly `world_size` ranks as the default group, a fixed seed, and torchrun's environment
    variables, so nothing carries over from the call before. A call that hangs or kills a rank costs new processes.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="recsys_edu_ranks_")
        self._workers: list[_Worker] = []
        self._calls = itertools.count()

    def run(self, function: Callable, world_size: int, *args: Any, hosts: int = 1, timeout: float = 60.0) -> list[Any]:
        """Return `[function(rank, world_size, group, *args) for each rank]`, run at the same time on real ranks.

        `hosts=2` divides the ranks among two simulated hosts (LOCAL_WORLD_SIZE). `timeout` is in seconds.

        Raises:
            Exception: the one that the first failing rank raised, with each failing rank's traceback as a note.
            TimeoutError: a rank did not end in time; the notes have the stack of every rank that hangs.
            RuntimeError: a rank's process died.
            ValueError: `world_size` is not a positive multiple of `hosts`.
        """
        if world_size < 1 or hosts < 1 or world_size % hosts:
            raise ValueError(f"world_size={world_size}, hosts={hosts}: expected a positive multiple of hosts")
        if not all(worker.process.is_alive() for worker in self._workers):
            self._stop_workers()
        while len(self._workers) < world_size:
            self._workers.append(_start_worker(len(self._workers)))
        # pickled here and not by Connection.send, which would pass tensors through shared memory
        request = pickle.dumps((function, args))
        store = Path(self._folder.name) / f"store{next(self._calls)}"
        for worker in self._workers[:world_size]:
            worker.connection.send((sys.path, request, world_size, world_size // hosts, str(store), timeout))
        outcomes = self._collect(world_size, timeout)
        failures = [outcome for outcome in outcomes.values() if isinstance(outcome, _Failure)]
        failures.sort(key=lambda failure: failure.time)
        unfinished = sorted(set(range(world_size)) - outcomes.keys())
        if unfinished or not all(failure.reusable for failure in failures):
            self._stop_workers()
        if not failures and not unfinished:
            return [outcomes[rank] for rank in range(world_size)]
        error = failures[0].error if failures else TimeoutError(f"no rank of {world_size} ended within {timeout:g} s")
        for failure in failures:
            error.add_note(f"rank {failure.rank} of {world_size}: {failure.details}")
        if unfinished:
            error.add_note(f"ranks {unfinished} were still running and were stopped")
        raise error

    def close(self) -> None:
        """End the processes; a later `run` would start new ones."""
        self._stop_workers()
        self._folder.cleanup()

    def _collect(self, world_size: int, timeout: float) -> dict[int, Any]:
        """Each rank's result or _Failure; ranks that do not answer in time are missing."""
        outcomes: dict[int, Any] = {}
        running = {self._workers[rank].connection: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout + GRACE_SECONDS  # a rank reports its own time-out before this
        while running and (ready := wait(list(running), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = running.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._workers[rank].process.join()
                    code = self._workers[rank].process.exitcode
                    died = RuntimeError(f"rank {rank} of {world_size} died with exit code {code}")
                    outcomes[rank] = _Failure(rank, died, str(died), time.monotonic(), reusable=False)
                if isinstance(outcomes[rank], _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return outcomes

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()


def _start_worker(rank: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, theirs), name=f"rank {rank}", daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(rank: int, connection: Connection) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        sys_path, request, world_size, local_size, store, timeout = connection.recv()
        sys.path[:] = sys_path  # test folders that pytest has added since this process started
        clock = threading.Timer(timeout, _report_time_out, (rank, connection, timeout, threading.get_ident()))
        clock.daemon = True
        clock.start()
        # The world of a call that succeeded is left only now, when every rank has answered: a rank that left as soon
        # as it was done would look dead to one that is still connecting. After a failure that is what we want.
        _leave_world()
        reusable = False
        try:
            function, args = pickle.loads(request)
            _join_world(rank, world_size, local_size, store, timeout)
            reusable = True
            reply = pickle.dumps(function(rank, world_size, dist.group.WORLD, *args))
        except Exception as error:
            reply = _pickle_failure(rank, error, traceback.format_exc(), reusable)
            _leave_world()
        clock.cancel()
        connection.send_bytes(reply)


def _join_world(rank: int, world_size: int, local_size: int, store: str, timeout: float) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local_size, "LOCAL_WORLD_SIZE": local_size}
    os.environ.update({name: str(value) for name, value in place.items()}, GROUP_RANK=str(rank // local_size))
    torch.manual_seed(0)
    # longer than the call's limit, so that the report names the rank that hangs and not a broken connection
    group_timeout = timedelta(seconds=timeout + 2 * GRACE_SECONDS)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=group_timeout
    )


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _pickle_failure(rank: int, error: Exception, details: str, reusable: bool) -> bytes:
    try:
        data = pickle.dumps(_Failure(rank, error, details, time.monotonic(), reusable))
        pickle.loads(data)  # exceptions with arguments of their own often pickle and do not unpickle
        return data
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps(_Failure(rank, plain, details, time.monotonic(), reusable))


def _report_time_out(rank: int, connection: Connection, timeout: float, main_thread: int) -> None:
    stack = "".join(traceback.format_stack(sys._current_frames()[main_thread]))
    error = TimeoutError(f"rank {rank} did not end within {timeout:g} s")
    connection.send_bytes(_pickle_failure(rank, error, f"still running at\n{stack}", reusable=False))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
