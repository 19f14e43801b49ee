"""A pipeline of stages that its user writes.

    progress 0   fills:  batch 0 through all stages, batch 1 through all but the last, ...; returns batch 0
    progress 1           batch 1 through the last stage, batch 2 through the one before, ...; returns batch 1

A stage is started for the next batch before `progress` returns, so on CUDA it runs beside what the caller computes.

Counterpart: torchrec.distributed.train_pipeline.train_pipelines.StagedTrainPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from recsys_edu.distributed.spans import span
from recsys_edu.distributed.train_pipeline.pipeline_stage import PipelineStage
from recsys_edu.distributed.train_pipeline.utils import on_stream, record_stream


@dataclass(frozen=True)
class _Failed:
    error: Exception


class StagedTrainPipeline:
    """Batches on an assembly line: every `progress` moves each one stage on and returns the one that is through.

    >>> double = PipelineStage("double", lambda batch: 2 * batch, stream=None)
    >>> add = PipelineStage("add", lambda batch: batch + 1, stream=None)
    >>> pipeline, batches = StagedTrainPipeline([double, add]), iter([1, 2, 3])
    >>> [pipeline.progress(batches) for _ in range(4)]
    [3, 5, 7, None]

    Args:
        pipeline_stages: in order; the first gets what the iterator gives.
        debug_mode: wait for every stage on CUDA, so that an error shows where it was made.
        compute_stream: the CUDA stream that uses the results; default: the current one.
        on_flush_end: called when a flush (`set_flush(True)`: finish what is inside, draw nothing) is through.

    Raises:
        ValueError: no stages.
        Exception: (progress) what a stage or the iterator raised, with the stage's name as a note, when that batch is
            due; the next call goes on with the next batch.

    (The CUDA part was written with care and has not been run on a GPU.)
    """

    def __init__(
        self,
        pipeline_stages: list[PipelineStage],
        debug_mode: bool = False,
        compute_stream: torch.Stream | None = None,
        on_flush_end: Callable[[], None] | None = None,
    ) -> None:
        if not pipeline_stages:
            raise ValueError("a StagedTrainPipeline needs at least one stage")
        self._stages, self._debug_mode = pipeline_stages, debug_mode
        self._compute_stream, self._on_flush_end = compute_stream, on_flush_end
        self._iterator: Iterator[Any] | None = None
        self._flushing = False
        self.reset()

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    def reset(self) -> None:
        """Drop everything inside and forget the iterator."""
        self._results: list[Any] = [None] * len(self._stages)  # of stage k for the batch that left it last
        self._iterator, self._has_ended = None, False

    def set_flush(self, flush: bool) -> None:
        """Stop (or again start) drawing batches; those inside are finished."""
        self._flushing = flush

    def flush_end(self) -> None:
        """Called when a flush is through: batches are drawn again."""
        self._flushing = False
        if self._on_flush_end is not None:
            self._on_flush_end()

    def progress(self, dataloader_iter: Iterator[Any]) -> Any | None:
        """The next batch that went through all stages; None when there are no more."""
        if dataloader_iter is not self._iterator:
            self._iterator, self._has_ended = dataloader_iter, False
        if not self._advance_to_result() and self._flushing:
            self.flush_end()
            self._advance_to_result()
        result = self._results[-1]
        self._results[-1] = None
        self._advance()
        if isinstance(result, _Failed):
            raise result.error
        self._hand_to_compute_stream(result)
        return result

    def _advance_to_result(self) -> bool:
        """Where nothing is through, as in an empty pipeline, move on until something is."""
        for _ in self._stages:
            if self._results[-1] is not None:
                break
            self._advance(filling=True)
        return self._results[-1] is not None

    def _advance(self, filling: bool = False) -> None:
        """Last stage first, so that every batch moves on by one."""
        for index in reversed(range(len(self._stages))):
            stage = self._stages[index]
            if self._results[index] is not None:
                continue  # what is through waits for its `progress`
            if index:
                given, self._results[index - 1] = self._results[index - 1], None
            else:
                given = self._draw()
            if given is None:
                if (
                    self._has_ended
                    and stage.data_exhausted_callback is not None
                    and not any(result is not None for result in self._results[:index])
                ):
                    stage.data_exhausted_callback()
                continue
            self._results[index] = given if isinstance(given, _Failed) else self._run(index, given)
            if filling and stage.fill_callback is not None:
                stage.fill_callback()

    def _draw(self) -> Any:
        if self._flushing or self._has_ended:
            return None
        try:
            return next(self._iterator)
        except StopIteration:
            self._has_ended = True
            return None
        except Exception as error:
            return _Failed(error)

    def _run(self, index: int, given: Any) -> Any:
        stage = self._stages[index]
        before = self._stages[index - 1].stream if index else None
        try:
            with span(stage.name), on_stream(stage.stream):
                if stage.stream is not None and before is not None and before is not stage.stream:
                    stage.stream.wait_stream(before)
                    record_stream(given, stage.stream)
                result = stage.runnable(given)
            if self._debug_mode and stage.stream is not None:
                stage.stream.synchronize()  # host sync: asked for by debug_mode
            return result
        except Exception as error:
            error.add_note(f"in stage {index}, {stage.name!r}, of a StagedTrainPipeline")
            return _Failed(error)

    def _hand_to_compute_stream(self, result: Any) -> None:
        stream = self._stages[-1].stream
        if stream is not None and result is not None:
            compute = self._compute_stream or torch.cuda.current_stream(stream.device)
            compute.wait_stream(stream)
            record_stream(result, compute)
