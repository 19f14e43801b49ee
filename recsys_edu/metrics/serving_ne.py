"""Normalised entropy of predictions made while serving, with the number of examples beside it.

Labels arrive late and for some of the served examples only (weight 0 marks those without): how many a value rests on
says how far to trust it.

Counterpart: torchrec.metrics.serving_ne
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.ne import ETA, compute_ne, get_ne_states
from recsys_edu.metrics.rec_metric import MetricComputationReport, RecMetric, SumMetricComputation


class ServingNEMetricComputation(SumMetricComputation):
    """The sums of `recsys_edu.metrics.ne`, and the state ``num_examples``: examples with a weight."""

    state_names = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("num_examples", torch.zeros(self._n_tasks, dtype=torch.int64), "sum", persistent=True)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        self.num_examples += weights.count_nonzero(dim=-1)
        return get_ne_states(labels, predictions, weights, ETA)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        ce, count, pos, neg = (sums[name] for name in self.state_names)
        return {MetricName.NE: compute_ne(ce, count, pos, neg, ETA)}

    def _compute(self) -> list[MetricComputationReport]:
        count = MetricComputationReport(MetricName.TOTAL_EXAMPLES, MetricPrefix.DEFAULT, self.num_examples)
        return [*super()._compute(), count]


class ServingNEMetric(RecMetric):
    """``serving_ne-<task>|lifetime_ne``, ``|window_ne`` and ``|total_examples``."""

    _namespace = MetricNamespace.SERVING_NE
    _computation_class = ServingNEMetricComputation
