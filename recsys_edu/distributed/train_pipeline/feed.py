"""Batches on their way to the model: drawn from an iterator, copied to the device, waiting in a queue.

An iterator's end and its errors stand in the queue like batches, and come up when it is their turn. So the batches
before them train just as they would without a pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from recsys_edu.distributed.spans import span
from recsys_edu.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from recsys_edu.distributed.train_pipeline.utils import new_stream, on_stream, record_stream, to_device


class Feed:
    """A queue of (batch, context), filled from whatever iterator is given.

    On CUDA copies run on a stream of their own. They overlap with computation where the batch is in pinned memory
    (DataLoader(pin_memory=True), or a DataLoadingThread, which pins).
    """

    def __init__(self, device: torch.device, context_type: type[TrainPipelineContext] = TrainPipelineContext) -> None:
        self.device, self._context_type = device, context_type
        self.queue: deque[tuple[Any, TrainPipelineContext]] = deque()
        self._stream = new_stream(device)
        self._iterator: Iterator[Any] | None = None
        self._has_ended = False
        self._num_drawn = 0

    @property
    def ends(self) -> bool:
        """Whether the last in the queue is the end of the iterator."""
        return bool(self.queue) and isinstance(self.queue[-1][1].absent, StopIteration)

    def fill(self, iterator: Iterator[Any], count: int) -> None:
        """Draw until the queue holds `count`; behind the end comes the end again.

        So the queue is as long on a rank that has no more batches as on one that has, and both start as many flights.
        A new iterator follows what is left of the one before.
        """
        self._switch_to(iterator)
        while len(self.queue) < count:
            self.queue.append(self.draw(iterator))

    def draw(self, iterator: Iterator[Any]) -> tuple[Any, TrainPipelineContext]:
        """The next batch, being copied to the device; or a context that says why there is none."""
        self._switch_to(iterator)
        context = self._context_type(index=self._num_drawn)
        if self._has_ended:
            context.absent = StopIteration()
            return None, context
        batch = None
        try:
            with span("load batch"):
                batch = next(iterator)
            self._num_drawn += 1
            with span("copy batch"), on_stream(self._stream):
                batch = to_device(batch, self.device, non_blocking=True)
                if self._stream is not None:
                    context.events.append(self._stream.record_event())
        except StopIteration as end:
            self._has_ended, context.absent = True, end
        except Exception as error:
            batch, context.absent = None, error
        return batch, context

    def _switch_to(self, iterator: Iterator[Any]) -> None:
        if iterator is self._iterator:
            return
        self._iterator, self._has_ended = iterator, False
        while self.ends:
            self.queue.pop()

    def clear(self) -> None:
        """Drop all batches, and forget the iterator."""
        self.queue.clear()
        self._iterator, self._has_ended = None, False


def wait_for(batch: Any, context: TrainPipelineContext, device: torch.device) -> None:
    """Let the current stream wait for what other streams do for the batch (CUDA; the host does not wait)."""
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    for event in context.events:
        stream.wait_event(event)
    record_stream(batch, stream)
