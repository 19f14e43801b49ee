"""Precision within sessions: of the k best predictions of each session, the weighted share that is positive.

    session 1: predictions 0.9 0.2 0.6, labels 1 1 0, top 2  ->  of 0.9 and 0.6 one is positive: 1 / 2

Counterpart: torchrec.metrics.precision_session
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from recsys_edu.metrics.metrics_config import RecComputeMode, RecTaskInfo, SessionMetricDef
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, SumMetricComputation, required_input
from recsys_edu.metrics.recall_session import checked_definition, chosen_and_positive, session_column, session_kwargs


class PrecisionSessionMetricComputation(SumMetricComputation):
    """The sums and ratios described at the top of this file."""

    state_names = ("num_true_pos", "num_false_pos")

    def __init__(self, *args: Any, session_metric_def: SessionMetricDef, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._definition = checked_definition(session_metric_def)

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        session = required_input(kwargs, self._definition.session_var_name, self).reshape(-1)
        return self.get_precision_states(labels, predictions, weights, session)

    def get_precision_states(
        self, labels: Tensor, predictions: Tensor, weights: Tensor, session: Tensor
    ) -> dict[str, Tensor]:
        """The sums of one batch, ``[T]`` each."""
        chosen, positive = chosen_and_positive(labels, predictions, session, self._definition)
        return {
            "num_true_pos": (weights * chosen * positive).sum(dim=-1),
            "num_false_pos": (weights * chosen * (1 - positive)).sum(dim=-1),
        }

    def values(self, sums: dict[str, Tensor]) -> dict[MetricName, Tensor]:
        chosen = sums["num_true_pos"] + sums["num_false_pos"]
        return {MetricName.PRECISION_SESSION_LEVEL: sums["num_true_pos"] / chosen}


class PrecisionSessionMetric(RecMetric):
    """``precision_session_level-<task>|lifetime_precision_session_level`` and ``|window_...``;

    needs the session column.
    """

    _namespace = MetricNamespace.PRECISION_SESSION_LEVEL
    _computation_class = PrecisionSessionMetricComputation

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
