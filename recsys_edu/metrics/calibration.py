"""Calibration: predicted clicks over real clicks, sum(w * prediction) / sum(w * label).

1 is right on average; 1.1 promises ten percent more clicks than come. A ranking can be perfect (AUC 1) and badly
calibrated; where a prediction is multiplied by a bid, that costs money.

Counterpart: torchrec.metrics.calibration
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_calibration(calibration_num: Tensor, calibration_denom: Tensor) -> Tensor:
    """Predicted over real clicks; 0 without any real click."""
    return ratio_or_zero(calibration_num, calibration_denom)


def get_calibration_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "calibration_num": (predictions * weights).sum(dim=-1),
        "calibration_denom": (labels * weights).sum(dim=-1),
    }


class CalibrationMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("calibration_num", "calibration_denom")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_calibration_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.CALIBRATION: compute_calibration(sums["calibration_num"], sums["calibration_denom"])}


class CalibrationMetric(RecMetric):
    """See the top of this file; keys ``calibration-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.CALIBRATION
    _computation_class = CalibrationMetricComputation
