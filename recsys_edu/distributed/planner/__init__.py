"""The planner: which table is cut how and lies where, and why.

Read in this order:

    topology    the machines
    cost        bytes and milliseconds of rectangles: the one cost function
    workload    the model's tables and the user's constraints, checked
    options     every way to shard every table, costed
    placement   which rank takes what
    search      ceilings and prices; the bound on what is possible
    improve     small steps that relieve the busiest rank
    report      the plan, and why it is as it is
    remedy      nothing fits: what would help

The other files are TorchRec's public names (planners, enumerators, shard_estimators, proposers, partitioners, ...).

Counterpart: torchrec.distributed.planner
"""

from recsys_edu.distributed.planner.planners import EmbeddingShardingPlanner
from recsys_edu.distributed.planner.types import ParameterConstraints, Topology
from recsys_edu.distributed.planner.utils import bytes_to_gb, sharder_name

__all__ = ["EmbeddingShardingPlanner", "ParameterConstraints", "Topology", "bytes_to_gb", "sharder_name"]
