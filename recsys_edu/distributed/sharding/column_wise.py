"""Column-wise: blocks of columns, one per rank.

    user, 6 rows x 8 columns, over two ranks:         rank 0 holds        rank 1 holds
                                                        columns 0:4         columns 4:8    (all rows each)

    rank 0's batch: bags [2, 5] [0]                   every owner needs every id: the batch is copied to each
    rank 1's batch: bags [5]    []

    ids sent          to rank 0       to rank 1       each owner pools its columns; the asking rank puts them
      from rank 0     [2, 5] [0]      [2, 5] [0]      side by side:
      from rank 1     [5]    []       [5]    []         rank 0:  [w[2,0:4] + w[5,0:4] | w[2,4:8] + w[5,4:8]],  ...

When: wide tables, and tables whose lookups are the bottleneck: work and memory spread exactly evenly,
whatever the ids are.
Costs: ids travel once per column block; outputs as in table-wise, D per bag in all. A row is read in narrower
pieces, and row-wise optimizers keep one number per row *per block*. Cuts are multiples of 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, pool
from recsys_edu.distributed.sharding.tiling import Shard


def column_blocks(table: str, num_columns: int, num_blocks: int, widths: Sequence[int] | None = None) -> list[range]:
    """`num_blocks` column ranges of equal width, or of the given `widths`.

    >>> column_blocks("user", 16, 2)
    [range(0, 8), range(8, 16)]

    Raises:
        ValueError: the width does not divide evenly, or `widths` do not add up to it.
    """
    if widths is None:
        if num_blocks < 1 or num_columns % num_blocks:
            raise ValueError(
                f"table {table!r}: {num_columns} columns cannot be divided evenly into {num_blocks} blocks; "
                "choose another number of ranks, or give each block's width"
            )
        widths = [num_columns // num_blocks] * num_blocks
    if len(widths) != num_blocks or sum(widths) != num_columns or min(widths) < 1:
        raise ValueError(
            f"table {table!r}: widths {list(widths)}: expected {num_blocks} widths >= 1 that add up to the table's "
            f"{num_columns} columns"
        )
    return [range(sum(widths[:i]), sum(widths[: i + 1])) for i in range(num_blocks)]


def column_wise_shards(
    table: str, num_rows: int, num_columns: int, ranks: Sequence[int], widths: Sequence[int] | None = None
) -> list[Shard]:
    """Column blocks on `ranks` in that order (a rank may come twice), equal or of the given `widths`.

    >>> [(s.columns, s.rank) for s in column_wise_shards("user", 6, 8, ranks=[0, 1])]
    [(range(0, 4), 0), (range(4, 8), 1)]
    """
    blocks = column_blocks(table, num_columns, len(ranks), widths)
    return [Shard(table, range(num_rows), columns, rank) for columns, rank in zip(blocks, ranks)]


def column_wise_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    num_ranks = len(batches)

    # 1. Every rank sends its whole batch once per column block.
    sent = [[batch for _ in shards] for batch in batches]

    # 2. Every owner looks up narrow rows: all ids, its own columns.
    parts = [
        [pool(*sent[source][i], weight_RD[:, shard.columns.start : shard.columns.stop]) for source in range(num_ranks)]
        for i, shard in enumerate(shards)
    ]

    # 3. The pieces go back, and the asking rank puts them side by side in column order.
    order = sorted(range(len(shards)), key=lambda i: shards[i].columns.start)
    sums = [torch.cat([parts[i][source] for i in order], dim=1) for source in range(num_ranks)]
    return finish(sums, batches, pooling)
