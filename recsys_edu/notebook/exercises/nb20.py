"""Exercises of notebook 20, quantisation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recsys_edu.kernels.quantized_rows import RowFormat
from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_equal, expect_number
from recsys_edu.types import DataType

KINDS = {2: DataType.INT2, 4: DataType.INT4, 8: DataType.INT8}


def check_there_and_back(answer: Callable[[Tensor, int], Tensor]) -> None:
    """`answer(row, bits)` is the row rounded to 2**bits evenly spaced values from its least to its most."""
    for _ in range(10):
        bits, row = random.choice(list(KINDS)), torch.randn(random.choice([4, 8, 12])) * random.uniform(0.1, 10)
        low, step = row.min(), (row.max() - row.min()) / (2**bits - 1)
        expected = ((row - low) / step).round() * step + low
        given = f"row {[round(x, 3) for x in row.tolist()]}, {bits} bits"
        expect_close("the row as it comes back", answer(row.clone(), bits), expected, given)
    constant = torch.full((4,), 0.5)
    got = answer(constant, 8)
    if not isinstance(got, Tensor) or not torch.equal(got, constant):
        raise CheckFailed(f"a row of one value has no range to divide by\nfor {constant.tolist()}\ngot {got}")


def check_pack(answer: Callable[[Tensor], Tensor]) -> None:
    """`answer(codes)` puts two codes of 4 bits into each byte, the first one into the lower half."""
    for _ in range(10):
        codes = torch.randint(0, 16, (random.choice([2, 4, 8]),), dtype=torch.uint8)
        expected = codes[0::2] + 16 * codes[1::2]
        got = answer(codes.clone())
        expect_equal("the packed bytes", got, expected, f"codes {codes.tolist()}")
        if got.dtype != torch.uint8:
            raise CheckFailed(f"bytes are torch.uint8, got {got.dtype}")


def check_fit(answer: Callable[[int, int, int], Any]) -> None:
    """`answer(num_rows, dim, limit)` is the most bits (8, 4, 2) whose rows fit into `limit` bytes; 0 if none do."""
    for _ in range(20):
        num_rows, dim = random.randrange(10, 10_000), random.choice([16, 64, 128])
        sizes = {bits: num_rows * RowFormat(kind, dim).num_bytes for bits, kind in KINDS.items()}
        limit = random.choice([*sizes.values(), *[size - 1 for size in sizes.values()], 10 * sizes[8]])
        got = answer(num_rows, dim, limit)
        if got is None or got is ...:
            raise NotImplementedError
        expected = max((bits for bits, size in sizes.items() if size <= limit), default=0)
        expect_number("the bits", got, expected, f"{num_rows} rows of {dim} numbers, at most {limit} bytes")


EXERCISES = (
    Exercise(
        "20.1",
        "There and back",
        "Write `there_and_back(row, bits)`: the row after its numbers were rounded to the nearest of `2**bits` evenly "
        "spaced values, the first the row's smallest number, the last its largest. Scales and biases may stay in "
        "float32. A row of one value comes back as it is.",
        difficulty=2,
        importance=5,
        minutes=8,
        hints=(
            "The step is the row's range divided by the number of gaps, `2**bits - 1`.",
            "`((row - low) / step).round()` are the codes; `codes * step + low` are the numbers.",
            "For a row of one value the step is 0: return the row.",
        ),
        check=check_there_and_back,
    ),
    Exercise(
        "20.2",
        "Two codes in a byte",
        "Write `pack(codes)`: an even number of 4-bit codes (uint8, 0 to 15) as half as many bytes, the first code of "
        "each pair in the lower four bits.",
        difficulty=2,
        importance=3,
        minutes=6,
        hints=(
            "`codes[0::2]` are the first ones of all pairs, `codes[1::2]` the second ones.",
            "A code moves into the upper half when it is shifted left by four: `<< 4`.",
            "`codes[0::2] | (codes[1::2] << 4)`.",
        ),
        check=check_pack,
    ),
    Exercise(
        "20.3",
        "How many bits can you afford?",
        "Write `bits_that_fit(num_rows, dim, limit)`: the largest of 8, 4 and 2 bits per number with which the table, "
        "scales and biases included, takes at most `limit` bytes; 0 if even 2 bits are too many.",
        difficulty=1,
        importance=4,
        minutes=6,
        hints=(
            "A row has `dim * bits / 8` bytes of codes.",
            "And four more: a scale and a bias of two bytes each.",
            "Try 8, 4, 2 in this order and return the first that fits.",
        ),
        check=check_fit,
    ),
)
