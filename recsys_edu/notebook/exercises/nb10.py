"""Exercises of notebook 10, talking ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal, expect_number


def random_sizes(world_size: int) -> Tensor:
    """Piece sizes `[source, destination]` with empty pieces among them."""
    return torch.randint(0, 4, (world_size, world_size))


def check_receive_sizes(answer: Callable[[Tensor, int], Sequence[int]]) -> None:
    """`answer(sizes_WW, rank)` is how many values come to `rank` from each rank."""
    for world_size in (1, 2, 4):
        sizes_WW = random_sizes(world_size)
        for rank in range(world_size):
            got = answer(sizes_WW.clone(), rank)
            if got is None or got is ...:
                raise NotImplementedError
            given = f"sizes {sizes_WW.tolist()}, rank {rank}"
            expected = torch.tensor([int(sizes_WW[source, rank]) for source in range(world_size)])
            expect_equal("the sizes to receive", torch.as_tensor(got), expected, given)


def check_all_to_all(answer: Callable[[list[Tensor], Tensor], list[Tensor]]) -> None:
    """`answer(sends, sizes_WW)` is what each rank holds after an all-to-all."""
    for world_size in (1, 2, 3, 4):
        sizes_WW = random_sizes(world_size)
        sends = [100 * (rank + 1) + torch.arange(int(sizes_WW[rank].sum())) for rank in range(world_size)]
        got = answer([send.clone() for send in sends], sizes_WW.clone())
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, (list, tuple)) or len(got) != world_size:
            raise CheckFailed(f"expected a list of {world_size} tensors, one per rank, got {type(got).__name__}")
        for rank in range(world_size):
            given = f"sends {[send.tolist() for send in sends]}, sizes {sizes_WW.tolist()}"
            expected = [
                value
                for source in range(world_size)
                for value in _piece(sends[source], sizes_WW[source].tolist(), rank)
            ]
            expect_equal(f"what rank {rank} receives", got[rank], torch.tensor(expected, dtype=torch.int64), given)


def check_bytes_between_hosts(answer: Callable[[Tensor, int], int]) -> None:
    """`answer(bytes_WW, local_size)` is the sum over pairs of ranks on different hosts."""
    for world_size, local_size in ((4, 2), (4, 4), (4, 1), (6, 3), (8, 2)):
        bytes_WW = torch.randint(0, 1000, (world_size, world_size))
        expected = sum(
            int(bytes_WW[source, destination])
            for source in range(world_size)
            for destination in range(world_size)
            if source // local_size != destination // local_size
        )
        got = answer(bytes_WW.clone(), local_size)
        if got is None or got is ...:
            raise NotImplementedError
        expect_number(
            "bytes between hosts", got, expected, f"{bytes_WW.tolist()}, {local_size} ranks per host", tolerance=0.0
        )


def _piece(send: Tensor, sizes: list[int], destination: int) -> list[int]:
    first = sum(sizes[:destination])
    return send[first : first + sizes[destination]].tolist()


EXERCISES = (
    Exercise(
        "10.1",
        "How much is coming",
        "Write `receive_sizes(sizes_WW, rank)`: a list with the number of values that come to `rank` from rank 0, "
        "rank 1, and so on. `sizes_WW[i, j]` is what rank `i` sends rank `j`.",
        difficulty=1,
        importance=4,
        minutes=3,
        hints=(
            "What a rank sends is one row of the matrix. What is it that it receives?",
            "A column: `sizes_WW[:, rank]`, as a list.",
        ),
        check=check_receive_sizes,
    ),
    Exercise(
        "10.2",
        "All-to-all with unequal pieces",
        "Write `all_to_all(sends, sizes_WW)`: `sends[i]` is the flat tensor of rank `i`, its pieces end to end in "
        "order of destination. Return a list with what each rank holds afterwards, in order of source.",
        difficulty=2,
        importance=5,
        minutes=12,
        hints=(
            "First cut: `sends[i].split(list_of_sizes)` gives the pieces of rank `i`, empty ones included.",
            "Then transpose: rank `j` gets piece `j` of rank 0, of rank 1, and so on.",
            "`torch.cat` puts them end to end.",
        ),
        check=check_all_to_all,
    ),
    Exercise(
        "10.3",
        "Bytes between hosts",
        "Write `bytes_between_hosts(bytes_WW, local_size)`: how many bytes of a traffic matrix cross from one host to "
        "another, with `local_size` ranks on each. Try it without a loop.",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "The host of rank `r` is `r // local_size`.",
            "Make all hosts at once: `host = torch.arange(W) // local_size`.",
            "`host[:, None] != host[None, :]` is True exactly where source and destination are on different hosts.",
        ),
        check=check_bytes_between_hosts,
    ),
)
