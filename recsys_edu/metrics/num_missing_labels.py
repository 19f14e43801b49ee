"""The weight of the examples whose label is missing (nan).

Counterpart: torchrec.metrics.num_missing_labels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_missing_label_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weight of the examples without a label, ``[T]``.

    >>> compute_missing_label_sum(torch.tensor([1.0, torch.nan]), torch.zeros(2), torch.tensor([2.0, 3.0]))
    tensor(3.)
    """
    return (weights * labels.isnan()).sum(dim=-1)


def get_num_missing_labels_states(labels: Tensor, predictions: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    weights = torch.ones_like(labels) if weights is None else weights
    return {"missing_label_sum": compute_missing_label_sum(labels, predictions, weights)}


class NumMissingLabelsMetricComputation(SumMetricComputation):
    """The sum described at the top of this file."""

    state_names = ("missing_label_sum",)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_num_missing_labels_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.NUM_MISSING_LABELS: sums["missing_label_sum"]}


class NumMissingLabelsMetric(RecMetric):
    """``num_missing_labels-<task>|lifetime_num_missing_labels`` and ``|window_...``."""

    _namespace = MetricNamespace.NUM_MISSING_LABELS
    _computation_class = NumMissingLabelsMetricComputation
