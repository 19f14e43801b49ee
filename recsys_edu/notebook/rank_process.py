"""The inside of one rank of a notebook's `Cluster`: how its process starts, joins the world, and tells where it is.

    python -m recsys_edu.notebook.rank_process engine ...        a rank: ipyparallel's engine
    python -m recsys_edu.notebook.rank_process controller ...    the switchboard between notebook and ranks

Both end when the process that started them ends, however it ends. In a rank a second thread answers the notebook
over a loopback connection while the first runs a cell: a thread in gloo waits without the interpreter's lock.
"""

from __future__ import annotations

import importlib
import linecache
import os
import runpy
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from types import FrameType
from typing import Any

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a rank is in its program: the collective it waits in, the exchange it belongs to, and the line of code."""

    collective: str | None
    exchange: str | None
    line: str

    def __str__(self) -> str:
        waits = f"waits in {self.collective}" if self.collective else "runs"
        return f"{waits}{f' (exchange {self.exchange!r})' if self.exchange else ''}, {self.line}"


@dataclass(frozen=True)
class World:
    """What a rank needs to find the others: `store` is a file that only this world uses."""

    rank: int
    world_size: int
    hosts: int
    store: str
    port: int
    use_gpu: bool
    timeout: timedelta

    @property
    def local_size(self) -> int:
        """Ranks per simulated host."""
        return self.world_size // self.hosts

    def environment(self) -> dict[str, str]:
        """The variables that torchrun sets."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.rank % self.local_size),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.rank // self.local_size),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(self.port),
        }


def join(world: World) -> None:
    """Join the world's process group, leaving any earlier one, and set `rank`, `world_size`, `device` and the like."""
    os.environ.update(world.environment())
    import torch
    import torch.distributed as dist
    from IPython import get_ipython

    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(1)
    local_rank = world.rank % world.local_size
    device = torch.device("cuda", world.rank) if world.use_gpu else torch.device("cpu")
    if world.use_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.use_gpu else "gloo",
        store=dist.FileStore(world.store, world.world_size),
        rank=world.rank,
        world_size=world.world_size,
        timeout=world.timeout,
    )
    dist.barrier()
    names = {"rank": world.rank, "world_size": world.world_size, "local_rank": local_rank, "device": device}
    get_ipython().user_ns.update(names, torch=torch, dist=dist)


def hang_up(keep: set[tuple]) -> None:
    """Shut this rank's connections to other ranks: whoever waits on one, here or there, gets an error.

    Gloo has no way to give up a collective, and destroying a group closes nothing while a model still holds it.
    `keep` are the connections from before there were groups. Where the system does not tell which connections are
    ours (Windows), nothing is shut.
    """
    for connection in _loopback_connections():
        if connection.fd >= 0 and _ends(connection) not in keep:
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:
                end.shutdown(socket.SHUT_RDWR)


def _loopback_connections() -> list[Any]:
    import psutil

    connections = psutil.Process().net_connections(kind="tcp")
    return [one for one in connections if one.raddr and one.laddr.ip == one.raddr.ip]


def _ends(connection: Any) -> tuple:
    return (*connection.laddr, *connection.raddr)


def listen(address: tuple[str, int], key: bytes) -> int:
    """Begin to answer the notebook in a thread of its own; returns this process's id. Call it in the main thread."""
    connection = Client(address, authkey=key)
    connection.send(os.getpid())
    before = {_ends(one) for one in _loopback_connections()}
    thread = threading.Thread(target=_answer, args=(connection, threading.get_ident(), before), daemon=True)
    thread.start()
    return os.getpid()


def _answer(connection: Connection, main_thread: int, before: set[tuple]) -> None:
    while True:
        try:
            number, request = connection.recv()
        except (EOFError, OSError):
            return
        reply: Any = None
        try:
            if request == "place":
                reply = find_place(sys._current_frames()[main_thread])
            elif request == "sequence":
                reply = _sequence_number()
            elif request == "hang up":
                hang_up(before)
            elif request == "interrupt":
                _interrupt(main_thread)
        except Exception as error:
            reply = error
        connection.send((number, reply))


def find_place(innermost: FrameType) -> Place:
    """Read a stack: the public function of torch.distributed, our exchange's label, and the line of the cell."""
    collective = exchange = None
    cell_line = first_line = None
    frame: FrameType | None = innermost
    while frame is not None:
        code, name = frame.f_code, frame.f_code.co_filename.replace("\\", "/")
        if name.endswith("torch/distributed/distributed_c10d.py") and not code.co_name.startswith("_"):
            collective = code.co_name
        elif name.endswith("recsys_edu/distributed/exchange.py"):
            exchange = exchange or frame.f_locals.get("label")
            collective = collective or "all_to_all_single"
        elif "c10d_logger" not in name:
            line = linecache.getline(code.co_filename, frame.f_lineno).strip()
            if first_line is None:
                first_line = f"at {os.path.basename(name)}, line {frame.f_lineno}: {line}"
                if collective is None and ".wait(" in line:
                    collective = "wait of a collective started before"
            if "ipykernel_" in name or "<ipython" in name:
                cell_line = cell_line or f"at line {frame.f_lineno} of the cell: {line}"
        frame = frame.f_back
    return Place(collective, exchange, cell_line or first_line or "at an unknown line")


def _sequence_number() -> int | None:
    """How many collectives this rank has begun: unequal numbers mean that the ranks are out of step."""
    import torch.distributed as dist

    return dist.group.WORLD._get_sequence_number_for_group() if dist.is_initialized() else None


def _interrupt(main_thread: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, signal.SIGINT)  # also wakes a sleeping thread
    else:
        signal.raise_signal(signal.SIGINT)


def _end_with(parent: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        psutil.Process(parent).wait()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def main() -> None:
    module = {"engine": "ipyparallel.engine", "controller": "ipyparallel.controller"}[sys.argv.pop(1)]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if module == "ipyparallel.engine":  # torch takes longest to import: begin while the engine waits for its controller
        threading.Thread(target=importlib.import_module, args=("torch.distributed",), daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
