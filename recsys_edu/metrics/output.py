"""Two counters that the model itself puts out, reported as they are: ``latest_imp`` and ``total_latest_imp``.

Counterpart: torchrec.metrics.output
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.rec_metric import MetricComputationReport, RecMetric, RecMetricComputation, required_input

COLUMNS = ("latest_imp", "total_latest_imp")


class OutputMetricComputation(RecMetricComputation):
    """The columns of the last update, summed over the ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in COLUMNS:
            zeros_T = torch.zeros(self._n_tasks, dtype=torch.float64)
            self.add_state(name, zeros_T, dist_reduce_fx="sum", persistent=False)

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        for name in COLUMNS:
            value = required_input(kwargs, name, self).double().sum()
            setattr(self, name, value.expand(self._n_tasks).clone())

    def _compute(self) -> list[MetricComputationReport]:
        return [
            MetricComputationReport(MetricName.OUTPUT, MetricPrefix.DEFAULT, getattr(self, name), f"_{name}")
            for name in COLUMNS
        ]


class OutputMetric(RecMetric):
    """``output-<task>|output_latest_imp`` and ``|output_total_latest_imp``; needs those two columns."""

    _namespace = MetricNamespace.OUTPUT
    _computation_class = OutputMetricComputation
    _needs_predictions = False

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return set(COLUMNS)
