"""Tables and their shards: from configs and a plan to a layout, from weights to shards, from shards to parameters.

What pooled and sequence collections have in common besides the lookup itself. A table of a sharded module is one of
two kinds: *sharded*, its rectangles spread over ranks and trained inside backward by its kernel, or *replicated*
(data-parallel), a whole copy on every rank whose gradients DDP averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.layout import Layout, RankKernel, ShardedTable
from recsys_edu.distributed.sharding.tiling import Shard, shards_from, validate
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor
from recsys_edu.distributed.types import ParameterSharding
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS
from recsys_edu.kernels.spec import Kernel, KernelSpec, OptimizerSpec, TableSpec, weight_dtype
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from recsys_edu.modules.fused_embedding_modules import FusedTablesOptimizer, LearningRate
from recsys_edu.optim.fused import EmptyFusedOptimizer
from recsys_edu.optim.fused_spec import optimizer_spec
from recsys_edu.optim.keyed import KeyedOptimizer

DEFAULT_OPTIMIZER = OptimizerSpec("SGD", learning_rate=0.01)
"""What trains a fused table that was given no optimizer, as in TorchRec."""

_FUSED_KINDS = {"EXACT_SGD": "SGD", "EXACT_ADAGRAD": "ADAGRAD", "EXACT_ROWWISE_ADAGRAD": "ROWWISE_ADAGRAD"}


def fused_params_spec(fused_params: Mapping[str, Any]) -> OptimizerSpec:
    """The update that a sharder's `fused_params` ask for; settings that are not the optimizer's are left alone.

        >>> from recsys_edu.distributed.comm import get_local_size
    from recsys_edu.distributed.embedding_types import OptimType
        >>> fused_params_spec({"optimizer": OptimType.SGD, "learning_rate": 0.1}).learning_rate
        0.1
    """
    name = getattr(fused_params.get("optimizer"), "name", None) or "EXACT_SGD"  # an OptimType, or FBGEMM's enum
    settings = {key: value for key, value in fused_params.items() if key in OptimizerSpec.__dataclass_fields__}
    return OptimizerSpec(_FUSED_KINDS.get(name, name), **settings)


def table_optimizer(parameter: nn.Parameter, fused_params: Mapping[str, Any] | None, table: str) -> OptimizerSpec:
    """The optimizer of one table: attached to its parameter, else the sharder's, else the default.

    Raises:
        ValueError: several optimizers are attached; a fused kernel applies one.
    """
    classes = getattr(parameter, "_optimizer_classes", [])
    if len(classes) > 1:
        names = ", ".join(cls.__name__ for cls in classes)
        raise ValueError(f"table {table!r} has {len(classes)} optimizers in backward ({names}); a fused kernel has one")
    if classes:
        try:
            return optimizer_spec(classes[0], parameter._optimizer_kwargs[0])
        except ValueError as error:
            raise ValueError(f"table {table!r}: {error}") from error
    return fused_params_spec(fused_params) if fused_params else DEFAULT_OPTIMIZER


@dataclass(frozen=True)
class Tables:
    """The tables of one sharded module: the layout of the sharded ones, and the replicated ones beside it."""

    layout: Layout
    replicated: tuple[str, ...]
    configs: Mapping[str, BaseEmbeddingConfig]

    @property
    def local_columns(self) -> tuple[slice, ...]:
        """Where the replicated tables' columns lie in the output."""
        return tuple(
            slice(output.column, output.column + output.table.num_columns)
            for output in self.layout.outputs
            if output.table.name in self.replicated
        )

    def replica_spec(self) -> KernelSpec:
        """One dense kernel for all replicated tables, its lanes in config order."""
        outputs = [output for output in self.layout.outputs if output.table.name in self.replicated]
        names = list(self.replicated)
        sizes = {table.name: table for table in self.layout.tables}
        return KernelSpec(
            tables=tuple(TableSpec(name, sizes[name].num_rows, sizes[name].num_columns) for name in names),
            lane_tables=tuple(names.index(output.table.name) for output in outputs),
            pooled=self.layout.pooled,
            data_type=sizes[names[0]].data_type,
            validate_ids=False,
            lane_features=tuple(output.feature for output in outputs),
        )


def plan_tables(
    configs: Sequence[BaseEmbeddingConfig],
    parameters: Mapping[str, nn.Parameter],
    plan: Mapping[str, ParameterSharding],
    world_size: int,
    fused_params: Mapping[str, Any] | None = None,
    local_size: int | None = None,
) -> Tables:
    """Put configs and plan together and check that every table is tiled exactly.

    Args:
        configs: tables in order.
        parameters: weight per table; only the attached optimizer is read.
        plan: ParameterSharding per table.
        world_size: number of ranks.
        fused_params: the sharder's defaults for tables without an attached optimizer.
        local_size: ranks per host; default: from the environment.

    Raises:
        ValueError: a table without a plan or a plan without a table; a tiling with gaps, overlaps or absent ranks.
    """
    names = [config.name for config in configs]
    unplanned, unknown = [n for n in names if n not in plan], [n for n in plan if n not in names]
    if unplanned or unknown:
        raise ValueError(
            f"the plan and the module disagree: tables without a plan {unplanned}, plans without a table {unknown}"
        )
    tables, replicated = [], []
    for config in configs:
        rows, columns = config.num_embeddings, config.embedding_dim
        shards = shards_from(config.name, plan[config.name], rows, columns)
        if shards:
            validate(shards, rows, columns, world_size, config.name)
        else:
            replicated.append(config.name)
        fused = shards and plan[config.name].compute_kernel != EmbeddingComputeKernel.DENSE.value
        optimizer = table_optimizer(parameters[config.name], fused_params, config.name) if fused else None
        tables.append(
            ShardedTable(
                name=config.name,
                num_rows=rows,
                num_columns=columns,
                features=tuple(config.feature_names),
                shards=tuple(shard for shard in shards if not shard.is_empty),
                mean=getattr(config, "pooling", PoolingType.NONE) is PoolingType.MEAN,
                data_type=config.data_type,
                optimizer=optimizer,
            )
        )
    pooled = all(hasattr(config, "pooling") for config in configs)
    layout = Layout(tuple(tables), world_size, pooled, local_size or get_local_size(world_size))
    return Tables(layout, tuple(replicated), {c.name: c for c in configs})


def fill_shard(weight: Tensor, shard: Shard, config: BaseEmbeddingConfig, source: Tensor | None) -> None:
    """Give one shard its first values: a rectangle of `source`, or, without one, the config's initialisation.

    The initialisation sees only the shard, never the whole table, so a table may be larger than any one memory.
    """
    with torch.no_grad():
        if source is not None and source.device.type != "meta":
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

    def __init__(self, table: ShardedTable, local: Sequence[LocalShard], attributes_of: nn.Parameter) -> None:
        super().__init__()
        self.table, self.local = table, tuple(local)
        for index, shard in enumerate(local):
            parameter = shard.weight if isinstance(shard.weight, nn.Parameter) else nn.Parameter(shard.weight)
            if table.optimizer is not None:
                _mark_as_trained_in_backward(parameter, attributes_of)
            self.register_parameter(f"weight_{index}" if index else "weight", parameter)

    def tiled(self) -> TiledTensor:
        """The whole table as this rank knows it."""
        tiles = [Tile((s.shard.rows.start, s.shard.columns.start), s.weight.detach()) for s in self.local]
        return TiledTensor((self.table.num_rows, self.table.num_columns), tiles, weight_dtype(self.table.data_type))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.tiled()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        try:
            copy_tiles(self.tiled(), state_dict[key], key)
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


def _mark_as_trained_in_backward(parameter: nn.Parameter, attributes_of: nn.Parameter) -> None:
    """Let `in_backward_optimizer_filter` see that no other optimizer needs to step this parameter."""
    parameter._optimizer_classes = list(getattr(attributes_of, "_optimizer_classes", []))
    parameter._optimizer_kwargs = list(getattr(attributes_of, "_optimizer_kwargs", []))
    parameter._in_backward_optimizers = []


@dataclass(frozen=True)
class LocalShard:
    """One of this rank's shards: its rectangle, its live weights, its live optimizer state."""

    shard: Shard
    weight: Tensor
    state: Mapping[str, Tensor]


def local_shards(rank_kernels: Iterable[RankKernel], kernels: Iterable[Kernel]) -> dict[str, list[LocalShard]]:
    """This rank's shards per table."""
    found: dict[str, list[LocalShard]] = {}
    for ranked, kernel in zip(rank_kernels, kernels):
        # A dense kernel's weights are parameters; those of a fused one are plain memory that it updates itself.
        weights = kernel.weights if ranked.spec.optimizer is None else kernel.table_weights()
        for shard, weight, state in zip(ranked.shards, weights, kernel.optimizer_state()):
            found.setdefault(shard.table, []).append(LocalShard(shard, weight, state))
    return found


def table_modules(
    tables: Tables,
    local: Mapping[str, list[LocalShard]],
    replicas: Mapping[str, nn.Parameter],
    sources: Mapping[str, nn.Parameter],
) -> nn.ModuleDict:
    """One module with a `weight` per table in config order, filled from `sources`, or freshly where those are meta."""
    modules = nn.ModuleDict()
    for table in tables.layout.tables:
        config, source = tables.configs[table.name], sources[table.name]
        if table.name in replicas:
            modules[table.name] = nn.Module()
            modules[table.name].register_parameter("weight", replicas[table.name])
            whole = Shard(table.name, range(table.num_rows), range(table.num_columns), 0)
            fill_shard(replicas[table.name], whole, config, source)
            continue
        for piece in local.get(table.name, []):
            fill_shard(piece.weight, piece.shard, config, source)
        modules[table.name] = TableShards(table, local.get(table.name, []), source)
    return modules


def fused_tables_optimizer(modules: nn.ModuleDict, prefix: str, kernels: Sequence[Kernel]) -> KeyedOptimizer:
    """The optimizers inside this rank's kernels as one keyed optimizer; keys are `<prefix>.<table>.weight`.

    Every fused table of the module is in it on every rank, so that checkpoints of all ranks have the same keys.
    """
    params: dict[str, Tensor] = {}
    states: list[dict[str, Any]] = []
    for name, module in modules.items():
        if isinstance(module, TableShards) and module.table.optimizer is not None:
            params[f"{prefix}.{name}.weight"] = module.tiled()
            states.append({f"{name}.{key}": value for key, value in _tiled_state(module).items()})
    if not params:
        return EmptyFusedOptimizer()
    fused = tuple(kernel for kernel in kernels if kernel.spec.optimizer is not None)
    return FusedTablesOptimizer(params, states, LearningRate(fused))


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
        cuts = (*starts, table.num_columns) if per_row and len(starts) > 1 else ()
        state[name] = TiledTensor(size, tiles, column_cuts=cuts)
    if optimizer.counts_steps:
        # One number, the same wherever the table has a shard; a rank without one must not offer a number of its own.
        steps = [Tile((0,), piece.state["iter"]) for piece in module.local[:1]]
        state["iter"] = TiledTensor((1,), steps, torch.int64)
    return state
