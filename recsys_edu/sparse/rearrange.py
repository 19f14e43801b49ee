"""How a KeyedJaggedTensor is split, joined, permuted and taken apart by key.

Plain functions behind the methods of the same names. All of them keep weights, variable strides (VBE) and
inverse indices with their keys.

Shapes: K keys, B stride, W ranks, N values in all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.kernels.jagged_ops import permute_1d, permute_2d
from recsys_edu.sparse.checks import JaggedInputError
from recsys_edu.sparse.jagged import JaggedTensor, trusted_jagged

if TYPE_CHECKING:
    from recsys_edu.sparse.keyed_jagged import InverseIndices, KeyedJaggedTensor


def split(kjt: KeyedJaggedTensor, segments: list[int]) -> list[KeyedJaggedTensor]:
    """Consecutive keys into parts; see KeyedJaggedTensor.split."""
    from recsys_edu.sparse.keyed_jagged import trusted_keyed

    keys = kjt.keys()
    if sum(segments) > len(keys):
        raise IndexError(f"split({segments}) asks for {sum(segments)} keys, but there are {len(keys)}: {keys}.")
    lengths = kjt.lengths().reshape(-1)
    length_per_key, offset_per_key = kjt.length_per_key(), kjt.offset_per_key()
    starts = kjt.lengths_offset_per_key()
    variable = kjt.variable_stride_per_key()
    parts = []
    end = 0
    for size in segments:
        start, end = end, end + size
        part_keys = keys[start:end]
        rows = slice(starts[start], starts[end])
        data = slice(offset_per_key[start], offset_per_key[end])
        parts.append(
            trusted_keyed(
                part_keys,
                kjt._values[data],
                None if kjt._weights is None else kjt._weights[data],
                lengths[rows],
                None,
                None if variable else kjt.stride(),
                kjt.stride_per_key_per_rank()[start:end] if variable else None,
                select_inverse(kjt, part_keys),
                length_per_key[start:end],
            )
        )
    return parts


def concat(kjt_list: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """Join along keys; see KeyedJaggedTensor.concat."""
    from recsys_edu.sparse.keyed_jagged import trusted_keyed

    if not kjt_list:
        raise JaggedInputError("concat needs at least one KeyedJaggedTensor, got an empty list.")
    weighted = [kjt.weights_or_none() is not None for kjt in kjt_list]
    if any(weighted) != all(weighted):
        keys = [kjt.keys() for kjt, has in zip(kjt_list, weighted) if not has]
        raise JaggedInputError(f"concat cannot join weighted and unweighted parts; without weights: keys {keys}.")
    parts = [kjt for kjt in kjt_list if kjt.keys()] or kjt_list[:1]
    variable = [kjt.variable_stride_per_key() for kjt in parts]
    if any(variable) != all(variable):
        raise JaggedInputError("concat cannot join parts of fixed and of variable stride per key.")
    if not all(variable) and len({kjt.stride() for kjt in parts}) > 1:
        strides = [(kjt.keys(), kjt.stride()) for kjt in parts]
        raise JaggedInputError(f"concat needs one stride (batch size) in all parts, got (keys, stride) {strides}.")
    known = all(kjt.length_per_key_or_none() is not None for kjt in parts)
    return trusted_keyed(
        [key for kjt in parts for key in kjt._keys],
        torch.cat([kjt.values() for kjt in parts]),
        torch.cat([kjt.weights() for kjt in parts]) if all(weighted) else None,
        torch.cat([kjt.lengths().reshape(-1) for kjt in parts]),
        None,
        None if any(variable) else parts[0].stride(),
        [row for kjt in parts for row in kjt.stride_per_key_per_rank()] if any(variable) else None,
        _join_inverse(parts),
        [length for kjt in parts for length in kjt.length_per_key()] if known else None,
    )


def permute(kjt: KeyedJaggedTensor, indices: list[int], indices_tensor: Tensor | None = None) -> KeyedJaggedTensor:
    """Pick keys by position; see KeyedJaggedTensor.permute."""
    from recsys_edu.sparse.keyed_jagged import trusted_keyed

    keys = kjt.keys()
    for index in indices:
        if not 0 <= index < len(keys):
            raise IndexError(f"permute asks for key number {index}, but there are {len(keys)} keys: {keys}.")
    if indices_tensor is None:
        indices_tensor = torch.tensor(indices, dtype=torch.int32, device=kjt.device())
    known = kjt.length_per_key_or_none()
    length_per_key = None if known is None else [known[index] for index in indices]
    num_values = None if length_per_key is None else sum(length_per_key)
    strides = None
    if kjt.variable_stride_per_key():
        all_strides = kjt.stride_per_key_per_rank()
        strides = [all_strides[index] for index in indices]
        rows_K = torch.tensor(kjt.stride_per_key(), device=kjt.lengths().device)
        _, lengths, _ = permute_1d(indices_tensor, rows_K, kjt.lengths(), None, sum(map(sum, strides)))
        starts_K = torch.tensor(kjt.lengths_offset_per_key(), device=kjt.lengths().device)
        values_per_key_K = kjt.offsets()[starts_K].diff()
        _, values, weights = permute_1d(indices_tensor, values_per_key_K, kjt.values(), kjt._weights, num_values)
    else:
        lengths_KB = kjt.lengths().reshape(len(keys), kjt.stride())
        lengths, values, weights = permute_2d(indices_tensor, lengths_KB, kjt.values(), kjt._weights, num_values)
    new_keys = [keys[index] for index in indices]
    return trusted_keyed(
        new_keys,
        values,
        weights,
        lengths.reshape(-1),
        None,
        None if strides is not None else kjt.stride(),
        strides,
        select_inverse(kjt, new_keys),
        length_per_key,
    )


def to_dict(kjt: KeyedJaggedTensor, compute_offsets: bool) -> dict[str, JaggedTensor]:
    """One JaggedTensor per key; see KeyedJaggedTensor.to_dict."""
    keys = kjt.keys()
    if not keys:
        return {}
    length_per_key = kjt.length_per_key()
    values = torch.split(kjt.values(), length_per_key)
    weights = [None] * len(keys) if kjt._weights is None else torch.split(kjt._weights, length_per_key)
    lengths = torch.split(kjt.lengths().reshape(-1), kjt.stride_per_key())
    offsets = _offsets_from_zero(kjt) if compute_offsets else [None] * len(keys)
    return {key: trusted_jagged(*parts) for key, *parts in zip(keys, values, weights, lengths, offsets)}


def _offsets_from_zero(kjt: KeyedJaggedTensor) -> list[Tensor]:
    """Each key's own offsets: its window of the common ones, less the value it begins with."""
    offsets = kjt.offsets()
    if not kjt.variable_stride_per_key() and kjt.stride() > 0:
        windows_KB = offsets.unfold(0, kjt.stride() + 1, kjt.stride())  # neighbours share their border
        return list((windows_KB - windows_KB[:, :1]).unbind(0))
    starts = kjt.lengths_offset_per_key()
    return [offsets[first : last + 1] - offsets[first] for first, last in pairwise(starts)]


def from_jt_dict(jt_dict: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
    """Join features in dict order; see KeyedJaggedTensor.from_jt_dict."""
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor, trusted_keyed

    if not jt_dict:
        return KeyedJaggedTensor.empty()
    parts = list(jt_dict.values())
    weighted = [jt.weights_or_none() is not None for jt in parts]
    if any(weighted) != all(weighted):
        without = [key for key, has in zip(jt_dict, weighted) if not has]
        raise JaggedInputError(f"from_jt_dict needs weights for all keys or for none; without: {without}.")
    rows = [jt.lengths().numel() for jt in parts]
    variable = len(set(rows)) > 1
    return trusted_keyed(
        list(jt_dict),
        torch.cat([jt.values() for jt in parts]),
        torch.cat([jt.weights() for jt in parts]) if all(weighted) else None,
        torch.cat([jt.lengths() for jt in parts]),
        None,
        None if variable else rows[0],
        [[count] for count in rows] if variable else None,
        None,
        [jt.values().size(0) for jt in parts],
    )


def select_inverse(kjt: KeyedJaggedTensor, keys: list[str]) -> InverseIndices | None:
    """The inverse indices of some keys: their rows of the matrix, in the order of `keys`."""
    inverse = kjt.inverse_indices_or_none()
    if inverse is None or inverse[0] == keys:
        return inverse
    row_of = {key: row for row, key in enumerate(inverse[0])}
    rows = torch.tensor([row_of[key] for key in keys], dtype=torch.int64, device=inverse[1].device)
    return keys, inverse[1][rows]


def _join_inverse(parts: list[KeyedJaggedTensor]) -> InverseIndices | None:
    inverses = [kjt.inverse_indices_or_none() for kjt in parts]
    if any(inverse is None for inverse in inverses):
        return None
    return [key for keys, _ in inverses for key in keys], torch.cat([matrix for _, matrix in inverses])
