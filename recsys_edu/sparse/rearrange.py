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


def count_values_per_key(kjt: KeyedJaggedTensor) -> list[int]:
    """Number of values of each key, in one wait for the device."""
    if not kjt._keys:
        return []
    stride = None if kjt._strides is not None else kjt.stride()
    if stride == 0:
        return [0] * len(kjt._keys)
    if stride is not None and kjt._offsets is None:
        # host sync: values per key, from the lengths
        return kjt._lengths.reshape(len(kjt._keys), stride).sum(1).tolist()
    offsets = kjt.offsets()
    if stride is not None:
        starts = offsets[::stride]
    else:
        starts = offsets[torch.tensor(kjt.lengths_offset_per_key(), device=offsets.device)]
    # host sync: values per key, from the offsets at which keys begin
    offset_per_key = starts.tolist()
    kjt._offset_per_key = offset_per_key
    return [end - start for start, end in pairwise(offset_per_key)]


def split(kjt: KeyedJaggedTensor, segments: list[int]) -> list[KeyedJaggedTensor]:
    """Consecutive keys into parts; see KeyedJaggedTensor.split."""
    from recsys_edu.sparse.keyed_jagged import trusted_keyed

    keys = kjt.keys()
    if sum(segments) > len(keys):
        raise IndexError(f"split({segments}) asks for {sum(segments)} keys, but there are {len(keys)}: {keys}.")
    lengths = kjt.flat_lengths()
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
    num_weighted = sum(kjt._weights is not None for kjt in kjt_list)
    if num_weighted not in (0, len(kjt_list)):
        keys = [kjt.keys() for kjt in kjt_list if kjt._weights is None]
        raise JaggedInputError(f"concat cannot join weighted and unweighted parts; without weights: keys {keys}.")
    parts = [kjt for kjt in kjt_list if kjt._keys] or kjt_list[:1]
    first = parts[0]
    variable = first.variable_stride_per_key()
    for kjt in parts:
        if kjt.variable_stride_per_key() != variable:
            raise JaggedInputError("concat cannot join parts of fixed and of variable stride per key.")
        if not variable and kjt.stride() != first.stride():
            strides = [(kjt.keys(), kjt.stride()) for kjt in parts]
            raise JaggedInputError(f"concat needs one stride (batch size) in all parts, got (keys, stride) {strides}.")
    known = all(kjt._length_per_key is not None for kjt in parts)
    return trusted_keyed(
        _joined([kjt._keys for kjt in parts]),
        torch.cat([kjt._values for kjt in parts]),
        torch.cat([kjt.weights() for kjt in parts]) if num_weighted else None,
        torch.cat([kjt.flat_lengths() for kjt in parts]),
        None,
        None if variable else first.stride(),
        _joined([kjt.stride_per_key_per_rank() for kjt in parts]) if variable else None,
        _join_inverse(parts),
        _joined([kjt._length_per_key for kjt in parts]) if known else None,
    )


def permute(kjt: KeyedJaggedTensor, indices: list[int], indices_tensor: Tensor | None = None) -> KeyedJaggedTensor:
    """Pick keys by position; see KeyedJaggedTensor.permute."""
    from recsys_edu.sparse.keyed_jagged import trusted_keyed

    keys = kjt.keys()
    for index in indices:
        if not 0 <= index < len(keys):
            raise IndexError(f"permute asks for key number {index}, but there are {len(keys)} keys: {keys}.")
    known = kjt.length_per_key_or_none()
    if known is not None and kjt.device().type == "cpu" and not torch.compiler.is_compiling():
        lengths, values, weights = _permute_pieces(kjt, indices)
    else:
        lengths, values, weights = _permute_in_a_kernel(kjt, indices, indices_tensor)
    variable = kjt.variable_stride_per_key()
    new_keys = [keys[index] for index in indices]
    return trusted_keyed(
        new_keys,
        values,
        weights,
        lengths,
        None,
        None if variable else kjt.stride(),
        [kjt.stride_per_key_per_rank()[index] for index in indices] if variable else None,
        select_inverse(kjt, new_keys),
        None if known is None else [known[index] for index in indices],
    )


def _permute_pieces(kjt: KeyedJaggedTensor, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """On a CPU that knows where keys begin, one block copy per key beats a kernel that copies id by id."""

    def pick(tensor: Tensor, sizes: list[int]) -> Tensor:
        pieces = torch.split(tensor, sizes)
        return torch.cat([pieces[index] for index in indices]) if indices else tensor[:0]

    length_per_key = kjt.length_per_key()
    return (
        pick(kjt.flat_lengths(), kjt.stride_per_key()),
        pick(kjt.values(), length_per_key),
        None if kjt._weights is None else pick(kjt._weights, length_per_key),
    )


def _permute_in_a_kernel(
    kjt: KeyedJaggedTensor, indices: list[int], indices_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Elsewhere one kernel does all keys; it need not know where they begin."""
    if indices_tensor is None:
        indices_tensor = torch.tensor(indices, dtype=torch.int32, device=kjt.device())
    known = kjt.length_per_key_or_none()
    num_values = None if known is None else sum(known[index] for index in indices)
    if not kjt.variable_stride_per_key():
        lengths_KB = kjt.lengths().reshape(len(kjt.keys()), kjt.stride())
        lengths, values, weights = permute_2d(indices_tensor, lengths_KB, kjt.values(), kjt._weights, num_values)
        return lengths.reshape(-1), values, weights
    rows_K = torch.tensor(kjt.stride_per_key(), device=kjt.device())
    starts_K = torch.tensor(kjt.lengths_offset_per_key(), device=kjt.device())
    num_lengths = sum(kjt.stride_per_key()[index] for index in indices)
    _, lengths, _ = permute_1d(indices_tensor, rows_K, kjt.flat_lengths(), None, num_lengths)
    values_per_key_K = kjt.offsets()[starts_K].diff()
    _, values, weights = permute_1d(indices_tensor, values_per_key_K, kjt.values(), kjt._weights, num_values)
    return lengths, values, weights


def to_dict(kjt: KeyedJaggedTensor, compute_offsets: bool) -> dict[str, JaggedTensor]:
    """One JaggedTensor per key; see KeyedJaggedTensor.to_dict."""
    keys = kjt.keys()
    if not keys:
        return {}
    length_per_key = kjt.length_per_key()
    values = torch.split(kjt.values(), length_per_key)
    weights = [None] * len(keys) if kjt._weights is None else torch.split(kjt._weights, length_per_key)
    lengths = torch.split(kjt.flat_lengths(), kjt.stride_per_key())
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


def _joined(lists: list[list]) -> list:
    result = []
    for part in lists:
        result += part
    return result


def _join_inverse(parts: list[KeyedJaggedTensor]) -> InverseIndices | None:
    inverses = [kjt._inverse_indices for kjt in parts]
    if any(inverse is None for inverse in inverses):
        return None
    return [key for keys, _ in inverses for key in keys], torch.cat([matrix for _, matrix in inverses])
