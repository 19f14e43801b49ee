"""Table-column-wise: blocks of columns, over the ranks of one host.

    user, 6 rows x 8 columns, on host 1 of two hosts with two ranks each:

        host 0:   rank 0  (nothing)        rank 1  (nothing)
        host 1:   rank 2  columns 0:4      rank 3  columns 4:8

    rank 0's batch: bags [2, 5] [0]        cross to host 1 and are needed by both of its ranks
    rank 0's answer, side by side:         [rank 2's 4 columns | rank 3's 4 columns]

When: a wide table, on hosts whose inner links are much faster than those between them: all the copies of an id
are needed on one host, which could fetch it over the slow link once.
Costs: as column-wise, ids once per column block. (This engine sends each block's ids directly.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, pool
from recsys_edu.distributed.sharding.column_wise import column_wise_shards
from recsys_edu.distributed.sharding.table_row_wise import host_ranks
from recsys_edu.distributed.sharding.tiling import Shard


def table_column_wise_shards(
    table: str, num_rows: int, num_columns: int, host_index: int, local_size: int
) -> list[Shard]:
    """Equal column blocks over the ranks of host `host_index`.

    >>> [(s.columns, s.rank) for s in table_column_wise_shards("user", 6, 8, host_index=1, local_size=2)]
    [(range(0, 4), 2), (range(4, 8), 3)]
    """
    return column_wise_shards(table, num_rows, num_columns, host_ranks(host_index, local_size))


def table_column_wise_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`.

    Written as the host sees it: the ids arrive once, are fanned out inside, and the answer leaves side by side.
    """
    by_column = sorted(shards, key=lambda shard: shard.columns.start)
    sums = []
    for batch in batches:
        # 1. The batch crosses to the host of the table.
        ids_N, lengths_B = batch
        # 2. Inside the host every rank gets all ids and pools its own columns.
        pieces = [pool(ids_N, lengths_B, weight_RD[:, s.columns.start : s.columns.stop]) for s in by_column]
        # 3. The asking rank puts what comes back side by side.
        sums.append(torch.cat(pieces, dim=1))
    return finish(sums, batches, pooling)
