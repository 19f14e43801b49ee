"""A sharding is a tiling: rectangles of a table, each on one rank. Everything else is derived from them.

    R rows x D columns           row_wise over 2 ranks      column_wise over 2 ranks     grid over 2 hosts of 2
    +--------------------+      +--------------------+      +---------+----------+      +---------+----------+
    |                    |      |       rank 0       |      |         |          |      | rank 0  |  rank 2  |
    |       table        |      +--------------------+      | rank 0  |  rank 1  |      +---------+----------+
    |                    |      |       rank 1       |      |         |          |      | rank 1  |  rank 3  |
    +--------------------+      +--------------------+      +---------+----------+      +---------+----------+

A plan is valid when the shards of every table tile it exactly: no gap, no overlap. `validate` says in words what is
wrong with one that does not. `ParameterSharding`, TorchRec's public form of the same facts, converts both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec

from recsys_edu.distributed.types import ParameterSharding, ShardingType

CUSTOM = "custom"  # the sharding type of a tiling that has no name
COLUMN_ALIGNMENT = 4  # the lookup kernels read four floats at a time


@dataclass(frozen=True)
class Shard:
    """A rectangle of a table on one rank: `rows` x `columns`, both plain ranges of step 1.

    >>> left = Shard("user", range(0, 10), range(0, 8), rank=0)
    >>> left.num_rows, left.num_columns
    (10, 8)
    >>> left.intersect(Shard("user", range(5, 10), range(4, 16), rank=1))
    (range(5, 10), range(4, 8))
    """

    table: str
    rows: range
    columns: range
    rank: int

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    @property
    def is_empty(self) -> bool:
        """True for a shard of no rows or no columns, as row-wise leaves on the last ranks of a small table."""
        return not (self.num_rows and self.num_columns)

    def intersect(self, other: Shard) -> tuple[range, range] | None:
        """The (rows, columns) both shards cover, or None where they share nothing (or are of different tables)."""
        if self.table != other.table:
            return None
        rows, columns = _overlap(self.rows, other.rows), _overlap(self.columns, other.columns)
        return (rows, columns) if rows and columns else None

    def __str__(self) -> str:
        return (
            f"rows {self.rows.start}:{self.rows.stop}, columns {self.columns.start}:{self.columns.stop} "
            f"on rank {self.rank}"
        )


@dataclass(frozen=True)
class Intersection:
    """What moves from `old` to `new` when a table is resharded: the rectangle that both cover."""

    old: Shard
    new: Shard
    rows: range
    columns: range


def _overlap(first: range, second: range) -> range:
    return range(max(first.start, second.start), min(first.stop, second.stop))


def non_empty(shards: Iterable[Shard]) -> list[Shard]:
    """The shards that own something, in the given order."""
    return [shard for shard in shards if not shard.is_empty]


def row_cuts(shards: Iterable[Shard]) -> list[int]:
    """The distinct row boundaries, ends included: `[0, 3, 6, 9, 10]` for 10 rows over 4 ranks."""
    return sorted({cut for shard in non_empty(shards) for cut in (shard.rows.start, shard.rows.stop)})


def column_cuts(shards: Iterable[Shard]) -> list[int]:
    """The distinct column boundaries, ends included: `[0, 8, 16]` for 16 columns over 2 ranks."""
    return sorted({cut for shard in non_empty(shards) for cut in (shard.columns.start, shard.columns.stop)})


def intersections(old_shards: Sequence[Shard], new_shards: Sequence[Shard]) -> list[Intersection]:
    """Every piece that resharding has to copy, in the order of `new_shards`, then of `old_shards`.

    >>> old = [Shard("user", range(0, 10), range(0, 8), 0)]
    >>> new = [Shard("user", range(0, 5), range(0, 8), 0), Shard("user", range(5, 10), range(0, 8), 1)]
    >>> [(piece.new.rank, piece.rows) for piece in intersections(old, new)]
    [(0, range(0, 5)), (1, range(5, 10))]
    """
    pieces = []
    for new in new_shards:
        for old in old_shards:
            common = new.intersect(old)
            if common is not None:
                pieces.append(Intersection(old, new, *common))
    return pieces


def validate(shards: Sequence[Shard], num_rows: int, num_columns: int, world_size: int, table: str) -> None:
    """Check that `shards` tile a table of `num_rows` x `num_columns` exactly; returns nothing, or says what is wrong.

    Shards of no rows are allowed anywhere inside the table: row-wise leaves them on ranks that get nothing.

    Raises:
        ValueError: naming the table and the shard: a gap, an overlap, a shard outside the table, a rank that does not
            exist, a column cut that is no multiple of 4, or a shard that spans several row blocks.
    """
    for shard in shards:
        _check_shard(shard, num_rows, num_columns, world_size, table)
    owned = non_empty(shards)
    _check_overlap(owned, table)
    _check_gap(owned, num_rows, num_columns, table)
    _check_row_blocks(owned, table)
    for cut in column_cuts(owned)[1:-1]:
        if cut % COLUMN_ALIGNMENT:
            raise ValueError(
                f"table {table!r}: column cut {cut} is not a multiple of {COLUMN_ALIGNMENT}, the kernels' vector "
                f"width. Cut at {cut - cut % COLUMN_ALIGNMENT} or {cut + -cut % COLUMN_ALIGNMENT} instead"
            )


def _check_shard(shard: Shard, num_rows: int, num_columns: int, world_size: int, table: str) -> None:
    if shard.table != table:
        raise ValueError(f"table {table!r}: got a shard of table {shard.table!r} ({shard})")
    if not 0 <= shard.rank < world_size:
        raise ValueError(f"table {table!r}: shard {shard}, but the ranks are 0 to {world_size - 1}")
    for name, part, size in (("rows", shard.rows, num_rows), ("columns", shard.columns, num_columns)):
        if part.step != 1:
            raise ValueError(f"table {table!r}: shard {shard} has {name} in steps of {part.step}; use step 1")
        if part.start < 0 or part.stop > size or part.start > part.stop:
            raise ValueError(
                f"table {table!r}: shard {shard} reaches outside the table, which has {name} 0:{size} "
                f"({num_rows} rows x {num_columns} columns)"
            )


def _check_overlap(shards: list[Shard], table: str) -> None:
    # A sweep down the rows: only shards whose rows are still open can overlap the next one.
    open_shards: list[Shard] = []
    for shard in sorted(shards, key=lambda s: (s.rows.start, s.columns.start)):
        open_shards = [other for other in open_shards if other.rows.stop > shard.rows.start]
        for other in open_shards:
            common = shard.intersect(other)
            if common is not None:
                rows, columns = common
                raise ValueError(
                    f"table {table!r}: shards overlap: {other} and {shard} both hold "
                    f"rows {rows.start}:{rows.stop}, columns {columns.start}:{columns.stop}{_picture(shards)}"
                )
        open_shards.append(shard)


def _check_gap(shards: list[Shard], num_rows: int, num_columns: int, table: str) -> None:
    # Inside the table and without overlap, so the areas add up exactly when nothing is missing.
    if sum(shard.num_rows * shard.num_columns for shard in shards) == num_rows * num_columns:
        return
    rows = sorted({0, num_rows, *row_cuts(shards)})
    columns = sorted({0, num_columns, *column_cuts(shards)})
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            if not _owners(shards, top, left):
                raise ValueError(
                    f"table {table!r}: gap: no shard holds rows {top}:{bottom}, columns {left}:{right} "
                    f"(the table has {num_rows} rows x {num_columns} columns){_picture(shards, num_rows, num_columns)}"
                )


def _check_row_blocks(shards: list[Shard], table: str) -> None:
    cuts = row_cuts(shards)
    for shard in shards:
        inside = [cut for cut in cuts if shard.rows.start < cut < shard.rows.stop]
        if inside:
            raise ValueError(
                f"table {table!r}: shard {shard} spans several row blocks: another column block is cut at row "
                f"{', '.join(map(str, inside))}. Row cuts are shared by all column blocks of a table: cut this shard "
                f"there too (both parts may stay on rank {shard.rank}){_picture(shards)}"
            )


def _owners(shards: Iterable[Shard], row: int, column: int) -> list[Shard]:
    return [shard for shard in shards if row in shard.rows and column in shard.columns]


def _picture(shards: Sequence[Shard], num_rows: int | None = None, num_columns: int | None = None) -> str:
    # An error about a thousand shards is better off without a page of boxes.
    return "\n" + draw(shards, num_rows, num_columns) if len(shards) <= 32 else ""


def draw(shards: Sequence[Shard], num_rows: int | None = None, num_columns: int | None = None) -> str:
    """A text picture of one table's tiling, not to scale; works for broken tilings too (`--` is a gap, `0+1` overlap).

    >>> print(draw([Shard("user", range(0, 3), range(0, 8), 0), Shard("user", range(3, 5), range(0, 8), 1)]))
    user: 5 rows x 8 columns
         0:8
        +--------+
    0:3 | rank 0 |
        +--------+
    3:5 | rank 1 |
        +--------+
    """
    owned = non_empty(shards)
    rows = sorted({*row_cuts(owned), *([0, num_rows] if num_rows else [])})
    columns = sorted({*column_cuts(owned), *([0, num_columns] if num_columns else [])})
    if not owned and not (num_rows and num_columns):
        return "(no shards)"
    owners = [[_owners(owned, top, left) for left in columns[:-1]] for top in rows[:-1]]
    texts = [["rank " + "+".join(str(s.rank) for s in cell) if cell else "--" for cell in line] for line in owners]
    labels = [f"{top}:{bottom}" for top, bottom in pairwise(rows)]
    heads = [f"{left}:{right}" for left, right in pairwise(columns)]
    cell_width = max(len(text) for text in heads + [text for line in texts for text in line])
    margin = max(map(len, labels))
    rule = " " * (margin + 1) + ("+" + "-" * (cell_width + 2)) * len(heads) + "+"
    names = {shard.table for shard in owned} or {"?"}
    lines = [f"{', '.join(sorted(names))}: {rows[-1]} rows x {columns[-1]} columns"]
    lines.append((" " * (margin + 2) + "".join(head.ljust(cell_width + 3) for head in heads)).rstrip())
    for label, line in zip(labels, texts):
        cells = "".join(f"| {text.ljust(cell_width)} " for text in line)
        lines += [rule, f"{label.ljust(margin)} {cells}|"]
    return "\n".join([*lines, rule])


def shards_from(table: str, sharding: ParameterSharding, num_rows: int, num_columns: int) -> list[Shard]:
    """The rectangles of a `ParameterSharding`; an empty list for data_parallel, which tiles nothing but replicates.

    Only the rectangles are read, not the sharding type's name: a plan means what its shards say.

    Raises:
        ValueError: a sharded table without a sharding_spec, or a shard that is not two-dimensional or has no placement.
    """
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return []
    spec = sharding.sharding_spec
    if spec is None:
        raise ValueError(
            f"table {table!r} ({num_rows} x {num_columns}): its ParameterSharding is {sharding.sharding_type!r} but "
            "has no sharding_spec; build it with recsys_edu.distributed.sharding_plan, e.g. table_wise(rank=0)"
        )
    shards = []
    for metadata in spec.shards:
        if len(metadata.shard_offsets) != 2 or metadata.placement is None:
            raise ValueError(f"table {table!r}: expected two offsets, two sizes and a placement, got {metadata}")
        (top, left), (height, width) = metadata.shard_offsets, metadata.shard_sizes
        rank = metadata.placement.rank()
        shards.append(Shard(table, range(top, top + height), range(left, left + width), rank))
    return shards


def parameter_sharding_from(
    shards: Sequence[Shard],
    sharding_type: ShardingType | str,
    compute_kernel: str,
    device_type: str | Sequence[str] = "cpu",
    local_size: int = 1,
) -> ParameterSharding:
    """The way back: a `ParameterSharding` with one ShardMetadata per shard.

    `device_type` is one for all shards or one per shard. `local_size` is the number of ranks per host; it decides the
    device index (`rank:5/cuda:1` for 4 per host). `sharding_type` may be `CUSTOM`: the rectangles are what counts.

    Raises:
        ValueError: an unknown sharding type, or another number of device types than shards.
    """
    name = sharding_type if sharding_type == CUSTOM else ShardingType(sharding_type).value
    devices = [device_type] * len(shards) if isinstance(device_type, str) else list(device_type)
    if len(devices) != len(shards):
        raise ValueError(f"{len(devices)} device types {devices} for {len(shards)} shards: expected one for each")
    metadata = [
        ShardMetadata(
            shard_offsets=[shard.rows.start, shard.columns.start],
            shard_sizes=[shard.num_rows, shard.num_columns],
            placement=device_string(device, shard.rank, local_size),
        )
        for shard, device in zip(shards, devices)
    ]
    return ParameterSharding(
        sharding_type=name,
        compute_kernel=compute_kernel,
        ranks=[shard.rank for shard in shards],
        sharding_spec=EnumerableShardingSpec(metadata),
    )


def device_string(device_type: str, rank: int, local_size: int) -> str:
    """Where a rank keeps its shards, in torch's notation: `rank:3/cpu`, `rank:3/cuda:1` with 2 ranks per host."""
    device = device_type if device_type == "cpu" else f"{device_type}:{rank % local_size}"
    return f"rank:{rank}/{device}"
