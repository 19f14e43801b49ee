"""Exercises of notebook 01, jagged tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal


def random_lengths(count: int) -> Tensor:
    """Lengths of a fresh random batch, with empty rows among them."""
    return torch.randint(0, 4, (count,))


def check_offsets(answer: Callable[[Tensor], Tensor]) -> None:
    """`answer(lengths)` is where each row starts, and where the last one ends."""
    for count in (0, 1, 5, 8):
        lengths = random_lengths(count)
        expected = torch.tensor([int(lengths[:end].sum()) for end in range(count + 1)])
        expect_equal("offsets", answer(lengths.clone()), expected, f"lengths {lengths.tolist()}")


def check_padded(answer: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """`answer(values, offsets, width)` is the padded matrix, cut or filled with zeros to `width`."""
    for width in (1, 3, 5):
        lengths = random_lengths(6)
        values = torch.randint(1, 100, (int(lengths.sum()),))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        expected = torch.zeros(len(lengths), width, dtype=values.dtype)
        for row in range(len(lengths)):
            kept = values[offsets[row] : offsets[row + 1]][:width]
            expected[row, : len(kept)] = kept
        given = f"values {values.tolist()}, offsets {offsets.tolist()}, width {width}"
        expect_equal("the padded matrix", answer(values.clone(), offsets, width), expected, given)


def check_permute(answer: Callable[[Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]) -> None:
    """`answer(lengths_FB, values, order)` is the same batch with its features in another order, repeats allowed."""
    for order in ([1, 0, 2], [2, 2], [0, 1, 2], [1]):
        lengths_FB = random_lengths(12).view(3, 4)
        values = torch.randint(0, 100, (int(lengths_FB.sum()),))
        parts = torch.split(values, lengths_FB.sum(1).tolist())
        given = f"lengths {lengths_FB.tolist()}, values {values.tolist()}, order {order}"
        result = answer(lengths_FB.clone(), values.clone(), list(order))
        if result is None or result is ...:
            raise NotImplementedError
        if not isinstance(result, tuple) or len(result) != 2:
            raise CheckFailed(f"expected a pair (lengths, values), got {type(result).__name__}\nfor {given}")
        expect_equal("lengths", result[0], lengths_FB[order], given)
        expect_equal("values", result[1], torch.cat([parts[feature] for feature in order]), given)


EXERCISES = (
    Exercise(
        "01.1",
        "Offsets without a loop",
        "Write `offsets_of(lengths)`: a tensor with one entry more than `lengths`, 0 first, then the running sum. "
        "A batch without rows has the offsets `[0]`.",
        difficulty=1,
        importance=5,
        minutes=5,
        hints=(
            "The last entry of the offsets is the number of all values. Which running operation ends in a total?",
            "`torch.cumsum(lengths, 0)` gives where each row ends. What is missing in front?",
            "`torch.cat` of a zero with as many dimensions and the same dtype, and the running sum.",
        ),
        check=check_offsets,
    ),
    Exercise(
        "01.2",
        "From jagged to padded",
        "Write `padded(values, offsets, width)`: the matrix `[B, width]` whose row `b` begins with the values of "
        "bag `b` and goes on with zeros; longer bags are cut. Try it without a loop over rows.",
        difficulty=3,
        importance=4,
        minutes=15,
        hints=(
            "Slot `(b, j)` wants the value at position `offsets[b] + j`, if that is still inside bag `b`.",
            "Make all positions at once: `offsets[:-1, None] + torch.arange(width)` has the shape `[B, width]`.",
            "A mask says which slots are real: `torch.arange(width) < lengths[:, None]`.",
            "Begin with `torch.zeros` and write `out[mask] = values[positions[mask]]`.",
        ),
        check=check_padded,
    ),
    Exercise(
        "01.3",
        "Features in another order",
        "Write `permute(lengths_FB, values, order)`, which returns `(lengths, values)` of the same batch with its "
        "features as `order` lists them. A feature may be listed twice. Sharding will do this to every batch.",
        difficulty=3,
        importance=5,
        minutes=15,
        hints=(
            "Lengths are easy: they are a matrix, one line per feature; index it with `order`.",
            "Values of a feature are one contiguous piece. How long is it? Sum its line of lengths.",
            "`torch.split(values, pieces)` cuts the flat tensor; `torch.cat` joins the pieces in the new order.",
        ),
        check=check_permute,
    ),
)
