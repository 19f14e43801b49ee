"""Plans by hand: `table_wise(rank=0)`, `row_wise()`, ... and the module plan they make.

    plan = construct_module_sharding_plan(
        ebc, {"user": table_wise(rank=0), "item": row_wise()}, world_size=2, local_size=2, device_type="cpu"
    )
    print(plan)

Each of these functions returns a generator: something that, given a parameter and the world, makes its
`ParameterSharding`. The cutting itself is in `recsys_edu.distributed.sharding`, one file per type; here it only gets
TorchRec's names and form. `custom(shards)` is ours: any list of rectangles that tiles the table.

Counterpart: torchrec.distributed.sharding_plan
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.sharding.column_wise import column_wise_shards
from recsys_edu.distributed.sharding.grid import grid_shards
from recsys_edu.distributed.sharding.row_wise import row_blocks, row_wise_shards
from recsys_edu.distributed.sharding.table_column_wise import table_column_wise_shards
from recsys_edu.distributed.sharding.table_row_wise import table_row_wise_shards
from recsys_edu.distributed.sharding.table_wise import table_wise_shards
from recsys_edu.distributed.sharding.tiling import CUSTOM, Shard, device_string, parameter_sharding_from, validate
from recsys_edu.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ParameterSharding, ShardingType

ParameterShardingGenerator = Callable[[nn.Parameter, int, int, str, ModuleSharder[nn.Module]], ParameterSharding]

MIN_CW_DIM = 128  # the width of column blocks where nobody says otherwise
UNNAMED_TABLE = "(unnamed)"


@dataclass(frozen=True)
class TilingRequest:
    """What a tiling may depend on: the table, and how many ranks there are, in all and per host."""

    table: str
    num_rows: int
    num_columns: int
    local_size: int
    world_size: int


@dataclass(frozen=True)
class TilingGenerator:
    """A parameter sharding generator that tiles: cut, check that the cut tiles the table, put it in TorchRec's form.

    `device_types` overrides the world's device type, for all shards or one by one. `table` is the name that errors
    give; `construct_module_sharding_plan` fills it in.
    """

    sharding_type: str
    cut: Callable[[TilingRequest], Sequence[Shard]]
    compute_kernel: str | None = None
    device_types: str | Sequence[str] | None = None
    table: str = UNNAMED_TABLE

    def __call__(
        self, param: nn.Parameter, local_size: int, world_size: int, device_type: str, sharder: ModuleSharder[Any]
    ) -> ParameterSharding:
        num_rows, num_columns = param.shape
        shards = list(self.cut(TilingRequest(self.table, num_rows, num_columns, local_size, world_size)))
        validate(shards, num_rows, num_columns, world_size, self.table)
        kernel = self.compute_kernel or default_compute_kernel(param, sharder)
        return parameter_sharding_from(shards, self.sharding_type, kernel, self.device_types or device_type, local_size)


def default_compute_kernel(param: nn.Parameter, sharder: ModuleSharder[Any] | None) -> str:
    """`fused` where an optimizer was given for the parameter, `dense` where its gradient is wanted, `quant` if served.

    An optimizer is given by `apply_optimizer_in_backward`, or by an "optimizer" in the sharder's `fused_params`
    (which TorchRec ignores unless the plan says fused).
    """
    quant = EmbeddingComputeKernel.QUANT.value
    if sharder is not None and quant in sharder.compute_kernels(ShardingType.TABLE_WISE.value, "cpu"):
        return quant
    has_optimizer = hasattr(param, "_optimizer_classes") or hasattr(param, "_in_backward_optimizers")
    asks_for_one = "optimizer" in (getattr(sharder, "fused_params", None) or {})
    return (EmbeddingComputeKernel.FUSED if has_optimizer or asks_for_one else EmbeddingComputeKernel.DENSE).value


# ---------------------------------------------------------------- one function per sharding type


def data_parallel() -> ParameterShardingGenerator:
    """A copy on every rank, its gradient averaged by DistributedDataParallel; always the dense kernel."""

    def replicate(
        param: nn.Parameter, local_size: int, world_size: int, device_type: str, sharder: ModuleSharder[Any]
    ) -> ParameterSharding:
        return ParameterSharding(
            sharding_type=ShardingType.DATA_PARALLEL.value,
            compute_kernel=EmbeddingComputeKernel.DENSE.value,
            ranks=list(range(world_size)),
        )

    return replicate


def table_wise(rank: int, device: str | None = None, compute_kernel: str | None = None) -> ParameterShardingGenerator:
    """The whole table on `rank`; `device` ("cpu", "cuda") if not the world's."""
    return TilingGenerator(
        ShardingType.TABLE_WISE.value,
        lambda r: table_wise_shards(r.table, r.num_rows, r.num_columns, rank),
        compute_kernel,
        device,
    )


def row_wise(
    sizes_placement: tuple[list[int], str | list[str]] | None = None,
    compute_kernel: str | None = None,
    num_buckets: int | None = None,
    ranks: list[int] | None = None,
) -> ParameterShardingGenerator:
    """Row blocks over all ranks, of equal size; or uneven, or on some ranks.

        row_wise()                                      10 rows on 4 ranks: 3, 3, 3, 1
        row_wise(sizes_placement=([7, 3], "cpu"))       7 rows on rank 0, 3 on rank 1
        row_wise(ranks=[1, 3])                          5 rows on rank 1, 5 on rank 3     (ours)

    `sizes_placement` is (rows per shard, device type or one per shard). `num_buckets` divides the rows into as many
    equal buckets that are never split between ranks. (TorchRec's `sizes_placement` is for serving: always the quant
    kernel, and on the CPU every shard in one process. Here shard i is on rank i and the kernel is chosen as usual.)

    Raises (when the plan is made):
        ValueError: sizes that do not add up, or buckets that do not divide the rows or are fewer than the ranks.
    """
    if sizes_placement is not None and num_buckets is not None:
        raise ValueError("row_wise takes sizes_placement or num_buckets, not both: each decides the sizes")
    sizes, devices = sizes_placement if sizes_placement is not None else (None, None)

    def cut(r: TilingRequest) -> list[Shard]:
        chosen = ranks if ranks is not None else range(len(sizes) if sizes is not None else r.world_size)
        rows = bucket_rows(r.num_rows, len(chosen), num_buckets) if num_buckets is not None else sizes
        return row_wise_shards(r.table, r.num_rows, r.num_columns, chosen, rows)

    return TilingGenerator(ShardingType.ROW_WISE.value, cut, compute_kernel, devices)


def column_wise(
    ranks: list[int] | None = None,
    size_per_rank: list[int] | None = None,
    compute_kernel: str | None = None,
    device_types: list[str] | None = None,
) -> ParameterShardingGenerator:
    """Column blocks on `ranks` (default: all, or the first of `size_per_rank`), equal or of the given widths.

    With both, `size_per_rank[i]` columns go to `ranks[i]`.

    Raises (when the plan is made):
        ValueError: a width that does not divide evenly, or a cut that is no multiple of 4.
    """

    def cut(r: TilingRequest) -> list[Shard]:
        chosen = ranks if ranks is not None else range(len(size_per_rank) if size_per_rank else r.world_size)
        return column_wise_shards(r.table, r.num_rows, r.num_columns, chosen, size_per_rank)

    return TilingGenerator(ShardingType.COLUMN_WISE.value, cut, compute_kernel, device_types)


def table_row_wise(host_index: int, compute_kernel: str | None = None) -> ParameterShardingGenerator:
    """Row blocks over the ranks of one host."""
    return TilingGenerator(
        ShardingType.TABLE_ROW_WISE.value,
        lambda r: table_row_wise_shards(r.table, r.num_rows, r.num_columns, host_index, r.local_size),
        compute_kernel,
    )


def table_column_wise(host_index: int, compute_kernel: str | None = None) -> ParameterShardingGenerator:
    """Equal column blocks over the ranks of one host (ours: TorchRec's plans have the type, but no function for it)."""
    return TilingGenerator(
        ShardingType.TABLE_COLUMN_WISE.value,
        lambda r: table_column_wise_shards(r.table, r.num_rows, r.num_columns, host_index, r.local_size),
        compute_kernel,
    )


def grid_shard(host_indexes: list[int], compute_kernel: str | None = None) -> ParameterShardingGenerator:
    """Equal column blocks over hosts, each cut into row blocks over the ranks of its host.

    The columns are divided by the number of hosts. (TorchRec cuts blocks of 128 or more columns whatever the number
    of hosts: a table of 512 columns on 2 hosts gets 256 columns placed and the rest dropped.)
    """
    return TilingGenerator(
        ShardingType.GRID_SHARD.value,
        lambda r: grid_shards(r.table, r.num_rows, r.num_columns, host_indexes, r.local_size),
        compute_kernel,
    )


def custom(
    shards: Sequence[Shard] | Callable[[TilingRequest], Sequence[Shard]], compute_kernel: str | None = None
) -> ParameterShardingGenerator:
    """Your own rectangles, as a list or as a function of the table's shape and the world: whatever tiles the table.

        custom([Shard("user", range(0, 70), range(0, 16), rank=0), Shard("user", range(70, 100), range(0, 16), rank=1)])

    Raises (when the plan is made):
        ValueError: in words, why they do not tile it; see `sharding.tiling.validate`.
    """

    def cut(r: TilingRequest) -> list[Shard]:
        if callable(shards):
            return list(shards(r))
        if r.table == UNNAMED_TABLE:  # called without a name, as TorchRec's generators are: take the shards' word
            return [replace(shard, table=UNNAMED_TABLE) for shard in shards]
        return list(shards)

    return TilingGenerator(CUSTOM, cut, compute_kernel)


def get_sharding_constructor_from_type(sharding_type: ShardingType) -> Callable[..., ParameterShardingGenerator]:
    """The function above for a sharding type: `get_sharding_constructor_from_type(ShardingType.ROW_WISE)()`."""
    return {
        ShardingType.DATA_PARALLEL: data_parallel,
        ShardingType.TABLE_WISE: table_wise,
        ShardingType.ROW_WISE: row_wise,
        ShardingType.COLUMN_WISE: column_wise,
        ShardingType.TABLE_ROW_WISE: table_row_wise,
        ShardingType.TABLE_COLUMN_WISE: table_column_wise,
        ShardingType.GRID_SHARD: grid_shard,
    }[sharding_type]


# ---------------------------------------------------------------- a whole module's plan


def apply_to_all(
    module: nn.Module,
    parameter_sharding_generator: ParameterShardingGenerator,
    sharder: ModuleSharder[Any] | None = None,
) -> dict[str, ParameterShardingGenerator]:
    """The same generator for every shardable parameter: `apply_to_all(ebc, row_wise())`."""
    sharder = sharder or default_sharder_for(module)
    return dict.fromkeys(sharder.shardable_parameters(module), parameter_sharding_generator)


def construct_module_sharding_plan(
    module: nn.Module,
    per_param_sharding: dict[str, ParameterShardingGenerator],
    sharder: ModuleSharder[Any] | None = None,
    local_size: int | None = None,
    world_size: int | None = None,
    device_type: str | None = None,
) -> EmbeddingModuleShardingPlan:
    """The plan of one module, from one generator per table.

    Defaults: the default sharder of the module's type, the process group's world size, the hosts of
    `comm.get_local_size`, and cuda where there is one.

    Raises:
        AssertionError: a table without a generator, or a generator for a table the module does not have.
        ValueError: shards that do not tile their table; or no world size and no process group.
    """
    sharder = sharder or default_sharder_for(module)
    parameters = sharder.shardable_parameters(module)
    missing = [name for name in parameters if name not in per_param_sharding]
    unknown = [name for name in per_param_sharding if name not in parameters]
    if missing or unknown:
        raise AssertionError(
            f"per_param_sharding must name each table of the {type(module).__name__} once: {list(parameters)}. "
            f"Missing: {missing or 'none'}; unknown: {unknown or 'none'}"
        )
    if world_size is None:
        if not dist.is_initialized():
            raise ValueError("no process group is initialised: pass world_size= (and local_size=, the ranks per host)")
        world_size = dist.get_world_size()
    local_size = local_size or get_local_size(world_size)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = EmbeddingModuleShardingPlan()
    for name, parameter in parameters.items():
        generator = per_param_sharding[name]
        if isinstance(generator, TilingGenerator):
            generator = replace(generator, table=name)
        plan[name] = generator(parameter, local_size, world_size, device_type, sharder)
    return plan


def get_default_sharders() -> list[ModuleSharder[Any]]:
    """One of each sharder of this package."""
    # Imported here: the sharded modules themselves import this file.
    from recsys_edu.distributed.embedding import EmbeddingCollectionSharder
    from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from recsys_edu.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
    from recsys_edu.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
    from recsys_edu.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder

    return [
        EmbeddingBagCollectionSharder(),
        FeatureProcessedEmbeddingBagCollectionSharder(),
        ManagedCollisionEmbeddingBagCollectionSharder(),
        EmbeddingCollectionSharder(),
        ManagedCollisionEmbeddingCollectionSharder(),
    ]


def get_module_to_default_sharders() -> dict[type[nn.Module], ModuleSharder[Any]]:
    """The default sharders by the module type they shard."""
    return {sharder.module_type: sharder for sharder in get_default_sharders()}


def default_sharder_for(module: nn.Module) -> ModuleSharder[Any]:
    """The default sharder of a module's type, or a ValueError that lists the types there are."""
    by_type = get_module_to_default_sharders()
    if type(module) not in by_type:
        raise ValueError(
            f"no default sharder for {type(module).__name__}: there is one for each of "
            f"{sorted(t.__name__ for t in by_type)}; pass sharder="
        )
    return by_type[type(module)]


# ---------------------------------------------------------------- sizes, offsets, placements


def placement(compute_device: str, rank: int, local_size: int) -> str:
    """Where a rank's shard lies: `placement("cuda", 3, 2)` is `"rank:3/cuda:1"`; on the CPU `"rank:3/cpu"`."""
    return device_string(compute_device, rank, local_size)


def placement_helper(device_type: str, index: int = 0, rank: int = 0) -> str:
    """A placement from a device index: `("cuda", 1, 2)` is `"rank:2/cuda:1"`; for the CPU always `"rank:0/cpu"`."""
    return "rank:0/cpu" if device_type == "cpu" else f"rank:{rank}/{device_type}:{index}"


def calculate_shard_sizes_and_offsets(
    tensor: Tensor,
    world_size: int,
    local_world_size: int,
    sharding_type: str,
    col_wise_shard_dim: int | None = None,
    device_memory_sizes: list[int] | None = None,
    num_buckets: int | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """`([rows, columns], ...), ([row, column], ...)` of every shard that a type would make of `tensor`.

    `col_wise_shard_dim` is the width of column blocks (default 128; rounded up to a multiple of 4 that divides the
    tensor's width, else the columns stay whole). `device_memory_sizes` makes row blocks in proportion to each rank's
    memory; `num_buckets` makes them of whole buckets.

    Raises:
        ValueError: an unknown sharding type.

    Counterpart: torchrec.distributed.sharding_plan.calculate_shard_sizes_and_offsets
    """
    num_rows, num_columns = tensor.shape
    kind = sharding_type
    if kind == ShardingType.DATA_PARALLEL.value:
        return [[num_rows, num_columns]] * world_size, [[0, 0]] * world_size
    rows = [range(num_rows)]
    columns = [range(num_columns)]
    if kind == ShardingType.ROW_WISE.value:
        rows = row_blocks(num_rows, world_size)
        if device_memory_sizes is not None:
            rows = _consecutive(proportional_rows(num_rows, device_memory_sizes))
        elif num_buckets is not None:
            rows = _consecutive(bucket_rows(num_rows, world_size, num_buckets))
    if kind in (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value):
        rows = row_blocks(num_rows, local_world_size)
    if kind in (
        ShardingType.COLUMN_WISE.value,
        ShardingType.TABLE_COLUMN_WISE.value,
        ShardingType.GRID_SHARD.value,
    ):
        width = column_block_width(num_columns, col_wise_shard_dim or MIN_CW_DIM)
        columns = [range(start, start + width) for start in range(0, num_columns, width)]
    if kind not in {t.value for t in ShardingType}:
        raise ValueError(f"sharding type {kind!r}: expected one of {[t.value for t in ShardingType]}")
    cells = [(row, column) for column in columns for row in rows]
    return [[len(r), len(c)] for r, c in cells], [[r.start, c.start] for r, c in cells]


def column_block_width(num_columns: int, wanted: int) -> int:
    """The smallest multiple of 4 that is at least `wanted` and divides `num_columns`; else all columns.

    >>> column_block_width(16, 5), column_block_width(18, 9)
    (8, 18)
    """
    first = -(-max(wanted, 1) // 4) * 4
    return next((width for width in range(first, num_columns, 4) if num_columns % width == 0), num_columns)


def bucket_rows(num_rows: int, num_ranks: int, num_buckets: int) -> list[int]:
    """Rows per rank when rows come in `num_buckets` equal buckets, the first ranks taking one more bucket.

    >>> bucket_rows(20, 4, num_buckets=5)
    [8, 4, 4, 4]

    Raises:
        ValueError: buckets that do not divide the rows, or fewer buckets than ranks.
    """
    if num_buckets < num_ranks:
        raise ValueError(
            f"{num_buckets} buckets for {num_ranks} ranks: a bucket is never split, so give at least one each"
        )
    if num_rows % num_buckets:
        raise ValueError(f"{num_rows} rows cannot be divided into {num_buckets} buckets of equal size")
    each, more = divmod(num_buckets, num_ranks)
    return [(each + (i < more)) * (num_rows // num_buckets) for i in range(num_ranks)]


def proportional_rows(num_rows: int, memory_sizes: Sequence[int]) -> list[int]:
    """Rows per rank in proportion to `memory_sizes`, rounded down; the last rank takes the rest.

    >>> proportional_rows(100, [1, 2, 3, 7])
    [7, 15, 23, 55]
    """
    total = sum(memory_sizes)
    if total <= 0 or min(memory_sizes) < 0:
        raise ValueError(f"memory sizes {list(memory_sizes)}: expected sizes >= 0, and one above 0")
    rows = [num_rows * size // total for size in memory_sizes[:-1]]
    return [*rows, num_rows - sum(rows)]


def _consecutive(sizes: Sequence[int]) -> list[range]:
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
