"""Learning-rate schedules in stages, counted in steps and kept in the checkpoint.

stages   LINEAR from 0.1 until step 4           then POLY until step 8      then 1
factor   0.1   0.325  0.55  0.775  1.0          ...                         1.0
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any

import torch
from torch import nn

from recsys_edu.optim.keyed import KeyedOptimizer, OptimizerWrapper


@unique
class WarmupPolicy(Enum):
    """Shape of the factor within a stage; `factor` has the formulas."""

    NONE = "none"
    LINEAR = "linear"
    CONSTANT = "constant"
    POLY = "poly"
    STEP = "step"
    INVSQRT = "inv_sqrt"
    COSINE_ANNEALING_WARM_RESTARTS = "cosine_annealing_warm_restarts"
    INTERPOLATE = "interpolate"


@dataclass
class WarmupStage:
    """One stretch of the schedule: it lasts through step `max_iters`, counted from the start of training.

    `lr_scale` multiplies the whole stage. `decay_iters` below 1 means: `max_iters` for POLY, 1 for STEP.

    Counterpart: torchrec.optim.warmup.WarmupStage.
    """

    policy: WarmupPolicy = WarmupPolicy.LINEAR
    max_iters: int = 1
    value: float = 1.0
    lr_scale: float = 1.0
    decay_iters: int = -1
    sgdr_period: int = 1
    start_interpolating_iters: int | None = None
    end_value: float | None = None


def factor(stage: WarmupStage, step: int) -> float:
    """What the learning rate is multiplied with in step `step` (from 0) of `stage`.

    >>> factor(WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.1), 2)
    0.55

    Raises:
        ValueError: INTERPOLATE without `end_value` or `start_interpolating_iters`.
    """
    policy, value = stage.policy, stage.value
    if policy is WarmupPolicy.LINEAR:
        shape = value + (1 - value) * step / stage.max_iters
    elif policy is WarmupPolicy.CONSTANT:
        shape = value
    elif policy is WarmupPolicy.POLY:
        decay_iters = stage.decay_iters if stage.decay_iters > 0 else stage.max_iters
        shape = (1 - step / decay_iters) ** value
    elif policy is WarmupPolicy.STEP:
        shape = value ** (step // max(stage.decay_iters, 1))
    elif policy is WarmupPolicy.INVSQRT:
        shape = 1 / math.sqrt(max(step, 1))
    elif policy is WarmupPolicy.COSINE_ANNEALING_WARM_RESTARTS:
        progress = (step % stage.sgdr_period) / stage.sgdr_period
        shape = value + (1 - value) * (1 + math.cos(math.pi * progress)) / 2
    elif policy is WarmupPolicy.INTERPOLATE:
        start = stage.start_interpolating_iters
        if start is None or stage.end_value is None:
            raise ValueError("WarmupPolicy.INTERPOLATE needs start_interpolating_iters and end_value")
        progress = (step - start) / max(stage.max_iters - start, 1)
        shape = value + (stage.end_value - value) * progress
    else:
        shape = 1.0
    return shape * stage.lr_scale


class WarmupOptimizer(OptimizerWrapper):
    """Sets the learning rate of each step from a list of stages, then steps the wrapped optimizer.

    >>> from recsys_edu.optim.keyed import KeyedOptimizerWrapper
    >>> weight = nn.Parameter(torch.zeros(1))
    >>> inner = KeyedOptimizerWrapper({"w": weight}, lambda params: torch.optim.SGD(params, lr=1.0))
    >>> warm = WarmupOptimizer(inner, [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.1)], lr=1.0)
    >>> warm.param_groups[0]["lr"]
    0.1

    Every group's `lr_param` becomes `lr` times the stage's factor; after the last stage, `lr`. The count of
    steps travels in the state dict, `state_dict()["state"][param_name]["warmup"]`, an int tensor
    [step, stage].

    Raises:
        ValueError: stages whose `max_iters` do not increase, or a stage that cannot be evaluated.

    Counterpart: torchrec.optim.warmup.WarmupOptimizer.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        stages: list[WarmupStage],
        lr: float = 0.1,
        lr_param: str = "lr",
        param_name: str = "__warmup",
    ) -> None:
        for earlier, later in itertools.pairwise(stages):
            if later.max_iters <= earlier.max_iters:
                raise ValueError(
                    f"stages must end later and later, got max_iters {earlier.max_iters}, then {later.max_iters}"
                )
        for stage in stages:
            factor(stage, 0)
        super().__init__(optimizer)
        self._stages, self._lr, self._lr_param, self._param_name = stages, lr, lr_param, param_name
        self._position = torch.zeros(2, dtype=torch.int64)  # [step, stage]
        self._own_param = nn.Parameter(torch.empty(0))
        self.params = {**optimizer.params, param_name: self._own_param}
        self._set_rate()

    def step(self, closure: Any = None) -> None:
        self._set_rate()  # a caller may have changed it since
        super().step(closure)
        self._position[0] += 1
        self._set_rate()

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        saved["state"] = {**saved["state"], self._param_name: {"warmup": self._position}}
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the wrapped optimizer's state and the step count.

        Raises:
            ValueError: a state without a step count, or one that the wrapped optimizer refuses.
        """
        inner = dict(state_dict.get("state", {}))
        own = inner.pop(self._param_name, {})
        position = own.get("warmup")
        if position is None or tuple(position.shape) != (2,):
            raise ValueError(
                f"the state has no step count: expected state[{self._param_name!r}]['warmup'] of 2 numbers"
            )
        super().load_state_dict({**state_dict, "state": inner})
        self._position.copy_(position)
        self.post_load_state_dict()

    def post_load_state_dict(self) -> None:
        super().post_load_state_dict()
        self._set_rate()

    def _set_rate(self) -> None:
        step, stage = self._position.tolist()
        while stage < len(self._stages) and step > self._stages[stage].max_iters:
            stage += 1
        self._position[1] = stage
        rate = self._lr * (factor(self._stages[stage], step) if stage < len(self._stages) else 1.0)
        for group in self.param_groups:
            group[self._lr_param] = rate
