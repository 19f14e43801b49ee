"""Exercises of notebook 18, checkpoints and resharding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from recsys_edu.distributed.sharding.column_wise import column_wise_shards
from recsys_edu.distributed.sharding.row_wise import row_wise_shards
from recsys_edu.distributed.sharding.table_wise import table_wise_shards
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal, expect_number
from recsys_edu.viz.resharding import moved_bytes


def check_overlap(answer: Callable[[Shard, Shard], Any]) -> None:
    """`answer(first, second)` is (rows, columns) of what both cover, or None."""
    for _ in range(40):
        first, second = (Shard("t", _random_range(), _random_range(), 0) for _ in range(2))
        got = answer(first, second)
        if got is ...:
            raise NotImplementedError
        expected = first.intersect(second)
        if got is None and expected is not None and answer(first, first) is None:
            raise NotImplementedError  # the stub answers None to everything
        if (None if got is None else tuple(got)) != expected:
            raise CheckFailed(
                f"the overlap differs\nfor      {first}\nand      {second}\nexpected {expected}\ngot {got}"
            )


def check_traffic(answer: Callable[[Sequence[Shard], Sequence[Shard], int], Tensor]) -> None:
    """`answer(old, new, world_size)` is the matrix of bytes of float32 that go from each rank to each other one."""
    for _ in range(6):
        old, new = random.sample(_random_tilings(), 2)
        given = f"old {[str(s) for s in old]}, new {[str(s) for s in new]}"
        expected = moved_bytes(old, new, 4).fill_diagonal_(0)
        expect_equal("the matrix of bytes", answer(old, new, 4), expected, given)


def check_interval(answer: Callable[[float, float], float]) -> None:
    """`answer(save_s, failure_s)` is the time between checkpoints that loses least."""
    for _ in range(6):
        save_s, failure_s = random.uniform(1, 100), random.uniform(1e4, 1e6)
        got = answer(save_s, failure_s)
        if got is None or got is ...:
            raise NotImplementedError
        given = f"{save_s:.1f} s for a checkpoint, a failure every {failure_s:.0f} s"
        expect_number("the interval in seconds", got, math.sqrt(2 * save_s * failure_s), given, 1e-3)


def _random_range() -> range:
    start = random.randrange(6)
    return range(start, start + random.randrange(1, 6))


def _random_tilings() -> list[list[Shard]]:
    rows = random.randrange(8, 20)
    return [
        row_wise_shards("t", rows, 16, ranks=range(4)),
        row_wise_shards("t", rows, 16, ranks=[3, 1]),
        column_wise_shards("t", rows, 16, ranks=range(4)),
        column_wise_shards("t", rows, 16, ranks=[2, 0]),
        table_wise_shards("t", rows, 16, rank=random.randrange(4)),
    ]


EXERCISES = (
    Exercise(
        "18.1",
        "What two rectangles share",
        "Write `overlap(first, second)` for two shards: the pair `(rows, columns)` of ranges that both cover, or "
        "`None` where they share nothing. Resharding is this and copying.",
        difficulty=1,
        importance=5,
        minutes=6,
        hints=(
            "Rows and columns can be treated apart: two rectangles meet where both their rows and their columns do.",
            "Two ranges share `range(max(starts), min(stops))`, which is empty when they miss each other.",
            "`len(range(5, 3))` is 0, so `if rows and columns` says whether anything is left.",
        ),
        check=check_overlap,
    ),
    Exercise(
        "18.2",
        "Bytes that travel",
        "Write `travelling_bytes(old, new, world_size)`: a matrix `[source, destination]` of the float32 bytes that "
        "have to be sent when the shards `old` become the shards `new`. What stays on its rank does not travel: the "
        "diagonal is 0.",
        difficulty=2,
        importance=4,
        minutes=10,
        hints=(
            "Go through all pairs of an old and a new shard; `overlap` of 18.1 says what goes from one to the other.",
            "The piece goes from `old.rank` to `new.rank` and has `len(rows) * len(columns)` numbers of 4 bytes.",
            "Begin with `torch.zeros(world_size, world_size, dtype=torch.long)` and end with `.fill_diagonal_(0)`.",
        ),
        check=check_traffic,
    ),
    Exercise(
        "18.3",
        "How often?",
        "A checkpoint takes `save_s` seconds, a failure comes every `failure_s` seconds on average, and costs on "
        "average half the time between two checkpoints. Write `best_interval(save_s, failure_s)`: the seconds between "
        "checkpoints that lose the smallest share of time.",
        difficulty=3,
        importance=4,
        minutes=12,
        hints=(
            "With an interval of t seconds, which share of the time goes into saving? Which share is repeated?",
            "Saving: `save_s / t`. Repeating: half an interval per failure, `(t / 2) / failure_s`.",
            "The sum is smallest where its derivative is 0: `save_s / t**2 == 1 / (2 * failure_s)`.",
        ),
        check=check_interval,
    ),
)
