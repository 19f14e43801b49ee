"""A number that the model puts out as its label, for example a loss: the last one, and the mean over a window.

    batch labels [1, 3], [5, 5]  ->  lifetime 5 (the last batch's mean), window (2 + 5) / 2

Counterpart: torchrec.metrics.scalar
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.rec_metric import (
    MAX_BUFFER_COUNT,
    MetricComputationReport,
    RecMetric,
    RecMetricComputation,
    WindowBuffer,
)


class ScalarMetricComputation(RecMetricComputation):
    """The last batch's mean label, and the sum and number of batch means in the window; ranks are averaged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("labels", "window_labels", "window_count"):
            zeros_T = torch.zeros(self._n_tasks, dtype=torch.float64)
            self.add_state(name, zeros_T, dist_reduce_fx="mean", persistent=False)
        self._make_buffers()

    def _make_buffers(self) -> None:
        self._window_buffers = {
            name: WindowBuffer(self._window_size, MAX_BUFFER_COUNT) for name in ("window_labels", "window_count")
        }

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        mean_T = labels.double().mean(dim=-1)
        self.labels = mean_T
        for name, value_T in (("window_labels", mean_T), ("window_count", torch.ones_like(mean_T))):
            self._window_buffers[name].aggregate_state(getattr(self, name), value_T, labels.shape[1])

    def _compute(self) -> list[MetricComputationReport]:
        window_T = self.window_labels / self.window_count
        return [
            MetricComputationReport(MetricName.SCALAR, MetricPrefix.LIFETIME, self.labels),
            MetricComputationReport(MetricName.SCALAR, MetricPrefix.WINDOW, window_T),
        ]

    def reset(self) -> None:
        super().reset()
        self._make_buffers()


class ScalarMetric(RecMetric):
    """``scalar-<task>|lifetime_scalar`` and ``|window_scalar``; predictions and weights are not needed."""

    _namespace = MetricNamespace.SCALAR
    _computation_class = ScalarMetricComputation
    _needs_predictions = False
