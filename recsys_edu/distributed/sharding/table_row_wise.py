"""Table-row-wise: blocks of rows, over the ranks of one host.

    user, 6 rows x 4 columns, on host 1 of two hosts with two ranks each:

        host 0:   rank 0  (nothing)      rank 1  (nothing)
        host 1:   rank 2  rows 0:3       rank 3  rows 3:6

    rank 0's batch: bags [2, 5] [0]      id 2 and id 0 travel to rank 2, id 5 (there: 2) to rank 3

    two hops back:  1. inside host 1, the parts that belong to rank 0 meet on rank 2, those of rank 1 on rank 3
                       (and so on, by position in the host), and are added:  w[2] + w[5],  w[0]
                    2. across hosts, rank 2 sends rank 0 the sum: one row per bag, not one per owner

When: a table too large for one rank but not for one host. The parts are added where links are fast.
Costs: ids as in row-wise. Between hosts one pooled row of D per bag, as in table-wise; row-wise over all ranks
would send a part from every rank. Inside the host `local_size` parts are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, keep_rows, pool
from recsys_edu.distributed.sharding.row_wise import row_wise_shards
from recsys_edu.distributed.sharding.tiling import Shard


def host_ranks(host_index: int, local_size: int) -> range:
    """The ranks of a host that runs `local_size` of them: `host_ranks(1, 2)` is `range(2, 4)`."""
    return range(host_index * local_size, (host_index + 1) * local_size)


def table_row_wise_shards(table: str, num_rows: int, num_columns: int, host_index: int, local_size: int) -> list[Shard]:
    """Row blocks over the ranks of host `host_index`.

    >>> [(s.rows, s.rank) for s in table_row_wise_shards("user", 6, 4, host_index=1, local_size=2)]
    [(range(0, 3), 2), (range(3, 6), 3)]
    """
    return row_wise_shards(table, num_rows, num_columns, host_ranks(host_index, local_size))


def sum_inside_host(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard]
) -> tuple[list[Tensor], dict[int, list[int]]]:
    """The sums `[B, d]` of one column block whose rows lie on one host, and which rank made which.

    Returns every asking rank's sums, and `{rank of the host: [asking ranks whose parts it added]}`.
    """
    columns = shards[0].columns
    first_hop: dict[int, dict[int, list[Tensor]]] = {shard.rank: {} for shard in shards}
    for source, batch in enumerate(batches):
        # 1. Ids go to the owner of their row, all on one host; every owner pools its part of every bag.
        parts = []
        for shard in shards:
            rows_rd = weight_RD[shard.rows.start : shard.rows.stop, columns.start : columns.stop]
            parts.append(pool(*keep_rows(batch, shard.rows), rows_rd))
        # 2. First hop: the parts meet on the owner at the same place in its host as the asking rank has in its own.
        meeting_rank = shards[source % len(shards)].rank
        first_hop[meeting_rank][source] = parts
    # 3. They are added there. Second hop: one sum for each asking rank crosses between hosts.
    sums = [weight_RD.new_empty(0)] * len(batches)
    for parts_by_source in first_hop.values():
        for source, parts in parts_by_source.items():
            sums[source] = torch.stack(parts).sum(dim=0)
    return sums, {rank: list(parts_by_source) for rank, parts_by_source in first_hop.items()}


def table_row_wise_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    sums, _ = sum_inside_host(batches, weight_RD, shards)
    return finish(sums, batches, pooling)
