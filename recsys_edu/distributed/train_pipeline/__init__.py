"""Pipelines that overlap copying, exchanging ids, and computing: base.py, train_pipelines.py, then input_flights.py.

Counterpart: torchrec.distributed.train_pipeline.
"""

from __future__ import annotations

from recsys_edu.distributed.train_pipeline.pipeline_context import In, Out, TrainPipelineContext
from recsys_edu.distributed.train_pipeline.pipeline_stage import PipelineStage, StageOut
from recsys_edu.distributed.train_pipeline.train_pipelines import (
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    StagedTrainPipeline,
    TorchCompileConfig,
    TrainPipeline,
    TrainPipelineBase,
    TrainPipelinePT2,
    TrainPipelineSparseDist,
)
from recsys_edu.distributed.train_pipeline.utils import DataLoadingThread, get_h2d_func

__all__ = [
    "DataLoadingThread",
    "EvalPipelineSparseDist",
    "In",
    "Out",
    "PipelineStage",
    "PrefetchTrainPipelineSparseDist",
    "StageOut",
    "StagedTrainPipeline",
    "TorchCompileConfig",
    "TrainPipeline",
    "TrainPipelineBase",
    "TrainPipelineContext",
    "TrainPipelinePT2",
    "TrainPipelineSparseDist",
    "get_h2d_func",
]
