"""Normalised entropy of predictions that were corrected for sampled negatives; see `recalibration`.

Counterpart: torchrec.metrics.ne_with_recalibration
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ne import ETA, compute_logloss, compute_ne, get_ne_states
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation
from recsys_edu.metrics.recalibration import recalibrated


class RecalibratedNEMetricComputation(SumMetricComputation):
    """NE's sums over corrected predictions; ``recalibration_coefficient`` is the share of negatives kept."""

    state_names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")

    def __init__(
        self,
        *args: Any,
        include_logloss: bool = False,
        allow_missing_label_with_zero_weight: bool = False,
        recalibration_coefficient: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, allow_missing_label_with_zero_weight=allow_missing_label_with_zero_weight, **kwargs)
        self._include_logloss, self._coefficient = include_logloss, recalibration_coefficient

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_ne_states(labels, recalibrated(predictions, self._coefficient), weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        ce, count, pos, neg = (sums[name] for name in self.state_names)
        values = {MetricName.NE: compute_ne(ce, count, pos, neg, ETA, self._allow_missing_label_with_zero_weight)}
        if self._include_logloss:
            values[MetricName.LOG_LOSS] = compute_logloss(ce, pos, neg, ETA)
        return values


class RecalibratedNEMetric(RecMetric):
    """``recalibrated_ne-<task>|lifetime_ne`` and ``|window_ne``; with ``include_logloss`` the log loss too.

    TorchRec takes ``include_logloss`` here without reporting anything.
    """

    _namespace = MetricNamespace.RECALIBRATED_NE
    _computation_class = RecalibratedNEMetricComputation
