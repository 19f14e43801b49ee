"""What a planner says about its plan.

Counterpart: torchrec.distributed.planner.stats
"""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from recsys_edu.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    PlanDebugStats,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from recsys_edu.distributed.planner.utils import show_bytes
from recsys_edu.distributed.types import ModuleSharder, ShardingPlan, text_table

logger = logging.getLogger(__name__)


def round_to_one_sigfig(x: float) -> str:
    """A short number.

    >>> round_to_one_sigfig(0.0234), round_to_one_sigfig(23.4)
    ('0.02', '20')
    """
    if x == 0:
        return "0"
    digits = -math.floor(math.log10(abs(x)))
    return f"{round(x, digits):.{max(digits, 0)}f}"


class EmbeddingStats(Stats):
    """Logs one line per rank (memory, milliseconds by phase) and, with `debug`, one per table.

    Counterpart: torchrec.distributed.planner.stats.EmbeddingStats
    """

    def log(
        self,
        sharding_plan: ShardingPlan,
        topology: Topology,
        batch_size: int,
        storage_reservation: StorageReservation,
        num_proposals: int,
        num_plans: int,
        run_time: float,
        best_plan: list[ShardingOption],
        constraints: dict[str, ParameterConstraints] | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        enumerator: Enumerator | None = None,
        debug: bool = True,
        debug_stats: PlanDebugStats | None = None,
    ) -> None:
        """At level INFO of the logger `recsys_edu.distributed.planner.stats`."""
        for line in plan_lines(topology, num_proposals, num_plans, run_time, best_plan, debug):
            logger.info(line)


class NoopEmbeddingStats(Stats):
    """Says nothing."""

    def log(
        self,
        sharding_plan: ShardingPlan,
        topology: Topology,
        batch_size: int,
        storage_reservation: StorageReservation,
        num_proposals: int,
        num_plans: int,
        run_time: float,
        best_plan: list[ShardingOption],
        constraints: dict[str, ParameterConstraints] | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        enumerator: Enumerator | None = None,
        debug: bool = True,
        debug_stats: PlanDebugStats | None = None,
    ) -> None:
        pass


def plan_lines(
    topology: Topology,
    num_proposals: int,
    num_plans: int,
    run_time: float,
    options: list[ShardingOption],
    per_table: bool,
) -> list[str]:
    """The text of `EmbeddingStats`."""
    used: list[dict[str, Any]] = [{"hbm": 0, "ddr": 0, "ms": 0.0, "shards": 0} for _ in topology.devices]
    for option in options:
        for shard in option.shards:
            mine = used[shard.rank]  # type: ignore[index]
            mine["hbm"] += shard.storage.hbm  # type: ignore[union-attr]
            mine["ddr"] += shard.storage.ddr  # type: ignore[union-attr]
            mine["ms"] += shard.perf.total  # type: ignore[union-attr]
            mine["shards"] += 1
    ranks = [
        [
            str(device.rank),
            str(mine["shards"]),
            f"{mine['ms']:.4g}",
            f"{show_bytes(mine['hbm'])} of {show_bytes(device.storage.hbm)}",
            f"{show_bytes(mine['ddr'])} of {show_bytes(device.storage.ddr)}",
        ]
        for device, mine in zip(topology.devices, used)
    ]
    times = [mine["ms"] for mine in used]
    mean = sum(times) / len(times)
    lines = [
        f"{num_proposals} proposals, {num_plans} of them placed, in {run_time:.2f} s",
        *text_table(["rank", "shards", "ms", "HBM", "host memory"], ranks).splitlines(),
        f"busiest over mean: {max(times) / mean if mean else 1.0:.3f}",
    ]
    if per_table:
        tables = [[o.fqn, o.sharding_type, o.compute_kernel, str(o.num_shards), f"{o.total_perf:.4g}"] for o in options]
        lines += text_table(["table", "sharding type", "kernel", "shards", "ms in all"], tables).splitlines()
    return lines
