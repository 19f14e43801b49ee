"""Quantised tables cut over the devices of one process: the engine's plan, routing, exchange and assembly, for serving.

    batch on device 0 --route--> device 0, 1, 2 --lookup--> --assemble--> answer on device 0

Each device is a rank of a simulated world (exchange.py). Only rank 0 has a batch; the others bring an empty one and
look up what is sent to them. A shard of rows is a slice of rows; a shard of columns is the same codes under a copy of
their row's scale and bias. So every number is the unsharded one to the bit, under every plan. On a laptop several CPU
"devices" stand in for GPUs.

Suffixes: W devices, R rows, P bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.exchange import SimulatedWorld
from recsys_edu.distributed.flight import Flight, LaneLookup
from recsys_edu.distributed.layout import Layout, ShardedTable
from recsys_edu.distributed.sharding.tiling import Shard, shards_from, validate
from recsys_edu.distributed.types import ParameterSharding, rank_device
from recsys_edu.kernels.quantized_remap import ArrayRemap
from recsys_edu.kernels.quantized_rows import RowFormat, cut_columns, paste_columns, realign
from recsys_edu.kernels.spec import TableSpec
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import Lanes, check_lane_ids, in_lane_order
from recsys_edu.quant.tables import QuantizedTable
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

HOME = 0
"""The rank whose device holds batches and answers."""


def quantized_layout(
    configs: Sequence[BaseEmbeddingConfig],
    stored: Sequence[TableSpec],
    plan: Mapping[str, ParameterSharding],
    world_size: int,
    pooled: bool,
    lanes: Lanes,
    one_feature_per_lane: bool,
) -> Layout:
    """The lanes of a quantised collection under a plan.

    Args:
        configs: of the quantised collection.
        stored: the rows each table really has, after pruning.
        plan: ParameterSharding per table. Data-parallel tables are put on device 0, where the batch is.
        one_feature_per_lane: features are named after lanes, because ids differ between tables (they were remapped).

    Raises:
        ValueError: tables without a plan or plans without a table; a tiling with gaps, overlaps or absent ranks.
    """
    names = [config.name for config in configs]
    unplanned, unknown = [n for n in names if n not in plan], [n for n in plan if n not in names]
    if unplanned or unknown:
        raise ValueError(
            f"the plan and the module disagree: tables without a plan {unplanned}, plans without a table {unknown}"
        )
    tables = []
    for index, (config, table) in enumerate(zip(configs, stored)):
        rows, columns = table.num_rows, table.dim
        shards = shards_from(config.name, plan[config.name], rows, columns)
        shards = shards or [Shard(config.name, range(rows), range(columns), HOME)]
        validate(shards, rows, columns, world_size, config.name)
        mine = [name for name, owner in zip(lanes.names, lanes.tables) if owner == index]
        tables.append(
            ShardedTable(
                name=config.name,
                num_rows=rows,
                num_columns=columns,
                features=tuple(mine if one_feature_per_lane else config.feature_names),
                shards=tuple(shard for shard in shards if not shard.is_empty),
                mean=getattr(config, "pooling", PoolingType.NONE) is PoolingType.MEAN,
                data_type=config.data_type,
            )
        )
    return Layout(tuple(tables), world_size, pooled, local_size=world_size, quantized=True)


class QuantizedShards(nn.Module):
    """The shards of all devices, and the phases of a lookup over all of them.

    One forward at a time: two threads must not share it. Moving the model (`.to`, `.half`) leaves the shards where the
    plan put them.

    Args:
        layout: the lanes.
        devices: one per rank; the same one may appear several times.
        weighted: features carry per-sample weights.
    """

    def __init__(self, layout: Layout, devices: Sequence[torch.device], weighted: bool = False) -> None:
        super().__init__()
        self.layout, self.devices, self.weighted = layout, tuple(devices), weighted
        world = SimulatedWorld(layout.world_size)
        self.ends = [
            LaneLookup(layout, world.exchange(rank), device, weighted) for rank, device in enumerate(self.devices)
        ]
        self.kernels = nn.ModuleList(kernel for end in self.ends for kernel in end.kernels)
        self._formats = [RowFormat(table.data_type, table.num_columns) for table in layout.tables]
        self._empty = [_no_examples(layout.features, device, weighted) for device in self.devices]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return self

    def places(self, table: int) -> list[tuple[Shard, Any, int]]:
        """Where a table's shards are: each with its kernel and its index there."""
        name = self.layout.tables[table].name
        return [
            (shard, kernel, index)
            for end in self.ends
            for ranked, kernel in zip(end.rank_kernels, end.kernels)
            for index, shard in enumerate(ranked.shards)
            if shard.table == name
        ]

    def rows_of(self, table: int) -> Tensor:
        """The whole table, put together on device 0: [R, P] uint8, without padding."""
        form, num_rows = self._formats[table], self.layout.tables[table].num_rows
        rows_RP = torch.zeros(num_rows, form.num_bytes, dtype=torch.uint8, device=self.devices[HOME])
        for shard, kernel, index in self.places(table):
            part = kernel.rows_of(index).to(rows_RP.device)
            paste_columns(rows_RP[shard.rows.start : shard.rows.stop], form, shard.columns, part)
        return rows_RP

    def assign(self, table: int, rows_RP: Tensor) -> None:
        """Cut whole rows into the table's shards.

        Raises:
            ValueError: another number of rows, or rows too short for the table's type.
        """
        form, name, num_rows = self._formats[table], self.layout.tables[table].name, self.layout.tables[table].num_rows
        if rows_RP.shape[0] != num_rows:
            raise ValueError(f"table {name!r} has {num_rows} rows, got {rows_RP.shape[0]}")
        rows_RP = realign(rows_RP, form)
        for shard, kernel, index in self.places(table):
            part = cut_columns(rows_RP[shard.rows.start : shard.rows.stop], form, shard.columns)
            kernel.assign(index, part.to(kernel.rows.device))

    def fly(self, batch: KeyedJaggedTensor, answer: Callable[[int, LaneLookup, Flight], None]) -> list[Flight]:
        """Every phase but the last on every device, phase by phase; `answer` starts to return what one looked up."""
        batches = [batch, *self._empty[1:]]
        try:
            flights = [end.start_input(own) for end, own in zip(self.ends, batches)]
            for end, flight in zip(self.ends, flights):
                end.exchange_input(flight)
            for rank, (end, flight) in enumerate(zip(self.ends, flights)):
                end.lookup(flight)
                answer(rank, end, flight)
        except Exception:
            self._reconnect()  # messages of the flight that broke off must not reach the next one
            raise
        return flights

    def _reconnect(self) -> None:
        world = SimulatedWorld(self.layout.world_size)
        for rank, end in enumerate(self.ends):
            end.exchange = world.exchange(rank)

    def memory_bytes_W(self) -> list[int]:
        """Bytes of rows on each rank."""
        return [sum(kernel.memory_bytes()["weights"] for kernel in end.kernels) for end in self.ends]

    def extra_repr(self) -> str:
        return f"{len(self.devices)} devices, bytes per device {self.memory_bytes_W()}"


def devices_of_world(world_size: int, device: torch.device | None) -> list[torch.device]:
    """The device of every rank: cuda:0, cuda:1, ... or the CPU, which stands in for as many as one likes."""
    return [rank_device(device.type if device is not None else "cpu", rank) for rank in range(world_size)]


def named_tables(
    shards: QuantizedShards,
    configs: Sequence[BaseEmbeddingConfig],
    remappings: Mapping[str, Tensor],
    unsharded: nn.ModuleDict,
    device: torch.device,
) -> nn.ModuleDict:
    """One module per table that shows the shards' rows under the unsharded name, filled from the unsharded tables.

    On meta there is nothing to fill from.
    """
    tables = nn.ModuleDict()
    for index, config in enumerate(configs):
        remapping = remappings.get(config.name)
        tables[config.name] = QuantizedTable(config, shards, index, remapping, shards.devices[HOME])
        if device.type != "meta":
            tables[config.name].fill(unsharded[config.name].weight)
    return tables


def stored_sizes(module: nn.Module, wanted: Sequence[str] | None) -> dict[str, Tensor]:
    """Table to a tensor of its rows and columns on meta, for plans; `_data_type` says how its numbers are stored.

    Raises:
        ValueError: a wanted table that the module does not have.
    """
    sizes, spec = {}, module.kernel.spec
    for table, data_type in zip(spec.tables, spec.data_types):
        sizes[table.name] = torch.empty(table.num_rows, table.dim, dtype=torch.uint8, device="meta")
        sizes[table.name]._data_type = data_type  # the planner's workload.weight_bytes reads it
    unknown = sorted(set(wanted or []) - set(sizes))
    if unknown:
        raise ValueError(f"shardable_params {unknown}: the module's tables are {sorted(sizes)}")
    return {name: size for name, size in sizes.items() if wanted is None or name in wanted}


def in_stored_ids(features: KeyedJaggedTensor, lanes: Lanes, remap: ArrayRemap | None) -> KeyedJaggedTensor:
    """The batch as the shards know it: as it is, or, for remapped tables, one feature per lane with new ids."""
    if remap is None:
        return features
    features = in_lane_order(features, lanes.features)
    check_lane_ids(features, lanes)
    starts = torch.tensor(features.offset_per_key(), device=features.device())
    variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        list(lanes.names),
        remap(features.values(), starts),
        features.weights_or_none(),
        lengths=features.lengths(),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
    )


def _no_examples(features: Sequence[str], device: torch.device, weighted: bool) -> KeyedJaggedTensor:
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    weights = nothing.float() if weighted else None
    return KeyedJaggedTensor(list(features), nothing, weights, lengths=nothing, stride=0)
