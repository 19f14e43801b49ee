"""Shards: what one rank holds of a module's tables, from first values to parameters, state dict and optimizer.

configs + plan + weights  ->  ShardedTables  ->  kernels that own memory, and parameters that show it by name
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.exchange import Exchange, GroupExchange, check_same_on_every_rank
from recsys_edu.distributed.flight import LaneLookup
from recsys_edu.distributed.layout import RankKernel, ShardedTable
from recsys_edu.distributed.replicas import Replicas
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.distributed.tables import KERNEL_OF_MEMORY, TableSource, check_memory, plan_tables
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor
from recsys_edu.distributed.types import ParameterSharding
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS
from recsys_edu.kernels.spec import Kernel, TableMemory, weight_dtype
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig
from recsys_edu.optim.fused import EmptyFusedOptimizer
from recsys_edu.optim.fused_tables import FusedTablesOptimizer, LearningRate
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizer


class ShardedTables:
    """Everything that pooled and sequence collections own alike.

    Args:
        configs: tables in order.
        sources: first values and optimizer per table.
        plan: ParameterSharding per table.
        exchange: this rank's end of the exchange; its world is the plan's.
        device: where shards and batches are.
        prefix: name of the container of tables in the state dict (`embedding_bags`, `embeddings`).
        weighted: features carry per-sample weights.
        local_size: ranks per host; default: from the environment.
        name: of the module, for errors.
    """

    def __init__(
        self,
        configs: Sequence[BaseEmbeddingConfig],
        sources: Mapping[str, TableSource],
        plan: Mapping[str, ParameterSharding],
        exchange: Exchange,
        device: torch.device,
        prefix: str,
        weighted: bool = False,
        local_size: int | None = None,
        name: str | None = None,
    ) -> None:
        self.configs, self.sources, self.exchange, self.device = configs, sources, exchange, device
        self._prefix, self._local_size, self._name = prefix, local_size, name
        self.tables = plan_tables(configs, sources, plan, exchange.world_size, local_size)
        self.layout = self.tables.layout
        check_memory(self.layout, device)
        check_same_on_every_rank(exchange, self.layout, f"tables or plan of {name or 'the sharded module'}")
        self.lookup = LaneLookup(self.layout, exchange, device, weighted)
        self.replicas = Replicas(self.tables, device, weighted)
        local = local_shards(self.lookup.rank_kernels, self.lookup.kernels)
        self.modules = _table_modules(self, local)
        # The unsharded weights are not needed any more; holding them would keep whole tables in memory.
        self.sources = {key: TableSource(None, s.optimizer, s.marks) for key, s in sources.items()}
        self.fused_optimizer = fused_tables_optimizer(self.modules, prefix, self.lookup.kernels)

    def with_plan(self, plan: Mapping[str, ParameterSharding]) -> ShardedTables:
        """The same tables cut otherwise, with memory that the caller has to fill.

        Only the rectangles of the plan count: a table goes on to be trained as it was, fused or by gradients.
        """
        dense = EmbeddingComputeKernel.DENSE.value
        kernels = {t.name: KERNEL_OF_MEMORY[t.memory] if t.optimizer else dense for t in self.layout.tables}
        plan = {name: replace(cut, compute_kernel=kernels[name]) for name, cut in plan.items()}
        return ShardedTables(
            self.configs,
            self.sources,
            plan,
            self.exchange,
            self.device,
            self._prefix,
            self.lookup.weighted,
            self._local_size,
            self._name,
        )


def fill_shard(weight: Tensor, shard: Shard, config: BaseEmbeddingConfig, source: Tensor | None) -> None:
    """Give one shard its first values: a rectangle of `source`, or, where that is on meta, the config's initialisation.

    The initialisation sees only the shard, never the whole table, so a table may be larger than any one memory.
    """
    if source is None:
        return
    with torch.no_grad():
        if source.device.type != "meta":
            rows, columns = shard.rows, shard.columns
            weight.copy_(source[rows.start : rows.stop, columns.start : columns.stop])
        elif config.init_fn is not None:
            fresh = config.init_fn(weight)
            if fresh is not None:
                weight.copy_(fresh)
        else:
            weight.uniform_(config.get_weight_init_min(), config.get_weight_init_max())


class TableShards(nn.Module):
    """What this rank holds of one sharded table, under the unsharded module's parameter name, `weight`.

    A rank with several shards of a table calls the further ones `weight_1`, `weight_2`, ...; a rank with none has no
    parameter. The state dict has one TiledTensor `weight` per table on every rank, of the table's whole size.
    """

    def __init__(self, table: ShardedTable, local: Sequence[LocalShard], source: TableSource) -> None:
        super().__init__()
        self.table, self.local = table, tuple(local)
        for index, shard in enumerate(local):
            parameter = shard.weight if isinstance(shard.weight, nn.Parameter) else nn.Parameter(shard.weight)
            if table.optimizer is not None:
                _mark_as_trained_in_backward(parameter, source)
            self.register_parameter(f"weight_{index}" if index else "weight", parameter)

    def tiled(self) -> TiledTensor:
        """The whole table as this rank knows it."""
        for shard in self.local:
            shard.settle()
        tiles = [Tile((s.shard.rows.start, s.shard.columns.start), s.weight.detach()) for s in self.local]
        return TiledTensor((self.table.num_rows, self.table.num_columns), tiles, weight_dtype(self.table.data_type))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.tiled()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        load_tiles({"weight": self.tiled()}, state_dict, prefix, *rest)


def load_tiles(
    targets: Mapping[str, TiledTensor],
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Fill this rank's tiles from a state dict; but for `targets` the arguments of `_load_from_state_dict`."""
    for name, target in targets.items():
        if prefix + name not in state_dict:
            missing_keys.append(prefix + name)
            continue
        try:
            copy_tiles(target, state_dict[prefix + name], prefix + name)
        except ValueError as error:
            error_msgs.append(str(error))


@torch.no_grad()
def copy_tiles(target: TiledTensor, source: Tensor, name: str) -> None:
    """Fill this rank's tiles from a whole tensor, or from tiles of the very same offsets and sizes.

    Raises:
        ValueError: another size, or other tiles (load through recsys_edu.distributed.checkpoint, which reshards).
    """
    if source.shape != target.shape:
        raise ValueError(f"{name}: expected {tuple(target.shape)}, got {tuple(source.shape)}")
    if isinstance(source, TiledTensor):
        have = {tile.offsets: tile.tensor for tile in source.tiles}
        if any(have.get(t.offsets) is None or have[t.offsets].shape != t.tensor.shape for t in target.tiles):
            raise ValueError(f"{name}: cut otherwise here ({target}) than in the state dict ({source})")
        for tile in target.tiles:
            tile.tensor.copy_(have[tile.offsets])
        return
    for tile in target.tiles:
        window = tuple(slice(first, first + size) for first, size in zip(tile.offsets, tile.tensor.shape))
        tile.tensor.copy_(source[window])


def _mark_as_trained_in_backward(parameter: nn.Parameter, source: TableSource) -> None:
    """Let `in_backward_optimizer_filter` see that no other optimizer needs to step this parameter."""
    parameter._optimizer_classes, parameter._optimizer_kwargs = map(list, source.marks)
    parameter._in_backward_optimizers = []


@dataclass(frozen=True)
class LocalShard:
    """One of this rank's shards: its rectangle, its live weights, its live optimizer state.

    `settle` makes the weights current, and has to be called before they are read or written: a GPU may cache some.
    """

    shard: Shard
    weight: Tensor
    state: Mapping[str, Tensor]
    settle: Callable[[], None] = lambda: None


def local_shards(rank_kernels: Iterable[RankKernel], kernels: Iterable[Kernel]) -> dict[str, list[LocalShard]]:
    """This rank's shards per table."""
    found: dict[str, list[LocalShard]] = {}
    for ranked, kernel in zip(rank_kernels, kernels):
        # A dense kernel's weights are parameters; those of a fused one are plain memory that it updates itself.
        weights = kernel.weights if ranked.spec.optimizer is None else kernel.table_weights()
        settle = {"settle": kernel.settle} if ranked.spec.memory is TableMemory.HOST_CACHED else {}
        for shard, weight, state in zip(ranked.shards, weights, kernel.optimizer_state()):
            found.setdefault(shard.table, []).append(LocalShard(shard, weight, state, **settle))
    return found


@torch.no_grad()
def _copy_from_rank_0(weight: Tensor, exchange: Exchange) -> None:
    """Make the copies of a table equal at the start, as DDP does; their updates keep them so. Collective.

    Simulated ranks are made one after another and cannot wait for each other: give them a module that has weights.
    """
    if not isinstance(exchange, GroupExchange) or exchange.world_size == 1:
        return
    is_first, others = exchange.rank == 0, [0] * (exchange.world_size - 1)
    send = weight.flatten().repeat(exchange.world_size) if is_first else weight.new_empty(0)
    send_W = [weight.numel() if is_first else 0] * exchange.world_size
    received = exchange.start(send, send_W, [weight.numel(), *others], "first values of copies").wait()
    weight.copy_(received.view_as(weight))


def _table_modules(owner: ShardedTables, local: Mapping[str, list[LocalShard]]) -> nn.ModuleDict:
    """One module with a `weight` per table in config order, its shards filled."""
    modules, replicas = nn.ModuleDict(), owner.replicas.parameters()
    configs = {config.name: config for config in owner.configs}
    for table in owner.layout.tables:
        source, config = owner.sources[table.name], configs[table.name]
        if table.name in replicas:
            whole = Shard(table.name, range(table.num_rows), range(table.num_columns), owner.exchange.rank)
            fill_shard(replicas[table.name], whole, config, source.weight)
            modules[table.name] = nn.Module()
            modules[table.name].register_parameter("weight", replicas[table.name])
            continue
        for piece in local.get(table.name, []):
            fill_shard(piece.weight, piece.shard, config, source.weight)
            if table.everywhere and source.weight is not None:
                _copy_from_rank_0(piece.weight, owner.exchange)
        modules[table.name] = TableShards(table, local.get(table.name, []), source)
    return modules


def fused_tables_optimizer(modules: nn.ModuleDict, prefix: str, kernels: Sequence[Kernel]) -> KeyedOptimizer:
    """The optimizers inside this rank's kernels as one keyed optimizer; keys are `<prefix>.<table>.weight`.

    Every fused table of the module is in it on every rank, so that checkpoints of all ranks have the same keys. Tables
    of one optimizer and its settings share a parameter group, and with it a learning rate.
    """
    fused = {
        name: module
        for name, module in modules.items()
        if isinstance(module, TableShards) and module.table.optimizer is not None
    }
    optimizers = []
    for spec in dict.fromkeys(module.table.optimizer for module in fused.values()):
        mine = {name: module for name, module in fused.items() if module.table.optimizer == spec}
        params = {f"{prefix}.{name}.weight": module.tiled() for name, module in mine.items()}
        states = [{f"{name}.{key}": v for key, v in _tiled_state(module).items()} for name, module in mine.items()]
        rates = LearningRate(tuple(kernel for kernel in kernels if kernel.spec.optimizer == spec))
        optimizers.append(FusedTablesOptimizer(params, states, rates))
        optimizers[-1].param_groups[0]["lr"] = spec.learning_rate  # also on a rank that has no kernel to ask
    if not optimizers:
        return EmptyFusedOptimizer()
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


def _column_cuts(table: ShardedTable) -> tuple[int, ...]:
    """Where columns are cut, ends included; as `TiledTensor.column_cuts` where the cuts change down the table."""
    starts_of_row: dict[int, set[int]] = {}
    for shard in table.shards:
        starts_of_row.setdefault(shard.rows.start, set()).add(shard.columns.start)
    runs: list[tuple[int, tuple[int, ...]]] = []
    for row, starts in sorted(starts_of_row.items()):
        cuts = (*sorted(starts), table.num_columns)
        if not runs or runs[-1][1] != cuts:
            runs.append((row, cuts))
    if len(runs) == 1:
        return runs[0][1]
    return tuple(number for row, cuts in runs for number in (-1 - row, *cuts))


def _tiled_state(module: TableShards) -> dict[str, Tensor]:
    """The table's optimizer state: one value per weight, or per row and column block (row-wise optimizers)."""
    table = module.table
    starts = sorted({shard.columns.start for shard in table.shards})
    state: dict[str, Tensor] = {}
    optimizer = ROW_OPTIMIZERS[table.optimizer.kind]
    for name, per in optimizer.state.items():
        per_row = per == "row"
        size: tuple[int, ...] = (table.num_rows, table.num_columns)
        if per_row:
            size = (table.num_rows,) if len(starts) == 1 else (table.num_rows, len(starts))
        tiles = []
        for piece in module.local:
            values = piece.state[name]
            offsets: tuple[int, ...] = (piece.shard.rows.start, piece.shard.columns.start)
            if per_row and len(starts) == 1:
                offsets = offsets[:1]
            elif per_row:
                values, offsets = values.unsqueeze(1), (offsets[0], starts.index(offsets[1]))
            tiles.append(Tile(offsets, values))
        cuts = _column_cuts(table) if per_row and len(starts) > 1 else ()
        state[name] = TiledTensor(size, tiles, column_cuts=cuts)
    if optimizer.counts_steps:
        # One number, the same wherever the table has a shard; a rank without one must not offer a number of its own.
        steps = [Tile((0,), piece.state["iter"]) for piece in module.local[:1]]
        state["iter"] = TiledTensor((1,), steps, torch.int64)
    return state
