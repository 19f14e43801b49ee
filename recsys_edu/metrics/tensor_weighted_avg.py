"""The weighted mean of any column of the model's output, named by the task's ``tensor_name``.

Counterpart: torchrec.metrics.tensor_weighted_avg
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_config import RecTaskInfo
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation, required_input
from recsys_edu.metrics.weighted_avg import get_mean

__all__ = ["TensorWeightedAvgMetric", "TensorWeightedAvgMetricComputation", "get_mean"]


class TensorWeightedAvgMetricComputation(SumMetricComputation):
    """Sums of the tasks' columns; a task with ``weighted=False`` counts every example once."""

    state_names = ("weighted_sum", "weighted_num_samples")

    def __init__(self, *args: Any, tasks: list[RecTaskInfo], description: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        without = [task.name for task in tasks if task.tensor_name is None]
        if without:
            raise RecMetricException(f"the tasks {without} have no tensor_name: which column is to be averaged?")
        self._tasks_of_rows, self._description = tasks, description

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        columns = [required_input(kwargs, str(task.tensor_name), self) for task in self._tasks_of_rows]
        values_TB = torch.stack([column.reshape(-1).double() for column in columns])
        if values_TB.shape != weights.shape:
            raise RecMetricException(
                f"the columns {[task.tensor_name for task in self._tasks_of_rows]} have shape"
                f" {tuple(values_TB.shape)}, the weights {tuple(weights.shape)}: one value per example is needed"
            )
        weighted_T1 = torch.tensor([[task.weighted] for task in self._tasks_of_rows], device=weights.device)
        weights_TB = torch.where(weighted_T1, weights, torch.ones_like(weights))
        return {"weighted_sum": (values_TB * weights_TB).sum(-1), "weighted_num_samples": weights_TB.sum(-1)}

    def values(self, sums: dict[str, Tensor]) -> dict[Any, Tensor]:
        key = (MetricName.WEIGHTED_AVG, self._description or "")
        return {key: get_mean(sums["weighted_sum"], sums["weighted_num_samples"])}


class TensorWeightedAvgMetric(RecMetric):
    """``weighted_avg-<task>|lifetime_weighted_avg`` and ``|window_weighted_avg``; needs the tasks' columns."""

    _namespace = MetricNamespace.WEIGHTED_AVG
    _computation_class = TensorWeightedAvgMetricComputation
    _needs_predictions = False

    @staticmethod
    def _columns_of_tasks(tasks: list[RecTaskInfo]) -> set[str]:
        return {task.tensor_name for task in tasks if task.tensor_name is not None}

    def _task_kwargs(self, tasks: list[RecTaskInfo], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "tasks": tasks}
