"""Exercises of notebook 14, table-row-wise and grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal, expect_number

NUM_ROWS, NUM_COLUMNS = 120, 32
SHARES = {0: 0.5, 1: 0.25, 2: 1 / 6, 3: 1 / 12}


def check_two_hops(answer: Callable[[dict[int, list[Tensor]], int], tuple[dict[int, Tensor], int]]) -> None:
    """`answer(parts, local_size)` is each asking rank's sum, and the rows that leave host 0."""
    for num_hosts, local_size in ((2, 2), (3, 2), (2, 4), (1, 2)):
        bags = torch.randint(1, 5, (num_hosts * local_size,)).tolist()
        parts = {
            rank: [torch.randint(0, 9, (bags[rank], 4)).float() for _ in range(local_size)] for rank in range(len(bags))
        }
        got = answer({rank: [part.clone() for part in each] for rank, each in parts.items()}, local_size)
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != 2:
            raise CheckFailed(f"expected a pair (sums, rows), got {type(got).__name__}")
        given = f"{num_hosts} hosts of {local_size} ranks, bags per rank {bags}"
        for rank, each in parts.items():
            total = each[0]
            for part in each[1:]:
                total = total + part
            expect_equal(f"rank {rank}'s sums", got[0][rank], total, given)
        expect_number("rows that leave host 0", got[1], sum(bags[local_size:]), given, tolerance=0.0)


def check_answer_bytes(answer: Callable[[int, int, int, int], Mapping[str, int]]) -> None:
    """`answer(batch_size, width, num_hosts, local_size)` is bytes between hosts, "flat" and in "two hops"."""
    for batch_size, width, num_hosts, local_size in ((4, 8, 2, 2), (16, 32, 4, 8), (5, 4, 1, 4), (3, 4, 2, 1)):
        got = answer(batch_size, width, num_hosts, local_size)
        if got is None or got is ...:
            raise NotImplementedError
        flat = two_hops = 0
        for asking in range(num_hosts * local_size):
            for owner in range(local_size):
                if asking // local_size != owner // local_size:
                    flat += 4 * batch_size * width
                    two_hops += 4 * batch_size * width * (owner == asking % local_size)
        given = f"batch_size {batch_size}, width {width}, {num_hosts} hosts of {local_size}"
        for name, expected in (("flat", flat), ("two hops", two_hops)):
            if not isinstance(got, Mapping) or name not in got:
                raise CheckFailed(f"expected a dict with the keys 'flat' and 'two hops', got {got!r}")
            expect_number(name, got[name], expected, given, tolerance=0.0)


def check_drawing(picture: str) -> None:
    """A drawing in which rank 0 has half of the table, rank 1 a quarter, rank 2 a sixth, rank 3 a twelfth."""
    from recsys_edu.distributed.sharding.tiling import validate
    from recsys_edu.viz.sharding_explorer import shards_from_drawing

    try:
        shards = shards_from_drawing(picture, NUM_ROWS, NUM_COLUMNS)
        validate(shards, NUM_ROWS, NUM_COLUMNS, world_size=len(SHARES), table="user")
    except ValueError as problem:
        raise CheckFailed(str(problem)) from problem
    for rank, expected in SHARES.items():
        held = sum(shard.num_rows * shard.num_columns for shard in shards if shard.rank == rank)
        expect_number(f"rank {rank}'s share of the table", held / (NUM_ROWS * NUM_COLUMNS), expected, picture, 1e-6)


EXERCISES = (
    Exercise(
        "14.1",
        "The two hops",
        "A table lies by rows on the ranks of host 0. `parts[r]` lists what its owners have for asking rank `r`, "
        "tensors of `[B_r, D]`. Write `two_hops(parts, local_size)`, which returns `(sums, rows)`: a dict with each "
        "asking rank's sum, and how many rows leave host 0 in the second hop.",
        difficulty=2,
        importance=5,
        minutes=10,
        hints=(
            "Hop 1 adds the parts of one asking rank: `torch.stack(parts[r]).sum(dim=0)`.",
            "Hop 2 sends each sum to its asking rank. Which ranks are on host 0, and need no network?",
            "Rank `r` is on host `r // local_size`. Count the rows of the sums of all others.",
        ),
        check=check_two_hops,
    ),
    Exercise(
        "14.2",
        "What crosses between hosts",
        "Write `answer_bytes_between_hosts(batch_size, width, num_hosts, local_size)`: a dict with the bytes of pooled "
        "float32 embeddings that cross between hosts for a table-row-wise table on one host, `'flat'` and in `'two "
        "hops'`. Every rank asks for `batch_size` bags.",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "How many ranks ask from other hosts? `(num_hosts - 1) * local_size`.",
            "In two hops each of them gets one row of `width` numbers per bag.",
            "Flat, it gets one from each of the `local_size` owners.",
        ),
        check=check_answer_bytes,
    ),
    Exercise(
        "14.3",
        "Draw for unequal ranks",
        "Rank 0 has much memory, rank 3 little. Draw a tiling (a text, as in section 6) in which rank 0 holds half of "
        "the table, rank 1 a quarter, rank 2 a sixth and rank 3 a twelfth. The table has 120 rows and 32 columns.",
        difficulty=2,
        importance=3,
        minutes=10,
        hints=(
            "Twelfths: rank 0 has 6, rank 1 has 3, rank 2 has 2, rank 3 has 1. That makes twelve characters.",
            "Try 3 lines of 4 characters. Row cuts are shared, so think of a rectangle of 6 for rank 0.",
            "Two lines of `000` are 6. What is left: a column of 3 at the right, and a line of 3 below.",
        ),
        check=check_drawing,
    ),
)
