"""Exercises of notebook 13, column-wise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_equal


def check_even_widths(answer: Callable[[int, int], list[int]]) -> None:
    """`answer(num_columns, num_blocks)` is widths, multiples of 4, that add up and differ by at most 4."""
    for num_columns, num_blocks in ((16, 2), (32, 4), (24, 4), (100, 8), (8, 2)):
        got = answer(num_columns, num_blocks)
        if got is None or got is ...:
            raise NotImplementedError
        widths = [int(width) for width in got]
        given = f"{num_columns} columns, {num_blocks} blocks\ngot {widths}"
        if len(widths) != num_blocks or sum(widths) != num_columns:
            raise CheckFailed(f"expected {num_blocks} widths that add up to {num_columns}\nfor {given}")
        if any(width % 4 for width in widths) or max(widths) - min(widths) > 4:
            raise CheckFailed(f"expected multiples of 4 that differ by at most 4\nfor {given}")
        if widths != sorted(widths, reverse=True):
            raise CheckFailed(f"expected the wider blocks first\nfor {given}")


def check_cheapest(answer: Callable[[int, int, int, int], str]) -> None:
    """`answer(bags, ids, width, world_size)` names the type that sends fewer bytes."""
    for _ in range(20):
        bags, pooling = int(torch.randint(1, 50, ())), int(torch.randint(0, 80, ()))
        width, world_size = 4 * int(torch.randint(1, 16, ())), int(torch.randint(2, 9, ()))
        ids = bags * pooling
        sent = {
            "row-wise": (world_size * bags + ids) + world_size * bags * width,
            "column-wise": world_size * (bags + ids) + bags * width,
        }
        got = answer(bags, ids, width, world_size)
        if got is None or got is ...:
            raise NotImplementedError
        if got not in sent or sent[got] > min(sent.values()):
            both = ", ".join(f"{name}: {4 * number:,} bytes" for name, number in sent.items())
            raise CheckFailed(
                f"for {bags} bags, {ids} ids, width {width}, {world_size} ranks\n"
                f"expected the smaller of {both}\ngot {got!r}"
            )


def check_rowwise_adagrad_step(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """`answer(weight, gradient, state, column_cuts, learning_rate)` is (new weight, new state [R, blocks])."""
    for column_cuts in ([0, 8], [0, 4, 8], [0, 4, 8, 12]):
        weight, gradient = torch.randn(5, column_cuts[-1]), torch.randn(5, column_cuts[-1])
        state = torch.rand(5, len(column_cuts) - 1)
        weights, states = [], []
        for block, (start, stop) in enumerate(pairwise(column_cuts)):
            states.append(state[:, block] + gradient[:, start:stop].square().sum(1) / (stop - start))
            weights.append(weight[:, start:stop] - 0.1 * gradient[:, start:stop] / (states[-1].sqrt()[:, None] + 1e-8))
        got = answer(weight.clone(), gradient.clone(), state.clone(), list(column_cuts), 0.1)
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != 2:
            raise CheckFailed(f"expected a pair (weight, state), got {type(got).__name__}")
        expect_close("the new state", got[1], torch.stack(states, dim=1), f"column cuts {column_cuts}")
        expect_close("the new weight", got[0], torch.cat(weights, dim=1), f"column cuts {column_cuts}")
    expect_equal("the number of states", torch.tensor(got[1].shape), torch.tensor([5, 3]), "three blocks")


EXERCISES = (
    Exercise(
        "13.1",
        "Widths that kernels like",
        "Write `even_widths(num_columns, num_blocks)`: widths of the column blocks, each a multiple of 4, as even as "
        "that allows, wider ones first. `num_columns` is a multiple of 4 and at least `4 * num_blocks`.",
        difficulty=1,
        importance=3,
        minutes=5,
        hints=(
            "Count in groups of four columns: there are `num_columns // 4`.",
            "`each, more = divmod(groups, num_blocks)`: every block gets `each` groups, the first `more` one more.",
        ),
        check=check_even_widths,
    ),
    Exercise(
        "13.2",
        "Which one sends less",
        "Write `cheapest(bags, ids, width, world_size)`: `'row-wise'` or `'column-wise'`, whichever sends fewer bytes "
        "per rank for lengths, ids and pooled float32 embeddings. `ids` is the number of all ids of the rank's bags.",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "Row-wise: lengths of all bags to everybody, each id to one owner, a part of every bag from everybody.",
            "Column-wise: lengths and ids to everybody, every column of every bag back once.",
            "Compare `W B + N + W B D` with `W (B + N) + B D`.",
        ),
        check=check_cheapest,
    ),
    Exercise(
        "13.3",
        "Row-wise Adagrad on column blocks",
        "Write `rowwise_adagrad_step(weight, gradient, state, column_cuts, learning_rate)`, which returns "
        "`(new_weight, new_state)`. `state` is `[R, blocks]`. Each block adds the mean of its "
        "squared gradient to its state and then takes a step of `learning_rate * gradient / (sqrt(state) + 1e-8)`.",
        difficulty=2,
        importance=3,
        minutes=12,
        hints=(
            "Loop over the blocks: `zip(column_cuts, column_cuts[1:])` gives their first and last columns.",
            "The new state of a block is `state[:, b] + gradient[:, start:stop].pow(2).mean(dim=1)`.",
            "Divide each row by its own root: `(new_state.sqrt() + 1e-8)[:, None]`.",
        ),
        check=check_rowwise_adagrad_step,
    ),
)
