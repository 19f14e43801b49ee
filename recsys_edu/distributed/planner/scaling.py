"""Scaling curves: plan the model again for every number of ranks, predict the step, see what more ranks buy.

weak     every rank keeps its batch: twice the ranks should do twice the examples per second
strong   the ranks share one global batch: twice the ranks should take half the time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from recsys_edu.distributed.planner.kernel_costs import KernelCosts, dense_work
from recsys_edu.distributed.planner.planners import EmbeddingShardingPlanner
from recsys_edu.distributed.planner.remedy import resized
from recsys_edu.distributed.planner.step_simulator import simulate_step
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.distributed.planner.types import PlannerError
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import PipelineType

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class ScalingPoint:
    """One number of ranks; without a plan only `why_not` is set.

    Args:
        batch_size: per rank.
        work_ms: of the step, what the busiest rank computes; the rest it waits.
        examples_per_s: of all ranks.
    """

    world_size: int
    batch_size: int
    step_ms: float | None = None
    work_ms: float | None = None
    examples_per_s: float | None = None
    why_not: str | None = None


def scaling_curve(
    model: nn.Module,
    topology: Topology,
    world_sizes: Sequence[int] = WORLD_SIZES,
    batch_size: int = 512,
    strong: bool = False,
    kernels: KernelCosts | None = None,
    pipeline: PipelineType = PipelineType.TRAIN_SPARSE_DIST,
) -> list[ScalingPoint]:
    """Plans and predicted steps of `model` on ever more machines like the topology's.

    Args:
        batch_size: per rank; with `strong`, per rank of `topology`, whose global batch is then divided anew.

    Raises:
        ValueError: a number of ranks that is no multiple of the ranks per host.
    """
    work, points = dense_work(model), []
    for world_size in world_sizes:
        size = max(1, round(batch_size * topology.world_size / world_size)) if strong else batch_size
        machines = resized(topology, world_size)
        planner = EmbeddingShardingPlanner(topology=machines, batch_size=size, suggest=False)
        try:
            plan = planner.plan(model, get_default_sharders())
        except PlannerError as error:
            points.append(ScalingPoint(world_size, size, why_not=str(error).splitlines()[0]))
            continue
        step = simulate_step(plan, work, size, kernels, pipeline)
        points.append(ScalingPoint(world_size, size, step.step_ms, step.work_ms, step.examples_per_s))
    return points
