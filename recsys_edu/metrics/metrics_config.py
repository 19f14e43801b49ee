"""What to measure: tasks, metrics, windows. Plain data; `metric_module.generate_metric_module` builds from it.

Counterpart: torchrec.metrics.metrics_config
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from recsys_edu.metrics.metrics_namespace import StrValueMixin


class RecMetricEnumBase(StrValueMixin, str, Enum):
    """Base of enums that name a metric in a configuration."""


class RecMetricEnum(RecMetricEnumBase):
    """The metrics that a configuration may ask for."""

    NE = "ne"
    NE_POSITIVE = "ne_positive"
    RECALIBRATED_NE = "recalibrated_ne"
    RECALIBRATED_CALIBRATION = "recalibrated_calibration"
    SEGMENTED_NE = "segmented_ne"
    LOG_LOSS = "log_loss"
    CTR = "ctr"
    AUC = "auc"
    AUPRC = "auprc"
    RAUC = "rauc"
    CALIBRATION = "calibration"
    MSE = "mse"
    MAE = "mae"
    MULTICLASS_RECALL = "multiclass_recall"
    RECALL_SESSION_LEVEL = "recall_session_level"
    PRECISION_SESSION_LEVEL = "precision_session_level"
    WEIGHTED_AVG = "weighted_avg"
    TOWER_QPS = "tower_qps"
    ACCURACY = "accuracy"
    NDCG = "ndcg"
    XAUC = "xauc"
    SCALAR = "scalar"
    PRECISION = "precision"
    RECALL = "recall"
    SERVING_NE = "serving_ne"
    SERVING_CALIBRATION = "serving_calibration"
    SERVING_AE_LOSS = "serving_ae_loss"
    OUTPUT = "output"
    TENSOR_WEIGHTED_AVG = "tensor_weighted_avg"
    CALI_FREE_NE = "cali_free_ne"
    UNWEIGHTED_NE = "unweighted_ne"
    HINDSIGHT_TARGET_PR = "hindsight_target_pr"
    NMSE = "nmse"
    AVERAGE = "average"
    MULTI_LABEL_PRECISION = "multi_label_precision"
    NUM_POSITIVE_SAMPLES = "num_positive_samples"
    SUM_WEIGHTS = "sum_weights"
    NUM_MISSING_LABELS = "num_missing_labels"
    WEIGHTED_SUM_PREDICTIONS = "weighted_sum_predictions"


class StateMetricEnum(StrValueMixin, str, Enum):
    """Metrics read from the system, not from the model's output."""

    OPTIMIZERS = "optimizers"
    MODEL_CONFIGURATOR = "model_configurator"


class RecComputeMode(Enum):
    """Whether several tasks are measured one by one or as rows of one tensor.

    ``FUSED_TASKS_AND_STATES_COMPUTATION`` would also pack all states into one tensor to save kernel launches on a
    GPU; here it means the same as ``FUSED_TASKS_COMPUTATION``, with the same keys and values.
    """

    FUSED_TASKS_COMPUTATION = 1
    UNFUSED_TASKS_COMPUTATION = 2
    FUSED_TASKS_AND_STATES_COMPUTATION = 3


@dataclass
class SessionMetricDef:
    """The column that holds the session of each example, and the cut for top-k metrics within a session."""

    session_var_name: str
    top_threshold: int | None = None
    run_ranking_of_labels: bool = False


@dataclass
class RecTaskInfo:
    """One task: under which names the model output holds its label, prediction and weight.

    >>> RecTaskInfo(name="click", label_name="clicked", prediction_name="p_click").weight_name
    'weight'
    """

    name: str = "DefaultTask"
    label_name: str = "label"
    prediction_name: str = "prediction"
    weight_name: str = "weight"
    session_metric_def: SessionMetricDef | None = None
    is_negative_task: bool = False
    tensor_name: str | None = None
    weighted: bool = True


@dataclass
class RecMetricDef:
    """One metric: its tasks (or their indices in the configuration), its window in examples, its own arguments."""

    rec_tasks: list[RecTaskInfo] = field(default_factory=list)
    rec_task_indices: list[int] = field(default_factory=list)
    window_size: int = 10_000_000
    arguments: dict[str, Any] | None = None


@dataclass
class ThroughputDef:
    """The window of the throughput metric in seconds, and the steps it leaves out at the start."""

    window_size: int = 100
    warmup_steps: int = 100


@dataclass
class MetricsConfig:
    """Everything `generate_metric_module` needs to know."""

    rec_tasks: list[RecTaskInfo] = field(default_factory=list)
    rec_metrics: dict[RecMetricEnum, RecMetricDef] = field(default_factory=dict)
    throughput_metric: ThroughputDef | None = None
    rec_compute_mode: RecComputeMode = RecComputeMode.UNFUSED_TASKS_COMPUTATION
    fused_update_limit: int = 0
    state_metrics: list[StateMetricEnum] = field(default_factory=list)
    compute_interval_steps: int = 100
    min_compute_interval: float = 0.0
    max_compute_interval: float = float("inf")
    compute_on_all_ranks: bool = False
    should_validate_update: bool = False
    enable_pt2_compile: bool = False
    should_clone_update_inputs: bool = False
    use_cpu_offloaded_rec_metric_module: bool | None = None


@dataclass
class BatchSizeStage:
    """A batch size that holds until ``max_iters`` iterations are done; None in the last stage means for ever."""

    batch_size: int = 0
    max_iters: int | None = 0


def validate_batch_size_stages(batch_size_stages: list[BatchSizeStage] | None) -> None:
    """Accept None, no stages, or stages of which the last and only the last is open-ended; else ValueError."""
    if not batch_size_stages:
        return
    *earlier, last = batch_size_stages
    for index, stage in enumerate(earlier):
        if stage.max_iters is None:
            raise ValueError(f"batch size stage {index} never ends (max_iters is None) but is not the last stage")
    if last.max_iters is not None:
        raise ValueError(f"the last batch size stage must be open-ended: max_iters=None, got {last.max_iters}")


DefaultTaskInfo = RecTaskInfo()
DefaultMetricsConfig = MetricsConfig(
    rec_tasks=[DefaultTaskInfo],
    rec_metrics={RecMetricEnum.NE: RecMetricDef(rec_tasks=[DefaultTaskInfo])},
    throughput_metric=ThroughputDef(),
)
EmptyMetricsConfig = MetricsConfig()
