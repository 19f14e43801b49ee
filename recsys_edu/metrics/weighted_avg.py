"""The weighted mean of the predictions: sum(w * prediction) / sum(w); nan without examples.

Counterpart: torchrec.metrics.weighted_avg
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def get_mean(value_sum: Tensor, num_samples: Tensor) -> Tensor:
    """The mean; nan without examples, so that it is not taken for a prediction of 0."""
    return value_sum / num_samples


class WeightedAvgMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("weighted_sum", "weighted_num_samples")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"weighted_sum": (predictions * weights).sum(dim=-1), "weighted_num_samples": weights.sum(dim=-1)}

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.WEIGHTED_AVG: get_mean(sums["weighted_sum"], sums["weighted_num_samples"])}


class WeightedAvgMetric(RecMetric):
    """See the top of this file; keys ``weighted_avg-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.WEIGHTED_AVG
    _computation_class = WeightedAvgMetricComputation
