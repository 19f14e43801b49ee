"""All metrics of a training run as one module: fed with the model's output, computed every few steps.

    module = generate_metric_module(RecMetricModule, config, batch_size=64, world_size=1, my_rank=0,
                                    state_metrics_mapping={}, device=torch.device("cpu"))
    module.update({"label": ..., "prediction": ..., "weight": ...})
    if module.should_compute():
        print(module.compute())

Counterpart: torchrec.metrics.metric_module
"""

from __future__ import annotations

import abc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from recsys_edu.metrics.accuracy import AccuracyMetric
from recsys_edu.metrics.auc import AUCMetric
from recsys_edu.metrics.auprc import AUPRCMetric
from recsys_edu.metrics.average import AverageMetric
from recsys_edu.metrics.cali_free_ne import CaliFreeNEMetric
from recsys_edu.metrics.calibration import CalibrationMetric
from recsys_edu.metrics.calibration_with_recalibration import RecalibratedCalibrationMetric
from recsys_edu.metrics.ctr import CTRMetric
from recsys_edu.metrics.hindsight_target_pr import HindsightTargetPRMetric
from recsys_edu.metrics.mae import MAEMetric
from recsys_edu.metrics.metrics_config import (
    BatchSizeStage,
    MetricsConfig,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
    StateMetricEnum,
)
from recsys_edu.metrics.metrics_namespace import MetricNamespace, compose_customized_metric_key
from recsys_edu.metrics.model_utils import parse_task_model_outputs
from recsys_edu.metrics.mse import MSEMetric
from recsys_edu.metrics.multi_label_precision import MultiLabelPrecisionMetric
from recsys_edu.metrics.multiclass_recall import MulticlassRecallMetric
from recsys_edu.metrics.ndcg import NDCGMetric
from recsys_edu.metrics.ne import NEMetric
from recsys_edu.metrics.ne_positive import NEPositiveMetric
from recsys_edu.metrics.ne_with_recalibration import RecalibratedNEMetric
from recsys_edu.metrics.nmse import NMSEMetric
from recsys_edu.metrics.num_missing_labels import NumMissingLabelsMetric
from recsys_edu.metrics.num_positive_samples import NumPositiveSamplesMetric
from recsys_edu.metrics.output import OutputMetric
from recsys_edu.metrics.precision import PrecisionMetric
from recsys_edu.metrics.precision_session import PrecisionSessionMetric
from recsys_edu.metrics.rauc import RAUCMetric
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, RecMetricList
from recsys_edu.metrics.recall import RecallMetric
from recsys_edu.metrics.recall_session import RecallSessionMetric
from recsys_edu.metrics.scalar import ScalarMetric
from recsys_edu.metrics.segmented_ne import SegmentedNEMetric
from recsys_edu.metrics.serving_calibration import ServingCalibrationMetric
from recsys_edu.metrics.serving_ne import ServingNEMetric
from recsys_edu.metrics.sum_weights import SumWeightsMetric
from recsys_edu.metrics.tensor_weighted_avg import TensorWeightedAvgMetric
from recsys_edu.metrics.throughput import ThroughputMetric
from recsys_edu.metrics.tower_qps import TowerQPSMetric
from recsys_edu.metrics.unweighted_ne import UnweightedNEMetric
from recsys_edu.metrics.weighted_avg import WeightedAvgMetric
from recsys_edu.metrics.weighted_sum_predictions import WeightedSumPredictionsMetric
from recsys_edu.metrics.xauc import XAUCMetric

REC_METRICS_MAPPING: dict[RecMetricEnum, type[RecMetric]] = {
    RecMetricEnum.NE: NEMetric,
    RecMetricEnum.NE_POSITIVE: NEPositiveMetric,
    RecMetricEnum.UNWEIGHTED_NE: UnweightedNEMetric,
    RecMetricEnum.CALI_FREE_NE: CaliFreeNEMetric,
    RecMetricEnum.CTR: CTRMetric,
    RecMetricEnum.CALIBRATION: CalibrationMetric,
    RecMetricEnum.AUC: AUCMetric,
    RecMetricEnum.AUPRC: AUPRCMetric,
    RecMetricEnum.MSE: MSEMetric,
    RecMetricEnum.NMSE: NMSEMetric,
    RecMetricEnum.MAE: MAEMetric,
    RecMetricEnum.ACCURACY: AccuracyMetric,
    RecMetricEnum.PRECISION: PrecisionMetric,
    RecMetricEnum.RECALL: RecallMetric,
    RecMetricEnum.NDCG: NDCGMetric,
    RecMetricEnum.AVERAGE: AverageMetric,
    RecMetricEnum.WEIGHTED_AVG: WeightedAvgMetric,
    RecMetricEnum.NUM_POSITIVE_SAMPLES: NumPositiveSamplesMetric,
    RecMetricEnum.SUM_WEIGHTS: SumWeightsMetric,
    RecMetricEnum.RECALIBRATED_CALIBRATION: RecalibratedCalibrationMetric,
    RecMetricEnum.RECALIBRATED_NE: RecalibratedNEMetric,
    RecMetricEnum.HINDSIGHT_TARGET_PR: HindsightTargetPRMetric,
    RecMetricEnum.MULTI_LABEL_PRECISION: MultiLabelPrecisionMetric,
    RecMetricEnum.MULTICLASS_RECALL: MulticlassRecallMetric,
    RecMetricEnum.NUM_MISSING_LABELS: NumMissingLabelsMetric,
    RecMetricEnum.OUTPUT: OutputMetric,
    RecMetricEnum.PRECISION_SESSION_LEVEL: PrecisionSessionMetric,
    RecMetricEnum.RAUC: RAUCMetric,
    RecMetricEnum.RECALL_SESSION_LEVEL: RecallSessionMetric,
    RecMetricEnum.SCALAR: ScalarMetric,
    RecMetricEnum.SEGMENTED_NE: SegmentedNEMetric,
    RecMetricEnum.SERVING_CALIBRATION: ServingCalibrationMetric,
    RecMetricEnum.SERVING_NE: ServingNEMetric,
    RecMetricEnum.TENSOR_WEIGHTED_AVG: TensorWeightedAvgMetric,
    RecMetricEnum.TOWER_QPS: TowerQPSMetric,
    RecMetricEnum.XAUC: XAUCMetric,
    RecMetricEnum.WEIGHTED_SUM_PREDICTIONS: WeightedSumPredictionsMetric,
}


class StateMetric(abc.ABC):
    """A source of values that do not come from the model's output, for example an optimizer's learning rate."""

    @abc.abstractmethod
    def get_metrics(self) -> dict[str, Tensor | float]:
        """The values by name; they are reported as ``"<namespace>|<name>"``."""


class RecMetricModule(nn.Module):
    """Metrics, throughput and state metrics behind one update and one compute.

    ``compute_interval_steps`` says how often `should_compute` is true. With ``min_compute_interval`` or
    ``max_compute_interval`` (seconds) it is adapted after each compute to the speed of training; the ranks agree on
    the slowest one's speed, so that all of them compute after the same step.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        rec_tasks: list[RecTaskInfo] | None = None,
        rec_metrics: RecMetricList | None = None,
        throughput_metric: ThroughputMetric | None = None,
        state_metrics: dict[str, StateMetric] | None = None,
        compute_interval_steps: int = 100,
        min_compute_interval: float = 0.0,
        max_compute_interval: float = float("inf"),
    ) -> None:
        super().__init__()
        if not 0 <= min_compute_interval <= max_compute_interval:
            raise ValueError(
                f"min_compute_interval {min_compute_interval} must be between 0 and"
                f" max_compute_interval {max_compute_interval}"
            )
        self.batch_size = batch_size
        self.world_size = world_size
        self.rec_tasks = rec_tasks or []
        self.rec_metrics = rec_metrics if rec_metrics is not None else RecMetricList([])
        self.throughput_metric = throughput_metric
        self.state_metrics = state_metrics or {}
        self.compute_interval_steps = compute_interval_steps
        self.min_compute_interval = min_compute_interval
        self.max_compute_interval = max_compute_interval
        self.trained_batches = 0
        self.compute_count = 0
        self.last_compute_time = time.monotonic()
        self._batches_at_last_compute = 0

    def update(self, model_out: dict[str, Tensor], **kwargs: Any) -> None:
        """Add one batch of the model's output to every metric."""
        if len(self.rec_metrics) and self.rec_tasks:
            with torch.no_grad():
                labels, predictions, weights, required_inputs = parse_task_model_outputs(
                    self.rec_tasks, model_out, self.get_required_inputs()
                )
                if required_inputs:
                    kwargs["required_inputs"] = required_inputs
                self.rec_metrics.update(predictions=predictions, labels=labels, weights=weights or None, **kwargs)
        if self.throughput_metric:
            self.throughput_metric.update()
        self.trained_batches += 1

    def should_compute(self) -> bool:
        return self.trained_batches % self.compute_interval_steps == 0

    def compute(self) -> dict[str, Tensor | float]:
        """All values, over all ranks; every rank has to call it."""
        self.compute_count += 1
        values = self._with_local_values(self.rec_metrics.compute())
        self._adapt_interval()
        return values

    def local_compute(self) -> dict[str, Tensor | float]:
        """All values, of the metrics over this rank's examples only."""
        return self._with_local_values(self.rec_metrics.local_compute())

    def _with_local_values(self, values: dict[str, Any]) -> dict[str, Tensor | float]:
        if self.throughput_metric:
            values.update(self.throughput_metric.compute())
        for namespace, metric in self.state_metrics.items():
            for name, value in metric.get_metrics().items():
                values[compose_customized_metric_key(namespace, name)] = value
        return values

    def _adapt_interval(self) -> None:
        steps = self.trained_batches - self._batches_at_last_compute
        if (self.min_compute_interval > 0 or self.max_compute_interval < float("inf")) and steps:
            per_step = torch.tensor([(time.monotonic() - self.last_compute_time) / steps], dtype=torch.float64)
            if self.world_size > 1 and dist.is_initialized():
                per_step = per_step.to("cuda" if dist.get_backend() == "nccl" else "cpu")
                dist.all_reduce(per_step, op=dist.ReduceOp.MAX)
            seconds = max(float(per_step), 1e-9)  # host sync: the interval is counted in Python
            if seconds * self.compute_interval_steps < self.min_compute_interval:
                self.compute_interval_steps = max(1, round(self.min_compute_interval / seconds))
            elif seconds * self.compute_interval_steps > self.max_compute_interval:
                self.compute_interval_steps = max(1, int(self.max_compute_interval / seconds))
        self.last_compute_time = time.monotonic()
        self._batches_at_last_compute = self.trained_batches

    def get_required_inputs(self) -> list[str] | None:
        """Columns the model's output must have besides labels, predictions and weights."""
        return self.rec_metrics.get_required_inputs()

    def sync(self) -> None:
        """Replace the metrics' states by those over all ranks, until `unsync`: for saving them once."""
        self.rec_metrics.sync()

    def unsync(self) -> None:
        self.rec_metrics.unsync()

    def reset(self) -> None:
        self.rec_metrics.reset()

    def shutdown(self) -> None:
        """Nothing runs in the background; here so that a trainer can call it for any metric module."""


def generate_metric_module(
    metric_class: type[RecMetricModule],
    metrics_config: MetricsConfig,
    batch_size: int,
    world_size: int,
    my_rank: int,
    state_metrics_mapping: dict[StateMetricEnum, StateMetric],
    device: torch.device,
    process_group: ProcessGroup | None = None,
    batch_size_stages: list[BatchSizeStage] | None = None,
    module_kwargs: dict[str, Any] | None = None,
) -> RecMetricModule:
    """Build the module from a configuration.

    Raises RecMetricException for a metric that does not exist here, for one without tasks, and for a state metric that
    the mapping lacks.
    """
    metrics = [
        _generate_metric(name, definition, metrics_config, batch_size, world_size, my_rank, process_group)
        for name, definition in metrics_config.rec_metrics.items()
    ]
    throughput = None
    if metrics_config.throughput_metric:
        throughput = ThroughputMetric(
            batch_size=batch_size,
            world_size=world_size,
            window_seconds=metrics_config.throughput_metric.window_size,
            warmup_steps=metrics_config.throughput_metric.warmup_steps,
            batch_size_stages=batch_size_stages,
        )
    missing = [name.value for name in metrics_config.state_metrics if name not in state_metrics_mapping]
    if missing:
        raise RecMetricException(f"state_metrics_mapping has no entry for {missing}")
    return metric_class(
        batch_size=batch_size,
        world_size=world_size,
        rec_tasks=metrics_config.rec_tasks,
        rec_metrics=RecMetricList(metrics),
        throughput_metric=throughput,
        state_metrics={
            MetricNamespace(name.value).value: state_metrics_mapping[name] for name in metrics_config.state_metrics
        },
        compute_interval_steps=metrics_config.compute_interval_steps,
        min_compute_interval=metrics_config.min_compute_interval,
        max_compute_interval=metrics_config.max_compute_interval,
        **(module_kwargs or {}),
    ).to(device)


def _generate_metric(
    name: RecMetricEnum,
    definition: RecMetricDef,
    config: MetricsConfig,
    batch_size: int,
    world_size: int,
    my_rank: int,
    process_group: ProcessGroup | None,
) -> RecMetric:
    if name not in REC_METRICS_MAPPING:
        known = sorted(metric.value for metric in REC_METRICS_MAPPING)
        raise RecMetricException(f"metric {str(name)!r} is not available; available are {known}")
    if bool(definition.rec_tasks) == bool(definition.rec_task_indices):
        raise RecMetricException(f"metric {str(name)!r} needs either rec_tasks or rec_task_indices")
    return REC_METRICS_MAPPING[name](
        world_size=world_size,
        my_rank=my_rank,
        batch_size=batch_size,
        tasks=definition.rec_tasks or [config.rec_tasks[index] for index in definition.rec_task_indices],
        compute_mode=config.rec_compute_mode,
        window_size=definition.window_size,
        fused_update_limit=config.fused_update_limit,
        compute_on_all_ranks=config.compute_on_all_ranks,
        should_validate_update=config.should_validate_update,
        process_group=process_group,
        **(definition.arguments or {}),
    )
