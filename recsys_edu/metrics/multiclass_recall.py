"""Multiclass recall at k: the weighted share of examples whose class is among the k with the highest scores.

    scores 0.1 0.5 0.4, class 2  ->  recall@1 0, recall@2 1, recall@3 1

Reported for every k from 1 to the number of classes. A class shares its place with those of equal score.

Counterpart: torchrec.metrics.multiclass_recall
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation


def compute_true_positives_at_k(predictions: Tensor, labels: Tensor, weights: Tensor, n_classes: int) -> Tensor:
    """The weight of the examples found among the first k, ``[T, K]``; predictions ``[T, B, K]``, labels ``[T, B]``."""
    own_TB1 = predictions.gather(-1, labels.long().unsqueeze(-1))
    better_TB = (predictions > own_TB1).sum(dim=-1)
    is_found_TBK = better_TB.unsqueeze(-1) < torch.arange(1, n_classes + 1, device=predictions.device)
    return (is_found_TBK * weights.unsqueeze(-1)).sum(dim=-2)


def compute_multiclass_recall_at_k(tp_at_k: Tensor, total_weights: Tensor) -> Tensor:
    """Found over all, ``[T, K]``; 0 without examples."""
    return ratio_or_zero(tp_at_k, total_weights.unsqueeze(-1).expand_as(tp_at_k))


def get_multiclass_recall_states(
    predictions: Tensor, labels: Tensor, weights: Tensor, n_classes: int
) -> dict[str, Tensor]:
    """The sums of one batch: ``tp_at_k`` ``[T, K]`` and ``total_weights`` ``[T]``."""
    found_TK = compute_true_positives_at_k(predictions, labels, weights, n_classes)
    return {"tp_at_k": found_TK, "total_weights": weights.sum(dim=-1)}


class MulticlassRecallMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file; ``number_of_classes`` is K."""

    def __init__(self, *args: Any, number_of_classes: int, **kwargs: Any) -> None:
        names, widths = ("tp_at_k", "total_weights"), {"tp_at_k": number_of_classes}
        super().__init__(*args, state_names=names, widths=widths, **kwargs)
        self._n_classes = number_of_classes

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        if predictions.dim() != 3 or predictions.shape[-1] != self._n_classes:
            raise RecMetricException(
                f"multiclass recall wants a score for each of {self._n_classes} classes, predictions"
                f" [{len(labels)}, B, {self._n_classes}]; got {tuple(predictions.shape)}"
            )
        return get_multiclass_recall_states(predictions, labels, weights, self._n_classes)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.MULTICLASS_RECALL: compute_multiclass_recall_at_k(sums["tp_at_k"], sums["total_weights"])}


class MulticlassRecallMetric(RecMetric):
    """``multiclass_recall-<task>|lifetime_multiclass_recall`` and ``|window_...``: one value for each k."""

    _namespace = MetricNamespace.MULTICLASS_RECALL
    _computation_class = MulticlassRecallMetricComputation
    _values_per_example = True
