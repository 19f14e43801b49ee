"""Normalised entropy in which every example counts once, whatever its weight.

Counterpart: torchrec.metrics.unweighted_ne
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ne import ETA, compute_ne, get_ne_states
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def get_unweighted_ne_states(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> dict[str, Tensor]:
    """The sums of one batch with all weights 1, ``[T]`` each."""
    return get_ne_states(labels, predictions, torch.ones_like(labels), eta)


class UnweightedNEMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")

    def __init__(self, *args: Any, allow_missing_label_with_zero_weight: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_missing_label_with_zero_weight=allow_missing_label_with_zero_weight, **kwargs)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_unweighted_ne_states(labels, predictions, weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        ce, count, pos, neg = (sums[name] for name in self.state_names)
        ne = compute_ne(ce, count, pos, neg, ETA, self._allow_missing_label_with_zero_weight)
        return {MetricName.UNWEIGHTED_NE: ne}


class UnweightedNEMetric(RecMetric):
    """See the top of this file; keys ``unweighted_ne-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.UNWEIGHTED_NE
    _computation_class = UnweightedNEMetricComputation
