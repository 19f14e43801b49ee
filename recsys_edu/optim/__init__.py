"""Optimizers that go by parameter names, and optimizers that run inside backward."""

from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.clipping import GradientClipping, GradientClippingOptimizer
from recsys_edu.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper
from recsys_edu.optim.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    in_backward_optimizer_filter,
)
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.optim.semi_sync import SemisyncOptimizer
from recsys_edu.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

__all__ = [
    "Adagrad",
    "Adam",
    "CombinedOptimizer",
    "EmptyFusedOptimizer",
    "FusedOptimizer",
    "FusedOptimizerModule",
    "GradientClipping",
    "GradientClippingOptimizer",
    "KeyedOptimizer",
    "KeyedOptimizerWrapper",
    "LAMB",
    "LarsSGD",
    "OptimizerWrapper",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RowWiseAdagrad",
    "SGD",
    "SemisyncOptimizer",
    "WarmupOptimizer",
    "WarmupPolicy",
    "WarmupStage",
    "apply_optimizer_in_backward",
    "in_backward_optimizer_filter",
]
