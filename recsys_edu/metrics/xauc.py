"""XAUC: the weighted share of pairs of examples that the predictions order as the labels do; for labels of any value.

    labels 3 1 2, predictions 0.9 0.5 0.4:  (3,1) right, (3,2) right, (1,2) wrong  ->  2 / 3

Pairs are those within one batch. A pair with equal labels is right only where the predictions are equal too. The cost
is quadratic in the batch size.

Counterpart: torchrec.metrics.xauc
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_xauc(error_sum: Tensor, weighted_num_pairs: Tensor) -> Tensor:
    """Right pairs over all pairs; 0 without any."""
    return ratio_or_zero(error_sum, weighted_num_pairs)


def compute_error_sum(labels: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    """The weight of the pairs in the right order, ``[T]``; a pair weighs the product of its examples' weights."""
    right_TBB = _order(labels) == _order(predictions)
    weights_TBB = weights.unsqueeze(-1) * weights.unsqueeze(-2)
    return (right_TBB * weights_TBB).triu(diagonal=1).sum(dim=(-2, -1))


def compute_weighted_num_pairs(weights: Tensor) -> Tensor:
    """The weight of all pairs, ``[T]``: half of (square of the sum minus sum of the squares)."""
    return (weights.sum(dim=-1).square() - weights.square().sum(dim=-1)) / 2


def get_xauc_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "error_sum": compute_error_sum(labels, predictions, weights),
        "weighted_num_pairs": compute_weighted_num_pairs(weights),
    }


def _order(values: Tensor) -> Tensor:
    return torch.sign(values.unsqueeze(-1) - values.unsqueeze(-2))


class XAUCMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("error_sum", "weighted_num_pairs")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_xauc_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.XAUC: compute_xauc(sums["error_sum"], sums["weighted_num_pairs"])}


class XAUCMetric(RecMetric):
    """``xauc-<task>|lifetime_xauc`` and ``|window_xauc``."""

    _namespace = MetricNamespace.XAUC
    _computation_class = XAUCMetricComputation
