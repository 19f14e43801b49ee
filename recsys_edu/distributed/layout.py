"""The layout of a sharded module: its lanes, worked out once from tables and shards, equal on every rank.

A lane is one (feature, shard) pair: the ids of that feature which that shard must see. Lanes are ordered by
rank, then by kernel, then by table, so what a rank sends to another lies in one piece, and what it receives
falls into one piece per kernel. Nothing here looks at a batch.

Suffixes: L lanes, W ranks, F features, T tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from recsys_edu.distributed.sharding.tiling import Shard, row_cuts
from recsys_edu.kernels.quantized import QuantizedSpec
from recsys_edu.kernels.spec import KernelSpec, OptimizerSpec, TableMemory, TableSpec
from recsys_edu.types import DataType


@dataclass(frozen=True)
class ShardedTable:
    """One embedding table and the rectangles it is cut into.

    `optimizer` None means a dense kernel: weights that get ordinary gradients. `everywhere` marks a data-parallel table
    that trains in backward: each shard is a whole copy, every rank looks up everybody's ids and keeps its own answers.
    `memory` and `cache_share` are a fused kernel's, see KernelSpec.
    """

    name: str
    num_rows: int
    num_columns: int
    features: tuple[str, ...]
    shards: tuple[Shard, ...]
    mean: bool = False
    data_type: DataType = DataType.FP32
    optimizer: OptimizerSpec | None = None
    everywhere: bool = False
    memory: TableMemory = TableMemory.DEVICE
    cache_share: float = 0.2

    @cached_property
    def row_cuts(self) -> tuple[int, ...]:
        """Where the rows are cut, both ends included: (0, R) for a table with whole rows."""
        return tuple(row_cuts(self.shards))

    @property
    def num_row_blocks(self) -> int:
        return len(self.row_cuts) - 1


@dataclass(frozen=True)
class Output:
    """One answer of the module: what `feature` finds in `table`, `num_columns` wide from column `column` on."""

    feature: str
    table: ShardedTable
    column: int


@dataclass(frozen=True)
class Lane:
    """One (feature, shard) pair. `row_block` says which block of the table's rows the shard holds."""

    output: Output
    shard: Shard
    row_block: int
    host: int | None = None
    """Set where the rows of the shard's columns lie on exactly the ranks of one host: they are summed there first."""

    @property
    def rank(self) -> int:
        return self.shard.rank

    @property
    def width(self) -> int:
        return len(self.shard.columns)

    @property
    def returns_alone(self) -> bool:
        """Whether its rank returns what it looked up as it is, to every rank."""
        return self.host is None and not self.output.table.everywhere

    @property
    def first_column(self) -> int:
        """Where the lane's columns lie in the module's whole output row."""
        return self.output.column + self.shard.columns.start


@dataclass(frozen=True)
class Layout:
    """All lanes of one sharded module, derived from its tables alone.

    >>> layout.lanes_W[1]                              # doctest: +SKIP
    (Lane(output=..., shard=Shard('t_user', rows=range(0, 10), columns=range(0, 8), rank=1), row_block=0),)

    Args:
        tables: in config order.
        world_size: W, number of ranks.
        pooled: one row per bag (embedding bags) or one row per id (sequences).
        local_size: ranks per host; 0 when all are on one.
        quantized: the tables are rows of codes that serve, looked up by one kernel per rank whatever their types.
    """

    tables: tuple[ShardedTable, ...]
    world_size: int
    pooled: bool
    local_size: int = 0
    quantized: bool = False

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.local_size if self.local_size else 1

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Features in order of first use."""
        return tuple(dict.fromkeys(feature for table in self.tables for feature in table.features))

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """One per (table, feature) in config order: the order of the answer, whatever the plan."""
        outputs, column = [], 0
        for table in self.tables:
            for feature in table.features:
                outputs.append(Output(feature, table, column))
                column += table.num_columns
        return tuple(outputs)

    @property
    def num_columns(self) -> int:
        return sum(output.table.num_columns for output in self.outputs)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Rank-major; inside a rank kernel by kernel, then those without a host first, then in config order."""
        outputs_of: dict[str, list[Output]] = {table.name: [] for table in self.tables}
        for output in self.outputs:
            outputs_of[output.table.name].append(output)
        lanes = []
        for table in self.tables:
            hosts = self._hosts_of_columns(table)
            for shard in table.shards:  # lanes that read one shard stay side by side: FBGEMM's fused update needs that
                row_block = table.row_cuts.index(shard.rows.start)
                lanes += [Lane(output, shard, row_block, hosts[shard.columns]) for output in outputs_of[table.name]]
        kernels = list(dict.fromkeys(self._kernel_key(lane) for lane in lanes))
        return tuple(
            sorted(lanes, key=lambda lane: (lane.rank, kernels.index(self._kernel_key(lane)), lane.host is not None))
        )

    def _hosts_of_columns(self, table: ShardedTable) -> dict[range, int | None]:
        """For each column block the host on whose ranks, each once, its row blocks lie; None for any other spread."""
        ranks_of: dict[range, list[int]] = {}
        for shard in sorted(table.shards, key=lambda shard: shard.rows.start):
            ranks_of.setdefault(shard.columns, []).append(shard.rank)
        hosts: dict[range, int | None] = dict.fromkeys(ranks_of)
        if self.pooled and self.num_hosts > 1 and self.local_size > 1 and not table.everywhere:
            for columns, ranks in ranks_of.items():
                host = ranks[0] // self.local_size
                if ranks == list(range(host * self.local_size, (host + 1) * self.local_size)):
                    hosts[columns] = host
        return hosts

    @cached_property
    def lanes_W(self) -> tuple[tuple[Lane, ...], ...]:
        """The lanes of each rank."""
        lanes_of_rank: list[list[Lane]] = [[] for _ in range(self.world_size)]
        for lane in self.lanes:
            lanes_of_rank[lane.rank].append(lane)
        return tuple(tuple(lanes) for lanes in lanes_of_rank)

    @cached_property
    def num_lanes_W(self) -> list[int]:
        return [len(lanes) for lanes in self.lanes_W]

    @cached_property
    def width_W(self) -> list[int]:
        """Columns that each rank returns by itself."""
        return [sum(lane.width for lane in lanes if lane.returns_alone) for lanes in self.lanes_W]

    @cached_property
    def width_H(self) -> list[int]:
        """Columns that each host's ranks sum among themselves before they return them."""
        if self.num_hosts == 1:
            return []
        firsts = self.lanes_W[:: self.local_size]
        return [sum(lane.width for lane in lanes if lane.host is not None) for lanes in firsts]

    def kernels_of_rank(self, rank: int) -> list[RankKernel]:
        """What `rank` has to look up: one kernel per weight type, optimizer, memory and, for sequences, width."""
        groups: dict[object, list[Lane]] = {}
        for lane in self.lanes_W[rank]:
            groups.setdefault(self._kernel_key(lane), []).append(lane)
        return [self._rank_kernel(lanes) for lanes in groups.values()]

    def _kernel_key(self, lane: Lane) -> tuple[object, ...]:
        table = lane.output.table
        data_type = None if self.quantized else table.data_type
        kind = (data_type, table.optimizer, table.everywhere, table.memory, table.cache_share)
        return (*kind, None if self.pooled else lane.width)

    def _rank_kernel(self, lanes: list[Lane]) -> RankKernel:
        shards = list(dict.fromkeys(lane.shard for lane in lanes))
        common = {
            "tables": tuple(TableSpec(shard.table, len(shard.rows), len(shard.columns)) for shard in shards),
            "lane_tables": tuple(shards.index(lane.shard) for lane in lanes),
            "pooled": self.pooled,
            "validate_ids": False,  # checked once, before routing, where the error can still name the batch's rank
            "lane_features": tuple(lane.output.feature for lane in lanes),
        }
        if self.quantized:
            type_of = {lane.shard: lane.output.table.data_type for lane in lanes}
            spec = QuantizedSpec(data_types=tuple(type_of[shard] for shard in shards), **common)
        else:
            table = lanes[0].output.table
            where = {"memory": table.memory, "cache_share": table.cache_share}
            spec = KernelSpec(data_type=table.data_type, optimizer=table.optimizer, **where, **common)
        return RankKernel(spec, tuple(shards), tuple(lanes))


@dataclass(frozen=True)
class RankKernel:
    """One table-batched kernel of a rank: what it computes, which shards it holds, which lanes it serves."""

    spec: KernelSpec | QuantizedSpec
    shards: tuple[Shard, ...]
    lanes: tuple[Lane, ...]

    @property
    def everywhere(self) -> bool:
        """Whether its tables have a copy on every rank; all of a kernel's do or none."""
        return self.lanes[0].output.table.everywhere

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of its output that the rank returns by itself, and those that its host sums first."""
        alone = sum(lane.width for lane in self.lanes if lane.host is None)
        return alone, sum(lane.width for lane in self.lanes) - alone
