"""A stage of a StagedTrainPipeline. Counterpart: torchrec.distributed.train_pipeline.pipeline_stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

StageOut = TypeVar("StageOut")


@dataclass
class PipelineStage:
    """What happens to a batch at one station: `runnable(what the stage before returned)`, on `stream`.

    `stream` is None on a CPU. `fill_callback` runs after the stage's runs that fill an empty pipeline,
    `data_exhausted_callback` when the stage has nothing left to do. Counterpart: TorchRec's class of this name.
    """

    name: str
    runnable: Callable[..., Any]
    stream: torch.Stream | None
    fill_callback: Callable[[], None] | None = None
    data_exhausted_callback: Callable[[], None] | None = None
