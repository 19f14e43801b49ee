"""The lookup in plain PyTorch: the readable specification, the test oracle, and the kernel where FBGEMM is absent.

    values   7 7 2 | 0 | 5            offsets  0 2 3 | 4 4 ...      bag 0 of lane 0 holds ids 7, 7
    pooled   row b, lane l's columns  =  sum over the bag's ids of  weight[n] * table[id[n]]
    sequence row n                    =  table[id[n]]

Backward of a pooled lookup is again a pooled lookup with the roles swapped (`sum_by_row`): each touched *row* is a bag
of the *output gradients* that its ids reached.

Shapes: B batch, L lanes, N values, R rows of a table, U unique rows touched, D columns, S gradient rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lane_bounds(offsets: Tensor, num_lanes: int) -> list[int]:
    """Where each lane's values start: L + 1 numbers, the last one N.

    >>> lane_bounds(torch.tensor([0, 2, 3, 4, 4]), num_lanes=2)
    [0, 3, 4]
    """
    batch_size = batch_size_of(offsets, num_lanes)
    if batch_size == 0:
        return [0] * (num_lanes + 1)
    return offsets[::batch_size].tolist()  # host sync: slices need their bounds on the host


def batch_size_of(offsets: Tensor, num_lanes: int) -> int:
    """B, from the L * B + 1 offsets; 0 when there are no lanes.

    Raises:
        ValueError: the number of offsets does not fit the number of lanes.
    """
    bags = offsets.numel() - 1
    if bags < 0 or (bags % num_lanes if num_lanes else bags):
        raise ValueError(f"expected lanes * batch_size + 1 offsets for {num_lanes} lanes, got {offsets.numel()}")
    return bags // num_lanes if num_lanes else 0


def pooled_lookup(
    weights: Sequence[Tensor],
    lane_tables: Sequence[int],
    values_N: Tensor,
    offsets: Tensor,
    per_sample_weights_N: Tensor | None = None,
) -> Tensor:
    """Sum every bag of every lane: [B, sum of lane dims], float32. Differentiable in weights and sample weights.

    >>> table = torch.tensor([[1.0], [10.0]])
    >>> pooled_lookup([table], [0, 0], torch.tensor([0, 1, 1]), torch.tensor([0, 2, 2, 2, 3]))
    tensor([[11.,  0.],
            [ 0., 10.]])
    """
    num_lanes = len(lane_tables)
    batch_size, bounds = batch_size_of(offsets, num_lanes), lane_bounds(offsets, num_lanes)
    if not lane_tables:
        return torch.zeros(0, 0, device=values_N.device)
    lanes = []
    for lane, table in enumerate(lane_tables):
        span = slice(bounds[lane], bounds[lane + 1])
        bag_starts_B = (offsets[lane * batch_size : (lane + 1) * batch_size] - bounds[lane]).to(values_N.dtype)
        sample_weights = None if per_sample_weights_N is None else per_sample_weights_N[span].float()
        lanes.append(_sum_bags(weights[table], values_N[span], bag_starts_B, sample_weights))
    return torch.cat(lanes, dim=1)


def _sum_bags(weight_RD: Tensor, ids: Tensor, bag_starts_B: Tensor, sample_weights: Tensor | None) -> Tensor:
    if bag_starts_B.numel() == 0:
        return weight_RD[:0].float()  # no examples, yet part of the graph
    if weight_RD.dtype != torch.float32:  # sum in float32, not in the table's own narrow type
        weight_RD, ids = F.embedding(ids, weight_RD).float(), torch.arange(ids.numel(), device=ids.device).to(ids.dtype)
    return F.embedding_bag(ids, weight_RD, bag_starts_B, mode="sum", per_sample_weights=sample_weights)


def sequence_lookup(weights: Sequence[Tensor], lane_tables: Sequence[int], values_N: Tensor, offsets: Tensor) -> Tensor:
    """One row per value, in the order of the values: [N, D], float32. Differentiable in the weights."""
    bounds = lane_bounds(offsets, len(lane_tables))
    lanes = [
        F.embedding(values_N[bounds[lane] : bounds[lane + 1]], weights[table]).float()
        for lane, table in enumerate(lane_tables)
    ]
    return torch.cat(lanes) if lanes else torch.zeros(0, 0, device=values_N.device)


def bag_of_value(offsets: Tensor, num_values: int) -> Tensor:
    """For each value the bag that holds it.

    >>> bag_of_value(torch.tensor([0, 2, 2, 3]), 3)
    tensor([0, 0, 2])
    """
    lengths = offsets.diff()
    return torch.repeat_interleave(
        torch.arange(lengths.numel(), device=offsets.device), lengths, output_size=num_values
    )


def sum_by_row(
    ids_N: Tensor, sources_N: Tensor, gradients_SD: Tensor, sample_weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add up what each touched row receives: value n adds `weight[n] * gradients[source[n]]` to row `ids[n]`.

    Returns the unique rows [U] and their summed gradients [U, D].

    >>> sum_by_row(torch.tensor([7, 2, 7]), torch.tensor([0, 0, 1]), torch.tensor([[1.0], [5.0]]))
    (tensor([2, 7]), tensor([[1.],
            [6.]]))
    """
    sorted_ids, order = torch.sort(ids_N, stable=True)
    rows_U, counts_U = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts_U = counts_U.cumsum(0) - counts_U
    sample_weights = None if sample_weights_N is None else sample_weights_N[order]
    summed_UD = F.embedding_bag(sources_N[order], gradients_SD, starts_U, mode="sum", per_sample_weights=sample_weights)
    return rows_U, summed_UD


def row_gradients(
    table: int,
    pooled: bool,
    lane_tables: Sequence[int],
    lane_dims: Sequence[int],
    values_N: Tensor,
    offsets: Tensor,
    bounds: Sequence[int],
    per_sample_weights_N: Tensor | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """One table's unique touched rows and their summed gradients, over all lanes that read it.

    `bounds` are `lane_bounds(offsets, L)`; `gradient` is that of the lookup's output: [B, sum of lane dims] or [N, D].
    """
    batch_size = batch_size_of(offsets, len(lane_tables))
    ids, sources, gradients, sample_weights = [], [], [], []
    for lane in (lane for lane, read in enumerate(lane_tables) if read == table):
        start, stop = bounds[lane], bounds[lane + 1]
        first_source = sum(len(block) for block in gradients)
        if pooled:
            column = sum(lane_dims[:lane])
            gradients.append(gradient[:, column : column + lane_dims[lane]])
            source = bag_of_value(offsets[lane * batch_size : (lane + 1) * batch_size + 1], stop - start)
        else:
            gradients.append(gradient[start:stop])
            source = torch.arange(stop - start, device=values_N.device)
        ids.append(values_N[start:stop])
        sources.append(source + first_source)
        if per_sample_weights_N is not None:
            sample_weights.append(per_sample_weights_N[start:stop].float())
    return sum_by_row(
        torch.cat(ids).long(),
        torch.cat(sources),
        torch.cat(gradients).float().contiguous(),
        torch.cat(sample_weights) if sample_weights else None,
    )


def sample_weight_gradients(
    weights: Sequence[Tensor], lane_tables: Sequence[int], values_N: Tensor, offsets: Tensor, gradient_BD: Tensor
) -> Tensor:
    """d loss / d per_sample_weights, [N]: how well each looked-up row agrees with its bag's gradient."""
    batch_size, bounds = batch_size_of(offsets, len(lane_tables)), lane_bounds(offsets, len(lane_tables))
    lanes, column = [], 0
    for lane, table in enumerate(lane_tables):
        start, stop, dim = bounds[lane], bounds[lane + 1], weights[table].shape[1]
        bags = bag_of_value(offsets[lane * batch_size : (lane + 1) * batch_size + 1], stop - start)
        rows_ND = F.embedding(values_N[start:stop], weights[table]).float()
        lanes.append((rows_ND * gradient_BD[:, column : column + dim][bags]).sum(dim=1))
        column += dim
    return torch.cat(lanes) if lanes else torch.zeros(0, device=values_N.device)
