"""Grid: columns over hosts, and in each host rows over its ranks.

    user, 6 rows x 8 columns, on two hosts with two ranks each:

                     columns 0:4    columns 4:8
                       host 0         host 1
        rows 0:3       rank 0         rank 2
        rows 3:6       rank 1         rank 3

    rank 0's batch: bags [2, 5] [0]      id 2 travels to ranks 0 and 2, id 5 (there: 2) to ranks 1 and 3
    inside each host the parts are added; rank 0 then puts the hosts' sums side by side:
        [w[2,0:4] + w[5,0:4] | w[2,4:8] + w[5,4:8]],  ...

When: a table too large for one host, and wide enough to cut.
Costs: ids travel once per host used; between hosts one pooled row of D per bag in all, as if the table lay on one
rank; the adding of parts happens over the fast links inside each host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish
from recsys_edu.distributed.sharding.column_wise import column_blocks
from recsys_edu.distributed.sharding.row_wise import row_blocks
from recsys_edu.distributed.sharding.table_row_wise import host_ranks, sum_inside_host
from recsys_edu.distributed.sharding.tiling import Shard


def grid_shards(
    table: str, num_rows: int, num_columns: int, host_indexes: Sequence[int], local_size: int
) -> list[Shard]:
    """One column block per host of `host_indexes`, cut into row blocks over that host's ranks.

    >>> [(s.rows, s.columns, s.rank) for s in grid_shards("user", 6, 8, host_indexes=[0, 1], local_size=2)][:3]
    [(range(0, 3), range(0, 4), 0), (range(3, 6), range(0, 4), 1), (range(0, 3), range(4, 8), 2)]
    """
    return [
        Shard(table, rows, columns, rank)
        for columns, host in zip(column_blocks(table, num_columns, len(host_indexes)), host_indexes)
        for rows, rank in zip(row_blocks(num_rows, local_size), host_ranks(host, local_size))
    ]


def grid_by_hand(batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum") -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    # 1. Each column block lies on one host, by rows: exactly table-row-wise, of a narrower table.
    blocks = sorted({(shard.columns.start, shard.columns.stop) for shard in shards})
    block_sums = []
    for start, stop in blocks:
        block_shards = [shard for shard in shards if shard.columns == range(start, stop)]
        sums, _ = sum_inside_host(batches, weight_RD, block_shards)
        block_sums.append(sums)
    # 2. The asking rank puts the hosts' sums side by side.
    outputs = [torch.cat([sums[source] for sums in block_sums], dim=1) for source in range(len(batches))]
    return finish(outputs, batches, pooling)
