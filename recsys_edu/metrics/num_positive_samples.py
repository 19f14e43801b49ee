"""The weighted number of positive examples.

Counterpart: torchrec.metrics.num_positive_samples
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_weighted_pos_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weighted number of positive examples."""
    return (weights * labels).sum(dim=-1)


def get_num_positive_sample_states(labels: Tensor, predictions: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """The sum of one batch, ``[T]``."""
    weights = torch.ones_like(labels) if weights is None else weights
    return {"weighted_pos_sum": compute_weighted_pos_sum(labels, predictions, weights)}


class NumPositiveSamplesMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("weighted_pos_sum",)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_num_positive_sample_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.NUM_POSITIVE_SAMPLES: sums["weighted_pos_sum"]}


class NumPositiveSamplesMetric(RecMetric):
    """See the top of this file; keys ``num_positive_samples-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.NUM_POSITIVE_SAMPLES
    _computation_class = NumPositiveSamplesMetricComputation
