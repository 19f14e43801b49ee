"""Row-wise: blocks of rows, one per rank.

    user, 6 rows x 4 columns, over two ranks:         rank 0 holds        rank 1 holds
                                                        rows 0:3            rows 3:6  (its own numbers 0, 1, 2)

    rank 0's batch: bags [2, 5] [0]                   an id travels to the rank that owns its row, counted from
    rank 1's batch: bags [5]    []                    the start of that rank's block: 5 becomes 2

    ids sent          to rank 0    to rank 1          each owner has a part of each bag; the asking rank adds them:
      from rank 0     [2]  [0]     [2]  []              rank 0:  w[2] + w[5],  w[0] + 0
      from rank 1     []   []      [2]  []              rank 1:  0    + w[5],  0    + 0

When: tables too large for one rank. Memory spreads evenly, whatever the table's width.
Costs: ids travel once; but every rank answers every bag, so W partial sums of D come back instead of one.
Ids must spread over the blocks too: frequent ids that are neighbours all ask the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, keep_rows, pool
from recsys_edu.distributed.sharding.tiling import Shard


def row_blocks(num_rows: int, num_blocks: int) -> list[range]:
    """Blocks of `ceil(num_rows / num_blocks)`; the last ones get what is left, or nothing.

    >>> row_blocks(10, 4)
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    size = -(-num_rows // num_blocks)
    return [range(min(i * size, num_rows), min((i + 1) * size, num_rows)) for i in range(num_blocks)]


def row_wise_shards(
    table: str, num_rows: int, num_columns: int, ranks: Sequence[int], sizes: Sequence[int] | None = None
) -> list[Shard]:
    """Row blocks on `ranks` in that order: of equal size, or of `sizes` rows each.

    >>> [(s.rows, s.rank) for s in row_wise_shards("user", 10, 4, ranks=[2, 0], sizes=[7, 3])]
    [(range(0, 7), 2), (range(7, 10), 0)]

    Raises:
        ValueError: no ranks, another number of sizes than ranks, or sizes that do not add up to `num_rows`.
    """
    if not ranks:
        raise ValueError(f"table {table!r}: row-wise needs at least one rank")
    if sizes is None:
        blocks = row_blocks(num_rows, len(ranks))
    else:
        if len(sizes) != len(ranks) or sum(sizes) != num_rows or min(sizes) < 0:
            raise ValueError(
                f"table {table!r}: sizes {list(sizes)} for ranks {list(ranks)}: expected {len(ranks)} sizes >= 0 that "
                f"add up to the table's {num_rows} rows"
            )
        blocks = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    return [Shard(table, rows, range(num_columns), rank) for rows, rank in zip(blocks, ranks)]


def row_wise_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    num_ranks = len(batches)

    # 1. Every rank cuts its batch by row block and sends each block to its owner.
    sent = [[keep_rows(batch, shard.rows) for shard in shards] for batch in batches]

    # 2. Every owner looks up each rank's share in the only rows it has: a part of every bag.
    parts = [
        [pool(*sent[source][i], weight_RD[shard.rows.start : shard.rows.stop]) for source in range(num_ranks)]
        for i, shard in enumerate(shards)
    ]

    # 3. The parts go back, and the asking rank adds them up.
    sums = []
    for source, (_, lengths_B) in enumerate(batches):
        total_BD = weight_RD.new_zeros(len(lengths_B), weight_RD.shape[1])
        for i in range(len(shards)):
            total_BD = total_BD + parts[i][source]
        sums.append(total_BD)
    return finish(sums, batches, pooling)
