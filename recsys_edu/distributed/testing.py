"""Real ranks for tests: processes that stay, so that a test on four ranks costs milliseconds and not four imports.

    def body(rank, world_size, group, rows):          # top level of the test file: it is pickled by name
        total = torch.full((rows,), float(rank))
        dist.all_reduce(total, group=group)
        return total

    def test_sum(ranks):                              # session fixture of tests/conftest.py
        assert ranks.run(body, 2, 3)[1].tolist() == [1.0, 1.0, 1.0]
"""

from __future__ import annotations

import faulthandler
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
    traceback_text: str
    time: float


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
            Exception: the one that the first failing rank raised, with a note that has its rank and traceback.
            TimeoutError: no rank failed, but some did not finish; a note has their stacks.
            ValueError: `world_size` is not a positive multiple of `hosts`.
        """
        if world_size < 1 or hosts < 1 or world_size % hosts:
            raise ValueError(f"world_size={world_size}, hosts={hosts}: expected a positive multiple of hosts")
        while len(self._workers) < world_size:
            self._workers.append(_start_worker(len(self._workers)))
        # pickled here and not by Connection.send, which would pass tensors through shared memory
        request = pickle.dumps((function, args))
        stores = Path(self._folder.name) / f"store{next(self._calls)}"
        for worker in self._workers[:world_size]:
            worker.connection.send((sys.path, request, world_size, world_size // hosts, str(stores), timeout))
        results, failures, unfinished = self._collect(world_size, timeout)
        if unfinished or any(not worker.process.is_alive() for worker in self._workers):
            self._stop_workers()
        if failures:
            first = min(failures, key=lambda failure: failure.time)
            first.error.add_note(f"raised on rank {first.rank} of {world_size}:\n{first.traceback_text}")
            if unfinished:
                first.error.add_note(f"ranks {sorted(unfinished)} were still running and were stopped")
            raise first.error
        if unfinished:
            raise TimeoutError(f"ranks {sorted(unfinished)} of {world_size} did not finish within {timeout:g} s")
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes; a later `run` would start new ones."""
        self._stop_workers()
        self._folder.cleanup()

    def _collect(self, world_size: int, timeout: float) -> tuple[dict[int, Any], list[_Failure], set[int]]:
        results: dict[int, Any] = {}
        failures: list[_Failure] = []
        running = {self._workers[rank].connection: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout + GRACE_SECONDS  # ranks report their own time-out before this one
        while running and (ready := wait(list(running), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = running.pop(connection)
                try:
                    outcome = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._workers[rank].process.join()
                    code = self._workers[rank].process.exitcode
                    died = RuntimeError(f"rank {rank} of {world_size} died with exit code {code} during the call")
                    outcome = _Failure(rank, died, "(the process ended without an exception)", time.monotonic())
                if isinstance(outcome, _Failure):
                    failures.append(outcome)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    results[rank] = outcome
        return results, failures, set(running.values())

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()
