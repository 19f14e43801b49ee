"""AUC: the chance that a random positive example is ranked above a random negative one; ties count half.

    score  0.9  0.8  0.4  0.1        pairs (positive, negative):  0.9>0.8  0.9>0.1  0.4<0.8  0.4>0.1
    label   1    0    1    0         AUC = 3 / 4

0.5 is a coin, 1 a perfect order. The value needs all examples at once, so this metric keeps those of the window and
gathers them over the ranks; there is no lifetime value. Exact, with weights, in float64.

Differs from TorchRec where scores are equal: there the value depends on the order in which they arrive.
Counterpart: torchrec.metrics.auc
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.rec_metric import (
    ExampleWindowComputation,
    MetricComputationReport,
    RecMetric,
)

NUM_BINS = 10_000


def weighted_auc(predictions_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    """AUC of one task; 0.5 when all labels (of examples with weight) are of one kind.

    >>> weighted_auc(torch.tensor([0.9, 0.8, 0.4, 0.1]), torch.tensor([1.0, 0, 1, 0]), torch.ones(4))
    tensor(0.7500, dtype=torch.float64)
    """
    scores, group_N = predictions_N.unique(return_inverse=True)  # ascending; equal scores share a group
    sums = torch.zeros(2, len(scores), dtype=torch.float64, device=scores.device)
    positive_G = sums[0].index_add(0, group_N, (weights_N * labels_N).double())
    negative_G = sums[1].index_add(0, group_N, (weights_N * (1 - labels_N)).double())
    negatives_below_G = negative_G.cumsum(0) - negative_G
    won_pairs = (positive_G * (negatives_below_G + negative_G / 2)).sum()
    all_pairs = positive_G.sum() * negative_G.sum()
    return torch.where(all_pairs == 0, torch.full_like(won_pairs, 0.5), won_pairs / all_pairs)


def compute_auc(
    n_tasks: int, predictions: list[Tensor], labels: list[Tensor], weights: list[Tensor], apply_bin: bool = False
) -> Tensor:
    """AUC per task ``[T]``, from lists of batches ``[T, B]``; ``apply_bin`` rounds scores to 1/10,000 first."""
    predictions_TN, labels_TN, weights_TN = (_concatenate(value) for value in (predictions, labels, weights))
    if apply_bin:
        predictions_TN = (predictions_TN * NUM_BINS).round() / NUM_BINS
    return torch.stack([weighted_auc(predictions_TN[t], labels_TN[t], weights_TN[t]) for t in range(n_tasks)])


def compute_auc_per_group(
    n_tasks: int, predictions: list[Tensor], labels: list[Tensor], weights: list[Tensor], grouping_keys: Tensor
) -> Tensor:
    """The mean over groups of their AUC, ``[T]``; a group with labels of one kind counts 0.5. 0.5 without groups."""
    tensors = [_concatenate(value) for value in (predictions, labels, weights)]
    groups = grouping_keys.unique()
    if not len(groups):
        return torch.full((n_tasks,), 0.5, dtype=torch.float64)
    per_group = [compute_auc(n_tasks, *(value[:, grouping_keys == group] for value in tensors)) for group in groups]
    return torch.stack(per_group).mean(dim=0)


def _concatenate(batches: Tensor | list[Tensor]) -> Tensor:
    return batches if isinstance(batches, Tensor) else torch.cat(batches, dim=-1)


class AUCMetricComputation(ExampleWindowComputation):
    """Keeps the window's examples, and with ``grouped_auc`` the column ``grouping_keys``."""

    def __init__(
        self,
        *args: Any,
        grouped_auc: bool = False,
        apply_bin: bool = False,
        fused_update_limit: int = 0,
        **kwargs: Any,
    ) -> None:
        extra_states = ("grouping_keys",) if grouped_auc else ()
        super().__init__(*args, extra_states=extra_states, fused_update_limit=fused_update_limit, **kwargs)
        self._grouped, self._apply_bin = grouped_auc, apply_bin

    def _compute(self) -> list[MetricComputationReport]:
        examples = [self.examples(name) for name in ("predictions", "labels", "weights")]
        value_T = compute_auc(self._n_tasks, *examples, apply_bin=self._apply_bin)
        reports = [MetricComputationReport(MetricName.AUC, MetricPrefix.WINDOW, value_T)]
        if self._grouped:
            groups_N = self.examples("grouping_keys")[0]
            value_T = compute_auc_per_group(self._n_tasks, *examples, groups_N)
            reports.append(MetricComputationReport(MetricName.GROUPED_AUC, MetricPrefix.WINDOW, value_T))
        return reports


class AUCMetric(RecMetric):
    """``auc-<task>|window_auc``, and with ``grouped_auc=True`` ``auc-<task>|window_grouped_auc``."""

    _namespace = MetricNamespace.AUC
    _computation_class = AUCMetricComputation

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return {"grouping_keys"} if kwargs.get("grouped_auc") else set()
