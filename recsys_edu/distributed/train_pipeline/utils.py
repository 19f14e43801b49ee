"""Moving batches: to the device, between CUDA streams, and out of a thread that loads them ahead.

Counterpart: torchrec.distributed.train_pipeline.utils.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

import torch

from recsys_edu.distributed.train_pipeline.pipeline_context import In


def get_h2d_func(batch: In, device: torch.device) -> In:
    """The batch on `device`; from pinned memory the copy to a GPU runs beside the host's work.

    Moves everything that has `to`: tensors, KeyedJaggedTensors, Pipelineable batches, and what lists, tuples, dicts and
    dataclasses hold. Anything else (names, numbers) stays as it is.

    Counterpart: torchrec.distributed.train_pipeline.utils.get_h2d_func.
    """
    return to_device(batch, device, non_blocking=True)


def to_device(batch: Any, device: torch.device, non_blocking: bool) -> Any:
    """See `get_h2d_func`."""
    if hasattr(batch, "to"):
        return batch.to(device=device, non_blocking=non_blocking)
    return _map(lambda part: to_device(part, device, non_blocking), batch)


def pin(batch: Any) -> Any:
    """The batch in page-locked memory, where its parts know how (`pin_memory`)."""
    if hasattr(batch, "pin_memory"):
        return batch.pin_memory()
    return batch if hasattr(batch, "to") else _map(pin, batch)


def record_stream(batch: Any, stream: torch.Stream) -> None:
    """Keep the CUDA memory of all parts from being reused before `stream` is done with them."""
    if isinstance(batch, torch.Tensor):
        if batch.is_cuda:  # the allocator knows no other memory
            batch.record_stream(stream)
    elif hasattr(batch, "record_stream"):
        batch.record_stream(stream)
    else:
        _map(lambda part: record_stream(part, stream), batch)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The container with `function` applied to what it holds; other values as they are."""
    if isinstance(value, Mapping):
        return {key: function(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(part) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **parts)
    return value


def new_stream(device: torch.device, priority: int = 0) -> torch.Stream | None:
    """A CUDA stream beside the one that computes; None on a CPU, where there are none."""
    return torch.cuda.Stream(device=device, priority=priority) if device.type == "cuda" else None


def on_stream(stream: torch.Stream | None) -> AbstractContextManager[Any]:
    """`with on_stream(s):` work is put on `s`; without a stream nothing changes."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


class DataLoadingThread(threading.Thread, Generic[In]):
    """Draws batches from an iterator and moves them to the device, one ahead, beside everything else.

    >>> with DataLoadingThread(torch.device("cpu"), iter(batches), to_device_non_blocking=True) as loader:
    ...     pipeline.progress(loader)                                                      # doctest: +SKIP

    The thread ends with the iterator, with an error of it, or by `stop()`; leaving the `with` block stops it too. It is
    an iterator itself, so every pipeline takes it in place of the one it reads. For CUDA it pins memory and copies on a
    stream of its own; the consumer's stream waits for the copy, not the consumer. (The CUDA part was written with care
    and has not been run on a GPU.)

    Args:
        device: where batches go.
        dataloader_iter: read by this thread alone.
        to_device_non_blocking: copy beside the host's work.
        memcpy_stream_priority, memcpy_stream: the CUDA stream of the copies.

    Raises:
        Exception: (get_next_batch) what the iterator raised, once; afterwards the batches have ended.

    Counterpart: torchrec.distributed.train_pipeline.utils.DataLoadingThread.
    """

    def __init__(
        self,
        device: torch.device,
        dataloader_iter: Iterator[In],
        to_device_non_blocking: bool,
        memcpy_stream_priority: int = 0,
        memcpy_stream: torch.Stream | None = None,
    ) -> None:
        super().__init__(name="DataLoadingThread", daemon=True)
        self._device, self._iterator, self._non_blocking = device, dataloader_iter, to_device_non_blocking
        self._stream = memcpy_stream or new_stream(device, memcpy_stream_priority)
        self._stopped = threading.Event()
        self._buffer: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(maxsize=1)
        self._ended = False

    def run(self) -> None:
        """Load until the end; called by `start()`."""
        while not self._stopped.is_set():
            batch = event = error = None
            try:
                batch, event = self._load(next(self._iterator))
            except BaseException as raised:  # StopIteration too: the consumer tells them apart
                error = raised
            self._put((batch, event, error))
            if error is not None:
                return

    def _load(self, batch: Any) -> tuple[Any, Any]:
        if self._stream is None:
            return to_device(batch, self._device, self._non_blocking), None
        with on_stream(self._stream):
            moved = to_device(pin(batch) if self._non_blocking else batch, self._device, self._non_blocking)
            return moved, self._stream.record_event()

    def _put(self, item: tuple[Any, Any, BaseException | None]) -> None:
        while not self._stopped.is_set():
            try:
                self._buffer.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def stop(self) -> None:
        """End the thread, after the batch it is loading; what it has loaded is dropped."""
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5.0)

    def get_next_batch(self, none_throws: bool = False) -> In | None:
        """The next batch, on the device; at the end None, or StopIteration if `none_throws`."""
        item = None
        while item is None and not self._ended:
            try:
                item = self._buffer.get(timeout=0.1)
            except queue.Empty:
                if self._stopped.is_set():
                    self._ended = True
                elif not self.is_alive() and self._buffer.empty():
                    raise RuntimeError("this DataLoadingThread was not started: call start()") from None
        batch, event, error = item or (None, None, StopIteration())
        if error is None:
            if event is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(event)
                record_stream(batch, stream)
            return batch
        self._ended = True
        if not isinstance(error, StopIteration):
            raise error
        if none_throws:
            raise StopIteration
        return None

    def __iter__(self) -> DataLoadingThread[In]:
        return self

    def __next__(self) -> In:
        return self.get_next_batch(none_throws=True)  # type: ignore[return-value]

    def __enter__(self) -> DataLoadingThread[In]:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
