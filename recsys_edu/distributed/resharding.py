"""Resharding a living model: every rectangle that changes its rank travels, in one all-to-all.

    old plan  user: rank 0                 new plan  user: rows 0:5 rank 0, rows 5:10 rank 1
    pieces    rows 0:5  rank 0 -> rank 0,  rows 5:10  rank 0 -> rank 1

The pieces are the intersections of old and new shards, so both plans may be anything. With each piece of weights goes
its optimizer state. Sizes follow from the plans; nothing about them is exchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys_edu.distributed.layout import ShardedTable
from recsys_edu.distributed.sharding.tiling import Shard, intersections
from recsys_edu.distributed.shards import LocalShard, TableShards
from recsys_edu.distributed.types import EmbeddingModuleShardingPlan
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS


@dataclass(frozen=True)
class Piece:
    """A rectangle of one table that is on `source` under the old plan and on `target` under the new one."""

    table: str
    old: Shard
    new: Shard
    rows: range
    columns: range


def reshard_module(module: nn.Module, plan: EmbeddingModuleShardingPlan) -> nn.Module:
    """A sharded collection under another plan: same weights, same optimizer state, same learning rate.

    Called by all ranks together. The given module is left as it is, so both exist for a moment. Of the plan only the
    rectangles are read: a table goes on to be trained as it was.

    Raises:
        ValueError: the new plan is invalid, differs between ranks, or makes a replicated table sharded or a sharded one
            replicated (their optimizers are different objects: save a checkpoint and load it under the new plan).
    """
    fresh = module.with_plan(plan)
    old_tables = {table.name: table for table in module.shards.layout.tables}
    for table in fresh.shards.layout.tables:
        if bool(table.shards) != bool(old_tables[table.name].shards):
            raise ValueError(
                f"table {table.name!r}: resharding cannot turn a replicated table into a sharded one or back; save a "
                "checkpoint and load it under the new plan"
            )
    pieces = [piece for table in fresh.shards.layout.tables for piece in _pieces(old_tables[table.name], table)]
    _move(pieces, module, fresh)
    _copy_replicas(module, fresh)
    for new, old in zip(fresh.fused_optimizer.param_groups, module.fused_optimizer.param_groups):
        new["lr"] = old["lr"]
    fresh.fused_optimizer.zero_grad()  # hands the learning rate to the kernels
    return fresh


def _pieces(old: ShardedTable, new: ShardedTable) -> Iterator[Piece]:
    for common in intersections(old.shards, new.shards):
        if old.everywhere and common.old.rank != common.new.rank:
            continue  # the target's own copy will do
        yield Piece(new.name, common.old, common.new, common.rows, common.columns)


@torch.no_grad()
def _move(pieces: list[Piece], old_module: nn.Module, new_module: nn.Module) -> None:
    exchange = old_module.shards.exchange
    old_local, new_local = _local_by_shard(old_module), _local_by_shard(new_module)
    tables = {table.name: table for table in new_module.shards.layout.tables}
    _warn_of_restarts(pieces, tables)
    send: list[list[Tensor]] = [[] for _ in range(exchange.world_size)]
    send_W, receive_W = [0] * exchange.world_size, [0] * exchange.world_size
    for piece in pieces:
        if piece.old.rank == exchange.rank:
            for values in _parts(piece, piece.old, old_local[piece.old], tables[piece.table]):
                send[piece.new.rank].append(values.contiguous().flatten().view(torch.uint8))
                send_W[piece.new.rank] += send[piece.new.rank][-1].numel()
        if piece.new.rank == exchange.rank:
            parts = _parts(piece, piece.new, new_local[piece.new], tables[piece.table])
            receive_W[piece.old.rank] += sum(values.numel() * values.element_size() for values in parts)
    flat = [values for of_rank in send for values in of_rank]
    packed = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=old_module.shards.device)
    received = exchange.start(packed, send_W, receive_W, "resharded tables").wait()
    for source, buffer in enumerate(received.split(receive_W)):
        first = 0
        for piece in pieces:
            if piece.old.rank != source or piece.new.rank != exchange.rank:
                continue
            for target in _parts(piece, piece.new, new_local[piece.new], tables[piece.table]):
                size = target.numel() * target.element_size()
                # A copy first: bytes in the middle of a buffer need not lie where the dtype wants them.
                values = buffer[first : first + size].clone().view(target.dtype).view(target.shape)
                target.copy_(values)
                first += size


def _parts(piece: Piece, shard: Shard, local: LocalShard, table: ShardedTable) -> list[Tensor]:
    """What travels with a piece, as views: weights, state per weight, state per row where its columns stay, steps."""
    rows = slice(piece.rows.start - shard.rows.start, piece.rows.stop - shard.rows.start)
    columns = slice(piece.columns.start - shard.columns.start, piece.columns.stop - shard.columns.start)
    parts = [local.weight.detach()[rows, columns]]
    if table.optimizer is None:
        return parts
    optimizer = ROW_OPTIMIZERS[table.optimizer.kind]
    for name, per in optimizer.state.items():
        if per == "element":
            parts.append(local.state[name][rows, columns])
        elif piece.old.columns == piece.new.columns:
            parts.append(local.state[name][rows])
    return [*parts, local.state["iter"]] if optimizer.counts_steps else parts


def _warn_of_restarts(pieces: list[Piece], tables: dict[str, ShardedTable]) -> None:
    cut_anew = {
        piece.table
        for piece in pieces
        if piece.old.columns != piece.new.columns and _has_row_state(tables[piece.table])
    }
    if cut_anew:
        warnings.warn(
            f"tables {sorted(cut_anew)}: their optimizer keeps one number per row and column block, and their column "
            "blocks change. That state starts again from zero; to keep it, keep the tables' column cuts",
            stacklevel=4,
        )


def _has_row_state(table: ShardedTable) -> bool:
    return table.optimizer is not None and "row" in ROW_OPTIMIZERS[table.optimizer.kind].state.values()


def _local_by_shard(module: nn.Module) -> dict[Shard, LocalShard]:
    return {
        local.shard: local
        for table in module.shards.modules.values()
        if isinstance(table, TableShards)
        for local in table.local
    }


@torch.no_grad()
def _copy_replicas(old_module: nn.Module, new_module: nn.Module) -> None:
    for name, table in new_module.shards.modules.items():
        if not isinstance(table, TableShards):
            table.weight.copy_(old_module.shards.modules[name].weight)
