"""Optimizers that backward has already applied.

A table has millions of rows and a batch touches thousands. The fused kernels update exactly those rows
while the gradient passes by and never write a gradient of the table's size. What remains for the
optimizer object is to hold the state and the learning rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from recsys_edu.optim.keyed import KeyedOptimizer


class FusedOptimizer(KeyedOptimizer, ABC):
    """A keyed optimizer whose `step` and `zero_grad` leave the weights alone: backward did the update.

    Counterpart: torchrec.optim.fused.FusedOptimizer.
    """

    @abstractmethod
    def step(self, closure: Any = None) -> None: ...

    @abstractmethod
    def zero_grad(self, set_to_none: bool = False) -> None: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.params)})"


class EmptyFusedOptimizer(FusedOptimizer):
    """The fused optimizer of a module that has no fused parameters.

    >>> EmptyFusedOptimizer().state_dict()
    {'state': {}}

    Counterpart: torchrec.optim.fused.EmptyFusedOptimizer.
    """

    def __init__(self) -> None:
        super().__init__({}, {}, [])

    def step(self, closure: Any = None) -> None:
        """Nothing to do."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing to do."""


class FusedOptimizerModule(ABC):
    """A module that trains some of its parameters during backward and can hand out their optimizer.

    Counterpart: torchrec.optim.fused.FusedOptimizerModule.
    """

    @property
    @abstractmethod
    def fused_optimizer(self) -> KeyedOptimizer: ...
