"""Mean squared error sum(w * (label - prediction)^2) / sum(w), its root, and on request R squared.

R squared compares with always predicting the mean label: 1 is perfect, 0 no better than the mean, negative worse.

Counterpart: torchrec.metrics.mse
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_mse(error_sum: Tensor, weighted_num_samples: Tensor) -> Tensor:
    """The mean squared error; 0 without examples."""
    return ratio_or_zero(error_sum, weighted_num_samples)


def compute_rmse(error_sum: Tensor, weighted_num_samples: Tensor) -> Tensor:
    """Its root, in the unit of the labels."""
    return compute_mse(error_sum, weighted_num_samples).sqrt()


def compute_r_squared(
    error_sum: Tensor, weighted_num_samples: Tensor, label_sum: Tensor, label_squared_sum: Tensor
) -> Tensor:
    """1 - error / spread of the labels around their mean; nan without examples, no number when all labels are equal."""
    spread = label_squared_sum - label_sum * label_sum / weighted_num_samples
    return 1.0 - error_sum / spread


def compute_error_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of squared errors."""
    return (weights * (labels - predictions).square()).sum(dim=-1)


def get_mse_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "error_sum": compute_error_sum(labels, predictions, weights),
        "weighted_num_samples": weights.sum(dim=-1),
        "label_sum": (weights * labels).sum(dim=-1),
        "label_squared_sum": (weights * labels.square()).sum(dim=-1),
    }


class MSEMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("error_sum", "weighted_num_samples")

    def __init__(self, *args: Any, include_r_squared: bool = False, **kwargs: Any) -> None:
        if include_r_squared:
            self.state_names = (*self.state_names, "label_sum", "label_squared_sum")
        super().__init__(*args, **kwargs)
        self._include_r_squared = include_r_squared

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_mse_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        totals = (sums["error_sum"], sums["weighted_num_samples"])
        values = {MetricName.MSE: compute_mse(*totals), MetricName.RMSE: compute_rmse(*totals)}
        if self._include_r_squared:
            values[MetricName.R_SQUARED] = compute_r_squared(*totals, sums["label_sum"], sums["label_squared_sum"])
        return values


class MSEMetric(RecMetric):
    """See the top of this file; keys ``mse-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.MSE
    _computation_class = MSEMetricComputation
