"""Recall at a threshold: of what is positive, the weighted share that was predicted so.

Counterpart: torchrec.metrics.recall
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_recall(
    num_true_positives: Tensor,
    num_false_negitives: Tensor,  # spelled as in the public interface
) -> Tensor:
    """True positives over true positives and false negatives; 0 when there are neither."""
    return ratio_or_zero(num_true_positives, num_true_positives + num_false_negitives)


def compute_true_pos_sum(labels: Tensor, predictions: Tensor, weights: Tensor, threshold: float = 0.5) -> Tensor:
    """The weight of the positives that were predicted positive."""
    return (weights * (predictions >= threshold) * labels).sum(dim=-1)


def compute_false_neg_sum(labels: Tensor, predictions: Tensor, weights: Tensor, threshold: float = 0.5) -> Tensor:
    """The weight of the false negatives."""
    return (weights * (predictions < threshold) * labels).sum(dim=-1)


def get_recall_states(
    labels: Tensor, predictions: Tensor, weights: Tensor | None, threshold: float = 0.5
) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    weights = torch.ones_like(predictions) if weights is None else weights
    return {
        "true_pos_sum": compute_true_pos_sum(labels, predictions, weights, threshold),
        "false_neg_sum": compute_false_neg_sum(labels, predictions, weights, threshold),
    }


class RecallMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("true_pos_sum", "false_neg_sum")

    def __init__(self, *args: Any, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threshold = threshold

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_recall_states(labels, predictions, weights, self._threshold)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.RECALL: compute_recall(sums["true_pos_sum"], sums["false_neg_sum"])}


class RecallMetric(RecMetric):
    """See the top of this file; keys ``recall-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.RECALL
    _computation_class = RecallMetricComputation
