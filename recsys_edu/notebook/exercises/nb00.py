"""The exercise of notebook 00, start here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_equal


def check_recommend(answer: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """`answer(probability, seen, k)` is the k best positions that are not seen, best first."""
    for count in (6, 10, 50):
        probability = torch.rand(count)
        seen, k = torch.randperm(count)[: count // 2], 3
        seen[0] = probability.argmax()  # the best one is always seen
        before = probability.clone()
        chosen = [position for position in probability.argsort(descending=True).tolist() if position not in seen]
        given = f"probability {[round(p, 2) for p in probability.tolist()]}, seen {seen.tolist()}, k {k}"
        expect_equal("the recommendation", answer(probability, seen, k), torch.tensor(chosen[:k]), given)
        if not torch.equal(probability, before):
            raise CheckFailed(
                f"the probabilities that were passed in have changed; leave them as they are\nfor {given}"
            )


EXERCISES = (
    Exercise(
        "00.1",
        "A recommendation in three lines",
        "Write `recommend(probability, seen, k)`: the positions of the `k` largest probabilities, best first, that "
        "are not listed in the tensor `seen`. Leave `probability` as it is.",
        difficulty=1,
        importance=3,
        minutes=5,
        hints=(
            "What probability can you give the seen films so that they never come out on top?",
            "Assigning to a tensor changes it for everybody who holds it: work on `probability.clone()`.",
            "`topk(k).indices` gives positions, best first.",
        ),
        check=check_recommend,
    ),
)
