"""Training on many ranks: plans, the sharded lookup engine, DistributedModelParallel, checkpoints.

A reader follows one batch through embeddingbag.py, flight.py, routing.py, exchange.py, pooled_assembly.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys_edu.distributed.comm import get_local_rank, get_local_size
    from recsys_edu.distributed.model_parallel import DistributedModelParallel
    from recsys_edu.distributed.train_pipeline import (
        DataLoadingThread,
        EvalPipelineSparseDist,
        PrefetchTrainPipelineSparseDist,
        TrainPipeline,
        TrainPipelineBase,
        TrainPipelineSparseDist,
    )
    from recsys_edu.distributed.types import (
        Awaitable,
        ModuleSharder,
        NoWait,
        ParameterSharding,
        ShardedModule,
        ShardingEnv,
        ShardingPlanner,
    )
    from recsys_edu.distributed.utils import get_unsharded_module_names

# Loaded on first use: the engine imports its own files by path and must not wait for all of them.
_HOMES = {
    "Awaitable": "types",
    "DataLoadingThread": "train_pipeline",
    "DistributedModelParallel": "model_parallel",
    "EvalPipelineSparseDist": "train_pipeline",
    "ModuleSharder": "types",
    "NoWait": "types",
    "ParameterSharding": "types",
    "PrefetchTrainPipelineSparseDist": "train_pipeline",
    "ShardedModule": "types",
    "ShardingEnv": "types",
    "ShardingPlanner": "types",
    "TrainPipeline": "train_pipeline",
    "TrainPipelineBase": "train_pipeline",
    "TrainPipelineSparseDist": "train_pipeline",
    "get_local_rank": "comm",
    "get_local_size": "comm",
    "get_unsharded_module_names": "utils",
}

__all__ = [
    "Awaitable",
    "DataLoadingThread",
    "DistributedModelParallel",
    "EvalPipelineSparseDist",
    "ModuleSharder",
    "NoWait",
    "ParameterSharding",
    "PrefetchTrainPipelineSparseDist",
    "ShardedModule",
    "ShardingEnv",
    "ShardingPlanner",
    "TrainPipeline",
    "TrainPipelineBase",
    "TrainPipelineSparseDist",
    "get_local_rank",
    "get_local_size",
    "get_unsharded_module_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
