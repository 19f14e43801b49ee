"""AUPRC: the area under the precision-recall curve, as a step function (average precision).

    walk down the ranking; at each distinct score:  precision x (gain in recall), summed

The value of a random ranking is the share of positives, not 0.5: it says more than AUC where positives are rare.
Kept and gathered like AUC: the examples of the window, no lifetime value.
Counterpart: torchrec.metrics.auprc
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import ExampleWindowComputation, MetricComputationReport, RecMetric


def weighted_auprc(predictions_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    """AUPRC of one task; 0 without positives of any weight.

    >>> weighted_auprc(torch.tensor([0.9, 0.8, 0.4, 0.1]), torch.tensor([1.0, 0, 1, 0]), torch.ones(4))
    tensor(0.8333, dtype=torch.float64)
    """
    scores, group_N = (-predictions_N).unique(return_inverse=True)  # best first; equal scores share a group
    zeros = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    positive_G = zeros.index_add(0, group_N, (weights_N * labels_N).double())
    total_G = zeros.index_add(0, group_N, weights_N.double())
    precision_G = ratio_or_zero(positive_G.cumsum(0), total_G.cumsum(0))
    return ratio_or_zero((precision_G * positive_G).sum(), positive_G.sum())


def compute_auprc(n_tasks: int, predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """AUPRC per task ``[T]`` from examples ``[T, N]``."""
    return torch.stack([weighted_auprc(predictions[t], labels[t], weights[t]) for t in range(n_tasks)])


def compute_auprc_per_group(
    n_tasks: int, predictions: Tensor, labels: Tensor, weights: Tensor, grouping_keys: Tensor
) -> Tensor:
    """The mean over groups of their AUPRC, ``[T]``; a group without positives counts 0. 0.5 without groups."""
    groups = grouping_keys.unique()
    if not len(groups):
        return torch.full((n_tasks,), 0.5, dtype=torch.float64)
    tensors = (predictions, labels, weights)
    per_group = [compute_auprc(n_tasks, *(value[:, grouping_keys == group] for value in tensors)) for group in groups]
    return torch.stack(per_group).mean(dim=0)


class AUPRCMetricComputation(ExampleWindowComputation):
    """Keeps the window's examples, and with ``grouped_auprc`` the column ``grouping_keys``."""

    def __init__(self, *args: Any, grouped_auprc: bool = False, fused_update_limit: int = 0, **kwargs: Any) -> None:
        extra_states = ("grouping_keys",) if grouped_auprc else ()
        super().__init__(*args, extra_states=extra_states, fused_update_limit=fused_update_limit, **kwargs)
        self._grouped = grouped_auprc

    def _compute(self) -> list[MetricComputationReport]:
        examples = [self.examples(name) for name in ("predictions", "labels", "weights")]
        value_T = compute_auprc(self._n_tasks, *examples)
        reports = [MetricComputationReport(MetricName.AUPRC, MetricPrefix.WINDOW, value_T)]
        if self._grouped:
            value_T = compute_auprc_per_group(self._n_tasks, *examples, self.examples("grouping_keys")[0])
            reports.append(MetricComputationReport(MetricName.GROUPED_AUPRC, MetricPrefix.WINDOW, value_T))
        return reports


class AUPRCMetric(RecMetric):
    """``auprc-<task>|window_auprc``, and with ``grouped_auprc=True`` ``auprc-<task>|window_grouped_auprc``."""

    _namespace = MetricNamespace.AUPRC
    _computation_class = AUPRCMetricComputation

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return {"grouping_keys"} if kwargs.get("grouped_auprc") else set()
