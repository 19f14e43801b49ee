"""Exercises of notebook 12, row-wise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from recsys_edu.distributed.sharding.by_hand import Batch
from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_equal

CUTS = ([0, 3, 6], [0, 3, 6, 9, 10], [0, 7, 7, 10], [0, 10])


def check_owner_and_local(answer: Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]) -> None:
    """`answer(ids, row_cuts)` is the block of each id, and the id counted from the block's first row."""
    for row_cuts in CUTS:
        ids = torch.randint(0, row_cuts[-1], (8,))
        owners = [next(i for i, (a, b) in enumerate(pairwise(row_cuts)) if a <= each < b) for each in ids.tolist()]
        given = f"ids {ids.tolist()}, row_cuts {row_cuts}"
        got = answer(ids.clone(), list(row_cuts))
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != 2:
            raise CheckFailed(f"expected a pair (owner, local), got {type(got).__name__}\nfor {given}")
        expect_equal("the owners", got[0], torch.tensor(owners), given)
        local = [each - row_cuts[owner] for each, owner in zip(ids.tolist(), owners)]
        expect_equal("the local ids", got[1], torch.tensor(local), given)


def check_row_wise_mean(answer: Callable[[list[Batch], Tensor, list[int]], list[Tensor]]) -> None:
    """`answer(batches, table, row_cuts)` is every rank's mean of each bag; an empty bag gives zeros."""
    for row_cuts in CUTS:
        table = torch.randn(row_cuts[-1], 4)
        batches, expected = [], []
        for _ in range(2):
            lengths = torch.cat([torch.tensor([0, 3]), torch.randint(0, 4, (2,))])
            ids = torch.randint(0, row_cuts[-1], (int(lengths.sum()),))
            batches.append((ids, lengths))
            bags = torch.split(table[ids], lengths.tolist())
            expected.append(torch.stack([bag.mean(0) if len(bag) else torch.zeros(4) for bag in bags]))
        got = answer([(ids.clone(), lengths.clone()) for ids, lengths in batches], table.clone(), list(row_cuts))
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != len(batches):
            raise CheckFailed(f"expected a list of {len(batches)} tensors, got {type(got).__name__}")
        for rank, (ids, lengths) in enumerate(batches):
            given = f"rank {rank}: ids {ids.tolist()}, lengths {lengths.tolist()}, row_cuts {row_cuts}"
            expect_close("the means", got[rank], expected[rank], given)


def check_spread(answer: Callable[[Tensor, int, int], Tensor]) -> None:
    """`answer(ids, num_rows, world_size)` renumbers ids one to one, neighbours on different ranks."""
    for num_rows, world_size in ((12, 4), (20, 2), (21, 3), (5, 1)):
        given = f"all ids below {num_rows}, {world_size} ranks"
        rows = answer(torch.arange(num_rows), num_rows, world_size)
        if rows is None or rows is ...:
            raise NotImplementedError
        expect_equal(
            "every row once: the sorted rows", torch.as_tensor(rows).sort().values, torch.arange(num_rows), given
        )
        owner = torch.as_tensor(rows) // (num_rows // world_size)
        for first in range(num_rows - world_size + 1):
            met = owner[first : first + world_size].tolist()
            if len(set(met)) < world_size:
                raise CheckFailed(
                    f"ids {first} to {first + world_size - 1} should lie on {world_size} different ranks\nfor {given}\n"
                    f"got ranks {met}"
                )


EXERCISES = (
    Exercise(
        "12.1",
        "Whose row is it",
        "Write `owner_and_local(ids, row_cuts)`: two tensors, the block that each id falls into and the id counted "
        "from that block's first row. `row_cuts` is `[0, 3, 6]` for blocks 0:3 and 3:6; blocks may be uneven or empty. "
        "Without a loop.",
        difficulty=2,
        importance=5,
        minutes=8,
        hints=(
            "You look for the last cut that is not greater than the id.",
            "`torch.searchsorted(cuts, ids, right=True)` counts the cuts that are less than or equal to each id.",
            "Subtract 1 for the block; subtract `cuts[block]` for the local id.",
        ),
        check=check_owner_and_local,
    ),
    Exercise(
        "12.2",
        "Row-wise, with a mean",
        "Write `row_wise_mean(batches, table, row_cuts)`: a list with each rank's `[B, D]` means. Look rows up block "
        "by block, as their owners would, with local ids; a bag without ids gives zeros.",
        difficulty=3,
        importance=5,
        minutes=15,
        hints=(
            "For each rank's batch begin with zeros of `[B, D]` and add every block's part.",
            "`bag = torch.repeat_interleave(torch.arange(B), lengths)` says which bag each id is in.",
            "For a block: a mask of its ids, then `total.index_add_(0, bag[mask], block_rows[ids[mask] - start])`.",
            "Divide once, after all blocks, by `lengths.clamp(min=1)[:, None]`.",
        ),
        check=check_row_wise_mean,
    ),
    Exercise(
        "12.3",
        "Spread popular ids",
        "Write `spread(ids, num_rows, world_size)`: new numbers for the ids, one to one below `num_rows`, so that any "
        "`world_size` neighbouring ids lie on different ranks of an equal row-wise tiling. `num_rows` is a multiple "
        "of `world_size`.",
        difficulty=2,
        importance=4,
        minutes=7,
        hints=(
            "Deal ids out like cards: id 0 to rank 0, id 1 to rank 1, and so on.",
            "`ids % world_size` is the rank. Which row of that rank's block is free?",
            "`ids // world_size`. Rank `r`'s block begins at `r * (num_rows // world_size)`.",
        ),
        check=check_spread,
    ),
)
