"""Recall within sessions: of the positives, the weighted share that is among the k best predictions of its session.

    session 1: predictions 0.9 0.2 0.6, labels 1 0 1, top 1  ->  1 of 2 positives found

With ``run_ranking_of_labels`` the positives are the k largest labels of the session, for labels that are not 0 or 1.
Sessions must not span batches.

Counterpart: torchrec.metrics.recall_session
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from recsys_edu.metrics.metrics_config import RecComputeMode, RecTaskInfo, SessionMetricDef
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation, required_input


def ranking_within_session(predictions: Tensor, session: Tensor) -> Tensor:
    """For every example the number of better ones in its session, ``[B]``; equal ones share a place.

    >>> ranking_within_session(torch.tensor([0.9, 0.2, 0.6, 0.4]), torch.tensor([1, 1, 1, 2]))
    tensor([0, 2, 1, 0])
    """
    by_score = predictions.argsort(descending=True, stable=True)
    order = by_score[session[by_score].argsort(stable=True)]  # sessions together, best first within each
    place = torch.arange(len(order), device=order.device)
    new_session = torch.ones_like(place, dtype=torch.bool)
    new_session[1:] = session[order][1:] != session[order][:-1]
    new_score = new_session.clone()
    new_score[1:] |= predictions[order][1:] != predictions[order][:-1]
    start, first_equal = (torch.where(new, place, 0).cummax(0).values for new in (new_session, new_score))
    return torch.empty_like(place).scatter_(0, order, first_equal - start)


def chosen_and_positive(
    labels: Tensor, predictions: Tensor, session: Tensor, definition: SessionMetricDef
) -> tuple[Tensor, Tensor]:
    """Which examples ``[T, B]`` are among the k best of their session, and which are positive, as 0.0 or 1.0."""
    top = definition.top_threshold

    def in_top(values: Tensor) -> Tensor:
        if top is None:
            return torch.ones_like(values)
        return torch.stack([ranking_within_session(row, session) < top for row in values]).double()

    return in_top(predictions), in_top(labels) if definition.run_ranking_of_labels else labels


class RecallSessionMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("num_true_pos", "num_false_neg")

    def __init__(self, *args: Any, session_metric_def: SessionMetricDef, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._definition = checked_definition(session_metric_def)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        session = required_input(kwargs, self._definition.session_var_name, self).reshape(-1)
        return self.get_recall_states(labels, predictions, weights, session)

    def get_recall_states(
        self, labels: Tensor, predictions: Tensor, weights: Tensor, session: Tensor
    ) -> dict[str, Tensor]:
        """The sums of one batch, ``[T]`` each."""
        chosen, positive = chosen_and_positive(labels, predictions, session, self._definition)
        return {
            "num_true_pos": (weights * chosen * positive).sum(dim=-1),
            "num_false_neg": (weights * (1 - chosen) * positive).sum(dim=-1),
        }

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        return {MetricName.RECALL_SESSION_LEVEL: sums["num_true_pos"] / (sums["num_true_pos"] + sums["num_false_neg"])}


def checked_definition(definition: SessionMetricDef) -> SessionMetricDef:
    """The definition, or RecMetricException for a top_threshold below 1."""
    if definition.top_threshold is not None and definition.top_threshold < 1:
        raise RecMetricException(f"top_threshold must be at least 1, got {definition.top_threshold}")
    return definition


def session_column(tasks: list[RecTaskInfo]) -> set[str]:
    """The columns that hold the tasks' sessions; RecMetricException for a task without a session_metric_def."""
    without = [task.name for task in tasks if task.session_metric_def is None]
    if without:
        raise RecMetricException(f"the tasks {without} have no session_metric_def: which column holds the session?")
    return {task.session_metric_def.session_var_name for task in tasks if task.session_metric_def is not None}


def session_kwargs(tasks: list[RecTaskInfo], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The computation's arguments; RecMetricException where fused tasks define sessions differently."""
    session_column(tasks)
    definitions = [task.session_metric_def for task in tasks]
    if any(definition != definitions[0] for definition in definitions):
        raise RecMetricException("fused tasks need equal session_metric_defs; use the unfused mode for different ones")
    return {**kwargs, "session_metric_def": definitions[0]}


class RecallSessionMetric(RecMetric):
    """``recall_session_level-<task>|lifetime_recall_session_level`` and ``|window_...``; needs the session column."""

    _namespace = MetricNamespace.RECALL_SESSION_LEVEL
    _computation_class = RecallSessionMetricComputation

    def __init__(
        self,
        world_size: int,
        my_rank: int,
        batch_size: int,
        tasks: list[RecTaskInfo],
        compute_mode: RecComputeMode = RecComputeMode.UNFUSED_TASKS_COMPUTATION,
        window_size: int = 100,
        fused_update_limit: int = 0,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = (world_size, my_rank, batch_size, tasks, compute_mode, window_size, fused_update_limit)
        super().__init__(*arguments, process_group=process_group, **kwargs)

    @staticmethod
    def _columns_of_tasks(tasks: list[RecTaskInfo]) -> set[str]:
        return session_column(tasks)

    def _task_kwargs(self, tasks: list[RecTaskInfo], kwargs: dict[str, Any]) -> dict[str, Any]:
        return session_kwargs(tasks, kwargs)
