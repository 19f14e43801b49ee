"""The few steps all `..._by_hand` functions share: cut a jagged batch by a mask, pool it, divide for a mean.

They run a whole world of W ranks in one process. `batches[w]` is what rank w was given, one feature's
`(values_N, lengths_B)`; a plain list of lists stands for the wire: `sent[source][destination]`.

Legend: B bags of this rank's batch, N ids, R rows, D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def pool(ids_N: Tensor, lengths_B: Tensor, weight_RD: Tensor) -> Tensor:
    """Sum the rows of each bag: `[B, D]`; a bag without ids gives zeros."""
    offsets = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
    if weight_RD.shape[0] == 0:  # a rank that owns no rows is sent no ids
        return weight_RD.new_zeros(len(lengths_B), weight_RD.shape[1])
    return F.embedding_bag(ids_N.long(), weight_RD, offsets.long(), mode="sum", include_last_offset=True)


def keep_rows(batch: Batch, rows: range) -> Batch:
    """The ids that fall into `rows`, counted from its start, with new lengths; the number of bags stays.

    >>> values, lengths = keep_rows((torch.tensor([4, 0, 7]), torch.tensor([2, 1])), range(4, 8))
    >>> values.tolist(), lengths.tolist()
    ([0, 3], [1, 1])
    """
    values_N, lengths_B = batch
    bag_N = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B.long())
    mask_N = (values_N >= rows.start) & (values_N < rows.stop)
    return values_N[mask_N] - rows.start, torch.bincount(bag_N[mask_N], minlength=len(lengths_B))


def finish(sums: list[Tensor], batches: list[Batch], pooling: str) -> list[Tensor]:
    """Turn sums into means where asked: every rank divides by the lengths of its own batch."""
    if pooling == "sum":
        return sums
    if pooling != "mean":
        raise ValueError(f"pooling is {pooling!r}: expected 'sum' or 'mean'")
    return [sum_BD / lengths_B.clamp(min=1).unsqueeze(1) for sum_BD, (_, lengths_B) in zip(sums, batches)]
