"""Normalised entropy with calibration divided out: NE over the bits of predicting the mean *prediction*.

Comparable only between models on the same examples: the second divisor is a sum over them, as in TorchRec, not a mean.
Counterpart: torchrec.metrics.cali_free_ne
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ne import ETA, compute_entropy, compute_ne, get_ne_states
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_cali_free_ne(
    ce_sum: Tensor,
    weighted_num_samples: Tensor,
    pos_labels: Tensor,
    neg_labels: Tensor,
    weighted_sum_predictions: Tensor,
    eta: float,
    allow_missing_label_with_zero_weight: bool = False,
) -> Tensor:
    """The value from the sums; nan without examples, or eta if those are allowed."""
    ne = compute_ne(ce_sum, weighted_num_samples, pos_labels, neg_labels, eta)
    mean_prediction = weighted_sum_predictions / weighted_num_samples
    value = ne / compute_entropy(mean_prediction, pos_labels, neg_labels, eta)
    if allow_missing_label_with_zero_weight:
        value = torch.where(weighted_num_samples == 0, torch.full_like(value, eta), value)
    return value


def get_cali_free_ne_states(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    states = get_ne_states(labels, predictions, weights, eta)
    return {**states, "weighted_sum_predictions": (weights * predictions).sum(dim=-1)}


class CaliFreeNEMetricComputation(SumMetricComputation):
    """The sums of NE and the weighted sum of predictions."""

    state_names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels", "weighted_sum_predictions")

    def __init__(self, *args: Any, allow_missing_label_with_zero_weight: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_missing_label_with_zero_weight=allow_missing_label_with_zero_weight, **kwargs)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_cali_free_ne_states(labels, predictions, weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        totals = [sums[name] for name in self.state_names]
        value = compute_cali_free_ne(*totals, ETA, self._allow_missing_label_with_zero_weight)
        return {MetricName.CALI_FREE_NE: value}


class CaliFreeNEMetric(RecMetric):
    """See the top of this file; keys ``cali_free_ne-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.CALI_FREE_NE
    _computation_class = CaliFreeNEMetricComputation
