"""Weighted means of the labels and of the predictions, side by side.

Counterpart: torchrec.metrics.average
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_average(weighted_sum: Tensor, weighted_num_samples: Tensor) -> Tensor:
    """The mean; 0 without examples."""
    return ratio_or_zero(weighted_sum, weighted_num_samples)


def get_average_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "label_sum": (labels * weights).sum(dim=-1),
        "prediction_sum": (predictions * weights).sum(dim=-1),
        "weighted_num_samples": weights.sum(dim=-1),
    }


class AverageMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("label_sum", "prediction_sum", "weighted_num_samples")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_average_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        count = sums["weighted_num_samples"]
        return {
            MetricName.LABEL_AVERAGE: compute_average(sums["label_sum"], count),
            MetricName.PREDICTION_AVERAGE: compute_average(sums["prediction_sum"], count),
        }


class AverageMetric(RecMetric):
    """See the top of this file; keys ``average-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.AVERAGE
    _computation_class = AverageMetricComputation
