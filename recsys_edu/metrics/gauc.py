"""GAUC: AUC within each session, averaged over the sessions that have positives and negatives.

    session 1: candidates ranked perfectly, AUC 1      session 2: the wrong way round, AUC 0      GAUC 1/2

A model cannot win by knowing which users click a lot: only the order within a session counts. ``update`` takes, beside
the usual tensors, ``num_candidates``: how many consecutive examples each session of the batch has.

Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, section 6.2 (unweighted mean).
Counterpart: torchrec.metrics.gauc
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.auc import weighted_auc
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation


def get_auc_states(labels: Tensor, predictions: Tensor, weights: Tensor, num_candidates: Tensor) -> dict[str, Tensor]:
    """The sum of the sessions' AUC and the number of sessions that have one, ``[T]`` each."""
    sizes = num_candidates.tolist()  # host sync: sessions are cut out one by one
    auc_sums, counts = [], []
    for task in zip(predictions, labels, weights):
        values = []
        for session in zip(*(tensor.split(sizes) for tensor in task)):
            positive, negative = session[2] * session[1], session[2] * (1 - session[1])
            if positive.sum() > 0 and negative.sum() > 0:
                values.append(weighted_auc(*session))
        auc_sums.append(torch.stack(values).sum() if values else labels.new_zeros(()))
        counts.append(len(values))
    return {
        "auc_sum": torch.stack(auc_sums).double(),
        "num_samples": torch.tensor(counts, dtype=torch.float64, device=labels.device),
    }


class GAUCMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("auc_sum", "num_samples")

    def update(
        self,
        *,
        predictions: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        num_candidates: Tensor,
        **kwargs: Any,
    ) -> None:
        kwargs["num_candidates"] = num_candidates
        super().update(predictions=predictions, labels=labels, weights=weights, **kwargs)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        num_candidates = kwargs["num_candidates"]
        if int(num_candidates.sum()) != labels.shape[-1]:  # host sync: a wrong size would mix sessions
            raise RecMetricException(
                f"num_candidates sums to {int(num_candidates.sum())}, the batch has {labels.shape[-1]} examples"
            )
        return get_auc_states(labels, predictions, weights, num_candidates)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        gauc = ratio_or_zero(sums["auc_sum"], sums["num_samples"])
        return {MetricName.GAUC: gauc, MetricName.GAUC_NUM_SAMPLES: sums["num_samples"]}


class GAUCMetric(RecMetric):
    """``gauc-<task>|lifetime_gauc``, ``|window_gauc``, and the number of sessions as ``..._gauc_num_samples``."""

    _namespace = MetricNamespace.GAUC
    _computation_class = GAUCMetricComputation
