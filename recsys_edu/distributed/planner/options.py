"""Every way to shard every table, as one grid: tables down, (sharding type, kernel) across, all costs worked out.

                 table_wise/fused   row_wise/fused   data_parallel/dense   ...
      user       1 shard, 12 ms     W shards, 4 ms   -                            "-": not possible, with the reason
      item       -                  W shards, 9 ms   -

An option is `count` equal rectangles (the last row block may be shorter) and a rule where they may lie:

    UNIFORM      one on each of the table's ranks           row_wise, data_parallel
    DEVICE       each on any rank                           table_wise, column_wise
    HOST         each on any rank of one host               table_column_wise
    HOST_ROWS    in blocks of one per rank of a host        table_row_wise, grid_shard

Suffixes: T tables, J (type, kernel) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from recsys_edu.distributed.embedding_types import HOST_MEMORY_KERNELS, EmbeddingComputeKernel
from recsys_edu.distributed.planner.constants import kernel_bw_lookup
from recsys_edu.distributed.planner.cost import (
    COUNTED,
    Array,
    Machine,
    Pattern,
    Rectangles,
    storage_bytes,
    times_ms,
)
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.distributed.planner.utils import show_bytes
from recsys_edu.distributed.planner.workload import Table, Workload
from recsys_edu.distributed.sharding.row_wise import row_blocks
from recsys_edu.distributed.sharding_plan import column_block_width
from recsys_edu.distributed.types import PipelineType, ShardingType

CACHED_KERNELS = frozenset(
    {EmbeddingComputeKernel.FUSED_UVM_CACHING.value, EmbeddingComputeKernel.QUANT_UVM_CACHING.value}
)


class Place(IntEnum):
    """Where the rectangles of an option may lie; see the top of this file."""

    UNIFORM = 0
    DEVICE = 1
    HOST = 2
    HOST_ROWS = 3


@dataclass(frozen=True)
class Kind:
    """What a sharding type means: where its rectangles lie, how answers come back, along which axes it cuts."""

    place: Place
    pattern: Pattern
    cuts_columns: bool = False


KINDS: Mapping[str, Kind] = {
    ShardingType.DATA_PARALLEL.value: Kind(Place.UNIFORM, Pattern.REPLICA),
    ShardingType.TABLE_WISE.value: Kind(Place.DEVICE, Pattern.WHOLE_ROWS),
    ShardingType.COLUMN_WISE.value: Kind(Place.DEVICE, Pattern.WHOLE_ROWS, cuts_columns=True),
    ShardingType.TABLE_COLUMN_WISE.value: Kind(Place.HOST, Pattern.WHOLE_ROWS, cuts_columns=True),
    ShardingType.ROW_WISE.value: Kind(Place.UNIFORM, Pattern.ROWS_EVERYWHERE),
    ShardingType.TABLE_ROW_WISE.value: Kind(Place.HOST_ROWS, Pattern.ROWS_ON_HOST),
    ShardingType.GRID_SHARD.value: Kind(Place.HOST_ROWS, Pattern.ROWS_ON_HOST, cuts_columns=True),
}


_UNCUT = {
    ShardingType.COLUMN_WISE.value: ShardingType.TABLE_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value: ShardingType.TABLE_WISE.value,
    ShardingType.GRID_SHARD.value: ShardingType.TABLE_ROW_WISE.value,
}
_ONE_ROW_BLOCK = {
    ShardingType.ROW_WISE.value: ShardingType.TABLE_WISE.value,
    ShardingType.TABLE_ROW_WISE.value: ShardingType.TABLE_WISE.value,
    ShardingType.GRID_SHARD.value: ShardingType.COLUMN_WISE.value,
}
_ON_ONE_HOST = {
    ShardingType.TABLE_COLUMN_WISE.value: ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value: ShardingType.ROW_WISE.value,
}


@dataclass(frozen=True)
class OptionGrid:
    """All options with their costs, per rectangle.

    Args:
        pairs: the (sharding type, kernel) of each column.
        valid_TJ: which may be chosen; `rejections` has the reason for the others, by (table, column).
        rows_TJ, width_TJ: of a full rectangle.
        row_blocks_TJ, column_blocks_TJ: how many, so `count_TJ` is their product.
        times_TJ: milliseconds per phase, [T, J, 6]; `ms_TJ` the sum of those that count.
        bytes_TJ: of device and host memory, [T, J, 2].
    """

    workload: Workload
    pairs: tuple[tuple[str, str], ...]
    places_J: tuple[Place, ...]
    valid_TJ: NDArray[np.bool_]
    rejections: Mapping[tuple[int, int], str]
    rows_TJ: Array
    width_TJ: Array
    row_blocks_TJ: NDArray[np.int64]
    column_blocks_TJ: NDArray[np.int64]
    times_TJ: Array
    ms_TJ: Array
    bytes_TJ: Array

    @property
    def count_TJ(self) -> NDArray[np.int64]:
        return self.row_blocks_TJ * self.column_blocks_TJ

    def rectangles(self, table: int, column: int) -> list[tuple[range, range]]:
        """(rows, columns) of each rectangle: for each column block its row blocks from the top."""
        num_rows, width = int(self.workload.rows_T[table]), int(self.width_TJ[table, column])
        blocks = row_blocks(num_rows, int(self.row_blocks_TJ[table, column]))
        if self.pairs[column][0] == ShardingType.DATA_PARALLEL.value:
            blocks = [range(num_rows)] * int(self.row_blocks_TJ[table, column])
        starts = range(0, width * int(self.column_blocks_TJ[table, column]), width)
        return [(rows, range(start, start + width)) for start in starts for rows in blocks]


def enumerate_options(
    workload: Workload,
    topology: Topology,
    pipeline: PipelineType = PipelineType.NONE,
    inference: bool = False,
    check_sizes: bool = True,
) -> OptionGrid:
    """The grid of all options; what cannot be is marked, with the reason.

    `check_sizes` marks options that are larger than any rank.
    """
    machine = Machine.of(topology)
    pairs = _pairs(workload, topology)
    shape = (len(workload), len(pairs))
    rows, width = np.zeros(shape), np.zeros(shape)
    row_blocks_TJ, column_blocks_TJ = np.ones(shape, np.int64), np.ones(shape, np.int64)
    narrow_T = _block_widths(workload)
    num_ranks_T = np.array([len(t.ranks) if t.ranks else machine.world_size for t in workload.tables])
    kernel_bw, parts = np.ones(shape), np.ones(shape)
    speeds_T = {kernel: _kernel_speeds(kernel, workload, topology) for kernel in {k for _, k in pairs}}
    for j, (sharding_type, kernel) in enumerate(pairs):
        kind = KINDS[sharding_type]
        if kind.place is Place.UNIFORM:
            row_blocks_TJ[:, j] = num_ranks_T
        elif kind.place is Place.HOST_ROWS:
            row_blocks_TJ[:, j] = machine.local_size
        is_split = kind.pattern >= Pattern.ROWS_EVERYWHERE
        parts[:, j] = row_blocks_TJ[:, j] if is_split else 1
        rows[:, j] = np.ceil(workload.rows_T / parts[:, j])
        width[:, j] = narrow_T if kind.cuts_columns else workload.columns_T
        column_blocks_TJ[:, j] = workload.columns_T // width[:, j]
        kernel_bw[:, j] = speeds_T[kernel]
    rectangles = Rectangles(
        rows=rows,
        columns=width,
        pattern=np.array([KINDS[t].pattern for t, _ in pairs]),
        parts=parts,
        kernel_bw=kernel_bw,
        on_host=np.array([k in HOST_MEMORY_KERNELS for _, k in pairs]),
        cached=np.array([k in CACHED_KERNELS for _, k in pairs]),
    )
    lookups = workload.lookups.at((slice(None), None))
    times = times_ms(rectangles, lookups, machine, inference)
    sizes = storage_bytes(rectangles, lookups, machine, pipeline)
    blocks = (row_blocks_TJ, column_blocks_TJ)
    rejections = _rejections(workload, pairs, topology, *blocks, sizes if check_sizes else 0 * sizes)
    valid = np.ones(shape, bool)
    if rejections:
        valid[tuple(np.array(list(rejections)).T)] = False
    return OptionGrid(
        workload=workload,
        pairs=pairs,
        places_J=tuple(KINDS[t].place for t, _ in pairs),
        valid_TJ=valid,
        rejections=rejections,
        rows_TJ=rows,
        width_TJ=width,
        row_blocks_TJ=row_blocks_TJ,
        column_blocks_TJ=column_blocks_TJ,
        times_TJ=times,
        ms_TJ=times[..., COUNTED].sum(axis=-1),
        bytes_TJ=sizes,
    )


def _pairs(workload: Workload, topology: Topology) -> tuple[tuple[str, str], ...]:
    """The pairs that any table may have, in the order of TorchRec's enums; kernels that the device runs."""
    found = {(t, k) for table in workload.tables for t, kernels in table.kernels.items() for k in kernels}
    device = topology.compute_device
    runs = {k: kernel_bw_lookup(device, k, 1.0, 1.0, 1.0) is not None for k in {k for _, k in found}}
    types, kernels = [t.value for t in ShardingType], [k.value for k in EmbeddingComputeKernel]
    ordered = sorted(found, key=lambda pair: (types.index(pair[0]), kernels.index(pair[1])))
    return tuple(pair for pair in ordered if runs[pair[1]])


def _block_widths(workload: Workload) -> Array:
    """The width of column blocks per table: at least the wanted one, dividing the table's columns."""
    both = [(int(d), int(w)) for d, w in zip(workload.columns_T, workload.block_width_T)]
    known = {pair: column_block_width(*pair) for pair in set(both)}
    return np.array([known[pair] for pair in both], dtype=np.float64)


def _kernel_speeds(kernel: str, workload: Workload, topology: Topology) -> Array:
    """Bytes per millisecond per table: cached kernels depend on how much is cached."""
    ratios_T, prefetch_T = workload.lookups.cache_ratio, workload.prefetch_T
    known = {
        (ratio, prefetch): kernel_bw_lookup(
            topology.compute_device,
            kernel,
            topology.hbm_mem_bw,
            topology.ddr_mem_bw,
            topology.hbm_to_ddr_mem_bw,
            ratio,
            bool(prefetch),
            topology.ssd_mem_bw,
        )
        for ratio, prefetch in set(zip(ratios_T.tolist(), prefetch_T.tolist()))
    }
    return np.array([known[pair] for pair in zip(ratios_T.tolist(), prefetch_T.tolist())], dtype=np.float64)


def _rejections(
    workload: Workload,
    pairs: Sequence[tuple[str, str]],
    topology: Topology,
    row_blocks_TJ: NDArray[np.int64],
    column_blocks_TJ: NDArray[np.int64],
    bytes_TJ: Array,
) -> dict[tuple[int, int], str]:
    """Why each impossible option is impossible; worked out once for tables that are alike, of which there are many."""
    local = topology.local_world_size
    caps = [(d.storage.hbm, d.storage.ddr) for d in topology.devices]
    whole_cap = np.array([max(hbm for hbm, _ in caps), max(ddr for _, ddr in caps)], dtype=np.float64)
    too_big_TJ = (bytes_TJ > whole_cap).any(axis=-1)
    rejections: dict[tuple[int, int], str] = {}
    alike: dict[tuple[object, ...], int] = {}
    for i, table in enumerate(workload.tables):
        sizes = (workload.columns_T[i], workload.block_width_T[i], bytes_TJ[i].tobytes())
        first = alike.setdefault(
            (*table.kernels.items(), id(table.constraint), table.ranks, type(table.sharder), *sizes), i
        )
        if first < i:
            rejections.update({(i, j): rejections[first, j] for j in range(len(pairs)) if (first, j) in rejections})
            continue
        allowed_hosts = None if table.ranks is None else _whole_hosts(table.ranks, local)
        offered = set(table.kernels)
        for j, (sharding_type, kernel) in enumerate(pairs):
            own = table.kernels.get(sharding_type, ())
            place = KINDS[sharding_type].place
            reason = None
            if sharding_type not in offered:
                reason = f"not among the allowed sharding types, {', '.join(table.kernels)} ({_whose(table, 'types')})"
            elif kernel not in own:
                reason = f"not among the allowed kernels, {', '.join(own)} ({_whose(table, 'kernels')})"
            else:
                blocks = int(row_blocks_TJ[i, j])
                twin = _twin(sharding_type, blocks, int(column_blocks_TJ[i, j]), topology, not table.ranks)
                if twin in offered:
                    reason = f"the same as {twin}: {_twin_reason(sharding_type, workload, i, blocks, topology)}"
            together = table.constraint.together is not None
            if reason is None and together and sharding_type != ShardingType.TABLE_WISE.value:
                reason = f"cut or copied tables cannot be kept together with group {table.constraint.together!r}"
            if reason is None and table.ranks is not None:
                if sharding_type == ShardingType.DATA_PARALLEL.value:
                    reason = f"a copy on every rank, but the constraint allows only {_some(table.ranks)}"
                elif place in (Place.HOST, Place.HOST_ROWS) and not allowed_hosts:
                    reason = f"needs all {local} ranks of a host; the constraint allows only {_some(table.ranks)}"
            if reason is None and too_big_TJ[i, j]:
                reason = _too_big(bytes_TJ[i, j], whole_cap, sharding_type, local)
            if reason is not None:
                rejections[i, j] = reason
    return rejections


def _twin(sharding_type: str, row_blocks: int, column_blocks: int, topology: Topology, anywhere: bool) -> str | None:
    """The simpler type that comes to the same thing for this table and world."""
    if column_blocks == 1 and sharding_type in _UNCUT:
        return _UNCUT[sharding_type]
    if row_blocks == 1 and sharding_type in _ONE_ROW_BLOCK:
        return _ONE_ROW_BLOCK[sharding_type]
    if topology.world_size != topology.local_world_size or sharding_type not in _ON_ONE_HOST:
        return None
    return _ON_ONE_HOST[sharding_type] if anywhere or KINDS[sharding_type].place is Place.HOST else None


def _twin_reason(sharding_type: str, workload: Workload, table: int, row_blocks: int, topology: Topology) -> str:
    columns, width = int(workload.columns_T[table]), int(workload.block_width_T[table])
    if sharding_type in _UNCUT and column_block_width(columns, width) == columns:
        return f"its {columns} columns make one block of at least {width}"
    if sharding_type in _ONE_ROW_BLOCK and row_blocks == 1:
        if topology.world_size == 1:
            return "there is one rank"
        return "the constraint leaves one rank" if workload.tables[table].ranks else "a host has one rank"
    return "there is one host"


def _whose(table: Table, what: str) -> str:
    """Who narrowed the types or kernels down: the user, or the module's sharder for this device."""
    constraint = table.constraint
    given = constraint.sharding_types if what == "types" else constraint.compute_kernels
    if given is not None:
        return f"constraint {'sharding_types' if what == 'types' else 'compute_kernels'}={given}"
    return f"all that {type(table.sharder).__name__} offers"


def _too_big(needed: Array, cap: Array, sharding_type: str, local: int) -> str:
    kind = 0 if needed[0] > cap[0] else 1
    memory = ("HBM", "host memory")[kind]
    how = {
        ShardingType.TABLE_WISE.value: "the whole table on one rank needs",
        ShardingType.DATA_PARALLEL.value: "a copy on every rank needs",
        ShardingType.TABLE_ROW_WISE.value: f"its rows over the {local} ranks of one host need",
        ShardingType.ROW_WISE.value: "its rows over all ranks need",
        ShardingType.GRID_SHARD.value: f"a column block's rows over the {local} ranks of a host need",
    }.get(sharding_type, "a column block on one rank needs")
    return f"{how} {show_bytes(needed[kind])} of {memory} per rank; {show_bytes(cap[kind])} there"


def grouped_reasons(grid: OptionGrid, table: int) -> list[str]:
    """Why a table may not have the options it has not, one line for all options with one reason."""
    return one_line_per_reason([(*pair, grid.rejections.get((table, j))) for j, pair in enumerate(grid.pairs)])


def one_line_per_reason(options: Iterable[tuple[str, str, str | None]]) -> list[str]:
    """(sharding type, kernel, reason) of all options to a line per reason; None is no reason.

    >>> one_line_per_reason([("row_wise", "fused", "too big"), ("table_wise", "fused", "too big"), ("grid", "x", None)])
    ['row_wise, table_wise: too big']
    """
    groups: dict[str, dict[str, list[str]]] = {}
    kernels: dict[str, list[str]] = {}
    for sharding_type, kernel, reason in options:
        kernels.setdefault(sharding_type, []).append(kernel)
        if reason is not None:
            groups.setdefault(reason, {}).setdefault(sharding_type, []).append(kernel)
    return [f"{named_pairs(found, kernels)}: {reason}" for reason, found in groups.items()]


def named_pairs(found: Mapping[str, Sequence[str]], offered: Mapping[str, Sequence[str]]) -> str:
    """Sharding types with their kernels, in few words.

    >>> kernels = ["fused", "fused_uvm"]
    >>> named_pairs({"row_wise": kernels, "table_wise": ["fused"]}, {"row_wise": kernels, "table_wise": kernels})
    'row_wise; table_wise with fused'
    """
    by_kernels: dict[str, list[str]] = {}
    for sharding_type, kernels in found.items():
        some = "" if list(kernels) == list(offered[sharding_type]) else " with " + ", ".join(kernels)
        by_kernels.setdefault(some, []).append(sharding_type)
    return "; ".join(", ".join(types) + some for some, types in by_kernels.items())


def _whole_hosts(ranks: Sequence[int], local: int) -> list[int]:
    """Hosts all of whose ranks are among `ranks`."""
    allowed = set(ranks)
    return [h for h in sorted({r // local for r in ranks}) if allowed.issuperset(range(h * local, (h + 1) * local))]


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{', ...' if len(ranks) > 8 else ''}"
