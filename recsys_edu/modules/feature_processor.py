"""The older form of position weights: a dict of JaggedTensors, or a KeyedJaggedTensor of which only some features stay.

New models take `recsys_edu.modules.feature_processor_` and `fp_embedding_modules`.

Counterpart: torchrec.modules.feature_processor.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.modules.feature_processor_ import (
    check_max_lengths,
    empty_position_weights,
    position_in_bag,
    set_to_one,
    weights_by_position,
    with_position_weights,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class BaseFeatureProcessor(nn.Module, abc.ABC):
    """Base of processors that take and give a dict of JaggedTensors."""

    @abc.abstractmethod
    def forward(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]: ...


class BaseGroupedFeatureProcessor(nn.Module, abc.ABC):
    """Base of processors that take and give a KeyedJaggedTensor."""

    @abc.abstractmethod
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor: ...


def offsets_to_range_traceble(offsets: Tensor, values: Tensor) -> Tensor:
    """For every value its place in its bag; spelt as TorchRec spells it.

    >>> offsets_to_range_traceble(torch.tensor([0, 3, 3, 5]), torch.zeros(5))
    tensor([0, 1, 2, 0, 1])
    """
    return position_in_bag(offsets, len(values))


class PositionWeightedModule(BaseFeatureProcessor):
    """Position weights by feature, parameters `position_weights.<feature>`; other features pass unchanged.

    >>> seen = JaggedTensor(torch.tensor([7, 2]), lengths=torch.tensor([2]))
    >>> PositionWeightedModule({"seen": 3})({"seen": seen})["seen"].weights().tolist()
    [1.0, 1.0]

    Raises:
        ValueError: a max length below 1.
        KeyError: (forward) a configured feature is missing.
        IndexError: (forward) a bag that is longer than its feature's max length.

    Counterpart: torchrec.modules.feature_processor.PositionWeightedModule.
    """

    def __init__(self, max_feature_lengths: dict[str, int], device: torch.device | None = None) -> None:
        super().__init__()
        self.max_feature_lengths = check_max_lengths(max_feature_lengths)
        self.position_weights = empty_position_weights(max_feature_lengths, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights back to 1."""
        set_to_one(self.position_weights)

    def forward(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        processed = dict(features)
        for name, weight_M in self.position_weights.items():
            if name not in features:
                raise KeyError(f"the input has no feature {name!r}; it has {sorted(features)}")
            jt = features[name]
            weights_N = weights_by_position(weight_M, jt.offsets(), len(jt.values()), name)
            processed[name] = JaggedTensor(jt.values(), weights=weights_N, lengths=jt.lengths(), offsets=jt.offsets())
        return processed


class PositionWeightedProcessor(BaseGroupedFeatureProcessor):
    """The configured features of a KeyedJaggedTensor, in the configured order, weighted by position.

    State dict keys are `position_weights.<feature>`.

    Raises:
        ValueError: a max length below 1.
        KeyError: (forward) a configured feature is missing.
        IndexError: (forward) a bag that is longer than its feature's max length.

    Counterpart: torchrec.modules.feature_processor.PositionWeightedProcessor.
    """

    def __init__(self, max_feature_lengths: dict[str, int], device: torch.device | None = None) -> None:
        super().__init__()
        self.max_feature_lengths = check_max_lengths(max_feature_lengths)
        self.position_weights = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(length, device=device)) for name, length in max_feature_lengths.items()}
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        index_of = features.index_per_key()
        missing = [name for name in self.max_feature_lengths if name not in index_of]
        if missing:
            raise KeyError(f"the input has no features {missing}; it has {features.keys()}")
        chosen = features.permute([index_of[name] for name in self.max_feature_lengths])
        return with_position_weights(chosen, self.position_weights)

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Keys `position_weights.<feature>`; the arguments may also be given by position."""
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
