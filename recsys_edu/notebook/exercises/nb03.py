"""Exercises of notebook 03, DLRM and its metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_edu.metrics.auc import weighted_auc
from recsys_edu.metrics.ne import ETA, compute_ne, get_ne_states
from recsys_edu.models.dlrm import InteractionArch
from recsys_edu.notebook.exercise import Exercise
from recsys_edu.notebook.exercises.compare import expect_close, expect_number


def check_interact(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`answer(dense_vector, sparse_vectors)` is the dense vector and the dot product of every pair."""
    for num_sparse in (1, 2, 5):
        dense, sparse = torch.randn(3, 4), torch.randn(3, num_sparse, 4)
        expected = InteractionArch(num_sparse)(dense, sparse)
        given = f"dense_vector of shape (3, 4), sparse_vectors of shape (3, {num_sparse}, 4)"
        expect_close("the interaction", answer(dense.clone(), sparse.clone()), expected, given)


def random_predictions(count: int) -> tuple[Tensor, Tensor]:
    """Distinct predictions and labels of both kinds."""
    prediction = (torch.randperm(count) + 0.5) / count
    label = (torch.rand(count) < prediction).float()
    label[:2] = torch.tensor([0.0, 1.0])
    return prediction, label


def _check_metric(what: str, answer: Callable[[Tensor, Tensor], float], reference: Callable[..., float]) -> None:
    for count in (6, 20, 1000):
        prediction, label = random_predictions(count)
        short = [round(value, 3) for value in prediction[:6].tolist()]
        given = f"{count} examples, predictions beginning with {short}, labels with {label[:6].tolist()}"
        got = answer(prediction.clone(), label.clone())
        if got is None or got is ...:
            raise NotImplementedError
        expect_number(what, got, reference(prediction, label), given)


def check_normalised_entropy(answer: Callable[[Tensor, Tensor], float]) -> None:
    """`answer(prediction, label)` is the cross entropy over that of always predicting the mean label."""

    def reference(prediction: Tensor, label: Tensor) -> float:
        return float(compute_ne(*get_ne_states(label, prediction, torch.ones_like(label), ETA).values(), ETA))

    _check_metric("normalised entropy", answer, reference)


def check_auc(answer: Callable[[Tensor, Tensor], float]) -> None:
    """`answer(prediction, label)` is the share of (positive, negative) pairs in the right order."""

    def reference(prediction: Tensor, label: Tensor) -> float:
        return float(weighted_auc(prediction, label, torch.ones_like(label)))

    _check_metric("AUC", answer, reference)


EXERCISES = (
    Exercise(
        "03.1",
        "Only the pairs you need",
        "Write `interact(dense_vector, sparse_vectors)` for `[B, D]` and `[B, F, D]`: the dense vector, then the dot "
        "products of all pairs of the F + 1 vectors, in the order (0, 1), (0, 2), ..., (1, 2), ... No pair twice.",
        difficulty=3,
        importance=4,
        minutes=15,
        hints=(
            "Put all vectors into one tensor `[B, F + 1, D]`; the dense one comes first.",
            "`torch.triu_indices(n, n, offset=1)` lists the pairs in the order asked for.",
            "A dot product is a product summed over the last dimension: `(a * b).sum(-1)`.",
        ),
        check=check_interact,
    ),
    Exercise(
        "03.2",
        "Normalised entropy",
        "Write `normalised_entropy_of(prediction, label)`: the model's mean cross entropy over that of a model which "
        "always predicts the mean label.",
        difficulty=2,
        importance=5,
        minutes=10,
        hints=(
            "Cross entropy of one example: `-(y * log(p) + (1 - y) * log(1 - p))`; torch has it as a function.",
            "The constant model predicts `label.mean()` for everybody: `expand_as` makes it as long as the labels.",
        ),
        check=check_normalised_entropy,
    ),
    Exercise(
        "03.3",
        "AUC without all pairs",
        "Section 4 compares every positive with every negative: a billion pairs for 60,000 examples. Write "
        "`auc(prediction, label)` with one sort. All predictions differ.",
        difficulty=4,
        importance=3,
        minutes=20,
        hints=(
            "Sort all examples by prediction and give each its rank, 1 for the smallest.",
            "A positive example of rank r has r - 1 examples below it. Which of those are no wins?",
            "The positives among themselves make 1 + 2 + ... of the sum of their ranks: P * (P + 1) / 2 in all.",
            "AUC = (sum of the positives' ranks - P * (P + 1) / 2) / (P * N).",
        ),
        check=check_auc,
    ),
)
