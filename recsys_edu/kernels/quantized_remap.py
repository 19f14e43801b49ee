"""Pruned tables: rows that are hardly ever read are dropped, and ids are renumbered on their way to the lookup.

    original ids   0  1  2  3  4            kept rows 1, 3, 4
    array          -1 0 -1  1  2            one number per original id: where its row is now, -1 if it was dropped
    hash           {1: 0, 3: 1, 4: 2}       one entry per kept row: for tables of which little is left

An id whose row was dropped finds zeros, as if it were not there, but still counts in a mean.

Shapes: L lanes, N values, K kept rows.
Source: FBGEMM's pruned_array_lookup and PrunedMapCPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.kernels.jagged_ops import complete_cumsum

PRUNED = -1


@dataclass(frozen=True)
class Remapping:
    """Where the rows of one pruned table went.

    Args:
        num_rows: rows before pruning: what ids are checked against.
        kept_K: the original numbers of the rows that stay, ascending; row k of the pruned table was row `kept_K[k]`.
    """

    num_rows: int
    kept_K: Tensor

    def array(self) -> Tensor:
        """One int32 per original row: its new number, or -1."""
        array = torch.full((self.num_rows,), PRUNED, dtype=torch.int32, device=self.kept_K.device)
        array[self.kept_K] = torch.arange(self.kept_K.numel(), dtype=torch.int32, device=self.kept_K.device)
        return array


def remapping_from_array(array_R: Tensor, table: str = "") -> Remapping:
    """The remapping that an array of new row numbers (-1: dropped) describes, as FBGEMM's index_remapping.

    Raises:
        ValueError: new numbers that are not 0, 1, 2, ... in the order of the original ids.
    """
    kept_K = (array_R != PRUNED).nonzero().squeeze(1)
    new_K = array_R[kept_K].long()
    if not torch.equal(new_K, torch.arange(kept_K.numel(), device=new_K.device)):
        raise ValueError(
            f"table {table!r}: an index remapping numbers the kept rows 0, 1, 2, ... in order and marks dropped ones "
            f"-1; got {array_R[:8].tolist()}{' ...' if array_R.numel() > 8 else ''}"
        )
    return Remapping(array_R.numel(), kept_K)


def keep_largest_rows(weight_RD: Tensor, num_kept: int) -> Remapping:
    """Keep the rows of the largest norm, which move a sum the most.

    >>> keep_largest_rows(torch.tensor([[0.1], [3.0], [0.0], [-2.0]]), 2).array()
    tensor([-1,  0, -1,  1], dtype=torch.int32)

    Raises:
        ValueError: more rows than there are, or none.
    """
    num_rows = weight_RD.shape[0]
    if not 0 < num_kept <= num_rows:
        raise ValueError(f"expected to keep 1 to {num_rows} rows, got {num_kept}")
    largest = weight_RD.detach().float().norm(dim=1).topk(num_kept).indices
    return Remapping(num_rows, largest.sort().values)


class ArrayRemap:
    """Remaps ids by one array per lane: four bytes per original row, one read per id.

    Args:
        arrays: for each lane the new number of every original row, as `Remapping.array`; None leaves its ids alone.
    """

    def __init__(self, arrays: Sequence[Tensor | None], device: torch.device) -> None:
        nothing = torch.empty(0, dtype=torch.int32)
        self.arrays = [(nothing if array is None else array).to(device) for array in arrays]
        self.all_arrays = torch.cat(self.arrays) if arrays else nothing.to(device)
        self.starts = torch.tensor([0, *[array.numel() for array in self.arrays]], device=device).cumsum(0)

    def __call__(self, values_N: Tensor, offsets: Tensor) -> Tensor:
        """New row numbers of ids, lane after lane, -1 for dropped ones. A lane without remapping keeps its ids."""
        if use_fbgemm(values_N.device) and values_N.numel():  # an empty array leaves a lane's ids alone, here too
            return torch.ops.fbgemm.pruned_array_lookup(
                values_N, offsets.to(values_N.dtype), self.all_arrays.to(values_N.dtype), self.starts
            )
        return self.reference(values_N, offsets)

    def reference(self, values_N: Tensor, offsets: Tensor) -> Tensor:
        """The same with one index operation per lane."""
        return _lane_by_lane(values_N, offsets, len(self.arrays), self.remap_lane)

    def remap_lane(self, lane: int, ids: Tensor) -> Tensor:
        return self.arrays[lane][ids.long()].to(ids.dtype) if self.arrays[lane].numel() else ids


class HashRemap:
    """Remaps ids by looking for them among the kept ones: memory for kept rows only, a search per id."""

    def __init__(self, lanes: Sequence[Remapping | None], device: torch.device) -> None:
        self.kept = [None if lane is None else lane.kept_K.to(device) for lane in lanes]
        self._map = _fbgemm_map(lanes) if device.type == "cpu" and use_fbgemm(device) else None

    def __call__(self, values_N: Tensor, offsets: Tensor) -> Tensor:
        if self._map is not None and values_N.numel() and all(kept is not None for kept in self.kept):
            return self._map.lookup(values_N.int(), offsets.int()).to(values_N.dtype)
        return self.reference(values_N, offsets)

    def reference(self, values_N: Tensor, offsets: Tensor) -> Tensor:
        """The same by binary search."""
        return _lane_by_lane(values_N, offsets, len(self.kept), self.remap_lane)

    def remap_lane(self, lane: int, ids: Tensor) -> Tensor:
        kept_K = self.kept[lane]
        if kept_K is None or ids.numel() == 0:
            return ids
        place = torch.searchsorted(kept_K, ids.long()).clamp(max=kept_K.numel() - 1)
        return torch.where(kept_K[place] == ids, place, PRUNED).to(ids.dtype)


def _lane_by_lane(values_N: Tensor, offsets: Tensor, num_lanes: int, remap_lane) -> Tensor:
    batch_size = (offsets.numel() - 1) // num_lanes if num_lanes else 0
    if batch_size == 0:
        return values_N
    bounds = offsets[::batch_size].tolist()  # host sync: slices need their bounds on the host
    lanes = [remap_lane(lane, values_N[bounds[lane] : bounds[lane + 1]]) for lane in range(num_lanes)]
    return torch.cat(lanes)


def _fbgemm_map(lanes: Sequence[Remapping | None]):
    """FBGEMM's hash maps, one per lane, filled with the kept rows."""
    if any(lane is None for lane in lanes) or not lanes:
        return None
    counts = torch.tensor([lane.kept_K.numel() for lane in lanes], dtype=torch.int32)
    table = torch.classes.fbgemm.PrunedMapCPU()
    ids = torch.cat([lane.kept_K for lane in lanes]).int().cpu()
    rows = torch.cat([torch.arange(lane.kept_K.numel()) for lane in lanes]).int()
    table.insert(ids, rows, complete_cumsum(counts), len(lanes))
    return table
