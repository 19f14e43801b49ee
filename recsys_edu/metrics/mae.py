"""Mean absolute error: sum(w * |label - prediction|) / sum(w).

Counterpart: torchrec.metrics.mae
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_mae(error_sum: Tensor, weighted_num_samples: Tensor) -> Tensor:
    """The mean; 0 without examples."""
    return ratio_or_zero(error_sum, weighted_num_samples)


def compute_error_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of absolute errors."""
    return (weights * (labels - predictions).abs()).sum(dim=-1)


def get_mae_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "error_sum": compute_error_sum(labels, predictions, weights),
        "weighted_num_samples": weights.sum(dim=-1),
    }


class MAEMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("error_sum", "weighted_num_samples")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_mae_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.MAE: compute_mae(sums["error_sum"], sums["weighted_num_samples"])}


class MAEMetric(RecMetric):
    """See the top of this file; keys ``mae-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.MAE
    _computation_class = MAEMetricComputation
