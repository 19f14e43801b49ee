"""Exercises of notebook 11, table-wise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal


def check_pieces(answer: Callable[[Tensor, Tensor, list[int], int], list[tuple[Tensor, Tensor]]]) -> None:
    """`answer(lengths_FB, values, rank_of_feature, world_size)` is what each rank is sent: (lengths, values)."""
    for rank_of_feature, world_size in (([1, 0, 1], 2), ([2, 2, 0], 3), ([0], 2)):
        lengths_FB = torch.randint(0, 4, (len(rank_of_feature), 3))
        values = torch.randint(0, 100, (int(lengths_FB.sum()),))
        given = f"lengths {lengths_FB.tolist()}, values {values.tolist()}, rank_of_feature {rank_of_feature}"
        got = answer(lengths_FB.clone(), values.clone(), list(rank_of_feature), world_size)
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != world_size:
            raise CheckFailed(
                f"expected a list of {world_size} pairs, one per rank, got {type(got).__name__}\nfor {given}"
            )
        ends = lengths_FB.sum(1).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        for rank, pair in enumerate(got):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise CheckFailed(f"rank {rank}: expected a pair (lengths, values), got {type(pair).__name__}")
            mine = [feature for feature, owner in enumerate(rank_of_feature) if owner == rank]
            ids = [value for feature in mine for value in values[starts[feature] : ends[feature]].tolist()]
            expect_equal(f"rank {rank}'s lengths", pair[0], lengths_FB[mine], given)
            expect_equal(f"rank {rank}'s values", pair[1], torch.tensor(ids, dtype=values.dtype), given)


def check_returned_bytes(answer: Callable[[list[int], list[int], list[int]], Tensor]) -> None:
    """`answer(batch_sizes, widths, rank_of_table)` is the `[W, W]` bytes of the pooled embeddings."""
    for world_size in (1, 2, 4):
        batch_sizes = torch.randint(1, 9, (world_size,)).tolist()
        widths = (4 * torch.randint(1, 9, (5,))).tolist()
        rank_of_table = torch.randint(0, world_size, (5,)).tolist()
        expected = torch.zeros(world_size, world_size, dtype=torch.int64)
        for width, owner in zip(widths, rank_of_table):
            for rank, batch_size in enumerate(batch_sizes):
                expected[owner, rank] += 4 * width * batch_size
        given = f"batch_sizes {batch_sizes}, widths {widths}, rank_of_table {rank_of_table}"
        expect_equal("the bytes", answer(list(batch_sizes), list(widths), list(rank_of_table)), expected, given)


def check_place(answer: Callable[[list[int], int], Sequence[int]]) -> None:
    """`answer(table_bytes, world_size)` is a rank per table, no worse than the largest-first rule."""
    for world_size, num_tables in ((1, 3), (2, 5), (4, 12), (4, 26)):
        table_bytes = (torch.rand(num_tables).pow(4) * 1e6).long().add(1).tolist()
        ranks = answer(list(table_bytes), world_size)
        if ranks is None or ranks is ...:
            raise NotImplementedError
        ranks = [int(rank) for rank in ranks]
        if len(ranks) != num_tables or not all(0 <= rank < world_size for rank in ranks):
            raise CheckFailed(f"expected {num_tables} ranks between 0 and {world_size - 1}, got {ranks}")
        heaviest, allowed = _heaviest(table_bytes, ranks, world_size), _largest_first(table_bytes, world_size)
        if heaviest > allowed:
            raise CheckFailed(
                f"the heaviest rank is heavier than largest-first makes it\nfor {table_bytes}, {world_size} ranks\n"
                f"expected at most {allowed:,} bytes\ngot      {heaviest:,} bytes with ranks {ranks}"
            )


def _heaviest(table_bytes: Sequence[int], ranks: Sequence[int], world_size: int) -> int:
    return max(sum(size for size, owner in zip(table_bytes, ranks) if owner == rank) for rank in range(world_size))


def _largest_first(table_bytes: Sequence[int], world_size: int) -> int:
    loads = [0] * world_size
    for size in sorted(table_bytes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


EXERCISES = (
    Exercise(
        "11.1",
        "A batch, cut by owner",
        "Write `pieces(lengths_FB, values, rank_of_feature, world_size)`: a list with one pair `(lengths, values)` per "
        "rank, holding the features whose tables are on that rank, in their order. A rank without features gets "
        "empty tensors.",
        difficulty=2,
        importance=5,
        minutes=12,
        hints=(
            "List each rank's features: `[f for f, owner in enumerate(rank_of_feature) if owner == rank]`.",
            "`lengths_FB[that_list]` is its lengths, of shape `[0, B]` for an empty list.",
            "`values.split(lengths_FB.sum(1).tolist())` gives each feature's values; join those of the list.",
            "`torch.cat` of nothing is an error: begin the list with `values[:0]`.",
        ),
        check=check_pieces,
    ),
    Exercise(
        "11.2",
        "Bytes that come back",
        "Write `returned_bytes(batch_sizes, widths, rank_of_table)`: the traffic matrix `[source, destination]` of the "
        "pooled embeddings, in bytes. Rank `r` has `batch_sizes[r]` bags; table `t` is `widths[t]` float32 numbers "
        "wide, lies on rank `rank_of_table[t]`, and is read by one feature.",
        difficulty=2,
        importance=4,
        minutes=10,
        hints=(
            "Who sends? The owner of a table. To whom? To every rank, one row for each of that rank's bags.",
            "First add up, for each rank, the widths of its tables.",
            "Then `bytes[i, j] = 4 * width_of_rank[i] * batch_sizes[j]`: an outer product.",
        ),
        check=check_returned_bytes,
    ),
    Exercise(
        "11.3",
        "Place tables",
        "Write `place(table_bytes, world_size)`: a rank for each table, so that the heaviest rank is as light as the "
        "rule 'largest first, each to the least loaded rank' makes it, or lighter.",
        difficulty=2,
        importance=4,
        minutes=10,
        hints=(
            "Keep a list with the load of every rank, all 0 at first.",
            "Go from the largest table to the smallest: `sorted(range(n), key=lambda t: -table_bytes[t])`.",
            "Each goes to `min(range(world_size), key=load.__getitem__)`; add its bytes to that load.",
        ),
        check=check_place,
    ),
)
