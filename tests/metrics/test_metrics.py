"""Metric values against numbers worked out by hand or by numpy, windows, modes, bad input, and the merge over ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.metrics.auc import AUCMetric, AUCMetricComputation, compute_auc, compute_auc_per_group, weighted_auc
from recsys_edu.metrics.auprc import AUPRCMetric, weighted_auprc
from recsys_edu.metrics.calibration import CalibrationMetric
from recsys_edu.metrics.ctr import CTRMetric
from recsys_edu.metrics.metric_module import REC_METRICS_MAPPING, RecMetricModule, StateMetric, generate_metric_module
from recsys_edu.metrics.metrics_config import (
    BatchSizeStage,
    MetricsConfig,
    RecComputeMode,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
    StateMetricEnum,
    ThroughputDef,
    validate_batch_size_stages,
)
from recsys_edu.metrics.model_utils import parse_model_outputs, parse_task_model_outputs
from recsys_edu.metrics.mse import MSEMetric
from recsys_edu.metrics.ndcg import NDCGMetric
from recsys_edu.metrics.ne import NEMetric
from recsys_edu.metrics.rec_metric import RecMetricException, WindowBuffer
from recsys_edu.metrics.throughput import ThroughputMetric

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
CLICK, BUY = RecTaskInfo(name="click"), RecTaskInfo(name="buy")
FUSED = RecComputeMode.FUSED_TASKS_COMPUTATION


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(metric_class, tasks=(CLICK,), **arguments):
    defaults = {"world_size": 1, "my_rank": 0, "batch_size": 4, "window_size": 100}
    return metric_class(tasks=list(tasks), **{**defaults, **arguments})


def feed(metric, predictions, labels, weights=None, **kwargs):
    metric.update(
        predictions={"click": predictions},
        labels={"click": labels},
        weights=None if weights is None else {"click": weights},
        **kwargs,
    )
    return metric


PREDICTIONS, LABELS, WEIGHTS = t(0.5, 0.25, 0.75, 0.5), t(1, 0, 1, 0), t(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("metric", "key", "by_hand"),
    [
        # bits: 1 * 1 + 2 * log2(4/3) + 3 * log2(4/3) + 4 * 1 over 10 * entropy(0.4)
        (
            RecMetricEnum.NE,
            "ne",
            (5 + 5 * math.log2(4 / 3)) / (-4 * math.log2(0.4) - 6 * math.log2(0.6)),
        ),
        (RecMetricEnum.CTR, "ctr", 4 / 10),
        (RecMetricEnum.CALIBRATION, "calibration", (0.5 + 0.5 + 2.25 + 2) / 4),
        (RecMetricEnum.ACCURACY, "accuracy", (1 + 2 + 3) / 10),  # 0.5 counts as positive
        (RecMetricEnum.PRECISION, "precision", 4 / (4 + 4)),
        (RecMetricEnum.RECALL, "recall", 1.0),
        (RecMetricEnum.MSE, "mse", (0.25 + 2 / 16 + 3 / 16 + 1) / 10),
        (RecMetricEnum.MAE, "mae", (0.5 + 0.5 + 0.75 + 2) / 10),
        (RecMetricEnum.WEIGHTED_AVG, "weighted_avg", 5.25 / 10),
        (RecMetricEnum.SUM_WEIGHTS, "sum_weights", 10),
        (RecMetricEnum.NUM_POSITIVE_SAMPLES, "num_positive_samples", 4),
        (RecMetricEnum.WEIGHTED_SUM_PREDICTIONS, "weighted_sum_predictions", 5.25),
    ],
)
def test_value_by_hand_in_one_batch_and_in_two(metric, key, by_hand):
    whole = feed(make(REC_METRICS_MAPPING[metric]), PREDICTIONS, LABELS, WEIGHTS).compute()
    halves = make(REC_METRICS_MAPPING[metric])
    for half in (slice(0, 1), slice(1, 4)):
        feed(halves, PREDICTIONS[half], LABELS[half], WEIGHTS[half])
    for prefix in ("lifetime", "window"):
        for values in (whole, halves.compute()):
            assert values[f"{metric.value}-click|{prefix}_{key}"].item() == pytest.approx(by_hand, rel=1e-12)


def test_r_squared_is_zero_for_the_mean_and_one_for_the_truth():
    labels = t(1, 2, 3, 6)
    for predictions, by_hand in ((torch.full((4,), 3.0), 0.0), (labels, 1.0)):
        values = feed(make(MSEMetric, include_r_squared=True), predictions, labels).compute()
        assert values["mse-click|lifetime_r_squared"].item() == pytest.approx(by_hand)


def test_ndcg_by_hand():
    # session 7: order of predictions 0, 1, 1 -> (1/log2(3) + 1/2) / (1 + 1/log2(3)); session 9: perfect
    metric = make(NDCGMetric, batch_size=5, report_ndcg_as_decreasing_curve=False)
    feed(
        metric,
        t(0.1, 0.9, 0.8, 0.3, 0.2),
        t(1, 0, 1, 1, 0),
        required_inputs={"session_id": torch.tensor([7, 7, 7, 9, 9])},
    )
    first = (1 / math.log2(3) + 0.5) / (1 + 1 / math.log2(3))
    assert metric.compute()["ndcg-click|lifetime_ndcg"].item() == pytest.approx((first + 1) / 2)
    assert metric.get_required_inputs() == {"session_id"}
    with pytest.raises(RecMetricException, match="session_id"):
        feed(metric, t(0.1), t(1))


def auc_by_pairs(predictions, labels, weights) -> float:
    won = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            pair = weights[i] * weights[j]
            total += pair
            won += pair * (1.0 if predictions[i] > predictions[j] else 0.5 if predictions[i] == predictions[j] else 0.0)
    return won / total if total else 0.5


examples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 3)), min_size=0, max_size=12)


@settings(max_examples=60, deadline=None)
@given(examples)
def test_auc_equals_counting_pairs(rows):
    predictions, labels, weights = np.array(rows, dtype=np.float64).reshape(-1, 3).T.copy()
    ours = weighted_auc(*(torch.from_numpy(value) for value in (predictions / 4, labels, weights)))
    assert ours.item() == pytest.approx(auc_by_pairs(predictions, labels, weights))


def test_auc_edge_cases():
    ones = torch.ones(1, 4)
    assert compute_auc(1, [PREDICTIONS[None]], [ones], [ones]).tolist() == [0.5]  # one kind of label
    assert compute_auc(1, [PREDICTIONS[None]], [LABELS[None]], [ones * 0]).tolist() == [0.5]
    assert make(AUCMetric).compute()["auc-click|window_auc"].item() == 0.5
    grouped = compute_auc_per_group(1, [t(0.9, 0.1, 0.1, 0.9)[None]], [t(1, 0, 1, 0)[None]], [ones], t(0, 0, 1, 1))
    assert grouped.tolist() == [0.5]  # one group perfect, one upside down
    assert weighted_auprc(PREDICTIONS, LABELS * 0, WEIGHTS).item() == 0
    assert weighted_auprc(t(0.9, 0.8, 0.4, 0.1), t(1, 0, 1, 0), torch.ones(4)).item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("metric_class, name", [(AUCMetric, "auc"), (AUPRCMetric, "auprc")])
def test_grouped_values_are_the_mean_over_groups(metric_class, name):
    metric = make(metric_class, **{f"grouped_{name}": True})
    assert metric.get_required_inputs() == {"grouping_keys"}
    scores, labels = t(0.9, 0.1, 0.1, 0.9), t(1, 0, 1, 0)  # first group perfect, second upside down
    feed(metric, scores, labels, required_inputs={"grouping_keys": torch.tensor([0, 0, 1, 1])})
    worst = {"auc": 0.0, "auprc": 0.5}[name]
    assert metric.compute()[f"{name}-click|window_grouped_{name}"].item() == (1 + worst) / 2
    assert make(metric_class).get_required_inputs() == set()


def test_without_examples_ne_is_nan_or_where_that_is_allowed_tiny():
    for module in ("ne", "ne_positive", "unweighted_ne", "cali_free_ne"):
        metric_class = next(c for c in REC_METRICS_MAPPING.values() if c.__module__.endswith(f".{module}"))
        values = [list(make(metric_class, **arguments).compute().values()) for arguments in
                  ({}, {"allow_missing_label_with_zero_weight": True})]  # fmt: skip
        assert all(value.isnan() for value in values[0])
        assert [value.item() for value in values[1]] == [1e-12, 1e-12]


def test_auc_keeps_exactly_the_window():
    metric = make(AUCMetric, window_size=4)
    feed(metric, t(0.1, 0.9), t(1, 0))  # upside down; half of it is forgotten
    feed(metric, t(0.8, 0.7, 0.2), t(1, 1, 0))
    assert metric.compute()["auc-click|window_auc"].item() == auc_by_pairs(
        np.array([0.9, 0.8, 0.7, 0.2]), np.array([0, 1, 1, 0]), np.ones(4)
    )


# Metrics that want columns, task settings or shapes of their own; tested in test_long_tail.py.
NEED_MORE = {
    RecMetricEnum.MULTICLASS_RECALL,
    RecMetricEnum.OUTPUT,
    RecMetricEnum.PRECISION_SESSION_LEVEL,
    RecMetricEnum.RECALL_SESSION_LEVEL,
    RecMetricEnum.SEGMENTED_NE,
    RecMetricEnum.TENSOR_WEIGHTED_AVG,
    RecMetricEnum.TOWER_QPS,  # a clock: no two runs are equal
}
PLAIN = [enum for enum in REC_METRICS_MAPPING if enum not in NEED_MORE]


@pytest.mark.parametrize("enum", PLAIN, ids=str)
def test_one_kind_of_label_zero_weights_and_no_examples_never_raise(enum):
    for labels, weights in ((torch.ones(4), torch.ones(4)), (torch.zeros(4), torch.ones(4)), (LABELS, torch.zeros(4))):
        metric = make(REC_METRICS_MAPPING[enum])
        columns = {name: torch.zeros(4, dtype=torch.int64) for name in metric.get_required_inputs()}
        feed(metric, PREDICTIONS, labels, weights, required_inputs=columns)
        feed(metric, PREDICTIONS[:0], labels[:0], weights[:0], required_inputs=columns)
        values = metric.compute()
        assert values and all(value.shape == (1,) for value in values.values())
    assert make(REC_METRICS_MAPPING[enum]).compute().keys() == values.keys()


@pytest.mark.parametrize("enum", PLAIN, ids=str)
def test_fused_equals_unfused(enum):
    generator = torch.Generator().manual_seed(3)
    predictions, weights = (torch.rand(2, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])
    columns = {"required_inputs": {"session_id": torch.tensor([0, 0, 1, 1])}}
    by_task = [{"click": value[0], "buy": value[1]} for value in (predictions, labels, weights)]
    results = []
    for mode, inputs in (
        (RecComputeMode.UNFUSED_TASKS_COMPUTATION, by_task),
        (FUSED, (predictions, labels, weights)),
        (FUSED, by_task),
        (RecComputeMode.FUSED_TASKS_AND_STATES_COMPUTATION, by_task),
    ):
        metric = make(REC_METRICS_MAPPING[enum], tasks=(CLICK, BUY), compute_mode=mode)
        metric.update(predictions=inputs[0], labels=inputs[1], weights=inputs[2], **columns)
        results.append({key: value.item() for key, value in metric.compute().items()})
    assert {key.split("|")[0].split("-")[1] for key in results[0]} == {"click", "buy"}
    assert all(result == pytest.approx(results[0], nan_ok=True) for result in results[1:])


def test_window_forgets_and_lifetime_does_not():
    metric = make(CTRMetric, window_size=8)
    for label in (0.0, 1.0, 1.0):
        feed(metric, PREDICTIONS, torch.full((4,), label))
    values = metric.compute()
    assert values["ctr-click|lifetime_ctr"].item() == pytest.approx(2 / 3)
    assert values["ctr-click|window_ctr"].item() == 1
    metric.reset()
    assert [value.item() for value in metric.compute().values()] == [0, 0]
    feed(metric, PREDICTIONS, LABELS)
    assert metric.compute()["ctr-click|window_ctr"].item() == 0.5


def test_window_buffer_bounds_memory_and_keeps_the_newest():
    window, buffer = torch.zeros(1), WindowBuffer(max_size=100, max_buffer_count=10)
    for _ in range(200):
        buffer.aggregate_state(window, torch.ones(1), size=1)
    assert len(buffer.buffers) <= 10 and window.item() == sum(buffer.buffers).item() == 100
    buffer.aggregate_state(window, torch.full((1,), 7.0), size=1000)
    assert window.item() == 7


def test_sums_are_float64():
    metric = make(CTRMetric)
    metric._metrics_computations[0].ctr_denom += 2.0**24  # float32 would stop counting here
    feed(metric, PREDICTIONS[:1].float(), torch.ones(1))
    assert metric._metrics_computations[0].ctr_denom.item() == 2**24 + 1
    assert list(metric.state_dict()) == ["_metrics_computations.0.ctr_num", "_metrics_computations.0.ctr_denom"]
    assert list(metric.state_dict({}, "ctr.")) == [f"ctr.{key}" for key in metric.state_dict()]


def test_validated_updates_ignore_tasks_without_weight():
    metric = make(NEMetric, tasks=(CLICK, BUY), compute_mode=FUSED, should_validate_update=True)
    metric.update(
        predictions=PREDICTIONS.expand(2, 4), labels=LABELS.expand(2, 4), weights=torch.stack([WEIGHTS * 0, WEIGHTS])
    )
    values = metric.compute()
    assert values["ne-click|lifetime_ne"].item() == 0 and values["ne-buy|lifetime_ne"].item() > 0


def test_bad_input_is_refused_and_changes_nothing():
    metric = make(CTRMetric, tasks=(CLICK, BUY))
    with pytest.raises(RecMetricException, match=r"click.*labels"):
        metric.update(predictions={"click": PREDICTIONS}, labels={}, weights=None)
    with pytest.raises(RecMetricException, match=r"\[1, B\]"):
        metric.update(predictions={"click": PREDICTIONS}, labels={"click": LABELS[:3]}, weights=None)
    metric.update(predictions={}, labels={}, weights={})  # a batch with nothing for either task
    assert all(not state.any() for state in metric.state_dict().values())
    with pytest.raises(RecMetricException, match="missing"):
        make(CTRMetric, tasks=(CLICK, BUY), compute_mode=FUSED).update(
            predictions={"click": PREDICTIONS}, labels={"click": LABELS}, weights=None
        )
    with pytest.raises(ValueError, match="window of 6"):
        make(CTRMetric, window_size=6, world_size=2)
    with pytest.raises(RecMetricException, match="at least one task"):
        make(CTRMetric, tasks=())
    with pytest.raises(RecMetricException, match="treshold"):
        make(CTRMetric, treshold=0.5)
    for metric_class in (CTRMetric, AUCMetric):
        with pytest.raises(RecMetricException, match="fused_update_limit=3 is not supported"):
            make(metric_class, fused_update_limit=3)
    with pytest.raises(RecMetricException, match="fused_update_limit=3"):
        AUCMetricComputation(0, 4, 1, 100, fused_update_limit=3)
    with pytest.raises(RecMetricException, match="is_negative_task_mask"):
        make(NDCGMetric, is_negative_task_mask=[True])
    make(NDCGMetric, is_negative_task_mask=[False])


def test_parsing_model_outputs():
    out = {"label": torch.ones(2, 1), "prediction": torch.zeros(2), "weight": torch.ones(2), "e": torch.zeros(0)}
    assert [value.shape for value in parse_model_outputs("label", "prediction", "weight", out)] == [(2,)] * 3
    assert parse_model_outputs("label", "prediction", "", out)[2] is None
    with pytest.raises(ValueError, match="clicks"):
        parse_model_outputs("clicks", "prediction", "weight", out)
    with pytest.raises(AssertionError, match="must be equal"):
        parse_model_outputs("label", "e", "weight", out)
    empty = RecTaskInfo(name="empty", label_name="e", prediction_name="e", weight_name="e")
    assert [list(part) for part in parse_task_model_outputs([CLICK, empty], out)] == [["click"]] * 3 + [[]]
    with pytest.raises(KeyError, match="session_id"):
        parse_task_model_outputs([CLICK], out, ["session_id"])


class LearningRate(StateMetric):
    def get_metrics(self):
        return {"learning_rate": 0.1}


def test_metric_module_from_config_and_through_a_checkpoint():
    config = MetricsConfig(
        rec_tasks=[CLICK],
        rec_metrics={
            RecMetricEnum.NE: RecMetricDef(rec_tasks=[CLICK], window_size=100),
            RecMetricEnum.NDCG: RecMetricDef(rec_task_indices=[0], window_size=100, arguments={"k": 2}),
        },
        throughput_metric=ThroughputDef(),
        state_metrics=[StateMetricEnum.OPTIMIZERS],
        compute_interval_steps=2,
    )

    def build():
        states = {StateMetricEnum.OPTIMIZERS: LearningRate()}
        return generate_metric_module(RecMetricModule, config, 4, 1, 0, states, torch.device("cpu"))

    module = build()
    out = {"label": LABELS, "prediction": PREDICTIONS, "weight": WEIGHTS, "session_id": torch.tensor([0, 0, 1, 1])}
    assert module.get_required_inputs() == ["session_id"]
    module.update(out)
    assert not module.should_compute()
    module.update(out)
    assert module.should_compute()
    values = module.compute()
    assert values["optimizers|learning_rate"] == 0.1
    assert values["throughput-throughput|total_examples"].item() == 8
    assert values["ne-click|lifetime_ne"].item() == pytest.approx(
        feed(make(NEMetric), PREDICTIONS, LABELS, WEIGHTS).compute()["ne-click|lifetime_ne"].item()
    )
    assert module.local_compute()["ndcg-click|window_ndcg"] == values["ndcg-click|window_ndcg"]
    restored = build()
    restored.load_state_dict(module.state_dict())
    assert restored.compute()["ne-click|lifetime_ne"] == values["ne-click|lifetime_ne"]
    assert restored.compute()["throughput-throughput|total_examples"].item() == 8


def test_metric_module_refuses_what_it_cannot_build():
    def build(**config):
        generate_metric_module(RecMetricModule, MetricsConfig(**config), 4, 1, 0, {}, torch.device("cpu"))

    with pytest.raises(RecMetricException, match="not available"):
        build(rec_metrics={RecMetricEnum.SERVING_AE_LOSS: RecMetricDef(rec_tasks=[CLICK])})
    with pytest.raises(RecMetricException, match="rec_task_indices"):
        build(rec_metrics={RecMetricEnum.NE: RecMetricDef()})
    with pytest.raises(RecMetricException, match="optimizers"):
        build(state_metrics=[StateMetricEnum.OPTIMIZERS])


def test_the_compute_interval_follows_the_speed_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("recsys_edu.metrics.metric_module.time.monotonic", lambda: now[0])
    module = RecMetricModule(4, 1, compute_interval_steps=10, min_compute_interval=60, max_compute_interval=120)
    for _ in range(10):
        module.update({})
        now[0] += 1.0
    module.compute()
    assert module.compute_interval_steps == 60  # one step a second


def test_throughput(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("recsys_edu.metrics.throughput.time.monotonic", lambda: now[0])
    metric = ThroughputMetric(batch_size=4, world_size=2, window_seconds=3, warmup_steps=2)
    for seconds in (0.0, 50.0, 4.0, 1.0, 1.0, 1.0):  # the first two steps are warmup
        now[0] += seconds
        metric.update()
    values = {key.split("|")[1]: value.item() for key, value in metric.compute().items()}
    assert values == {
        "total_examples": 48,
        "attempt_examples": 48,
        "lifetime_throughput": pytest.approx(32 / 7),
        "window_throughput": 8,
        "attempt_throughput": pytest.approx(32 / 7),
    }
    restored = ThroughputMetric(batch_size=4, world_size=2, window_seconds=3, warmup_steps=2)
    restored.load_state_dict(metric.state_dict())
    restored.update()
    assert restored.compute()["throughput-throughput|total_examples"].item() == 56
    assert restored.compute()["throughput-throughput|attempt_examples"].item() == 8


def test_throughput_with_batch_size_stages():
    stages = [BatchSizeStage(2, 3), BatchSizeStage(8, None)]
    metric = ThroughputMetric(batch_size=4, world_size=2, window_seconds=3, batch_size_stages=stages)
    totals = []
    for _ in range(5):
        metric.update()
        totals.append(metric.compute()["throughput-throughput|total_examples"].item())
    assert totals == [4, 8, 12, 28, 44]
    with pytest.raises(ValueError, match="open-ended"):
        validate_batch_size_stages([BatchSizeStage(2, 3)])
    with pytest.raises(ValueError, match="stage 0"):
        validate_batch_size_stages([BatchSizeStage(2, None), BatchSizeStage(2, None)])


def run_rank(rank: int, world_size: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    arguments = {"world_size": 2, "my_rank": rank, "compute_on_all_ranks": True}
    metrics = [make(CalibrationMetric, **arguments), make(AUCMetric, **arguments), make(AUCMetric, **arguments)]
    part = slice(0, 1) if rank == 0 else slice(1, 4)
    for metric in metrics[:2]:
        feed(metric, PREDICTIONS[part], LABELS[part], WEIGHTS[part])
    if rank == 1:  # rank 0 has no example at all
        feed(metrics[2], PREDICTIONS, LABELS, WEIGHTS)
    values = [next(iter(metric.compute().values())).item() for metric in metrics]
    values.append(next(iter(metrics[0].local_compute().values())).item())  # states are local again
    silent = feed(make(CTRMetric, world_size=2, my_rank=rank), PREDICTIONS, LABELS)
    results[rank] = (values, len(silent.compute()))
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_give_the_value_over_all_examples(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run_rank, args=(2, str(tmp_path / "store"), results), nprocs=2)
        (first, reports_0), (second, reports_1) = results[0], results[1]
    whole = feed(make(CalibrationMetric), PREDICTIONS, LABELS, WEIGHTS).compute()[
        "calibration-click|lifetime_calibration"
    ]
    auc = weighted_auc(PREDICTIONS, LABELS, WEIGHTS).item()
    assert first[:3] == second[:3] == pytest.approx([whole.item(), auc, auc])
    assert (first[3], second[3]) == pytest.approx((0.5, (0.5 + 2.25 + 2) / 3))
    assert (reports_0, reports_1) == (2, 0)  # without compute_on_all_ranks only rank 0 reports
