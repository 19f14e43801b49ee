"""A KeyedJaggedTensor as plain tensors to send to other ranks, and back from what arrived.

    rank 0 sends  lengths | values            keys a b -> rank 0,  key c -> rank 1
    rank 0 gets   [a b] from rank 0, [a b] from rank 1: rank-major
    recat         makes it key-major: a from both ranks, b from both ranks

Shapes: K keys, W ranks, B_r batch of rank r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.kernels.jagged_ops import complete_cumsum, permute_1d, permute_2d
from recsys_edu.sparse.checks import JaggedInputError

if TYPE_CHECKING:
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor


def dist_labels(kjt: KeyedJaggedTensor) -> list[str]:
    """Names of the tensors that travel."""
    labels = ["lengths", "values"]
    if kjt.variable_stride_per_key():
        labels.append("strides")
    if kjt.weights_or_none() is not None:
        labels.append("weights")
    return labels


def dist_splits(kjt: KeyedJaggedTensor, key_splits: list[int]) -> list[list[int]]:
    """For each label, the number of elements for each rank."""
    if sum(key_splits) != len(kjt.keys()):
        raise JaggedInputError(f"key_splits {key_splits} deal out {sum(key_splits)} keys of {len(kjt.keys())}.")
    splits = {
        "lengths": _sum_per_segment(kjt.stride_per_key(), key_splits),
        "values": _sum_per_segment(kjt.length_per_key(), key_splits),
        "strides": list(key_splits),
    }
    splits["weights"] = splits["values"]
    return [splits[label] for label in dist_labels(kjt)]


def dist_tensors(kjt: KeyedJaggedTensor) -> list[Tensor]:
    """The tensors that travel, in the order of the labels."""
    tensors = [kjt.flat_lengths(), kjt.values()]
    if kjt.variable_stride_per_key():
        tensors.append(torch.tensor(kjt.stride_per_key(), device=kjt.device()))
    if (weights := kjt.weights_or_none()) is not None:
        tensors.append(weights)
    return tensors


def dist_init(
    keys: list[str],
    tensors: list[Tensor],
    variable_stride_per_key: bool,
    num_workers: int,
    recat: Tensor | None,
    stride_per_rank: list[int] | None,
    stagger: int = 1,
) -> KeyedJaggedTensor:
    """Put together what the ranks sent; see KeyedJaggedTensor.dist_init."""
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor

    lengths, values, *rest = tensors
    strides_WK = rest.pop(0) if variable_stride_per_key else None
    weights = rest.pop(0) if rest else None
    if strides_WK is not None:
        if recat is not None:
            lengths, values, weights = _permute_blocks(recat, strides_WK, lengths, values, weights)
        strides_KW = strides_WK.view(num_workers, len(keys)).T
        if stagger > 1:
            # Ranks were interleaved over hosts: rank 0 of every host first, then rank 1 of every host, ...
            order = torch.arange(num_workers, device=strides_KW.device).view(stagger, -1).T.reshape(-1)
            strides_KW = strides_KW[:, order]
        # host sync: batch sizes of the other ranks
        strides = strides_KW.tolist()
        return KeyedJaggedTensor(keys, values, weights, lengths, stride_per_key_per_rank=strides).sync()
    if stride_per_rank is None:
        raise JaggedInputError("dist_init of a fixed stride needs stride_per_rank, the batch size of each rank.")
    if recat is not None and recat.numel():
        num_blocks = num_workers * len(keys)
        if recat.numel() == lengths.numel():
            lengths, values, weights = permute_1d(recat, lengths, values, weights)
        elif len(set(stride_per_rank)) == 1:
            lengths_LB, values, weights = permute_2d(recat, lengths.view(num_blocks, -1), values, weights)
            lengths = lengths_LB.reshape(-1)
        else:
            rows = torch.tensor(stride_per_rank, device=lengths.device).repeat_interleave(len(keys))
            lengths, values, weights = _permute_blocks(recat, rows, lengths, values, weights)
    return KeyedJaggedTensor(keys, values, weights, lengths, stride=sum(stride_per_rank)).sync()


def _permute_blocks(
    recat: Tensor, rows_per_block: Tensor, lengths: Tensor, values: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Permute blocks of lengths, and the values that belong to them."""
    block_starts = complete_cumsum(rows_per_block).long()
    values_per_block = complete_cumsum(lengths)[block_starts].diff()
    _, new_lengths, _ = permute_1d(recat, rows_per_block, lengths, None, lengths.numel())
    _, new_values, new_weights = permute_1d(recat, values_per_block, values, weights, values.size(0))
    return new_lengths, new_values, new_weights


def _sum_per_segment(numbers: list[int], segments: list[int]) -> list[int]:
    sums, end = [], 0
    for size in segments:
        start, end = end, end + size
        sums.append(sum(numbers[start:end]))
    return sums
