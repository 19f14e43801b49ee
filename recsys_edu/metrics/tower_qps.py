"""Queries per second of each task: the examples with a label for it, over the time between updates.

Unlike throughput, which counts batches, this counts what a task really got, and adds up the ranks: examples of all
ranks over the time of the slowest. The first ``warmup_steps`` updates count as examples but not in the rate.

Counterpart: torchrec.metrics.tower_qps
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from recsys_edu.metrics.metrics_config import BatchSizeStage, RecComputeMode, RecTaskInfo
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from recsys_edu.metrics.ratios import ratio_or_zero
from recsys_edu.metrics.rec_metric import (
    MAX_BUFFER_COUNT,
    MetricComputationReport,
    RecMetric,
    RecMetricComputation,
    WindowBuffer,
)

WINDOW_STATES = ("num_examples", "time_lapse")


class TowerQPSMetricComputation(RecMetricComputation):
    """States ``num_examples``, ``warmup_examples`` (int64) and ``time_lapse`` (seconds), ``[T]`` each."""

    def __init__(self, *args: Any, warmup_steps: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        zeros_T = torch.zeros(self._n_tasks, dtype=torch.int64)
        self.add_state("num_examples", zeros_T.clone(), dist_reduce_fx="sum", persistent=True)
        self.add_state("window_num_examples", zeros_T.clone(), dist_reduce_fx="sum", persistent=False)
        self.add_state("warmup_examples", zeros_T, dist_reduce_fx="sum", persistent=True)
        self.add_state("time_lapse", zeros_T.double(), dist_reduce_fx="max", persistent=True)
        self.add_state("window_time_lapse", zeros_T.double(), dist_reduce_fx="max", persistent=False)
        self._warmup_steps = warmup_steps
        self._start_anew()

    def _start_anew(self) -> None:
        self._steps, self._previous_ts = 0, 0.0
        self._window_buffers = {name: WindowBuffer(self._window_size, MAX_BUFFER_COUNT) for name in WINDOW_STATES}

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        now, count = time.monotonic(), labels.shape[1]
        self._steps += 1
        counts_T = torch.full_like(self.num_examples, count)
        self.num_examples += counts_T
        if self._steps <= self._warmup_steps:
            self.warmup_examples += counts_T
        else:
            seconds_T = torch.full_like(self.time_lapse, now - self._previous_ts)
            self.time_lapse += seconds_T
            self._window_buffers["num_examples"].aggregate_state(self.window_num_examples, counts_T, count)
            self._window_buffers["time_lapse"].aggregate_state(self.window_time_lapse, seconds_T, count)
        self._previous_ts = now

    def _compute(self) -> list[MetricComputationReport]:
        lifetime_T = ratio_or_zero((self.num_examples - self.warmup_examples).double(), self.time_lapse)
        window_T = ratio_or_zero(self.window_num_examples.double(), self.window_time_lapse)
        return [
            MetricComputationReport(MetricName.TOWER_QPS, MetricPrefix.LIFETIME, lifetime_T),
            MetricComputationReport(MetricName.TOWER_QPS, MetricPrefix.WINDOW, window_T),
            MetricComputationReport(MetricName.TOTAL_EXAMPLES, MetricPrefix.DEFAULT, self.num_examples),
        ]

    def reset(self) -> None:
        super().reset()
        self._start_anew()


class TowerQPSMetric(RecMetric):
    """``qps-<task>|lifetime_qps``, ``|window_qps`` and ``|total_examples``; predictions and weights are not needed.

    ``batch_size_stages`` changes nothing: the examples that arrive are counted.
    """

    _namespace = MetricNamespace.TOWER_QPS
    _computation_class = TowerQPSMetricComputation
    _needs_predictions = False

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
        warmup_steps: int = 100,
        batch_size_stages: list[BatchSizeStage] | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = (world_size, my_rank, batch_size, tasks, compute_mode, window_size, fused_update_limit)
        super().__init__(*arguments, process_group=process_group, warmup_steps=warmup_steps, **kwargs)
