"""The four operations on ragged tensors that everything else is made of, each written twice.

The `_pytorch` versions are the specification: a few lines of indexing that run on any device and any
dtype. The FBGEMM versions do the same in one kernel. The public functions pick: FBGEMM where it is in use
and covers the dtypes at hand, PyTorch otherwise; the results are equal, element for element.

    lengths   2 0 1        offsets   0 2 2 3        values   a b | | c

Shapes: F segments in, L segments out, B batch, N values, M values out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.kernels.backend import use_fbgemm

# FBGEMM's CPU kernels know these and refuse the rest (float64 values, float16 weights, int16, bool ...).
_FBGEMM_INTEGERS = (torch.int32, torch.int64)
_FBGEMM_VALUES = (*_FBGEMM_INTEGERS, torch.float32)
_FBGEMM_PADDED = (*_FBGEMM_VALUES, torch.float16, torch.bfloat16)


def complete_cumsum(lengths_N: Tensor) -> Tensor:
    """Offsets of segments whose lengths are given: a running sum with a leading 0, in the same dtype.

    >>> complete_cumsum(torch.tensor([2, 0, 1]))
    tensor([0, 2, 2, 3])
    """
    if lengths_N.dtype in _FBGEMM_INTEGERS and use_fbgemm(lengths_N.device):
        return torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_N)
    return complete_cumsum_pytorch(lengths_N)


def complete_cumsum_pytorch(lengths_N: Tensor) -> Tensor:
    return torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0, dtype=lengths_N.dtype)])


def permute_2d(
    permute_L: Tensor,
    lengths_FB: Tensor,
    values_N: Tensor,
    weights_N: Tensor | None = None,
    num_values: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pick features of a ragged batch in a new order: any subset, repeats allowed.

    >>> lengths = torch.tensor([[1, 0], [2, 1]])            # feature 0: [a] []   feature 1: [b c] [d]
    >>> permute_2d(torch.tensor([1, 0, 1]), lengths, torch.tensor([10, 20, 30, 40]))[:2]
    (tensor([[2, 1],
            [1, 0],
            [2, 1]]), tensor([20, 30, 40, 10, 20, 30, 40]))

    Args:
        permute_L: for each output row, the row of `lengths_FB` to take (int32 or int64).
        lengths_FB: number of values per feature and row of the batch.
        values_N, weights_N: concatenated feature by feature, first dim N; any dtype.
        num_values: the number of values in the result, if known; saves a wait for a CUDA device.

    Returns:
        lengths [L, B], values [M], weights [M] or None.
    """
    if _fbgemm_permutes(lengths_FB, values_N, weights_N):
        return torch.ops.fbgemm.permute_2D_sparse_data(permute_L.int(), lengths_FB, values_N, weights_N, num_values)
    return permute_2d_pytorch(permute_L, lengths_FB, values_N, weights_N, num_values)


def permute_2d_pytorch(
    permute_L: Tensor,
    lengths_FB: Tensor,
    values_N: Tensor,
    weights_N: Tensor | None = None,
    num_values: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _, values, weights = permute_1d_pytorch(permute_L, lengths_FB.sum(1), values_N, weights_N, num_values)
    return lengths_FB[permute_L], values, weights


def permute_1d(
    permute_L: Tensor,
    lengths_F: Tensor,
    values_N: Tensor,
    weights_N: Tensor | None = None,
    num_values: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pick segments of any length in a new order: any subset, repeats allowed.

    >>> permute_1d(torch.tensor([2, 0]), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 2, 3, 3, 3]))[:2]
    (tensor([3, 1]), tensor([3, 3, 3, 1]))

    Args and returns as in `permute_2d`, with one length per segment.
    """
    if _fbgemm_permutes(lengths_F, values_N, weights_N):
        return torch.ops.fbgemm.permute_1D_sparse_data(permute_L.int(), lengths_F, values_N, weights_N, num_values)
    return permute_1d_pytorch(permute_L, lengths_F, values_N, weights_N, num_values)


def permute_1d_pytorch(
    permute_L: Tensor,
    lengths_F: Tensor,
    values_N: Tensor,
    weights_N: Tensor | None = None,
    num_values: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    lengths_L = lengths_F[permute_L]
    old_starts_L = complete_cumsum_pytorch(lengths_F)[:-1][permute_L]
    new_starts_L = complete_cumsum_pytorch(lengths_L)[:-1]
    # Value m of the result sits in segment l and comes from old_start[l] + (m - new_start[l]).
    # host sync: the number of values in the result, where the caller does not know it
    shift_M = torch.repeat_interleave(old_starts_L - new_starts_L, lengths_L, output_size=num_values)
    source_M = torch.arange(shift_M.numel(), device=shift_M.device) + shift_M
    return lengths_L, values_N[source_M], None if weights_N is None else weights_N[source_M]


def jagged_to_padded_dense(values_N: Tensor, offsets: Tensor, max_length: int, padding_value: float = 0.0) -> Tensor:
    """A ragged batch as a matrix: each row cut, or filled with `padding_value`, to `max_length`.

    >>> jagged_to_padded_dense(torch.tensor([1., 2., 3.]), torch.tensor([0, 1, 1, 3]), 2, -1.0)
    tensor([[ 1., -1.],
            [-1., -1.],
            [ 2.,  3.]])

    Args:
        values_N: first dim N is the ragged one; further dims are kept.
        offsets: [B + 1], where each row begins in `values_N`.

    Returns:
        [B, max_length, ...] in the dtype of `values_N`.
    """
    if values_N.dtype in _FBGEMM_PADDED and values_N.dim() <= 2 and use_fbgemm(values_N.device):
        return torch.ops.fbgemm.jagged_to_padded_dense(values_N, [offsets], [max_length], padding_value)
    return jagged_to_padded_dense_pytorch(values_N, offsets, max_length, padding_value)


def jagged_to_padded_dense_pytorch(
    values_N: Tensor, offsets: Tensor, max_length: int, padding_value: float = 0.0
) -> Tensor:
    batch_size = offsets.numel() - 1
    if values_N.size(0) == 0:
        return values_N.new_full((batch_size, max_length, *values_N.shape[1:]), padding_value)
    column = torch.arange(max_length, device=values_N.device)
    source = offsets[:-1, None] + column
    filled = source < offsets[1:, None]
    dense = values_N[source.clamp(max=values_N.size(0) - 1)]
    filled = filled.view(batch_size, max_length, *[1] * (values_N.dim() - 1))
    return torch.where(filled, dense, torch.full((), padding_value, dtype=values_N.dtype, device=values_N.device))


def _fbgemm_permutes(lengths: Tensor, values_N: Tensor, weights_N: Tensor | None) -> bool:
    """Whether FBGEMM's permute kernels take these tensors.

    Its backward assumes that no segment is taken twice, so tensors that carry gradients go the PyTorch way.
    """
    return (
        values_N.dtype in _FBGEMM_VALUES
        and values_N.dim() == 1
        and lengths.dtype in _FBGEMM_INTEGERS
        and not values_N.requires_grad
        and (
            weights_N is None
            or (weights_N.dtype == torch.float32 and weights_N.dim() == 1 and not weights_N.requires_grad)
        )
        and use_fbgemm(values_N.device)
    )
