"""Dynamic batching: requests that arrive while the model is busy go through it together.

    time ->        r1        r2 r3 r4             r5
    model     idle [r1       ][r2 r3 r4      ]    [r5 ]

An idle model takes a request at once, so a lone client waits for nobody. The busier the server, the larger its
batches, and a batch of 32 costs an embedding model hardly more than a batch of 1. `wait_ms` lets a batch wait for
company; rarely worth it, and off by default. What does pay is to let in who is on the way already: clients of the
last batch ask again within a millisecond, and a batch that left at the first of them would have a third of their size.

The model runs on the event loop itself. In a thread of its own it would hand Python's lock back and forth with the loop
at every operator, which made batches of a DLRM several times slower when 32 clients asked. `in_thread` is for models
that take long: the loop then goes on refusing requests and answering /health meanwhile.

The queue is bounded: past `max_pending` examples a request is refused at once, with 429, rather than answered too late.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from recsys_edu.inference.requests import RefusedRequest, ScoringRequest

ROUNDS_TO_ARRIVE = 3
"""Rounds of the event loop from a request's bytes to its place in the queue: read, start its task, run it."""

Score = Callable[[Sequence[ScoringRequest]], list[float]]
Observe = Callable[[int, float], None]


@dataclass(frozen=True)
class BatchingOptions:
    """How requests are joined.

    Args:
        max_batch: examples in a batch; 1 is a server without batching.
        wait_ms: how long the first request of a batch waits for others.
        max_pending: examples that may wait; more are refused.
        timeout_s: how long a request may wait before it is given up.
        in_thread: run the model beside the event loop rather than on it.
    """

    max_batch: int = 256
    wait_ms: float = 0.0
    max_pending: int = 4096
    timeout_s: float = 10.0
    in_thread: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_pending < self.max_batch or self.wait_ms < 0 or self.timeout_s <= 0:
            raise ValueError(
                f"expected max_batch >= 1, max_pending >= max_batch, wait_ms >= 0, timeout_s > 0; got {self}"
            )


@dataclass(eq=False)
class _Waiting:
    request: ScoringRequest
    answer: asyncio.Future[list[float]]


class Batcher:
    """The queue in front of one model, and the task that empties it.

    Args:
        score: requests to the scores of all their examples, in order.
        observe: told the examples and the seconds of every batch.
    """

    def __init__(self, score: Score, options: BatchingOptions, observe: Observe = lambda examples, seconds: None):
        self._score, self.options, self._observe = score, options, observe
        self._queue: deque[_Waiting] = deque()
        self._pending = 0
        self._arrived = asyncio.Event()
        threads = torch.get_num_threads()  # a new thread would start with as many as there are processors
        self._pool = ThreadPoolExecutor(1, "model", torch.set_num_threads, (threads,)) if options.in_thread else None
        self._task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Examples that wait."""
        return self._pending

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Refuse what still waits, and let the model finish its batch."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._queue:
            _fail(waiting, RefusedRequest(503, "the server is stopping"))
        self._queue.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    async def submit(self, request: ScoringRequest) -> list[float]:
        """The request's scores, after it went through the model in some batch.

        Raises:
            RefusedRequest: 429 when too much waits, 503 when it took too long or the server stops, 500 when the
                model failed on it.
        """
        if not self.alive:
            raise RefusedRequest(503, "the server is stopping")
        if self._pending + request.num_examples > self.options.max_pending:
            raise RefusedRequest(429, f"{self._pending} examples wait already, try again later")
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._pending += request.num_examples
        self._arrived.set()
        try:
            async with asyncio.timeout(self.options.timeout_s):
                return await waiting.answer
        except TimeoutError:
            raise RefusedRequest(503, f"no answer after {self.options.timeout_s:g} s, try again later") from None

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._newcomers()
            if self.options.wait_ms and self._pending < self.options.max_batch:
                await asyncio.sleep(self.options.wait_ms / 1e3)
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _newcomers(self) -> None:
        """Let the event loop go round while more requests come in: clients ask again once they are answered."""
        before = -1
        while before < self._pending < self.options.max_batch:
            before = self._pending
            for _ in range(ROUNDS_TO_ARRIVE):
                await asyncio.sleep(0)

    def _take(self) -> list[_Waiting]:
        """As many requests as fit into a batch; those that nobody waits for any more are dropped."""
        batch, examples = [], 0
        while self._queue and examples + self._queue[0].request.num_examples <= self.options.max_batch:
            waiting = self._queue.popleft()
            self._pending -= waiting.request.num_examples
            if not waiting.answer.done():
                batch.append(waiting)
                examples += waiting.request.num_examples
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        requests = [waiting.request for waiting in batch]
        try:
            scores = (
                await loop.run_in_executor(self._pool, self._score, requests) if self._pool else self._score(requests)
            )
        except asyncio.CancelledError:
            for waiting in batch:
                _fail(waiting, RefusedRequest(503, "the server is stopping"))
            raise
        except Exception as error:
            if len(batch) > 1:  # whose fault it was shows when each goes alone
                for waiting in batch:
                    await self._answer([waiting])
            else:
                _fail(batch[0], RefusedRequest(500, f"the model failed: {type(error).__name__}"))
            return
        self._observe(len(scores), time.perf_counter() - start)
        first = 0
        for waiting in batch:
            last = first + waiting.request.num_examples
            if not waiting.answer.done():
                waiting.answer.set_result(scores[first:last])
            first = last


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
