"""RAUC: the share of pairs that the predictions do not order against the labels; AUC for labels of any value.

    labels by rising prediction  1 3 2  ->  of 3 pairs one is reversed (3 before 2)  ->  2 / 3

Pairs with equal labels count as right, pairs with equal predictions and different labels as half. Weights are not
used. The examples of the window are kept and gathered, as for AUC; there is no lifetime value.

Differs from TorchRec where predictions are equal: there the value depends on the order in which they arrive.
Counterpart: torchrec.metrics.rauc
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.rec_metric import ExampleWindowComputation, MetricComputationReport, RecMetric


def count_reversed_pairs(values_N: Tensor) -> int:
    """How many pairs stand in falling order, in O(N log^2 N) without a loop over elements.

    >>> count_reversed_pairs(torch.tensor([1.0, 3.0, 2.0]))
    1

    Two numbers differ first in one bit; there the larger has a 1. So, for each bit: among the elements that agree in
    all higher bits, count the ones that stand before zeros.
    """
    rank_N = values_N.unique(return_inverse=True)[1]
    total = 0
    for bit in range(int(rank_N.max()).bit_length() if len(rank_N) else 0):  # host sync: the number of rounds
        higher_N = rank_N >> (bit + 1)
        order_N = higher_N.argsort(stable=True)
        higher_N, is_one_N = higher_N[order_N], (rank_N[order_N] >> bit) & 1
        ones_before_N = is_one_N.cumsum(0) - is_one_N
        is_first_N = torch.ones_like(higher_N, dtype=torch.bool)
        is_first_N[1:] = higher_N[1:] != higher_N[:-1]
        ones_of_earlier_groups_N = torch.where(is_first_N, ones_before_N, 0).cummax(0).values
        total += int(((ones_before_N - ones_of_earlier_groups_N) * (1 - is_one_N)).sum())  # host sync: the count
    return total


def rauc_of_task(predictions_N: Tensor, labels_N: Tensor) -> float:
    """RAUC of one task; 1 with fewer than two examples."""
    count = len(labels_N)
    if count < 2:
        return 1.0
    by_label_N = labels_N.argsort(stable=True)
    order_N = by_label_N[predictions_N[by_label_N].argsort(stable=True)]  # equal predictions by rising label
    pairs = torch.stack([predictions_N.double(), labels_N.double()], dim=1)
    equal_predictions = _pairs_within(predictions_N.unique(return_counts=True)[1])
    equal_both = _pairs_within(pairs.unique(dim=0, return_counts=True)[1])
    reversed_pairs = count_reversed_pairs(labels_N[order_N]) + (equal_predictions - equal_both) / 2
    return 1.0 - reversed_pairs / (count * (count - 1) / 2)


def _pairs_within(counts: Tensor) -> int:
    return int((counts * (counts - 1) // 2).sum())  # host sync: the count


def compute_rauc(n_tasks: int, predictions: list[Tensor], labels: list[Tensor], weights: list[Tensor]) -> Tensor:
    """RAUC per task ``[T]``, from lists of batches ``[T, B]`` or tensors ``[T, N]``; weights are not used."""
    predictions_TN, labels_TN = _concatenate(predictions), _concatenate(labels)
    return torch.tensor([rauc_of_task(predictions_TN[t], labels_TN[t]) for t in range(n_tasks)], dtype=torch.float64)


def compute_rauc_per_group(
    n_tasks: int, predictions: list[Tensor], labels: list[Tensor], weights: list[Tensor], grouping_keys: Tensor
) -> Tensor:
    """The mean over groups of their RAUC, ``[T]``; 1 without groups."""
    predictions_TN, labels_TN = _concatenate(predictions), _concatenate(labels)
    groups = grouping_keys.unique()
    if not len(groups):
        return torch.ones(n_tasks, dtype=torch.float64)
    members = [grouping_keys == group for group in groups]
    return torch.stack(
        [compute_rauc(n_tasks, predictions_TN[:, own], labels_TN[:, own], weights) for own in members]
    ).mean(dim=0)


def _concatenate(batches: Tensor | list[Tensor]) -> Tensor:
    return batches if isinstance(batches, Tensor) else torch.cat(batches, dim=-1)


class RAUCMetricComputation(ExampleWindowComputation):
    """Keeps the window's examples, and with ``grouped_rauc`` the column ``grouping_keys``."""

    def __init__(self, *args: Any, grouped_rauc: bool = False, fused_update_limit: int = 0, **kwargs: Any) -> None:
        extra_states = ("grouping_keys",) if grouped_rauc else ()
        super().__init__(*args, extra_states=extra_states, fused_update_limit=fused_update_limit, **kwargs)
        self._grouped = grouped_rauc

    def _compute(self) -> list[MetricComputationReport]:
        examples = [self.examples(name) for name in ("predictions", "labels", "weights")]
        value_T = compute_rauc(self._n_tasks, *examples)
        reports = [MetricComputationReport(MetricName.RAUC, MetricPrefix.WINDOW, value_T)]
        if self._grouped:
            value_T = compute_rauc_per_group(self._n_tasks, *examples, self.examples("grouping_keys")[0])
            reports.append(MetricComputationReport(MetricName.GROUPED_RAUC, MetricPrefix.WINDOW, value_T))
        return reports


class RAUCMetric(RecMetric):
    """``rauc-<task>|window_rauc``, and with ``grouped_rauc=True`` ``rauc-<task>|window_grouped_rauc``."""

    _namespace = MetricNamespace.RAUC
    _computation_class = RAUCMetricComputation

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return {"grouping_keys"} if kwargs.get("grouped_rauc") else set()
