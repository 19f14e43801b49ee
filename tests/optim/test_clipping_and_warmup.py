"""Clipping against torch's own functions; warm-up against the formulas written out."""

import copy
import math

import pytest
import torch
from torch import nn

from recsys_edu.optim.clipping import GradientClipping, GradientClippingOptimizer
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from recsys_edu.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage


def sgd(*values: float) -> KeyedOptimizerWrapper:
    params = {f"p{index}": nn.Parameter(torch.tensor([value])) for index, value in enumerate(values)}
    return KeyedOptimizerWrapper(params, lambda tensors: torch.optim.SGD(tensors, lr=1.0))


def set_grads(optimizer, *grads: float) -> None:
    for param, grad in zip(optimizer.params.values(), grads):
        param.grad = torch.tensor([grad])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, "inf"])
def test_norm_clipping_scales_all_gradients_together(norm_type) -> None:
    optimizer = GradientClippingOptimizer(
        sgd(0.0, 0.0, 0.0), GradientClipping.NORM, 1.0, norm_type, track_grad_norm=True
    )
    set_grads(optimizer, 3.0, -4.0)  # the third parameter has no gradient
    norm = {1.0: 7.0, 2.0: 5.0, "inf": 4.0}[norm_type]
    optimizer.step()
    first, second, third = optimizer.params.values()
    assert first.item() == pytest.approx(-3 / norm, rel=1e-4) and second.item() == pytest.approx(4 / norm, rel=1e-4)
    assert third.item() == 0 and optimizer.last_total_grad_norm.item() == pytest.approx(norm)


def test_small_gradients_and_other_kinds() -> None:
    gentle = GradientClippingOptimizer(sgd(0.0), GradientClipping.NORM, 1.0)
    set_grads(gentle, 0.5)
    assert gentle.clip_grad_norm_().item() == 0.5 and gentle.params["p0"].grad.item() == 0.5
    clamped = GradientClippingOptimizer(sgd(0.0, 0.0), GradientClipping.VALUE, 0.3)
    set_grads(clamped, 3.0, -0.2)
    clamped.step()
    assert [param.item() for param in clamped.params.values()] == pytest.approx([-0.3, 0.2])
    free = GradientClippingOptimizer(sgd(0.0))
    set_grads(free, 9.0)
    free.step()
    assert free.params["p0"].item() == -9 and free.last_total_grad_norm is None
    empty = GradientClippingOptimizer(sgd(0.0), GradientClipping.NORM)
    empty.step()
    assert empty.params["p0"].item() == 0


def rates(stages: list[WarmupStage], steps: int = 10, lr: float = 1.0) -> list[float]:
    optimizer = WarmupOptimizer(sgd(0.0), stages, lr=lr)
    used, previous = [], 0.0
    for _ in range(steps):
        set_grads(optimizer, 1.0)
        optimizer.step()
        used.append(previous - optimizer.params["p0"].item())
        previous = optimizer.params["p0"].item()
    return used


P = WarmupPolicy


@pytest.mark.parametrize(
    "stages, expected",
    [
        ([WarmupStage(P.LINEAR, 4, 0.1)], [0.1, 0.325, 0.55, 0.775, 1.0, 1.0]),
        (
            [WarmupStage(P.CONSTANT, 1, 0.3), WarmupStage(P.STEP, 5, 0.5, decay_iters=2)],
            [0.3, 0.3, 0.5, 0.5, 0.25, 0.25, 1],
        ),
        (
            [WarmupStage(P.POLY, 3, 2.0, lr_scale=0.5, decay_iters=20)],
            [0.5 * (1 - i / 20) ** 2 for i in range(4)] + [1.0],
        ),
        ([WarmupStage(P.POLY, 3, 1.0)], [1.0, 2 / 3, 1 / 3, 0.0, 1.0]),
        ([WarmupStage(P.NONE, 0), WarmupStage(P.INVSQRT, 3)], [1.0] + [1 / math.sqrt(i) for i in (1, 2, 3)] + [1.0]),
        ([WarmupStage(P.COSINE_ANNEALING_WARM_RESTARTS, 5, 0.2, sgdr_period=3)], [1.0, 0.8, 0.4, 1.0, 0.8, 0.4, 1.0]),
        (
            [
                WarmupStage(P.CONSTANT, 2, 0.3),
                WarmupStage(P.INTERPOLATE, 6, 0.2, start_interpolating_iters=3, end_value=0.8),
            ],
            [0.3, 0.3, 0.3, 0.2, 0.4, 0.6, 0.8, 1.0],
        ),
        ([], [1.0, 1.0]),
    ],
)
def test_each_steps_rate(stages: list[WarmupStage], expected: list[float]) -> None:
    assert rates(stages, len(expected)) == pytest.approx(expected, abs=1e-5)


def test_step_count_is_saved_and_loaded() -> None:
    stages = [WarmupStage(P.LINEAR, 4, 0.1)]
    first, second = WarmupOptimizer(sgd(0.0), stages, lr=2.0), WarmupOptimizer(sgd(0.0), stages, lr=2.0)
    for _ in range(2):
        set_grads(first, 1.0)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    assert saved["state"]["__warmup"]["warmup"].tolist() == [2, 0]
    second.load_state_dict(saved)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="no step count"):
        second.load_state_dict({"state": {}})


def test_warmup_of_a_combined_optimizer_and_another_parameter() -> None:
    combined = CombinedOptimizer([("a", sgd(0.0)), ("b", sgd(0.0))])
    optimizer = WarmupOptimizer(combined, [WarmupStage(P.CONSTANT, 3, 0.25)], lr=1.0, lr_param="weight_decay")
    assert [group["weight_decay"] for group in combined.param_groups] == [0.25, 0.25]
    assert list(optimizer.params) == ["a.p0", "b.p0", "__warmup"]


def test_stages_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="max_iters 4, then 4"):
        WarmupOptimizer(sgd(0.0), [WarmupStage(P.LINEAR, 4), WarmupStage(P.LINEAR, 4)])
    with pytest.raises(ValueError, match="INTERPOLATE needs"):
        WarmupOptimizer(sgd(0.0), [WarmupStage(P.INTERPOLATE, 4)])
