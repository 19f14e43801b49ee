"""Exercises of notebook 05, sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_edu.modules.jagged_attention import jagged_attention
from recsys_edu.notebook.exercise import Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_equal


def check_windowed_attention(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """`answer(query_ND, key_ND, value_ND, window)`: causal attention of one row over the last `window` positions."""
    for length, window in ((1, 1), (5, 2), (6, 6), (7, 3)):
        query_ND, key_ND, value_ND = (torch.randn(length, 4) for _ in range(3))
        given = f"{length} positions, window {window}"
        got = answer(query_ND.clone(), key_ND.clone(), value_ND.clone(), window)
        expected = torch.stack([
            _last_of_row(query_ND, key_ND, value_ND, max(0, place + 1 - window), place) for place in range(length)
        ])  # fmt: skip
        expect_close("the attended values", got, expected, given)


def check_next_pairs(answer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """`answer(items_N, lengths_B)` is (inputs, labels) of all rows, one after the other."""
    for _ in range(3):
        lengths_B = torch.randint(0, 5, (6,))
        items_N = torch.randint(0, 100, (int(lengths_B.sum()),))
        rows = items_N.split(lengths_B.tolist())
        given = f"items {items_N.tolist()}, lengths {lengths_B.tolist()}"
        got = answer(items_N.clone(), lengths_B.clone())
        if got is None or got is ...:
            raise NotImplementedError
        inputs, labels = got
        expect_equal("the inputs", inputs, torch.cat([row[:-1] for row in rows]), given)
        expect_equal("the labels", labels, torch.cat([row[1:] for row in rows]), given)


def _last_of_row(query_ND: Tensor, key_ND: Tensor, value_ND: Tensor, start: int, end: int) -> Tensor:
    parts = [part[start : end + 1, None] for part in (query_ND, key_ND, value_ND)]
    return jagged_attention(*parts, torch.tensor([0, end + 1 - start]), causal=True)[-1, 0]


EXERCISES = (
    Exercise(
        "05.1",
        "What comes next",
        "Write `next_pairs(items_N, lengths_B)`: of a ragged batch of sequences, every item that has a successor, and "
        "those successors. Rows of length 0 and 1 give nothing. No loop over rows is needed.",
        difficulty=2,
        importance=5,
        minutes=10,
        hints=(
            "Inputs are all items but the last of each row; labels are all but the first.",
            "The number of each item's row: `torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)`.",
            "An item is followed by one of its own row where `row[:-1] == row[1:]`.",
        ),
        check=check_next_pairs,
    ),
    Exercise(
        "05.2",
        "A short memory",
        "Write `windowed_attention(query_ND, key_ND, value_ND, window)` for one row and one head: position n attends "
        "to itself and to the `window - 1` positions before it. Logits are dot products divided by the root of D.",
        difficulty=3,
        importance=3,
        minutes=15,
        hints=(
            "All logits at once: `query_ND @ key_ND.T / D ** 0.5`, row n is query n.",
            "With `n = torch.arange(N)`, `n[:, None] - n` is how far back a key lies: allowed are 0 to window - 1.",
            "`masked_fill` what is not allowed with minus infinity, then `softmax(1) @ value_ND`.",
        ),
        check=check_windowed_attention,
    ),
)
