"""Squared error relative to a constant prediction of 1, and its root.

Counterpart: torchrec.metrics.nmse
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.mse import compute_error_sum, get_mse_states
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_norm(model_error_sum: Tensor, baseline_error_sum: Tensor) -> Tensor:
    """The model's error over the baseline's; 0 when the baseline makes none."""
    return ratio_or_zero(model_error_sum, baseline_error_sum)


def get_norm_mse_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    baseline = compute_error_sum(labels, torch.ones_like(labels), weights)
    return {**get_mse_states(labels, predictions, weights), "const_pred_error_sum": baseline}


class NMSEMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("error_sum", "weighted_num_samples", "const_pred_error_sum")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_norm_mse_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        nmse = compute_norm(sums["error_sum"], sums["const_pred_error_sum"])
        return {MetricName.NMSE: nmse, MetricName.NRMSE: nmse.sqrt()}


class NMSEMetric(RecMetric):
    """See the top of this file; keys ``nmse-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.NMSE
    _computation_class = NMSEMetricComputation
