"""What a pipeline knows about one batch under way.

Counterpart: torchrec.distributed.train_pipeline.pipeline_context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass
class TrainPipelineContext:
    """The flights of one batch, and what became of it.

    Flights are kept by name, `<path of the sharded module>[<number of the call>]`. Fields that are marked "unused" are
    there so that TorchRec's arguments are accepted: nothing here is traced, fused over modules or post-processed.

    Counterpart: torchrec.distributed.train_pipeline.pipeline_context.TrainPipelineContext.
    """

    input_dist_splits_requests: dict[str, Any] = field(default_factory=dict)
    """Flights whose sizes are on their way (`start_input` ran)."""
    input_dist_tensors_requests: dict[str, Any] = field(default_factory=dict)
    """Flights whose lengths and ids are on their way or here (`exchange_input` ran)."""
    module_contexts: dict[str, Any] = field(default_factory=dict)
    """Unused."""
    module_contexts_next_batch: dict[str, Any] = field(default_factory=dict)
    """Unused."""
    fused_splits_awaitables: list[Any] = field(default_factory=list)
    """Unused."""
    events: list[Any] = field(default_factory=list)
    """CUDA events of what other streams do for this batch: the copy, then the exchange of ids."""
    postproc_fwd_results: dict[str, Any] = field(default_factory=dict)
    """Unused."""
    index: int | None = None
    """Number of the batch, counted from 0 over all iterators."""
    version: int = 0
    """Unused."""
    given: dict[str, Any] = field(default_factory=dict)
    """The KeyedJaggedTensor that each flight was started with."""
    absent: Exception | None = None
    """Why this rank has no such batch: StopIteration, or what the iterator raised."""
    failure: Exception | None = None
    """Why no rank can train on this batch; raised when its turn comes, so that the batches before it train."""
    news: str | None = None
    """Which rank had no batch and why, where there is a failure of that kind."""
    started: bool = False
    ended_everywhere: bool = False
    """The iterators of all ranks end here."""

    def drop_flights(self) -> None:
        """Forget what was started, so that it can be started again."""
        self.input_dist_splits_requests.clear()
        self.input_dist_tensors_requests.clear()
        self.given.clear()
        self.started = False
