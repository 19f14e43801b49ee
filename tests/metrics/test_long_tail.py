"""The metrics that few models use, by hand: values, windows, bad input, and the way through a metric module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.metrics.auc import weighted_auc
from recsys_edu.metrics.gauc import GAUCMetric
from recsys_edu.metrics.hindsight_target_pr import HindsightTargetPRMetric, get_pr_states
from recsys_edu.metrics.metric_module import REC_METRICS_MAPPING, RecMetricModule, generate_metric_module
from recsys_edu.metrics.metrics_config import (
    MetricsConfig,
    RecComputeMode,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
    SessionMetricDef,
)
from recsys_edu.metrics.multi_label_precision import MultiLabelPrecisionMetric
from recsys_edu.metrics.multiclass_recall import MulticlassRecallMetric
from recsys_edu.metrics.ne_with_recalibration import RecalibratedNEMetric
from recsys_edu.metrics.num_missing_labels import NumMissingLabelsMetric
from recsys_edu.metrics.output import OutputMetric
from recsys_edu.metrics.precision_session import PrecisionSessionMetric
from recsys_edu.metrics.rauc import RAUCMetric, count_reversed_pairs, rauc_of_task
from recsys_edu.metrics.rec_metric import RecMetricException
from recsys_edu.metrics.recall_session import RecallSessionMetric
from recsys_edu.metrics.scalar import ScalarMetric
from recsys_edu.metrics.segmented_ne import SegmentedNEMetric
from recsys_edu.metrics.serving_ne import ServingNEMetric
from recsys_edu.metrics.tensor_weighted_avg import TensorWeightedAvgMetric
from recsys_edu.metrics.tower_qps import TowerQPSMetric
from recsys_edu.metrics.xauc import XAUCMetric

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
FUSED = RecComputeMode.FUSED_TASKS_COMPUTATION


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(metric_class, task: RecTaskInfo | None = None, **arguments):
    defaults = {"world_size": 1, "my_rank": 0, "batch_size": 4, "window_size": 100}
    return metric_class(tasks=[task or RecTaskInfo(name="a")], **{**defaults, **arguments})


def feed(metric, predictions, labels, weights=None, **kwargs):
    given = None if predictions is None else {"a": predictions}
    metric.update(
        predictions=given, labels={"a": labels}, weights=None if weights is None else {"a": weights}, **kwargs
    )
    return metric


def value(metric, key: str) -> float:
    return metric.compute()[key].item()


def test_recalibration_by_hand():
    # kept 1/4 of the negatives: 0.5 becomes 0.2
    metric = feed(
        make(RecalibratedNEMetric, recalibration_coefficient=0.25, include_logloss=True), t(0.5, 0.5), t(1, 0)
    )
    bits = (-math.log2(0.2) - math.log2(0.8)) / 2
    assert value(metric, "recalibrated_ne-a|lifetime_logloss") == pytest.approx(bits)
    assert value(metric, "recalibrated_ne-a|window_ne") == pytest.approx(bits)  # the data's entropy is 1 bit


def test_serving_ne_counts_examples_with_a_weight():
    metric = feed(make(ServingNEMetric), t(0.5, 0.5, 0.9), t(1, 0, 1), t(1, 1, 0))
    assert value(metric, "serving_ne-a|lifetime_ne") == pytest.approx(1.0)
    assert value(metric, "serving_ne-a|total_examples") == 2


def test_missing_labels():
    metric = feed(make(NumMissingLabelsMetric), t(0, 0, 0), t(1, math.nan, math.nan), t(1, 2, 3))
    assert value(metric, "num_missing_labels-a|lifetime_num_missing_labels") == 5


def test_scalar_reports_the_last_value_and_the_window_mean():
    metric = make(ScalarMetric, batch_size=2, window_size=4)
    for labels in (t(1, 3), t(5, 5), t(9, 9)):
        feed(metric, None, labels)
    assert value(metric, "scalar-a|lifetime_scalar") == 9
    assert value(metric, "scalar-a|window_scalar") == 7  # the oldest batch has left the window
    metric.reset()
    feed(metric, None, t(2, 2))
    assert value(metric, "scalar-a|window_scalar") == 2


def test_output_reports_the_columns_as_they_are():
    metric = make(OutputMetric)
    for latest in (3.0, 4.0):
        columns = {"latest_imp": torch.tensor(latest), "total_latest_imp": torch.tensor(10.0)}
        feed(metric, None, t(1, 0), required_inputs=columns)
    assert value(metric, "output-a|output_latest_imp") == 4
    assert value(metric, "output-a|output_total_latest_imp") == 10
    with pytest.raises(RecMetricException, match="latest_imp"):
        feed(metric, None, t(1, 0))


def test_tensor_weighted_average():
    task = RecTaskInfo(name="a", tensor_name="dwell")
    columns = {"required_inputs": {"dwell": t(1, 2, 3)}}
    metric = feed(make(TensorWeightedAvgMetric, task), None, t(0, 0, 0), t(1, 1, 2), **columns)
    assert value(metric, "weighted_avg-a|lifetime_weighted_avg") == pytest.approx(9 / 4)
    task = RecTaskInfo(name="a", tensor_name="dwell", weighted=False)
    metric = feed(make(TensorWeightedAvgMetric, task), None, t(0, 0, 0), t(1, 1, 2), **columns)
    assert value(metric, "weighted_avg-a|lifetime_weighted_avg") == 2
    with pytest.raises(RecMetricException, match="no tensor_name"):
        make(TensorWeightedAvgMetric)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.data())
def test_pair_metrics_equal_loops_over_pairs(labels, data):
    predictions = data.draw(st.lists(st.integers(0, 6), min_size=len(labels), max_size=len(labels)))
    pairs = [(i, j) for j in range(len(labels)) for i in range(j)]
    assert count_reversed_pairs(t(*labels)) == sum(labels[i] > labels[j] for i, j in pairs)
    right, half = 0, 0
    for i, j in pairs:
        order = (predictions[i] - predictions[j]) * (labels[i] - labels[j])
        right += order > 0 or labels[i] == labels[j]
        half += order == 0 and labels[i] != labels[j]
    if len(labels) > 1:
        assert rauc_of_task(t(*predictions), t(*labels)) == pytest.approx((right + half / 2) / len(pairs))
        weights = torch.arange(1, len(labels) + 1).double()
        metric = feed(make(XAUCMetric, batch_size=12), t(*predictions), t(*labels), weights)
        same = [
            torch.sign(t(predictions[i] - predictions[j])) == torch.sign(t(labels[i] - labels[j])) for i, j in pairs
        ]
        by_hand = sum(weights[i] * weights[j] for (i, j), agrees in zip(pairs, same) if agrees)
        total = sum(weights[i] * weights[j] for i, j in pairs)
        assert value(metric, "xauc-a|lifetime_xauc") == pytest.approx(float(by_hand / total))


def test_rauc_windows_and_groups():
    metric = make(RAUCMetric, batch_size=2, window_size=4, grouped_rauc=True)
    columns = {"required_inputs": {"grouping_keys": torch.tensor([0, 1])}}
    feed(metric, t(0.1, 0.2), t(9, 1), **columns)
    for predictions, labels in ((t(0.1, 0.3), t(1, 4)), (t(0.2, 0.4), t(2, 3))):
        feed(metric, predictions, labels, **columns)
    # window: predictions .1 .2 .3 .4 -> labels 1 2 4 3: one of six pairs reversed; group 0: 1 2, group 1: 4 3
    assert value(metric, "rauc-a|window_rauc") == pytest.approx(5 / 6)
    assert value(metric, "rauc-a|window_grouped_rauc") == pytest.approx(0.5)


def test_gauc_is_the_mean_over_sessions_that_have_both_kinds():
    predictions, labels, weights = t(0.9, 0.2, 0.6, 0.3, 0.5), t(1, 0, 0, 1, 1), t(1, 2, 3, 4, 5)
    metric = feed(make(GAUCMetric, batch_size=5), predictions, labels, weights, num_candidates=torch.tensor([2, 2, 1]))
    first, second = (weighted_auc(predictions[s], labels[s], weights[s]) for s in (slice(0, 2), slice(2, 4)))
    assert value(metric, "gauc-a|lifetime_gauc") == pytest.approx(float(first + second) / 2)
    assert value(metric, "gauc-a|window_gauc_num_samples") == 2
    with pytest.raises(RecMetricException, match="sums to 4, the batch has 5"):
        feed(metric, predictions, labels, weights, num_candidates=torch.tensor([2, 2]))
    with pytest.raises(TypeError, match="num_candidates"):
        feed(metric, predictions, labels, weights)


def test_multiclass_recall_at_every_k():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.1, 0.1]])
    metric = make(MulticlassRecallMetric, number_of_classes=3)
    feed(metric, scores, torch.tensor([2, 0]), t(1, 3))
    recall = metric.compute()["multiclass_recall-a|lifetime_multiclass_recall"].flatten()
    assert recall.tolist() == [0.75, 1, 1]
    with pytest.raises(RecMetricException, match="score for each of 3 classes"):
        feed(metric, scores[:, :2], torch.tensor([1, 0]), t(1, 3))


def test_multi_label_precision_by_label():
    metric = make(MultiLabelPrecisionMetric, num_labels=2, label_names=["x", "y"])
    predictions = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.8, 0.8]])
    feed(metric, predictions, torch.tensor([[1.0, 0], [0, 1], [1, 0]]), t(1, 2, 3))
    assert value(metric, "multi_label_precision-a|lifetime_multi_label_precisionx") == pytest.approx(4 / 6)
    assert value(metric, "multi_label_precision-a|window_multi_label_precisiony") == pytest.approx(2 / 5)
    with pytest.raises(RecMetricException, match="2 labels want"):
        feed(metric, predictions[:, :1], torch.ones(3, 1), t(1, 2, 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_hindsight_states_equal_counting_at_every_threshold(seed):
    generator = torch.Generator().manual_seed(seed)
    predictions, weights = (torch.rand(2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 2, (2, 6), generator=generator).double()
    states = get_pr_states(labels, predictions, weights)
    thresholds = torch.linspace(0, 1, 1000, dtype=torch.float64)
    chosen = predictions.unsqueeze(1) >= thresholds[:, None]  # [T, 1000, B]
    terms = ((chosen, labels), (chosen, 1 - labels), (~chosen, labels))
    for name, (picked, kind) in zip(("true_pos_sum", "false_pos_sum", "false_neg_sum"), terms):
        torch.testing.assert_close(states[name], (picked * (weights * kind).unsqueeze(1)).sum(-1))


def test_hindsight_reports_the_lowest_threshold_that_reaches_the_target():
    metric = feed(make(HindsightTargetPRMetric, target_precision=0.9), t(0.9, 0.2, 0.6, 0.4), t(1, 0, 1, 0))
    threshold = value(metric, "hindsight_target_pr-a|lifetime_hindsight_target_pr")
    assert 0.4 < threshold <= 0.4 + 1 / 999
    assert value(metric, "hindsight_target_pr-a|window_hindsight_target_precision") == 1
    assert value(metric, "hindsight_target_pr-a|window_hindsight_target_recall") == 1


def test_segmented_ne_by_group_and_bad_groups():
    predictions, labels = t(0.5, 0.5, 0.25, 0.25), t(1, 0, 1, 0)
    columns = {"required_inputs": {"grouping_keys": torch.tensor([0, 0, 1, 1])}}
    metric = feed(make(SegmentedNEMetric, num_groups=2), predictions, labels, **columns)
    assert value(metric, "segmented_ne-a|lifetime_segmented_ne_0") == pytest.approx(1.0)
    by_hand = (math.log2(4) + math.log2(4 / 3)) / 2
    assert value(metric, "segmented_ne-a|window_segmented_ne_1") == pytest.approx(by_hand)
    with pytest.raises(RecMetricException, match="values from 0 to 2; expected 0 to 1"):
        feed(metric, predictions, labels, required_inputs={"grouping_keys": torch.tensor([0, 0, 1, 2])})
    with pytest.raises(RecMetricException, match="cast_keys_to_int"):
        feed(metric, predictions, labels, required_inputs={"grouping_keys": t(0, 0, 1, 1)})


def test_session_metrics():
    task = RecTaskInfo(name="a", session_metric_def=SessionMetricDef("session", 2))
    columns = {"required_inputs": {"session": torch.tensor([1, 1, 1, 2])}}
    batch = (t(0.9, 0.2, 0.6, 0.4), t(1, 1, 1, 0), t(1, 2, 1, 3))
    precision = feed(make(PrecisionSessionMetric, task), *batch, **columns)
    assert value(precision, "precision_session_level-a|lifetime_precision_session_level") == pytest.approx(2 / 5)
    recall = feed(make(RecallSessionMetric, task), *batch, **columns)
    assert value(recall, "recall_session_level-a|window_recall_session_level") == pytest.approx(2 / 4)
    with pytest.raises(RecMetricException, match="no session_metric_def"):
        make(RecallSessionMetric)


def test_tower_qps_counts_the_examples_it_gets(monkeypatch):
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("recsys_edu.metrics.tower_qps.time.monotonic", lambda: next(clock))
    metric = make(TowerQPSMetric, warmup_steps=1, window_size=4)
    for count in (4, 4, 2):
        feed(metric, None, torch.ones(count))
    assert value(metric, "qps-a|lifetime_qps") == pytest.approx(6 / 3)
    assert value(metric, "qps-a|window_qps") == pytest.approx(2 / 1)  # 4 + 2 examples would be more than the window
    assert value(metric, "qps-a|total_examples") == 10


def test_every_metric_is_reachable_from_a_configuration():
    task = RecTaskInfo(name="a", tensor_name="dwell", session_metric_def=SessionMetricDef("session", 2))
    arguments = {RecMetricEnum.SEGMENTED_NE: {"grouping_keys": "session", "num_groups": 2}}
    several = {RecMetricEnum.MULTICLASS_RECALL}  # its predictions have another shape than everybody's
    config = MetricsConfig(
        rec_tasks=[task],
        rec_metrics={
            enum: RecMetricDef(rec_tasks=[task], window_size=100, arguments=arguments.get(enum))
            for enum in REC_METRICS_MAPPING
            if enum not in several
        },
    )
    module = generate_metric_module(RecMetricModule, config, 4, 1, 0, {}, torch.device("cpu"))
    module.update(
        {
            "label": t(1, 0, 1, 0),
            "prediction": t(0.9, 0.2, 0.6, 0.4),
            "weight": t(1, 1, 1, 1),
            "session": torch.tensor([0, 0, 1, 1]),
            "session_id": torch.tensor([0, 0, 1, 1]),
            "dwell": t(1, 2, 3, 4),
            "latest_imp": torch.tensor(1.0),
            "total_latest_imp": torch.tensor(2.0),
        }
    )
    namespaces = {key.split("-")[0] for key in module.compute()}
    assert {"rauc", "xauc", "qps", "scalar", "output", "segmented_ne", "serving_calibration"} <= namespaces
    missing = {enum.name for enum in RecMetricEnum} - {enum.name for enum in REC_METRICS_MAPPING}
    assert missing == {"LOG_LOSS", "SERVING_AE_LOSS"}  # TorchRec has no class for these either


@pytest.mark.parametrize(
    "metric_class, arguments, shape",
    [
        (SegmentedNEMetric, {"num_groups": 2, "include_logloss": True}, ()),
        (MultiLabelPrecisionMetric, {"num_labels": 3}, (3,)),
        (HindsightTargetPRMetric, {}, ()),
        (PrecisionSessionMetric, {}, ()),
    ],
)
def test_fused_equals_unfused(metric_class, arguments, shape):
    generator = torch.Generator().manual_seed(3)
    predictions = torch.rand(2, 4, *shape, generator=generator)
    labels = torch.randint(0, 2, (2, 4, *shape), generator=generator).float()
    weights = torch.rand(2, 4, generator=generator)
    definition = SessionMetricDef("session", 1)
    tasks = [RecTaskInfo(name=name, session_metric_def=definition) for name in ("a", "b")]
    columns = {"grouping_keys": torch.tensor([0, 0, 1, 1]), "session": torch.tensor([0, 0, 1, 1])}
    results = []
    for mode in (RecComputeMode.UNFUSED_TASKS_COMPUTATION, FUSED):
        metric = metric_class(
            world_size=1, my_rank=0, batch_size=4, tasks=tasks, window_size=100, compute_mode=mode, **arguments
        )
        inputs = (predictions, labels, weights)
        if mode is not FUSED:
            inputs = tuple({"a": x[0], "b": x[1]} for x in inputs)
        metric.update(predictions=inputs[0], labels=inputs[1], weights=inputs[2], required_inputs=columns)
        results.append({key: float(v) for key, v in metric.compute().items()})
    assert results[0] == pytest.approx(results[1])
