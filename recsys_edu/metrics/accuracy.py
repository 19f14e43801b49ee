"""Accuracy: the weighted share of examples on the right side of the threshold.

With three clicks in a hundred, always saying "no click" has accuracy 0.97: compare with that, not with 0.

Counterpart: torchrec.metrics.accuracy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_accuracy(accuracy_sum: Tensor, weighted_num_samples: Tensor) -> Tensor:
    """The share; 0 without examples."""
    return ratio_or_zero(accuracy_sum, weighted_num_samples)


def compute_accuracy_sum(labels: Tensor, predictions: Tensor, weights: Tensor, threshold: float = 0.5) -> Tensor:
    """The weight of the examples that are right; a prediction equal to the threshold counts as positive."""
    return (weights * ((predictions >= threshold) == labels)).sum(dim=-1)


def get_accuracy_states(
    labels: Tensor, predictions: Tensor, weights: Tensor | None, threshold: float = 0.5
) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    weights = torch.ones_like(predictions) if weights is None else weights
    return {
        "accuracy_sum": compute_accuracy_sum(labels, predictions, weights, threshold),
        "weighted_num_samples": weights.sum(dim=-1),
    }


class AccuracyMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("accuracy_sum", "weighted_num_samples")

    def __init__(self, *args: Any, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threshold = threshold

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_accuracy_states(labels, predictions, weights, self._threshold)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.ACCURACY: compute_accuracy(sums["accuracy_sum"], sums["weighted_num_samples"])}


class AccuracyMetric(RecMetric):
    """See the top of this file; keys ``accuracy-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.ACCURACY
    _computation_class = AccuracyMetricComputation
