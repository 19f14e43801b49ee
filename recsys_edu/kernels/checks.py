"""Ids are checked once, before the fast kernels run unchecked: a wrong id there would read or write foreign memory.

Shapes: L lanes, N values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ONE_CORE = 32768
"""torch divides reductions of more elements among cores, which is slow where ranks share the cores."""


def check_ids(
    values_N: Tensor,
    lane_offsets: Sequence[int] | Tensor,
    features: Sequence[str],
    tables: Sequence[str],
    num_rows: Sequence[int],
) -> None:
    """Refuse ids outside their table.

    Args:
        values_N: ids, lane after lane.
        lane_offsets: L + 1 positions: lane l owns `values[lane_offsets[l] : lane_offsets[l + 1]]`.
        features, tables, num_rows: per lane the feature's name, the table's name and its number of rows.

    Raises:
        IndexError: naming the feature, the id, the table and its size.
        ValueError: offsets that do not cover the values.

    >>> check_ids(torch.tensor([0, 9]), [0, 2], ["item"], ["t_item"], [5])
    Traceback (most recent call last):
    IndexError: feature 'item': id 9 at position 1 of its values is not in table 't_item', whose 5 rows are 0 ... 4
    """
    num_values = values_N.numel()
    if isinstance(lane_offsets, Tensor):
        lane_offsets = lane_offsets.tolist()  # host sync: a slice per lane needs its bounds on the host
    if len(lane_offsets) != len(features) + 1 or (features and lane_offsets[-1] != num_values) or lane_offsets[0] != 0:
        raise ValueError(
            f"{len(features)} lanes and {num_values} values need {len(features) + 1} lane offsets from 0 to "
            f"{num_values}, got {list(lane_offsets)}"
        )
    lengths = [stop - start for start, stop in itertools.pairwise(lane_offsets)]
    filled = [lane for lane, length in enumerate(lengths) if length] if features else []
    if not filled:
        return
    rows = [num_rows[lane] for lane in filled]
    # One pass over all ids settles tables of about one size; under sizes that differ it would only come on top.
    if max(rows) < 2 * min(rows) and _all_within(values_N, min(rows)):
        return
    for lane, low, high in zip(filled, *_extremes(values_N, lengths)):
        if low < 0 or high >= num_rows[lane]:
            ids = values_N[lane_offsets[lane] : lane_offsets[lane + 1]]
            raise _out_of_range(ids, features[lane], tables[lane], num_rows[lane])


def _all_within(values_N: Tensor, smallest_num_rows: int) -> bool:
    """Whether all ids are rows of even the smallest table."""
    pieces = [values_N] if _is_one_piece(values_N) else values_N.split(ONE_CORE)
    verdict = torch.stack([extreme for ids in pieces for extreme in torch.aminmax(ids)]).tolist()  # host sync: as below
    return min(verdict) >= 0 and max(verdict) < smallest_num_rows


def _extremes(values_N: Tensor, lengths: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The smallest and the largest id of every lane that has any."""
    # host sync: an error has to be raised here, before anything changes
    if min(lengths) == max(lengths) and _is_one_piece(values_N):
        lows, highs = torch.stack(torch.aminmax(values_N.view(len(lengths), -1), dim=1)).tolist()
        return lows, highs
    extremes = [extreme for ids in values_N.split(list(lengths)) if ids.numel() for extreme in torch.aminmax(ids)]
    verdict = torch.stack(extremes).tolist()
    return verdict[::2], verdict[1::2]


def _is_one_piece(values_N: Tensor) -> bool:
    """Whether torch reduces these ids without dividing them among cores."""
    return values_N.device.type != "cpu" or torch.get_num_threads() == 1 or values_N.numel() <= ONE_CORE


def _out_of_range(ids: Tensor, feature: str, table: str, num_rows: int) -> IndexError:
    position = int(((ids < 0) | (ids >= num_rows)).nonzero()[0])
    rows = f"whose {num_rows} rows are 0 ... {num_rows - 1}" if num_rows else "which has no rows"
    return IndexError(
        f"feature {feature!r}: id {int(ids[position])} at position {position} of its values is not in table "
        f"{table!r}, {rows}"
    )
