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

and then, from a finished plan:

    one_rank        what one rank of many holds, without the others
    loads           what the plan asks of every rank in a step
    kernel_costs    what a step costs besides; calibrate measures it on this machine
    step_simulator  the time line of a step, predicted
    scaling         the same for 8 to 4,096 ranks

The other files are TorchRec's public names (planners, enumerators, shard_estimators, proposers, partitioners, ...).

Counterpart: torchrec.distributed.planner
"""

from recsys_edu.distributed.planner.planners import EmbeddingShardingPlanner
from recsys_edu.distributed.planner.types import ParameterConstraints, Topology
from recsys_edu.distributed.planner.utils import bytes_to_gb, sharder_name

__all__ = ["EmbeddingShardingPlanner", "ParameterConstraints", "Topology", "bytes_to_gb", "sharder_name"]
