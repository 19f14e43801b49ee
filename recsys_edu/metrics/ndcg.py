"""NDCG within sessions: how close the order of the predictions comes to the order of the labels.

    DCG = sum over ranks r = 1, 2, ... of gain(label at r) / log2(1 + r)        NDCG = DCG / DCG of the best order

gain is the label, or 2^label - 1 with ``exponential_gain``. A session without any positive label has NDCG 0.

Reported is, as in TorchRec by default, a *falling* curve: sum over sessions of (1 - NDCG) x the session's largest
weight, over the number of sessions. ``report_ndcg_as_decreasing_curve=False`` gives NDCG itself, where 1 is best.

Source: Jarvelin and Kekalainen, Cumulated gain-based evaluation of IR techniques, TOIS 2002.
Counterpart: torchrec.metrics.ndcg
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import (
    RecMetric,
    RecMetricException,
    SumMetricComputation,
    required_input,
)


def dcg_per_session(order_N: Tensor, gains_N: Tensor, session_N: Tensor, num_sessions: int, k: int) -> Tensor:
    """DCG ``[S]`` when each session is read by descending ``order_N``; only the first k ranks unless k is -1."""
    by_score = order_N.argsort(descending=True, stable=True)
    by_session = by_score[session_N[by_score].argsort(stable=True)]  # sessions together, best first within each
    length_S = torch.bincount(session_N, minlength=num_sessions)
    start_S = length_S.cumsum(0) - length_S
    session_sorted_N = session_N[by_session]
    rank_N = torch.arange(len(session_N), device=session_N.device) - start_S[session_sorted_N]
    discounted_N = gains_N[by_session].double() / (rank_N + 2).double().log2()
    if k > 0:
        discounted_N = discounted_N * (rank_N < k)
    return (
        torch.zeros(num_sessions, dtype=torch.float64).to(gains_N.device).index_add(0, session_sorted_N, discounted_N)
    )


class NDCGComputation(SumMetricComputation):
    """Sums 1 - NDCG (or NDCG) over sessions. Sessions must not span batches: each batch counts its own."""

    state_names = ("sum_ndcg", "num_sessions")

    def __init__(
        self,
        *args: Any,
        exponential_gain: bool = False,
        session_key: str = "session_id",
        k: int = -1,
        report_ndcg_as_decreasing_curve: bool = True,
        remove_single_length_sessions: bool = False,
        scale_by_weights_tensor: bool = False,
        is_negative_task_mask: list[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if any(is_negative_task_mask or ()):
            raise RecMetricException(
                f"is_negative_task_mask={is_negative_task_mask} would change no value (TorchRec 1.8 takes it without"
                " effect): for a task where less is better pass 1 - label and 1 - prediction"
            )
        self._exponential_gain = exponential_gain
        self._session_key = session_key
        self._k = k
        self._decreasing = report_ndcg_as_decreasing_curve
        self._remove_single = remove_single_length_sessions
        self._scale_by_weights = scale_by_weights_tensor

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        sessions, session_N = required_input(kwargs, self._session_key, self).flatten().unique(return_inverse=True)
        keep_S = torch.ones(len(sessions), dtype=torch.bool, device=session_N.device)
        if self._remove_single:
            keep_S = torch.bincount(session_N) > 1
        sums = [
            (self._session_values(*task, session_N, len(sessions)) * keep_S).sum()
            for task in zip(labels, predictions, weights)
        ]
        return {"sum_ndcg": torch.stack(sums), "num_sessions": keep_S.sum().double().expand(len(sums)).clone()}

    def _session_values(self, labels_N, predictions_N, weights_N, session_N, num_sessions: int) -> Tensor:
        weight_S = torch.ones(num_sessions, dtype=torch.float64, device=labels_N.device)
        if self._scale_by_weights:  # weights act on each example, then every session counts once
            labels_N, predictions_N = labels_N * weights_N, predictions_N * weights_N
        else:
            weight_S = weight_S.scatter_reduce(0, session_N, weights_N, "amax", include_self=False)
        gains_N = torch.exp2(labels_N) - 1 if self._exponential_gain else labels_N
        dcg_S = dcg_per_session(predictions_N, gains_N, session_N, num_sessions, self._k)
        best_S = dcg_per_session(labels_N, gains_N, session_N, num_sessions, self._k)
        ndcg_S = torch.where(best_S == 0, torch.zeros_like(dcg_S), dcg_S / best_S)
        return weight_S * (1 - ndcg_S if self._decreasing else ndcg_S)

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.NDCG: sums["sum_ndcg"] / sums["num_sessions"]}


class NDCGMetric(RecMetric):
    """``ndcg-<task>|lifetime_ndcg`` and ``|window_ndcg``; needs the column ``session_key`` (default "session_id")."""

    _namespace = MetricNamespace.NDCG
    _computation_class = NDCGComputation

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return {kwargs.get("session_key", "session_id")}
