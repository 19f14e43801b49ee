"""Calibration of predictions made while serving, with the number of examples beside it.

Labels arrive late and for some of the served examples only (weight 0 marks those without): how many a value rests on
says how far to trust it.

Counterpart: torchrec.metrics.serving_calibration
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.calibration import compute_calibration, get_calibration_states
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.rec_metric import MetricComputationReport, RecMetric, SumMetricComputation


class ServingCalibrationMetricComputation(SumMetricComputation):
    """The sums of `recsys_edu.metrics.calibration`, and the state ``num_examples``: examples with a weight."""

    state_names = ("calibration_num", "calibration_denom")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("num_examples", torch.zeros(self._n_tasks, dtype=torch.int64), "sum", persistent=True)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        self.num_examples += weights.count_nonzero(dim=-1)
        return get_calibration_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.CALIBRATION: compute_calibration(sums["calibration_num"], sums["calibration_denom"])}

    def _compute(self) -> list[MetricComputationReport]:
        count = MetricComputationReport(MetricName.TOTAL_EXAMPLES, MetricPrefix.DEFAULT, self.num_examples)
        return [*super()._compute(), count]


class ServingCalibrationMetric(RecMetric):
    """``serving_calibration-<task>|lifetime_calibration``, ``|window_calibration`` and ``|total_examples``."""

    _namespace = MetricNamespace.SERVING_CALIBRATION
    _computation_class = ServingCalibrationMetricComputation
