"""The lowest threshold whose precision reached a target, known only in hindsight, with its precision and recall.

    target precision 0.8:  at 0.31 it is 0.79, at 0.32 it is 0.80  ->  threshold 0.32; how much recall does it leave?

True and false positives are counted at 1,000 thresholds evenly spaced over [0, 1] (a score equal to the threshold
counts as predicted). Where no threshold reaches the target, the last one, 1, is reported.

TorchRec 1.8.0 reports uninitialised memory in place of the threshold's number; here it is the threshold itself.
Counterpart: torchrec.metrics.hindsight_target_pr
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation

THRESHOLD_GRANULARITY = 1000


def compute_precision(num_true_positives: Tensor, num_false_positives: Tensor) -> Tensor:
    """True positives over all that was predicted positive; 0 where nothing was."""
    return ratio_or_zero(num_true_positives, num_true_positives + num_false_positives)


def compute_recall(num_true_positives: Tensor, num_false_negitives: Tensor) -> Tensor:
    """True positives over all positives; 0 without any. The argument is spelt as TorchRec spells it."""
    return ratio_or_zero(num_true_positives, num_true_positives + num_false_negitives)


def compute_threshold_idx(num_true_positives: Tensor, num_false_positives: Tensor, target_precision: float) -> int:
    """The number of the lowest threshold that reaches the target, of sums ``[1000]``; 999 where none does."""
    reached = compute_precision(num_true_positives, num_false_positives) >= target_precision
    return int(reached.int().argmax()) if bool(reached.any()) else len(reached) - 1  # host sync: an int is asked for


def get_pr_states(labels: Tensor, predictions: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """True positives, false positives and false negatives at every threshold, ``[..., 1000]``.

    A histogram of the scores summed from above: linear in the batch size.
    """
    weights = torch.ones_like(predictions) if weights is None else weights
    thresholds = torch.linspace(0, 1, THRESHOLD_GRANULARITY, dtype=torch.float64, device=predictions.device)
    # a score reaches the thresholds 0 .. passed - 1
    passed = torch.searchsorted(thresholds, predictions.double(), right=True)
    positive, negative = (_sums_from_above(passed, weights * part) for part in (labels, 1 - labels))
    all_positive = (weights * labels).double().sum(dim=-1, keepdim=True)
    return {"true_pos_sum": positive, "false_pos_sum": negative, "false_neg_sum": all_positive - positive}


def _sums_from_above(passed: Tensor, amounts: Tensor) -> Tensor:
    counts = torch.zeros(*passed.shape[:-1], THRESHOLD_GRANULARITY + 1, dtype=torch.float64, device=passed.device)
    counts.scatter_add_(-1, passed, amounts.double())
    return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


class HindsightTargetPRMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    def __init__(self, *args: Any, target_precision: float = 0.5, **kwargs: Any) -> None:
        names = ("true_pos_sum", "false_pos_sum", "false_neg_sum")
        super().__init__(*args, state_names=names, widths=dict.fromkeys(names, THRESHOLD_GRANULARITY), **kwargs)
        self._target = target_precision

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return get_pr_states(labels, predictions, weights)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        true, false, missed = (sums[name] for name in self.state_names)
        index_T = torch.tensor([compute_threshold_idx(t, f, self._target) for t, f in zip(true, false)])
        index_T1 = index_T.to(true.device).unsqueeze(-1)
        precision_T = compute_precision(true, false).gather(-1, index_T1).squeeze(-1)
        recall_T = compute_recall(true, missed).gather(-1, index_T1).squeeze(-1)
        return {
            MetricName.HINDSIGHT_TARGET_PR: index_T1.squeeze(-1).double() / (THRESHOLD_GRANULARITY - 1),
            MetricName.HINDSIGHT_TARGET_PRECISION: precision_T,
            MetricName.HINDSIGHT_TARGET_RECALL: recall_T,
        }


class HindsightTargetPRMetric(RecMetric):
    """``hindsight_target_pr-<task>|`` + ``hindsight_target_pr``, ``..._precision``, ``..._recall``, both spans."""

    _namespace = MetricNamespace.HINDSIGHT_TARGET_PR
    _computation_class = HindsightTargetPRMetricComputation
