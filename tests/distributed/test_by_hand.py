"""The by-hand forward of every sharding type equals one unsharded `F.embedding_bag` on every rank's batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.distributed.sharding import (
    column_wise,
    data_parallel,
    grid,
    row_wise,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from recsys_edu.distributed.sharding.by_hand import Batch, keep_rows
from recsys_edu.distributed.sharding.tiling import Shard

NUM_HOSTS, LOCAL_SIZE = 2, 2
WORLD_SIZE = NUM_HOSTS * LOCAL_SIZE

ByHand = Callable[[list[Batch], torch.Tensor, list[Shard], str], list[torch.Tensor]]
CASES: dict[str, tuple[ByHand, Callable[[int, int], list[Shard]]]] = {
    "data_parallel": (
        data_parallel.data_parallel_by_hand,
        lambda r, d: data_parallel.data_parallel_shards("user", r, d),
    ),
    "table_wise": (table_wise.table_wise_by_hand, lambda r, d: table_wise.table_wise_shards("user", r, d, 2)),
    "row_wise": (
        row_wise.row_wise_by_hand,
        lambda r, d: row_wise.row_wise_shards("user", r, d, range(WORLD_SIZE)),
    ),
    "row_wise, uneven on ranks 3 and 1": (
        row_wise.row_wise_by_hand,
        lambda r, d: row_wise.row_wise_shards("user", r, d, [3, 1], [r // 3, r - r // 3]),
    ),
    "column_wise": (
        column_wise.column_wise_by_hand,
        lambda r, d: column_wise.column_wise_shards("user", r, d, [1, 0, 3, 2]),
    ),
    "column_wise, uneven": (
        column_wise.column_wise_by_hand,
        lambda r, d: column_wise.column_wise_shards("user", r, d, [2, 2, 0], [4, d - 8, 4]),
    ),
    "table_row_wise": (
        table_row_wise.table_row_wise_by_hand,
        lambda r, d: table_row_wise.table_row_wise_shards("user", r, d, 1, LOCAL_SIZE),
    ),
    "table_column_wise": (
        table_column_wise.table_column_wise_by_hand,
        lambda r, d: table_column_wise.table_column_wise_shards("user", r, d, 1, LOCAL_SIZE),
    ),
    "grid_shard": (grid.grid_by_hand, lambda r, d: grid.grid_shards("user", r, d, [1, 0], LOCAL_SIZE)),
}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Batch], int]:
    """One jagged batch per rank, of unequal sizes, with empty bags and empty batches."""
    num_rows = draw(st.integers(1, 9))
    batches = []
    for _ in range(WORLD_SIZE):
        lengths = draw(st.lists(st.integers(0, 4), max_size=4))
        values = draw(st.lists(st.integers(0, num_rows - 1), min_size=sum(lengths), max_size=sum(lengths)))
        batches.append((torch.tensor(values, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)))
    return batches, num_rows


def unsharded(batch: Batch, weight_RD: torch.Tensor, pooling: str) -> torch.Tensor:
    values_N, lengths_B = batch
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    return F.embedding_bag(values_N, weight_RD, offsets, mode=pooling, include_last_offset=True)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("name", CASES)
@given(world=worlds())
@settings(max_examples=12, deadline=None)
def test_by_hand_equals_unsharded_forward_and_gradient(name: str, pooling: str, world: tuple[list[Batch], int]) -> None:
    batches, num_rows = world
    by_hand, make_shards = CASES[name]
    generator = torch.Generator().manual_seed(num_rows)
    weight_RD = torch.randn(num_rows, 16, generator=generator, dtype=torch.float64, requires_grad=True)

    actual = by_hand(batches, weight_RD, make_shards(num_rows, 16), pooling)
    expected = [unsharded(batch, weight_RD, pooling) for batch in batches]

    assert len(actual) == WORLD_SIZE
    for actual_BD, expected_BD in zip(actual, expected):
        torch.testing.assert_close(actual_BD, expected_BD)
    loss = [torch.cat(outputs).square().sum() for outputs in (actual, expected)]
    (actual_grad,) = torch.autograd.grad(loss[0], weight_RD)
    (expected_grad,) = torch.autograd.grad(loss[1], weight_RD)
    torch.testing.assert_close(actual_grad, expected_grad)


def test_keep_rows_keeps_bags_and_order() -> None:
    batch = (torch.tensor([5, 1, 4, 4, 0]), torch.tensor([2, 0, 3]))
    values, lengths = keep_rows(batch, range(4, 6))
    assert values.tolist() == [1, 0, 0]
    assert lengths.tolist() == [1, 0, 2]


def test_sums_meet_at_the_same_position_in_the_host() -> None:
    shards = table_row_wise.table_row_wise_shards("user", 6, 4, host_index=1, local_size=2)
    batches = [(torch.tensor([2, 5, 0]), torch.tensor([2, 1]))] * WORLD_SIZE
    _, summed_by = table_row_wise.sum_inside_host(batches, torch.randn(6, 4), shards)
    assert summed_by == {2: [0, 2], 3: [1, 3]}


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="'max': expected 'sum' or 'mean'"):
        table_wise.table_wise_by_hand(
            [(torch.tensor([0]), torch.tensor([1]))],
            torch.ones(1, 4),
            table_wise.table_wise_shards("user", 1, 4, 0),
            "max",
        )


def test_average_gradients_by_hand_equals_one_process_on_the_joined_batch() -> None:
    weight_RD = torch.randn(5, 4, dtype=torch.float64)
    batches = [(torch.tensor([0, 3]), torch.tensor([1, 1])), (torch.tensor([3, 3]), torch.tensor([2, 0]))]
    copies = [weight_RD.clone().requires_grad_() for _ in batches]
    for batch, copy_RD in zip(batches, copies):
        unsharded(batch, copy_RD, "sum").square().sum(dim=1).mean().backward()
    data_parallel.average_gradients_by_hand(copies)

    whole_RD = weight_RD.clone().requires_grad_()
    joined = (torch.cat([v for v, _ in batches]), torch.cat([lengths for _, lengths in batches]))
    unsharded(joined, whole_RD, "sum").square().sum(dim=1).mean().backward()
    for copy_RD in copies:
        torch.testing.assert_close(copy_RD.grad, whole_RD.grad)
