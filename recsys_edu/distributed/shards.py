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

from recsys_edu.distributed.layout import Layout, RankKernel, ShardedTable
from recsys_edu.distributed.sharding.tiling import Shard, shards_from, validate
from recsys_edu.distributed.types import ParameterSharding
from recsys_edu.kernels.spec import Kernel, KernelSpec, OptimizerSpec, TableSpec
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, PoolingType

DEFAULT_OPTIMIZER = OptimizerSpec("SGD", learning_rate=0.01)
"""What trains a fused table that was given no optimizer, as in TorchRec."""

# torch.optim's and TorchRec's optimizer classes, by name, as the kernels call them.
_KINDS = {
    "SGD": "SGD",
    "Adagrad": "ADAGRAD",
    "RowWiseAdagrad": "ROWWISE_ADAGRAD",
    "Adam": "ADAM",
    "AdamW": "ADAM",
    "PartialRowWiseAdam": "PARTIAL_ROWWISE_ADAM",
    "LAMB": "LAMB",
    "LarsSGD": "LARS_SGD",
}
_FUSED_KINDS = {"EXACT_SGD": "SGD", "EXACT_ADAGRAD": "ADAGRAD", "EXACT_ROWWISE_ADAGRAD": "ROWWISE_ADAGRAD"}
_RENAMED = {"lr": "learning_rate"}


def optimizer_spec(optimizer_class: type, kwargs: Mapping[str, Any], table: str = "?") -> OptimizerSpec:
    """The fused update that an optimizer class and its arguments ask for.

    >>> optimizer_spec(torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.99)}).beta1
    0.8

    Raises:
        ValueError: no kernel fuses this class, or one of its arguments.
    """
    kind = _KINDS.get(optimizer_class.__name__)
    if kind is None:
        raise ValueError(
            f"table {table!r}: no kernel fuses {optimizer_class.__name__}; use one of {', '.join(sorted(_KINDS))}"
        )
    defaults = {"Adagrad": {"eps": 1e-10}, "RowWiseAdagrad": {"eps": 1e-10}, "AdamW": {"weight_decay": 0.01}}
    return _spec(kind, {**defaults.get(optimizer_class.__name__, {}), **kwargs}, table)


def fused_params_spec(fused_params: Mapping[str, Any], table: str = "?") -> OptimizerSpec:
    """The same from a sharder's `fused_params`, e.g. `{"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1}`."""
    settings = dict(fused_params)
    name = getattr(settings.pop("optimizer", None), "name", None) or "EXACT_SGD"
    kind = _FUSED_KINDS.get(name, name)
    known = {key: value for key, value in settings.items() if key in OptimizerSpec.__dataclass_fields__ or key == "lr"}
    return _spec(kind, known, table)


def _spec(kind: str, kwargs: Mapping[str, Any], table: str) -> OptimizerSpec:
    settings = {_RENAMED.get(key, key): value for key, value in kwargs.items() if value is not None}
    if "betas" in settings:
        settings["beta1"], settings["beta2"] = settings.pop("betas")
    unknown = [key for key, value in settings.items() if key not in OptimizerSpec.__dataclass_fields__ and value]
    if unknown:
        raise ValueError(f"table {table!r}: the fused {kind} has no argument {unknown[0]!r} (given {kwargs})")
    return OptimizerSpec(kind, **{k: v for k, v in settings.items() if k in OptimizerSpec.__dataclass_fields__})


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
        return optimizer_spec(classes[0], parameter._optimizer_kwargs[0], table)
    return fused_params_spec(fused_params, table) if fused_params else DEFAULT_OPTIMIZER


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
) -> Tables:
    """Put configs and plan together and check that every table is tiled exactly.

    Args:
        configs: tables in order.
        parameters: weight per table; only the attached optimizer is read.
        plan: ParameterSharding per table.
        world_size: number of ranks.
        fused_params: the sharder's defaults for tables without an attached optimizer.

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
        optimizer = table_optimizer(parameters[config.name], fused_params, config.name) if shards else None
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
    return Tables(Layout(tuple(tables), world_size, pooled), tuple(replicated), {c.name: c for c in configs})


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
    """What this rank holds of one table, under the unsharded module's parameter name, `weight`.

    A rank with several shards of a table (a custom tiling) calls the further ones `weight_1`, `weight_2`, ...; a rank
    with none has no parameter. The state dict has one entry per table on every rank, of the table's whole size.
    """

    def __init__(self, table: ShardedTable, local: Sequence[tuple[Shard, Tensor]], attributes_of: nn.Parameter) -> None:
        super().__init__()
        self.table = table
        self.shards = tuple(shard for shard, _ in local)
        for index, (_, weight) in enumerate(local):
            parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
            if table.shards:
                _mark_as_trained_in_backward(parameter, attributes_of)
            self.register_parameter(f"weight_{index}" if index else "weight", parameter)

    def local_weights(self) -> list[tuple[Shard, Tensor]]:
        """This rank's shards and their live weights."""
        return list(zip(self.shards, (parameter.detach() for parameter in self.parameters())))


def _mark_as_trained_in_backward(parameter: nn.Parameter, attributes_of: nn.Parameter) -> None:
    """Let `in_backward_optimizer_filter` see that no other optimizer needs to step this parameter."""
    parameter._optimizer_classes = list(getattr(attributes_of, "_optimizer_classes", []))
    parameter._optimizer_kwargs = list(getattr(attributes_of, "_optimizer_kwargs", []))
    parameter._in_backward_optimizers = []


def local_shards(
    rank_kernels: Iterable[RankKernel], kernels: Iterable[Kernel]
) -> dict[str, list[tuple[Shard, Tensor]]]:
    """Per table this rank's shards and their live weights."""
    found: dict[str, list[tuple[Shard, Tensor]]] = {}
    for ranked, kernel in zip(rank_kernels, kernels):
        for shard, weight in zip(ranked.shards, kernel.table_weights()):
            found.setdefault(shard.table, []).append((shard, weight))
    return found


def table_modules(
    tables: Tables, local: Mapping[str, list[tuple[Shard, Tensor]]], sources: Mapping[str, nn.Parameter]
) -> nn.ModuleDict:
    """One `TableShards` per table in config order, filled from `sources`, or freshly where those are meta."""
    modules = nn.ModuleDict()
    for table in tables.layout.tables:
        shards = local.get(table.name, [])
        for shard, weight in shards:
            fill_shard(weight, shard, tables.configs[table.name], sources[table.name])
        modules[table.name] = TableShards(table, shards, sources[table.name])
    return modules
