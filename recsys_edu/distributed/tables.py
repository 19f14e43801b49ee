"""The tables of a sharded module: configs and a plan, put together and checked.

A table is *sharded*, its rectangles spread over ranks; or *replicated* (data-parallel), a whole copy on every rank,
whose gradients DDP averages; or, where a data-parallel table has an optimizer attached to train in backward,
*everywhere*: a whole copy on every rank, each updated by the ids and gradients of all ranks. That moves touched rows
only, where DDP moves whole tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.layout import Layout, Output, ShardedTable
from recsys_edu.distributed.sharding.tiling import Shard, shards_from, validate
from recsys_edu.distributed.types import ParameterSharding
from recsys_edu.kernels.fbgemm import why_not_host_memory
from recsys_edu.kernels.spec import KernelSpec, OptimizerSpec, TableMemory, TableSpec
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from recsys_edu.optim.fused_spec import optimizer_spec
from recsys_edu.types import DataType

DEFAULT_OPTIMIZER = OptimizerSpec("SGD", learning_rate=0.01)
"""What trains a fused table that was given no optimizer, as in TorchRec."""

KERNEL_OF_MEMORY = {
    TableMemory.DEVICE: EmbeddingComputeKernel.FUSED.value,
    TableMemory.HOST: EmbeddingComputeKernel.FUSED_UVM.value,
    TableMemory.HOST_CACHED: EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
}
"""The plan's name of a fused kernel by where its weights lie."""
MEMORY_OF_KERNEL = {kernel: memory for memory, kernel in KERNEL_OF_MEMORY.items()}

_FUSED_KINDS = {"EXACT_SGD": "SGD", "EXACT_ADAGRAD": "ADAGRAD", "EXACT_ROWWISE_ADAGRAD": "ROWWISE_ADAGRAD"}


def fused_params_spec(fused_params: Mapping[str, Any]) -> OptimizerSpec:
    """The update that a sharder's `fused_params` ask for; settings that are not the optimizer's are left alone.

    >>> from recsys_edu.distributed.embedding_types import OptimType
    >>> fused_params_spec({"optimizer": OptimType.SGD, "learning_rate": 0.1}).learning_rate
    0.1
    """
    name = getattr(fused_params.get("optimizer"), "name", None) or "EXACT_SGD"  # an OptimType, or FBGEMM's enum
    settings = {key: value for key, value in fused_params.items() if key in OptimizerSpec.__dataclass_fields__}
    return OptimizerSpec(_FUSED_KINDS.get(name, name), **settings)


@dataclass(frozen=True)
class TableSource:
    """What a sharded table starts from.

    `weight` may be on meta: then its shards are initialised by the config. None leaves them for the caller to fill.
    `marks` are the optimizer classes and arguments attached to the parameter, handed on to the shards' parameters.
    """

    weight: Tensor | None
    optimizer: OptimizerSpec
    marks: tuple[list[type], list[dict[str, Any]]] = ((), ())


def table_source(parameter: nn.Parameter, fused_params: Mapping[str, Any] | None, table: str) -> TableSource:
    """From the unsharded table: its optimizer is the one attached to it, else the sharder's, else the default.

    Raises:
        ValueError: several optimizers are attached, and a fused kernel applies one; or one that no kernel fuses.
    """
    classes, kwargs = getattr(parameter, "_optimizer_classes", []), getattr(parameter, "_optimizer_kwargs", [])
    if len(classes) > 1:
        names = ", ".join(cls.__name__ for cls in classes)
        raise ValueError(f"table {table!r} has {len(classes)} optimizers in backward ({names}); a fused kernel has one")
    try:
        spec = optimizer_spec(classes[0], kwargs[0]) if classes else None
    except ValueError as error:
        raise ValueError(f"table {table!r}: {error}") from error
    spec = spec or (fused_params_spec(fused_params) if fused_params else DEFAULT_OPTIMIZER)
    return TableSource(parameter, spec, (list(classes), list(kwargs)))


@dataclass(frozen=True)
class Tables:
    """The tables of one sharded module: the layout of the sharded ones, and the replicated ones beside it."""

    layout: Layout
    replicated: tuple[str, ...]
    configs: Mapping[str, BaseEmbeddingConfig]

    @property
    def local_outputs(self) -> list[Output]:
        """The outputs that this rank's own copies give, in config order."""
        return [o for o in self.layout.outputs if o.table.everywhere or o.table.name in self.replicated]

    @property
    def local_columns(self) -> tuple[slice, ...]:
        """Where their columns lie in the answer."""
        return tuple(slice(o.column, o.column + o.table.num_columns) for o in self.local_outputs)

    def replica_outputs(self) -> list[Output]:
        """The outputs that replicated tables give, in config order."""
        return [output for output in self.layout.outputs if output.table.name in self.replicated]

    def replica_specs(self) -> dict[DataType, KernelSpec]:
        """One dense kernel per weight type for the replicated tables, its lanes in config order."""
        specs = {}
        tables = [table for table in self.layout.tables if table.name in self.replicated]
        for data_type in dict.fromkeys(table.data_type for table in tables):
            mine = [table for table in tables if table.data_type is data_type]
            outputs = [output for output in self.replica_outputs() if output.table in mine]
            specs[data_type] = KernelSpec(
                tables=tuple(TableSpec(table.name, table.num_rows, table.num_columns) for table in mine),
                lane_tables=tuple(mine.index(output.table) for output in outputs),
                pooled=self.layout.pooled,
                data_type=data_type,
                validate_ids=False,
                lane_features=tuple(output.feature for output in outputs),
            )
        return specs


def plan_tables(
    configs: Sequence[BaseEmbeddingConfig],
    sources: Mapping[str, TableSource],
    plan: Mapping[str, ParameterSharding],
    world_size: int,
    local_size: int | None = None,
) -> Tables:
    """Put configs and plan together and check that every table is tiled exactly.

    Args:
        configs: tables in order.
        sources: per table; only the optimizer is read.
        plan: ParameterSharding per table.
        world_size: number of ranks.
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
        everywhere = not shards and bool(sources[config.name].marks[0])
        if shards:
            validate(shards, rows, columns, world_size, config.name)
        elif everywhere:
            shards = [Shard(config.name, range(rows), range(columns), rank) for rank in range(world_size)]
        else:
            replicated.append(config.name)
        fused = everywhere or (shards and plan[config.name].compute_kernel != EmbeddingComputeKernel.DENSE.value)
        optimizer = sources[config.name].optimizer if fused else None
        memory, cache = MEMORY_OF_KERNEL.get(plan[config.name].compute_kernel), plan[config.name].cache_params
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
                everywhere=everywhere,
                memory=memory or TableMemory.DEVICE,
                **({} if cache is None or cache.load_factor is None else {"cache_share": cache.load_factor}),
            )
        )
    pooled = all(hasattr(config, "pooling") for config in configs)
    layout = Layout(tuple(tables), world_size, pooled, local_size or get_local_size(world_size))
    return Tables(layout, tuple(replicated), {c.name: c for c in configs})


def check_memory(layout: Layout, device: torch.device) -> None:
    """Every table that its plan leaves in host memory can be looked up from there; every rank finds the same.

    Raises:
        ValueError: naming the first table that cannot, its kernel, why, and what to plan instead.
    """
    for table in layout.tables:
        if table.memory is TableMemory.DEVICE or device.type == "meta":
            continue
        shape = TableSpec(table.name, table.num_rows, table.num_columns)
        settings = {"data_type": table.data_type, "optimizer": table.optimizer, "cache_share": table.cache_share}
        spec = KernelSpec((shape,), tuple(0 for _ in table.features), layout.pooled, memory=table.memory, **settings)
        reason = why_not_host_memory(spec, device)
        if reason is not None:
            raise ValueError(
                f"table {table.name!r}: the plan's kernel {KERNEL_OF_MEMORY[table.memory]!r} keeps its weights in host "
                f"memory for a GPU to read: {reason}. Plan it with 'fused' or 'dense', or for the device "
                "that is here"
            )
