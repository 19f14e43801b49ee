"""Calibration of predictions that were corrected for sampled negatives; see `recalibration`.

Counterpart: torchrec.metrics.calibration_with_recalibration
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.calibration import compute_calibration, get_calibration_states
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation
from recsys_edu.metrics.recalibration import recalibrated


class RecalibratedCalibrationMetricComputation(SumMetricComputation):
    """Calibration's sums over corrected predictions; ``recalibration_coefficient`` is the share of negatives kept."""

    state_names = ("calibration_num", "calibration_denom")

    def __init__(self, *args: Any, recalibration_coefficient: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._coefficient = recalibration_coefficient

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_calibration_states(labels, recalibrated(predictions, self._coefficient), weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.CALIBRATION: compute_calibration(sums["calibration_num"], sums["calibration_denom"])}


class RecalibratedCalibrationMetric(RecMetric):
    """``recalibrated_calibration-<task>|lifetime_calibration`` and ``|window_calibration``."""

    _namespace = MetricNamespace.RECALIBRATED_CALIBRATION
    _computation_class = RecalibratedCalibrationMetricComputation
