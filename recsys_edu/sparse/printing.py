"""`str()` of the three ragged classes, in TorchRec's form, and the one-line `repr()`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from recsys_edu.sparse.keyed import KeyedTensor


def rows_string(values: Tensor, offsets: list[int]) -> str:
    """`[[1, 2], [], [3]]`: the values between each two consecutive offsets.

    Raises:
        ValueError: values of more than two dimensions have no string form.
    """
    if values.dim() > 2:
        raise ValueError(f"Only 1-D and 2-D values can be printed, got shape {tuple(values.shape)}.")
    # host sync: printing needs the numbers
    numbers = values.tolist()
    return str([numbers[start:end] for start, end in itertools.pairwise(offsets)])


def jagged_string(values: Tensor, weights: Tensor | None, offsets: list[int]) -> str:
    """The body of a JaggedTensor's `str()`."""
    if weights is None:
        body = f"    {rows_string(values, offsets)}\n"
    else:
        body = f'    "values": {rows_string(values, offsets)},\n    "weights": {rows_string(weights, offsets)}\n'
    return "JaggedTensor({\n" + body + "})\n"


def keyed_jagged_string(
    keys: list[str], values: Tensor, weights: Tensor | None, offsets: list[int], key_starts: list[int]
) -> str:
    """The body of a KeyedJaggedTensor's `str()`; `key_starts` says where each key's rows begin."""
    if not keys:
        return "KeyedJaggedTensor()\n"
    entries = []
    for key, start, end in zip(keys, key_starts, key_starts[1:]):
        rows = offsets[start : end + 1]
        entry = f'    "{key}": '
        if weights is None:
            entry += rows_string(values, rows)
        else:
            entry += f'{{\n        "values": {rows_string(values, rows)},\n'
            entry += f'        "weights": {rows_string(weights, rows)}\n    }}'
        entries.append(entry)
    return "KeyedJaggedTensor({\n" + ",\n".join(entries) + "\n})\n"


def keyed_string(keyed: KeyedTensor) -> str:
    """The body of a KeyedTensor's `str()`."""
    if not keyed.keys():
        return "KeyedTensor()\n"
    # host sync: printing needs the numbers
    entries = [f'    "{key}": {tensor.tolist()}' for key, tensor in keyed.to_dict().items()]
    return "KeyedTensor({\n" + ",\n".join(entries) + "\n})\n"


def tensor_summary(values: Tensor) -> str:
    """`torch.int64[3]` or `torch.float32[2, 8] on cuda:0`."""
    where = "" if values.device.type == "cpu" else f" on {values.device}"
    return f"{values.dtype}{list(values.shape)}{where}"
