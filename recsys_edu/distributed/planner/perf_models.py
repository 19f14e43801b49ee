"""What a whole plan costs, from the costs of its shards.

Counterpart: torchrec.distributed.planner.perf_models
"""

from __future__ import annotations

from recsys_edu.distributed.planner.types import PerfModel, ShardingOption, Topology


class NoopPerfModel(PerfModel):
    """Milliseconds of the busiest rank: the others wait for it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def rate(self, plan: list[ShardingOption]) -> float:
        busy = [0.0] * self._topology.world_size
        for option in plan:
            for shard in option.shards:
                busy[shard.rank] += shard.perf.total / self._topology.speeds[shard.rank]  # type: ignore[index, union-attr]
        return max(busy)


class NoopStorageModel(PerfModel):
    """Bytes of device memory (on the CPU: host memory) of the fullest rank."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def rate(self, plan: list[ShardingOption]) -> float:
        kind = "ddr" if self._topology.compute_device == "cpu" else "hbm"
        full = [0] * self._topology.world_size
        for option in plan:
            for shard in option.shards:
                full[shard.rank] += getattr(shard.storage, kind)  # type: ignore[index]
        return max(full)
