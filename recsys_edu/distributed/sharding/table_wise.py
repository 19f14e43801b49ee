"""Table-wise: the whole table on one rank.

    user, 6 rows x 4 columns, on rank 1 of two:       rank 0 holds        rank 1 holds
                                                        (nothing)          rows 0:6, columns 0:4

    rank 0's batch: bags [2, 5] [0]                   every id of every rank travels to rank 1
    rank 1's batch: bags [5]    []

    ids sent          to rank 0    to rank 1          rank 1 looks up 4 bags and sends each back to its owner:
      from rank 0         -        [2, 5] [0]           to rank 0:  w[2] + w[5],  w[0]
      from rank 1         -        [5]    []            to rank 1:  w[5],         0

When: tables that fit on one rank, many of them: with as many tables as ranks the work spreads by itself.
Costs: ids travel once, one pooled row of D per bag comes back, from one rank. A table that is popular or large
makes its rank the slowest one, and nothing here can split it: see row_wise and column_wise.
"""

from __future__ import annotations

from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, pool
from recsys_edu.distributed.sharding.tiling import Shard


def table_wise_shards(table: str, num_rows: int, num_columns: int, rank: int) -> list[Shard]:
    """One rectangle, the whole table.

    >>> table_wise_shards("user", 6, 4, rank=1)
    [Shard(table='user', rows=range(0, 6), columns=range(0, 4), rank=1)]
    """
    return [Shard(table, range(num_rows), range(num_columns), rank)]


def table_wise_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    (shard,) = shards
    num_ranks = len(batches)

    # 1. Every rank sends its ids to the owner, and nobody else anything.
    sent: list[list[Batch | None]] = [[None] * num_ranks for _ in range(num_ranks)]
    for source in range(num_ranks):
        sent[source][shard.rank] = batches[source]

    # 2. The owner, alone, looks up what each rank asked for.
    answers = {source: pool(*sent[source][shard.rank], weight_RD) for source in range(num_ranks)}  # type: ignore[misc]

    # 3. Each answer goes back where its ids came from.
    return finish([answers[source] for source in range(num_ranks)], batches, pooling)
