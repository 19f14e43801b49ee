"""The weighted sum of the predictions.

Counterpart: torchrec.metrics.weighted_sum_predictions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_weighted_predictions_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the predictions."""
    return (weights * predictions).sum(dim=-1)


def get_weighted_sum_prediction_states(
    labels: Tensor, predictions: Tensor, weights: Tensor | None
) -> dict[str, Tensor]:
    """The sum of one batch, ``[T]``."""
    weights = torch.ones_like(labels) if weights is None else weights
    return {"weighted_predictions_sum": compute_weighted_predictions_sum(labels, predictions, weights)}


class WeightedSumPredictionsMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("weighted_predictions_sum",)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_weighted_sum_prediction_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.WEIGHTED_SUM_PREDICTIONS: sums["weighted_predictions_sum"]}


class WeightedSumPredictionsMetric(RecMetric):
    """See the top of this file; keys ``weighted_sum_predictions-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.WEIGHTED_SUM_PREDICTIONS
    _computation_class = WeightedSumPredictionsMetricComputation
