"""A server under load: so many clients, each asking again as soon as it is answered.

    with ServerProcess("film.pt2") as server:
        for clients in (1, 8, 32):
            print(run_load(server.url, bodies, clients, seconds=2))

The clients are tasks of one asyncio loop that write ready-made bytes: on a small machine they share the processor with
the server, and whatever they burn is missing there.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

START_SECONDS, STOP_SECONDS = 60, 10


@dataclass(frozen=True)
class LoadResult:
    """What `clients` clients saw: answers by HTTP status, and milliseconds of the good ones, sorted."""

    clients: int
    seconds: float
    statuses: dict[int, int]
    latencies_ms: list[float]

    @property
    def per_second(self) -> float:
        """Good answers per second."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the good answers did not exceed; NaN without any."""
        if not self.latencies_ms:
            return float("nan")
        return self.latencies_ms[min(int(len(self.latencies_ms) * percent / 100), len(self.latencies_ms) - 1)]


def join_results(results: Sequence[LoadResult]) -> LoadResult:
    """Several turns of equally many clients as one result."""
    statuses: Counter[int] = Counter()
    for result in results:
        statuses.update(result.statuses)
    latencies_ms = sorted(latency for result in results for latency in result.latencies_ms)
    return LoadResult(results[0].clients, sum(result.seconds for result in results), dict(statuses), latencies_ms)


class ServerProcess:
    """A package served by a process of its own, on a free port of this machine alone.

    It starts at once and takes seconds, most of them to import torch; `url` waits until it answers. As a context
    manager it ends with the block.

    >>> server = ServerProcess("film.pt2", "--threads", "1")               # doctest: +SKIP
    >>> server.url                                                          # doctest: +SKIP
    'http://127.0.0.1:40001'
    >>> server.stop()                                                       # doctest: +SKIP

    Args:
        package: what `export_package` or `compile_package` wrote.
        options: of `recsys_edu serve`.

    Raises:
        RuntimeError: (from `url`) it did not start; with what it said.
    """

    def __init__(self, package: str | Path, *options: str) -> None:
        command = [sys.executable, "-m", "recsys_edu.inference.serve", str(package), "--port", "0", *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=_environment())
        self._killer = threading.Timer(START_SECONDS, self._process.kill)
        self._killer.daemon = True
        self._killer.start()
        self._url: str | None = None

    @property
    def url(self) -> str:
        if self._url is None:
            line = self._process.stdout.readline()
            self._killer.cancel()
            if "http://" not in line:
                self._process.kill()
                raise RuntimeError(f"the server did not start: {line}{self._process.communicate()[1].strip()}")
            # A full pipe would stop the server
            threading.Thread(target=self._process.stderr.read, daemon=True).start()
            self._url = line.split()[-1]
        return self._url

    def stop(self) -> None:
        """End it, orderly if it can; does nothing the second time."""
        self._killer.cancel()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _environment() -> dict[str, str]:
    """The child finds the same recsys_edu, installed or not, and does not repeat warnings that were given here."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def ask(url: str, path: str = "/health", content: Any = None, timeout_s: float = 30.0) -> tuple[int, Any]:
    """One request: status and what JSON (or text) came back. `content` makes it a POST."""
    data = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            status, text = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode()


def run_load(url: str, contents: Sequence[Any], clients: int, seconds: float, warm_up_s: float = 0.2) -> LoadResult:
    """Let `clients` clients ask for `seconds`, after a warm-up that does not count.

    Runs its own event loop in a thread, so a notebook, which has one already, can call it too.
    """
    address = urlsplit(url)
    requests = [_request_bytes(address.netloc, content) for content in contents]
    found: list[LoadResult | BaseException] = []

    def work() -> None:
        try:
            load = _load(address.hostname, address.port, requests, clients, seconds, warm_up_s)
            found.append(asyncio.run(load))
        except BaseException as error:  # a thread keeps its exceptions to itself
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _request_bytes(host: str, content: Any) -> bytes:
    body = json.dumps(content).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


async def _load(
    host: str, port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_up_s: float
) -> LoadResult:
    statuses: Counter[int] = Counter()
    latencies_ms: list[float] = []
    begin = time.perf_counter() + warm_up_s
    end = begin + seconds

    async def client(first: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        turn = first
        while (start := time.perf_counter()) < end:
            writer.write(requests[turn % len(requests)])
            turn += 1
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            stop = time.perf_counter()
            if begin <= start and stop <= end:
                status = int(head.split(b" ", 2)[1])
                statuses[status] += 1
                if status == 200:
                    latencies_ms.append((stop - start) * 1e3)
        writer.close()

    await asyncio.wait_for(asyncio.gather(*(client(number) for number in range(clients))), warm_up_s + seconds + 60)
    return LoadResult(clients, seconds, dict(statuses), sorted(latencies_ms))
