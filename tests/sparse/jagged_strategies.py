"""Random jagged batches for hypothesis: empty rows, empty keys, no keys, weights, variable batch sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@st.composite
def rows_per_key(draw, max_keys: int = 4, variable: bool | None = None) -> dict[str, list[list[int]]]:
    """Plain Python: for each key a list of rows, each a list of ids."""
    num_keys = draw(st.integers(0, max_keys))
    is_variable = draw(st.booleans()) if variable is None else variable
    stride = draw(st.integers(0, 4))
    rows = {}
    for index in range(num_keys):
        count = draw(st.integers(0, 4)) if is_variable else stride
        row = st.lists(st.integers(0, 99), max_size=3)
        rows[f"f{index}"] = draw(st.lists(row, min_size=count, max_size=count))
    return rows


def parts_of(rows: dict[str, list[list[int]]], lengths_dtype: torch.dtype = torch.int64) -> dict:
    """Constructor arguments of the batch that `rows` describes."""
    lengths = torch.tensor([len(row) for key in rows.values() for row in key], dtype=lengths_dtype)
    values = torch.tensor([number for key in rows.values() for row in key for number in row], dtype=torch.int64)
    counts = [len(key) for key in rows.values()]
    parts = {"keys": list(rows), "values": values, "lengths": lengths}
    if len(set(counts)) > 1:
        parts["stride_per_key_per_rank"] = [[count] for count in counts]
    elif counts:
        parts["stride"] = counts[0]
    return parts


def kjt_of(rows: dict[str, list[list[int]]], weighted: bool = False, from_offsets: bool = False) -> KeyedJaggedTensor:
    parts = parts_of(rows)
    if weighted:
        parts["weights"] = torch.arange(parts["values"].numel(), dtype=torch.float32) / 8
    if from_offsets:
        lengths = parts.pop("lengths")
        parts["offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return KeyedJaggedTensor(**parts)


def rows_of(kjt: KeyedJaggedTensor) -> list[tuple[str, list[list[int]]]]:
    """Back to plain Python, by the lengths alone (keys may repeat)."""
    lengths, values = kjt.lengths().tolist(), kjt.values().tolist()
    result, row, start = [], 0, 0
    for key, count in zip(kjt.keys(), kjt.stride_per_key()):
        rows = []
        for length in lengths[row : row + count]:
            rows.append(values[start : start + length])
            start += length
        row += count
        result.append((key, rows))
    assert start == len(values)
    assert row == len(lengths)
    return result
