"""AUPRC: the area under the precision-recall curve, as a step function (average precision).

    walk down the ranking; at each distinct score:  precision x (gain in recall), summed

The value of a random ranking is the share of positives, not 0.5: it says more than AUC where positives are rare.
Kept and gathered like AUC: the examples of the window, no lifetime value.
Counterpart: torchrec.metrics.auprc
"""

from __future__ import annotations

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


class AUPRCMetricComputation(ExampleWindowComputation):
    """Keeps the window's examples."""

    def _compute(self) -> list[MetricComputationReport]:
        examples = [self.examples(name) for name in ("predictions", "labels", "weights")]
        value_T = compute_auprc(self._n_tasks, *examples)
        return [MetricComputationReport(MetricName.AUPRC, MetricPrefix.WINDOW, value_T)]


class AUPRCMetric(RecMetric):
    """``auprc-<task>|window_auprc``."""

    _namespace = MetricNamespace.AUPRC
    _computation_class = AUPRCMetricComputation
