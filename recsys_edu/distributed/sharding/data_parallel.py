"""Data-parallel: a copy of the table on every rank.

    user, 6 rows x 4 columns, on two ranks:           rank 0 holds        rank 1 holds
                                                        rows 0:6            rows 0:6

    rank 0's batch: bags [2, 5] [0]                   no id travels; each rank looks up its own batch:
    rank 1's batch: bags [5]    []                      rank 0: w[2] + w[5], w[0]      rank 1: w[5], 0

    backward: the copies stay equal because every rank applies the same gradient, the average over ranks of
    the whole [6, 4] gradient (an all-reduce, done by DistributedDataParallel)

When: small tables, read by every example: a table of 100 rows is cheaper to copy than to ask for.
Costs: no communication forward; backward all-reduces R x D numbers however few rows were used, and every rank
keeps the whole table and its optimizer state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch, finish, pool
from recsys_edu.distributed.sharding.tiling import Shard


def data_parallel_shards(table: str, num_rows: int, num_columns: int) -> list[Shard]:
    """No rectangles: the table is not cut but replicated, and its lanes stay on the rank that asks.

    >>> data_parallel_shards("user", 6, 4)
    []
    """
    del table, num_rows, num_columns  # the same arguments as the other constructors
    return []


def data_parallel_by_hand(
    batches: list[Batch], weight_RD: Tensor, shards: list[Shard], pooling: str = "sum"
) -> list[Tensor]:
    """Every rank's pooled output `[B, D]`, for `batches[w]` = rank w's `(values_N, lengths_B)`."""
    assert not shards, "a data-parallel table has no shards"
    return finish([pool(ids_N, lengths_B, weight_RD) for ids_N, lengths_B in batches], batches, pooling)


def average_gradients_by_hand(copies: list[Tensor]) -> None:
    """What DistributedDataParallel does after backward: give every rank's copy the mean of all the gradients."""
    mean_RD = torch.stack([copy.grad for copy in copies]).mean(dim=0)
    for copy in copies:
        copy.grad = mean_RD.clone()
