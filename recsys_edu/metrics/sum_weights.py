"""The total weight of the examples.

Counterpart: torchrec.metrics.sum_weights
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_weighted_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The total weight of the examples."""
    return weights.sum(dim=-1)


def get_weighted_sum_states(labels: Tensor, predictions: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """The sum of one batch, ``[T]``."""
    weights = torch.ones_like(labels) if weights is None else weights
    return {"weighted_sum": compute_weighted_sum(labels, predictions, weights)}


class SumWeightsMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("weighted_sum",)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_weighted_sum_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.SUM_WEIGHTS: sums["weighted_sum"]}


class SumWeightsMetric(RecMetric):
    """See the top of this file; keys ``sum_weights-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.SUM_WEIGHTS
    _computation_class = SumWeightsMetricComputation
