"""The optimizer object of tables that kernels train in backward: their state and their one learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recsys_edu.kernels.spec import Kernel
from recsys_edu.optim.fused import FusedOptimizer


class FusedTablesOptimizer(FusedOptimizer):
    """The state and the learning rate of fused kernels, under parameter names.

        params   embedding_bags.<table>.weight
        state    <table>.momentum1, <table>.momentum2, as far as the optimizer has them; live tensors

    There is one parameter group; changing its `lr`, directly or by a scheduler, takes effect with the next
    forward.
    """

    def __init__(self, params: dict[str, torch.Tensor], states: Sequence[dict[str, Any]], rates: LearningRate) -> None:
        self._rates = rates
        state = {param: entries for param, entries in zip(params.values(), states) if entries}
        super().__init__(params, state, [{"params": list(params.values()), "lr": rates.get()}])

    def step(self, closure: Any = None) -> None:
        """Nothing is left to step; hands the group's learning rate to the kernels."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.apply_learning_rate()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """No gradients to clear; hands the group's learning rate to the kernels."""
        self.apply_learning_rate()

    def post_load_state_dict(self) -> None:
        self.apply_learning_rate()

    def apply_learning_rate(self) -> None:
        """Make the kernels train with the group's `lr`."""
        self._rates.set(float(self.param_groups[0]["lr"]))


@dataclass(frozen=True)
class LearningRate:
    """The one learning rate of several kernels."""

    kernels: tuple[Kernel, ...]

    def get(self) -> float:
        return self.kernels[0].learning_rate if self.kernels else 0.0

    def set(self, learning_rate: float) -> None:
        for kernel in self.kernels:
            if kernel.learning_rate != learning_rate:
                kernel.learning_rate = learning_rate
