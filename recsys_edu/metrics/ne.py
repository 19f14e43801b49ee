"""Normalised entropy: the model's cross entropy over that of always predicting the mean label.

Below 1 the model knows more than the click-through rate alone; 1 means it learnt nothing; above 1 it is worse than a
constant. Dividing by the entropy of the data makes data sets with different click-through rates comparable.
With labels of one kind only there is nothing to predict: the denominator is almost 0 and the value huge.

Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014. In bits (base-2 logarithm).

Counterpart: torchrec.metrics.ne
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation

ETA = 1e-12


def compute_cross_entropy(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> Tensor:
    """Bits per example times its weight; predictions are clamped to [eta, 1 - eta].

    >>> compute_cross_entropy(torch.tensor([1.0]), torch.tensor([0.25]), torch.tensor([3.0]), 1e-12)
    tensor([6.], dtype=torch.float64)
    """
    predictions = predictions.double().clamp(min=eta, max=1.0 - eta)
    return -weights * (labels * predictions.log2() + (1.0 - labels) * (1.0 - predictions).log2())


def compute_entropy(mean: Tensor, pos_labels: Tensor, neg_labels: Tensor, eta: float) -> Tensor:
    """The bits of predicting ``mean`` for every example; 0 without examples."""
    mean = mean.double().nan_to_num(0.0).clamp(min=eta, max=1.0 - eta)
    return -pos_labels * mean.log2() - neg_labels * (1.0 - mean).log2()


def compute_ne(
    ce_sum: Tensor,
    weighted_num_samples: Tensor,
    pos_labels: Tensor,
    neg_labels: Tensor,
    eta: float,
    allow_missing_label_with_zero_weight: bool = False,
) -> Tensor:
    """The ratio from the sums; nan without examples, or eta if those are allowed."""
    ne = ce_sum / compute_entropy(pos_labels / weighted_num_samples, pos_labels, neg_labels, eta)
    if allow_missing_label_with_zero_weight:
        ne = torch.where(weighted_num_samples == 0, torch.full_like(ne, eta), ne)
    return ne


def compute_logloss(ce_sum: Tensor, pos_labels: Tensor, neg_labels: Tensor, eta: float) -> Tensor:
    """Bits per weighted example."""
    return ce_sum / (pos_labels + neg_labels).clamp(min=eta)


def get_ne_states(labels: Tensor, predictions: Tensor, weights: Tensor, eta: float) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {
        "cross_entropy_sum": compute_cross_entropy(labels, predictions, weights, eta).sum(dim=-1),
        "weighted_num_samples": weights.sum(dim=-1),
        "pos_labels": (weights * labels).sum(dim=-1),
        "neg_labels": (weights * (1.0 - labels)).sum(dim=-1),
    }


class NEMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")

    def __init__(
        self,
        *args: Any,
        include_logloss: bool = False,
        allow_missing_label_with_zero_weight: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, allow_missing_label_with_zero_weight=allow_missing_label_with_zero_weight, **kwargs)
        self._include_logloss = include_logloss

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_ne_states(labels, predictions, weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        ce, count, pos, neg = (sums[name] for name in self.state_names)
        values = {MetricName.NE: compute_ne(ce, count, pos, neg, ETA, self._allow_missing_label_with_zero_weight)}
        if self._include_logloss:
            values[MetricName.LOG_LOSS] = compute_logloss(ce, pos, neg, ETA)
        return values


class NEMetric(RecMetric):
    """See the top of this file; keys ``ne-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.NE
    _computation_class = NEMetricComputation
