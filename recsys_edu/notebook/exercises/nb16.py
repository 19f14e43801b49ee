"""Exercises of notebook 16, a trillion parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_number


def check_fewest_ranks(answer: Callable[[list[tuple[int, int]], int, float, int], Any]) -> None:
    """`answer(shapes, bytes_per_number, bytes_per_rank, ranks_per_host)` is the fewest ranks, in whole hosts."""
    for _ in range(8):
        shapes = [
            (random.randrange(10**6, 10**9), random.choice([64, 128, 256])) for _ in range(random.randrange(2, 9))
        ]
        size, per_rank, local = random.choice([2, 4]), random.uniform(20, 80) * 2**30, random.choice([4, 8])
        got = answer(shapes, size, per_rank, local)
        if got is None or got is ...:
            raise NotImplementedError
        total = sum(rows * columns for rows, columns in shapes) * size
        expected = math.ceil(total / (per_rank * local)) * local
        given = f"{len(shapes)} tables, {total:,} bytes in all, {per_rank:,.0f} per rank, {local} ranks per host"
        expect_number("the number of ranks", got, expected, given, 0)


def check_too_large(answer: Callable[[int, int, float, int, int], Any]) -> None:
    """`answer(rows, columns, bytes_per_rank, world_size, ranks_per_host)` is the set of types that cannot be."""
    for _ in range(20):
        rows, columns = int(10 ** random.uniform(6, 9.5)), random.choice([128, 256, 512])
        local, hosts, per_rank = 8, random.choice([2, 4, 16]), random.uniform(10, 80) * 2**30
        got = answer(rows, columns, per_rank, local * hosts, local)
        if got is None or got is ...:
            raise NotImplementedError
        expected = too_large(rows, columns, per_rank, local * hosts, local)
        if set(got) != expected:
            raise CheckFailed(
                f"for {rows:,} rows x {columns} columns, {per_rank:,.0f} bytes per rank, {local * hosts} ranks on "
                f"{hosts} hosts\nexpected {sorted(expected)}\ngot      {sorted(got)}"
            )


def too_large(rows: int, columns: int, bytes_per_rank: float, world_size: int, ranks_per_host: int) -> set[str]:
    """The sharding types with a float32 rectangle of more than a rank's memory; column blocks are 128 wide."""
    widths = {"column_wise": 128, "grid_shard": 128}
    parts = {"table_row_wise": ranks_per_host, "grid_shard": ranks_per_host, "row_wise": world_size}
    kinds = ("table_wise", "column_wise", "table_row_wise", "grid_shard", "row_wise")
    sizes = {kind: math.ceil(rows / parts.get(kind, 1)) * widths.get(kind, columns) * 4 for kind in kinds}
    return {kind for kind, size in sizes.items() if size > bytes_per_rank}


EXERCISES = (
    Exercise(
        "16.1",
        "The fewest ranks",
        "Write `fewest_ranks(shapes, bytes_per_number, bytes_per_rank, ranks_per_host)`: how many ranks, in whole "
        "hosts, hold tables of the shapes `(rows, columns)` if they could be cut anywhere. No plan needs fewer.",
        difficulty=1,
        importance=4,
        minutes=5,
        hints=(
            "Bytes of all tables: the sum of rows x columns x bytes_per_number.",
            "A host holds `bytes_per_rank * ranks_per_host`. Round the number of hosts up with `math.ceil`.",
        ),
        check=check_fewest_ranks,
    ),
    Exercise(
        "16.2",
        "What cannot be",
        "Write `too_large(rows, columns, bytes_per_rank, world_size, ranks_per_host)`: the set of sharding types, out "
        "of `table_wise`, `column_wise`, `table_row_wise`, `grid_shard` and `row_wise`, whose rectangles of float32 do "
        "not fit into a rank. Column blocks are 128 wide; row blocks are rounded up.",
        difficulty=2,
        importance=5,
        minutes=12,
        hints=(
            "For each type: how wide is a rectangle, and over how many ranks are its rows spread?",
            "Widths: 128 for column_wise and grid_shard, else all columns. Rows are cut by the ranks of a host for "
            "table_row_wise and grid_shard, by all ranks for row_wise, else not at all.",
            "`math.ceil(rows / parts) * width * 4 > bytes_per_rank` is what cannot be.",
        ),
        check=check_too_large,
    ),
)
