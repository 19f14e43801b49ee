"""The part of the normalised entropy that the positive examples cause.

Counterpart: torchrec.metrics.ne_positive
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ne import ETA, compute_ne, get_ne_states
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_cross_entropy_positive(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> Tensor:
    """Bits per positive example times its weight; 0 for the negative ones."""
    return -weights * labels * predictions.double().clamp(min=eta, max=1.0 - eta).log2()


def compute_ne_positive(
    ce_positive_sum: Tensor,
    weighted_num_samples: Tensor,
    pos_labels: Tensor,
    neg_labels: Tensor,
    eta: float,
    allow_missing_label_with_zero_weight: bool = False,
) -> Tensor:
    """The positives' bits over the bits of always predicting the mean label, for all examples."""
    return compute_ne(
        ce_positive_sum, weighted_num_samples, pos_labels, neg_labels, eta, allow_missing_label_with_zero_weight
    )


def get_ne_positive_states(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    states = get_ne_states(labels, predictions, weights, eta)
    del states["cross_entropy_sum"]
    positive = compute_cross_entropy_positive(labels, predictions, weights, eta)
    return {"cross_entropy_positive_sum": positive.sum(dim=-1), **states}


class NEPositiveMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("cross_entropy_positive_sum", "weighted_num_samples", "pos_labels", "neg_labels")

    def __init__(self, *args: Any, allow_missing_label_with_zero_weight: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_missing_label_with_zero_weight=allow_missing_label_with_zero_weight, **kwargs)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_ne_positive_states(labels, predictions, weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        ce, count, pos, neg = (sums[name] for name in self.state_names)
        ne = compute_ne_positive(ce, count, pos, neg, ETA, self._allow_missing_label_with_zero_weight)
        return {MetricName.NE_POSITIVE: ne}


class NEPositiveMetric(RecMetric):
    """See the top of this file; keys ``ne_positive-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.NE_POSITIVE
    _computation_class = NEPositiveMetricComputation
