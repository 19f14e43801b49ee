"""The click-through rate in the data: sum(w * label) / sum(w). It does not look at the predictions.

Counterpart: torchrec.metrics.ctr
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation


def compute_ctr(ctr_num: Tensor, ctr_denom: Tensor) -> Tensor:
    """Clicks per weighted example; 0 without examples."""
    return ratio_or_zero(ctr_num, ctr_denom)


def get_ctr_states(labels: Tensor, predictions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sums of one batch, ``[T]`` each."""
    return {"ctr_num": (labels * weights).sum(dim=-1), "ctr_denom": weights.sum(dim=-1)}


class CTRMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("ctr_num", "ctr_denom")

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_ctr_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.CTR: compute_ctr(sums["ctr_num"], sums["ctr_denom"])}


class CTRMetric(RecMetric):
    """See the top of this file; keys ``ctr-<task>|lifetime_...`` and ``...|window_...``."""

    _namespace = MetricNamespace.CTR
    _computation_class = CTRMetricComputation
