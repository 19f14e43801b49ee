"""Precision of each of several labels of one task: of what was predicted to have label i, the weighted share that has.

Predictions and labels are ``[B, L]`` per task, weights ``[B]``; a prediction of 0.5 or more is a yes.

Counterpart: torchrec.metrics.multi_label_precision (whose 1.8.0 fails with more than one label)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation

THRESHOLD = 0.5


def compute_multi_label_precision(num_true_positives: Tensor, num_false_positives: Tensor) -> Tensor:
    """True positives over all positives; 0 without any."""
    return ratio_or_zero(num_true_positives, num_true_positives + num_false_positives)


class MultiLabelPrecisionMetricComputation(SumMetricComputation):
    """States ``true_pos_sum_<label>`` and ``false_pos_sum_<label>``; labels are called ``label_0``, ... by default."""

    def __init__(self, *args: Any, num_labels: int = 1, label_names: list[str] | None = None, **kwargs: Any) -> None:
        names = label_names or [f"label_{index}" for index in range(num_labels)]
        if len(names) != num_labels:
            raise RecMetricException(f"num_labels is {num_labels}, label_names has {len(names)} names: {names}")
        states = tuple(f"{kind}_pos_sum_{name}" for name in names for kind in ("true", "false"))
        super().__init__(*args, state_names=states, **kwargs)
        self._label_names = names

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        shape = (*weights.shape, len(self._label_names))
        if predictions.numel() != labels.numel() or predictions.shape[2:].numel() != shape[-1]:
            raise RecMetricException(
                f"{shape[-1]} labels want predictions and labels of shape {shape}; got {tuple(predictions.shape)} and"
                f" {tuple(labels.shape)}"
            )
        labels_TBL, predictions_TBL = labels.reshape(shape), predictions.reshape(shape)
        chosen_TBL = (predictions_TBL >= THRESHOLD) * weights.unsqueeze(-1)
        sums = {}
        for index, name in enumerate(self._label_names):
            sums[f"true_pos_sum_{name}"] = (chosen_TBL * labels_TBL)[..., index].sum(dim=-1)
            sums[f"false_pos_sum_{name}"] = (chosen_TBL * (1 - labels_TBL))[..., index].sum(dim=-1)
        return sums

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        if weights is None:
            weights = labels.new_ones(labels.shape[:2])
        super().update(predictions=predictions, labels=labels, weights=weights, **kwargs)

    def values(self, sums: dict[str, Tensor]) -> dict[Any, Tensor]:
        return {
            (MetricName.MULTI_LABEL_PRECISION, name): compute_multi_label_precision(
                sums[f"true_pos_sum_{name}"], sums[f"false_pos_sum_{name}"]
            )
            for name in self._label_names
        }


class MultiLabelPrecisionMetric(RecMetric):
    """``multi_label_precision-<task>|lifetime_multi_label_precision<label>`` and ``|window_...``."""

    _namespace = MetricNamespace.MULTI_LABEL_PRECISION
    _computation_class = MultiLabelPrecisionMetricComputation
    _values_per_example = True
