"""One rank of many, without the others: what rank 37 of 128 holds, made from the plan alone and counted.

    held = hold_rank(model, plan, rank=37)           # on meta: shapes and dtypes, no memory
    held.check()                                     # the tensors have exactly the bytes that the plan says
    held.to_frame()                                  # one row per shard

The sharded modules are the real ones, kernels and optimizer state included; only the exchange is one of a simulated
world. With `device="cpu"` the shards are really allocated and filled, for plans whose rank fits into this machine.
What the plan leaves in a GPU's host memory is held here like the rest: there is only one memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import HOST_MEMORY_KERNELS, EmbeddingComputeKernel
from recsys_edu.distributed.exchange import SimulatedWorld
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.types import PlannerError, PlannerErrorType
from recsys_edu.distributed.planner.utils import show_bytes, to_frame
from recsys_edu.distributed.planner.workload import Table
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.distributed.shards import local_shards
from recsys_edu.distributed.simulation import shard_one
from recsys_edu.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingType


@dataclass(frozen=True)
class HeldShard:
    """One rectangle on the rank: its tensors, and what the plan says of it.

    Args:
        weight, state: as the kernel holds them; state is empty where nothing trains in backward.
        planned_bytes: weights and optimizer state of exactly this rectangle, by the plan's numbers.
        charged_bytes: what the planner reserved: a full-sized rectangle and the buffers of the batch.
    """

    module: str
    shard: Shard
    weight: Tensor
    state: Mapping[str, Tensor]
    planned_bytes: int
    charged_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    @property
    def state_bytes(self) -> int:
        """Of the optimizer; its step counter, one number per table, is not counted."""
        return sum(s.numel() * s.element_size() for name, s in self.state.items() if name != "iter")

    @property
    def held_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes


@dataclass(frozen=True)
class HeldRank:
    """Everything that one rank holds of the model's tables.

    `modules` are the sharded collections by their path; `used_bytes` is what the planner reserved for tables.
    """

    rank: int
    world_size: int
    modules: Mapping[str, nn.Module]
    shards: tuple[HeldShard, ...]
    used_bytes: int

    @property
    def held_bytes(self) -> int:
        """Weights and optimizer state, counted from the tensors."""
        return sum(shard.held_bytes for shard in self.shards)

    def check(self) -> HeldRank:
        """Compare every tensor's bytes with the plan's; returns itself.

        Raises:
            PlannerError: a shard with other bytes than planned, or more in all than the planner reserved.
        """
        for held in self.shards:
            if held.held_bytes != held.planned_bytes:
                raise PlannerError(
                    f"rank {self.rank}, {held.shard}: the plan says {held.planned_bytes:,} bytes, its tensors have "
                    f"{held.held_bytes:,} ({held.weight_bytes:,} weights, {held.state_bytes:,} optimizer state)"
                )
        if self.held_bytes > self.used_bytes:
            raise PlannerError(
                f"rank {self.rank} holds {show_bytes(self.held_bytes)}, the planner reserved "
                f"{show_bytes(self.used_bytes)}",
                PlannerErrorType.INSUFFICIENT_STORAGE,
            )
        return self

    def to_frame(self) -> Any:
        """One row per shard, as a polars DataFrame (pandas where polars is missing)."""
        rows = [
            {
                "module": held.module,
                "table": held.shard.table,
                "first_row": held.shard.rows.start,
                "rows": len(held.shard.rows),
                "first_column": held.shard.columns.start,
                "columns": len(held.shard.columns),
                "device": str(held.weight.device),
                "weight_bytes": held.weight_bytes,
                "state_bytes": held.state_bytes,
                "planned_bytes": held.planned_bytes,
                "charged_bytes": held.charged_bytes,
            }
            for held in self.shards
        ]
        return to_frame(rows)

    def __str__(self) -> str:
        weights = sum(shard.weight_bytes for shard in self.shards)
        tables = len({(shard.module, shard.shard.table) for shard in self.shards})
        return (
            f"rank {self.rank} of {self.world_size}: {len(self.shards)} shards of {tables} tables, "
            f"{show_bytes(weights)} of weights and {show_bytes(self.held_bytes - weights)} of optimizer state; the "
            f"planner reserved {show_bytes(self.used_bytes)}, the rest of it for the batch's buffers"
        )


def hold_rank(model: nn.Module, plan: PlannedSharding, rank: int, device: torch.device | str = "meta") -> HeldRank:
    """Make the sharded modules of one rank as they would be in the whole world.

    Args:
        model: the one that was planned; on meta, its shards are initialised by their configs.
        device: "meta" for shapes only, "cpu" or "cuda" to allocate and fill what the rank holds.

    Raises:
        ValueError: no such rank.
    """
    world_size, device = plan.topology.world_size, torch.device(device)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: the plan is for ranks 0 to {world_size - 1}")
    end = SimulatedWorld(world_size).exchange(rank)
    sharders = {table.path: table.sharder for table in plan.found.placement.problem.grid.workload.tables}
    modules = {}
    tables_of = {path: in_one_memory(plan.plan[path]) for path in sharders}
    for path, sharder in sharders.items():
        child = model.get_submodule(path)
        options = {"fused_params": getattr(sharder, "fused_params", None)}
        if hasattr(child, "embedding_bag_configs"):  # only pooled answers are summed inside a host
            options["local_size"] = plan.topology.local_world_size
        modules[path] = shard_one(child, tables_of[path], end, device, **options)
    numbers = {(path, shard): both for path, shard, *both in _planned(plan, rank)}
    held = [
        HeldShard(path, shard, weight, state, *numbers[path, shard])
        for path, module in modules.items()
        for shard, weight, state in _tensors(module, rank)
    ]
    return HeldRank(rank, world_size, modules, tuple(held), int(plan.used_bytes_W2[rank].sum()))


def in_one_memory(plan: EmbeddingModuleShardingPlan) -> EmbeddingModuleShardingPlan:
    """The plan with the fused kernel wherever only the place of the weights sets a kernel apart from it."""
    fused = EmbeddingComputeKernel.FUSED.value
    return EmbeddingModuleShardingPlan(
        (name, replace(cut, compute_kernel=fused) if cut.compute_kernel in HOST_MEMORY_KERNELS else cut)
        for name, cut in plan.items()
    )


def _tensors(module: nn.Module, rank: int) -> Iterator[tuple[Shard, Tensor, Mapping[str, Tensor]]]:
    """(rectangle, weight, optimizer state) of everything that a sharded collection holds, replicas included."""
    shards = module.shards
    for pieces in local_shards(shards.lookup.rank_kernels, shards.lookup.kernels).values():
        for piece in pieces:
            yield piece.shard, piece.weight.detach(), piece.state
    for name, weight in shards.replicas.parameters().items():
        num_rows, num_columns = weight.shape
        yield Shard(name, range(num_rows), range(num_columns), rank), weight.detach(), {}


def _planned(plan: PlannedSharding, rank: int) -> Iterator[tuple[str, Shard, int, int]]:
    """(module path, rectangle, its bytes, the bytes charged for it) of what the plan lays on the rank."""
    placement = plan.found.placement
    grid = placement.problem.grid
    use, tables = grid.workload.lookups, grid.workload.tables
    for unit, members in enumerate(placement.problem.units):
        column, ranks = int(placement.choice_U[unit]), placement.ranks_U[unit]
        for i in members:
            trains = _trains_in_backward(tables[i], plan.plan[tables[i].path][tables[i].name])
            per_cell, per_row = (use.state_per_cell[i], use.state_per_row[i]) if trains else (0, 0)
            for (rows, columns), where in zip(grid.rectangles(i, column), ranks):
                if where == rank and len(rows):
                    cells = len(rows) * len(columns)
                    num_bytes = int(cells * (use.element_bytes[i] + per_cell) + len(rows) * per_row)
                    charged = int(grid.bytes_TJ[i, column].sum())
                    yield tables[i].path, Shard(tables[i].name, rows, columns, rank), num_bytes, charged


def _trains_in_backward(table: Table, sharding: ParameterSharding) -> bool:
    """Whether the table's optimizer, and so its state, lives with the shard."""
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return bool(getattr(table.parameter, "_optimizer_classes", ()))
    return sharding.compute_kernel != EmbeddingComputeKernel.DENSE.value
