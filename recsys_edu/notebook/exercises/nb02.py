"""Exercises of notebook 02, embedding bags and kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recsys_edu.notebook.exercise import Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_number


def random_lookup(num_rows: int = 8, dim: int = 4, num_bags: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A fresh table, ids with repeats, and offsets with an empty bag."""
    lengths = torch.randint(0, 4, (num_bags,))
    lengths[torch.randint(num_bags, (1,))] = 0
    ids = torch.randint(0, num_rows, (int(lengths.sum()),))
    return torch.randn(num_rows, dim), ids, torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])


def check_mean_pool(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """`answer(table, ids, offsets)` is the mean of each bag's rows, zeros for empty bags."""
    for _ in range(4):
        table, ids, offsets = random_lookup()
        expected = nn.functional.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True)
        given = f"ids {ids.tolist()}, offsets {offsets.tolist()}"
        expect_close("the pooled means", answer(table.clone(), ids.clone(), offsets.clone()), expected, given)


def check_least_milliseconds(answer: Callable[[int, int, int, int, float], float]) -> None:
    """`answer(num_tables, batch_size, pooling, dim, gb_s)` is bytes moved over bandwidth, in milliseconds."""
    for _ in range(4):
        num_tables, batch_size = (int(torch.randint(1, 100, ())) for _ in range(2))
        pooling, dim, gb_s = int(torch.randint(1, 20, ())), 4 * int(torch.randint(1, 64, ())), 8.5
        num_bags = num_tables * batch_size
        num_bytes = num_bags * pooling * (dim * 4 + 8) + num_bags * dim * 4
        given = f"num_tables {num_tables}, batch_size {batch_size}, pooling {pooling}, dim {dim}, gb_s {gb_s}"
        got = answer(num_tables, batch_size, pooling, dim, gb_s)
        if got is None or got is ...:
            raise NotImplementedError
        expect_number("milliseconds", got, num_bytes / (gb_s * 1e9) * 1e3, given)


def check_fused_adagrad(answer: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], None]) -> None:
    """`answer(table, squares, ids, offsets, arriving, lr)` updates table and squares in place, as Adagrad does."""
    for _ in range(4):
        table, ids, offsets = random_lookup()
        squares, arriving, lr = torch.rand_like(table), torch.randn(len(offsets) - 1, table.shape[1]), 0.1
        weight = table.clone().requires_grad_()
        nn.functional.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True).backward(arriving)
        expected_squares = squares + weight.grad.square()
        expected = table - lr * weight.grad / (expected_squares.sqrt() + 1e-8)
        got, got_squares = table.clone(), squares.clone()
        answer(got, got_squares, ids.clone(), offsets.clone(), arriving.clone(), lr)
        if torch.equal(got, table) and torch.equal(got_squares, squares) and len(ids):
            raise NotImplementedError  # nothing was updated: the stub's body is still empty
        given = f"ids {ids.tolist()}, offsets {offsets.tolist()}, lr {lr}"
        expect_close("the accumulated squares", got_squares, expected_squares, given)
        expect_close("the table", got, expected, given)


EXERCISES = (
    Exercise(
        "02.1",
        "Mean pooling",
        "Write `mean_pool(table, ids, offsets)`: like the sum of section 1, divided by the number of ids in the bag. "
        "An empty bag gives zeros. Without a loop.",
        difficulty=2,
        importance=4,
        minutes=10,
        hints=(
            "Begin with the sum: `torch.repeat_interleave` says which bag each id belongs to, `index_add` adds.",
            "The number of ids in each bag is `offsets.diff()`.",
            "Zero divided by zero is NaN. What may you divide an empty bag's zeros by instead?",
        ),
        check=check_mean_pool,
    ),
    Exercise(
        "02.2",
        "The least time a lookup needs",
        "Write `least_milliseconds(num_tables, batch_size, pooling, dim, gb_s)`: rows read and pooled vectors written "
        "as float32, ids read as 64-bit integers (leave offsets out), over one bandwidth in GB/s (1e9 bytes).",
        difficulty=2,
        importance=5,
        minutes=10,
        hints=(
            "Count bags first: one per table and row of the batch. Then ids: `pooling` per bag.",
            "Each id reads `dim * 4` bytes of table and 8 bytes of itself; each bag writes `dim * 4` bytes.",
            "Bytes over GB/s are nanoseconds. A millisecond has a million of them.",
        ),
        check=check_least_milliseconds,
    ),
    Exercise(
        "02.3",
        "A fused Adagrad",
        "Write `fused_adagrad(table, squares, ids, offsets, arriving, lr)`, which updates `table` and `squares` in "
        "place: squares += gradient², table -= lr * gradient / (sqrt(squares) + 1e-8), on touched rows only. "
        "`arriving` is the gradient of the pooled sums, one row per bag. Mind ids that occur more than once.",
        difficulty=4,
        importance=4,
        minutes=25,
        hints=(
            "Each id receives the gradient of its bag: `arriving[bag_of_id]`.",
            "A row's gradient is the sum over all occurrences of its id, also in different bags. Sum, then square.",
            "`rows, place = ids.unique(return_inverse=True)` gives each touched row once, and where each id went.",
            "`torch.zeros(len(rows), dim).index_add(0, place, arriving[bag_of_id])` is the gradient of those rows.",
        ),
        check=check_fused_adagrad,
    ),
)
