"""Every metric against TorchRec's, where that is installed: values, keys and state dict keys."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("torchrec")

from recsys_edu.metrics.metrics_config import RecComputeMode, RecTaskInfo

# module, class, further arguments, keys TorchRec reports and we do not
METRICS = [
    ("ne", "NEMetric", {"include_logloss": True}),
    ("ne", "NEMetric", {"should_validate_update": True}),
    ("ne", "NEMetric", {"allow_missing_label_with_zero_weight": True}),
    ("ne_positive", "NEPositiveMetric", {}),
    ("ne_positive", "NEPositiveMetric", {"allow_missing_label_with_zero_weight": True}),
    ("unweighted_ne", "UnweightedNEMetric", {}),
    ("unweighted_ne", "UnweightedNEMetric", {"allow_missing_label_with_zero_weight": True}),
    ("cali_free_ne", "CaliFreeNEMetric", {}),
    ("cali_free_ne", "CaliFreeNEMetric", {"allow_missing_label_with_zero_weight": True}),
    ("ctr", "CTRMetric", {}),
    ("calibration", "CalibrationMetric", {}),
    ("accuracy", "AccuracyMetric", {"threshold": 0.3}),
    ("precision", "PrecisionMetric", {"threshold": 0.3}),
    ("recall", "RecallMetric", {}),
    ("mse", "MSEMetric", {"include_r_squared": True}),
    ("nmse", "NMSEMetric", {}),
    ("mae", "MAEMetric", {}),
    ("average", "AverageMetric", {}),
    ("weighted_avg", "WeightedAvgMetric", {}),
    ("num_positive_samples", "NumPositiveSamplesMetric", {}),
    ("sum_weights", "SumWeightsMetric", {}),
    ("weighted_sum_predictions", "WeightedSumPredictionsMetric", {}),
    ("calibration_with_recalibration", "RecalibratedCalibrationMetric", {"recalibration_coefficient": 0.3}),
    ("ne_with_recalibration", "RecalibratedNEMetric", {"recalibration_coefficient": 0.3}),
    ("serving_ne", "ServingNEMetric", {}),
    ("serving_calibration", "ServingCalibrationMetric", {}),
    ("num_missing_labels", "NumMissingLabelsMetric", {}),
    ("xauc", "XAUCMetric", {}),
    ("segmented_ne", "SegmentedNEMetric", {"num_groups": 3}),
    ("segmented_ne", "SegmentedNEMetric", {"num_groups": 3, "include_logloss": True}),
    ("segmented_ne", "SegmentedNEMetric", {"grouping_keys": [{"name": "session_id", "num_groups": 3}]}),
    ("rauc", "RAUCMetric", {}),
    ("rauc", "RAUCMetric", {"grouped_rauc": True}),
    ("auc", "AUCMetric", {}),
    ("auc", "AUCMetric", {"grouped_auc": True}),
    ("auprc", "AUPRCMetric", {}),
    ("auprc", "AUPRCMetric", {"grouped_auprc": True}),
    ("ndcg", "NDCGMetric", {}),
    ("ndcg", "NDCGMetric", {"k": 2, "exponential_gain": True}),
    ("ndcg", "NDCGMetric", {"scale_by_weights_tensor": True, "report_ndcg_as_decreasing_curve": False}),
    ("ndcg", "NDCGMetric", {"remove_single_length_sessions": True}),
]


def build(package: str, module: str, name: str, fused: bool, arguments: dict, window_size: int):
    config = importlib.import_module(f"{package}.metrics.metrics_config")
    mode = RecComputeMode.FUSED_TASKS_COMPUTATION if fused else RecComputeMode.UNFUSED_TASKS_COMPUTATION
    return getattr(importlib.import_module(f"{package}.metrics.{module}"), name)(
        world_size=1,
        my_rank=0,
        batch_size=8,
        tasks=[config.RecTaskInfo(name="click"), config.RecTaskInfo(name="buy")],
        compute_mode=config.RecComputeMode(mode.value),
        window_size=window_size,
        **arguments,
    )


def batches(count: int, zero_weights: bool = False):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        predictions, weights = (torch.rand(2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        labels = torch.randint(0, 2, (2, 8), generator=generator).double()
        if zero_weights:
            weights[0] = 0
        groups = torch.randint(0, 3, (8,), generator=generator).sort().values
        yield predictions, labels, weights, {"session_id": groups, "grouping_keys": groups}


def compare(ours, theirs, ours_only=frozenset(), theirs_only=frozenset()) -> None:
    assert set(ours) - set(theirs) == set(ours_only)
    assert set(theirs) - set(ours) == set(theirs_only)
    for key in set(ours) & set(theirs):
        # one value there is a scalar in one mode and not in the other
        expected = theirs[key].reshape(ours[key].shape) if "segmented_ne" in key else theirs[key]
        assert ours[key].shape == expected.shape, key
        torch.testing.assert_close(ours[key].double(), expected.double(), rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zero_weights", [False, True])
@pytest.mark.parametrize(("module", "name", "arguments"), METRICS)
def test_values_keys_and_state_dict_equal_torchrec(module, name, arguments, fused, zero_weights):
    grouped = "grouped_auc" in arguments or "grouped_auprc" in arguments or "grouped_rauc" in arguments
    if grouped and fused:
        pytest.skip("compared in unfused mode")
    if module in ("ne_positive", "cali_free_ne") and arguments and fused and zero_weights:
        pytest.skip("compared in unfused mode: fused, TorchRec gives one value for all tasks when one lacks examples")
    if module == "ndcg" and fused:
        pytest.skip("compared in unfused mode: fused, TorchRec wants the session column once per task")
    # AUC's window drops the oldest examples one by one, the sums' window drops batches; both as TorchRec does.
    window_size = 40 if grouped else 20  # TorchRec fails when the window cuts a batch with groups
    pair = [build(package, module, name, fused, arguments, window_size) for package in ("recsys_edu", "torchrec")]
    for metric in pair:
        for predictions, labels, weights, columns in batches(4, zero_weights):
            tensors = (predictions, labels, weights)
            if not fused:
                tensors = tuple({"click": value[0], "buy": value[1]} for value in tensors)
            required = {key: value for key, value in columns.items() if key in metric.get_required_inputs()}
            extra = {"required_inputs": required} if required else {}
            metric.update(predictions=tensors[0], labels=tensors[1], weights=tensors[2], **extra)
    ours, theirs = (metric.compute() for metric in pair)
    # TorchRec reports AUPRC's window under the lifetime key as well; we do not call it lifetime.
    theirs_only = {key for key in theirs if "lifetime_auprc" in key}
    if name == "WeightedAvgMetric":  # TorchRec's window never forgets: compare the lifetime values
        ours, theirs = ({k: v for k, v in values.items() if "lifetime" in k} for values in (ours, theirs))
    compare(ours, theirs, theirs_only=theirs_only)
    states = [metric.state_dict() for metric in pair]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert (value.dtype, value.shape) == (states[1][key].dtype, states[1][key].shape)
        torch.testing.assert_close(value, states[1][key], equal_nan=True, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("module", "name", "arguments"), [m for m in METRICS if m[0] not in ("auc", "auprc", "rauc", "ndcg")]
)
def test_values_without_any_example_equal_torchrec(module, name, arguments):
    pair = [build(package, module, name, False, arguments, 20) for package in ("recsys_edu", "torchrec")]
    compare(*(metric.compute() for metric in pair))


def test_a_torchrec_state_dict_loads():
    ours, theirs = (build(package, "ne", "NEMetric", False, {}, 20) for package in ("recsys_edu", "torchrec"))
    for predictions, labels, weights, _ in batches(2):
        tensors = [{"click": value[0], "buy": value[1]} for value in (predictions, labels, weights)]
        theirs.update(predictions=tensors[0], labels=tensors[1], weights=tensors[2])
    ours.load_state_dict(theirs.state_dict())
    key = "ne-click|lifetime_ne"
    torch.testing.assert_close(ours.compute()[key], theirs.compute()[key])


def test_names_and_enums_equal_torchrec():
    for module, names in {
        "metrics_namespace": ("MetricName", "MetricNamespace", "MetricPrefix"),
        "metrics_config": ("RecMetricEnum", "RecComputeMode", "StateMetricEnum"),
    }.items():
        ours, theirs = (
            importlib.import_module(f"{package}.metrics.{module}") for package in ("recsys_edu", "torchrec")
        )
        for name in names:
            values = [{member.name: member.value for member in getattr(side, name)} for side in (ours, theirs)]
            assert values[0] == values[1]
    ours, theirs = (
        importlib.import_module(f"{package}.metrics.metric_module") for package in ("recsys_edu", "torchrec")
    )
    known = {key.value: value.__name__ for key, value in theirs.REC_METRICS_MAPPING.items()}
    assert RecTaskInfo().name == "DefaultTask"
    assert all(known[key.value] == value.__name__ for key, value in ours.REC_METRICS_MAPPING.items())
