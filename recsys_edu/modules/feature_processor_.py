"""Feature processors: what happens to ids and their weights before the lookup.

The one that everybody uses weighs an id by its place in its bag, and learns the weights:

    history  [[7, 2, 9], [4]]       position_weight  [1.0, 0.5, 0.25]
    weights  [[1.0, 0.5, 0.25], [1.0]]                the newest film counts most

Per feature (`FeatureProcessor`, a JaggedTensor in and out) or for all at once (`FeatureProcessorsCollection`, a
KeyedJaggedTensor in and out).

Suffixes: B bags, N values, M the longest bag a feature may have.

Counterpart: torchrec.modules.feature_processor_.
"""

from __future__ import annotations

import abc
import copy as copy_module
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from recsys_edu.types import CopyMixIn


class FeatureProcessor(nn.Module, abc.ABC):
    """Base of processors of one feature."""

    @abc.abstractmethod
    def forward(self, features: JaggedTensor) -> JaggedTensor: ...


class FeatureProcessorsCollection(nn.Module, abc.ABC):
    """Base of processors of many features at once."""

    @abc.abstractmethod
    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor: ...


def position_in_bag(offsets: Tensor, num_values: int) -> Tensor:
    """For every value its place in its bag.

    >>> position_in_bag(torch.tensor([0, 3, 3, 5]), 5)
    tensor([0, 1, 2, 0, 1])
    """
    places_N = torch.arange(num_values, device=offsets.device)
    bag_N = torch.searchsorted(offsets[1:].long(), places_N, right=True)
    return places_N - offsets.long().index_select(0, bag_N)


def weights_by_position(weight_M: Tensor, offsets: Tensor, num_values: int, feature: str) -> Tensor:
    """`weight_M[position]` for every value; the gradient reaches `weight_M`.

    Raises:
        IndexError: a bag is longer than M; names the feature, the bag's length and M.
    """
    position_N = position_in_bag(offsets, num_values)
    if num_values and int(position_N.max()) >= len(weight_M):  # host sync: one comparison, for a message that helps
        raise IndexError(
            f"feature {feature!r} has a bag of {int(position_N.max()) + 1} ids, but position weights for"
            f" {len(weight_M)}: raise max_feature_length, or cut the bags"
        )
    return weight_M.index_select(0, position_N)


class PositionWeightedModule(FeatureProcessor):
    """Position weights of one feature, parameter `position_weight` of shape `[max_feature_length]`, first all 1.

    >>> module = PositionWeightedModule(max_feature_length=3)
    >>> module(JaggedTensor(torch.tensor([7, 2, 4]), lengths=torch.tensor([2, 1]))).weights().tolist()
    [1.0, 1.0, 1.0]

    Weights that come in are replaced. IndexError for a bag that is longer than `max_feature_length`.

    Counterpart: torchrec.modules.feature_processor_.PositionWeightedModule.
    """

    def __init__(self, max_feature_length: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.position_weight = nn.Parameter(torch.empty(max_feature_length, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights back to 1."""
        with torch.no_grad():
            self.position_weight.fill_(1.0)

    def forward(self, features: JaggedTensor) -> JaggedTensor:
        values = features.values()
        weights_N = weights_by_position(self.position_weight, features.offsets(), len(values), "")
        return JaggedTensor(values, weights=weights_N, lengths=features.lengths(), offsets=features.offsets())

    def pre_process_input(self, features: JaggedTensor) -> None:
        """Compute the offsets now, so that `forward` finds them there."""
        features.offsets()


class PositionWeightedModuleCollection(FeatureProcessorsCollection, CopyMixIn):
    """Position weights of many features, parameters `position_weights.<feature>`, first all 1.

    >>> features = KeyedJaggedTensor.from_lengths_sync(
    ...     ["seen", "liked"], torch.tensor([7, 2, 4]), torch.tensor([2, 0, 0, 1]))
    >>> PositionWeightedModuleCollection({"seen": 5, "liked": 5})(features).weights().tolist()
    [1.0, 1.0, 1.0]

    Raises:
        ValueError: a max length below 1.
        KeyError: (forward) a feature that has no position weights.
        IndexError: (forward) a bag that is longer than its feature's max length.

    Counterpart: torchrec.modules.feature_processor_.PositionWeightedModuleCollection.
    """

    def __init__(self, max_feature_lengths: dict[str, int], device: torch.device | None = None) -> None:
        super().__init__()
        self.max_feature_lengths = check_max_lengths(max_feature_lengths)
        self.position_weights = empty_position_weights(max_feature_lengths, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights back to 1."""
        set_to_one(self.position_weights)

    @property
    def position_weights_dict(self) -> dict[str, nn.Parameter]:
        """The parameters by feature; always the registered ones."""
        return dict(self.position_weights.items())

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return with_position_weights(features, self.position_weights)

    def copy(self, device: torch.device) -> nn.Module:
        """A copy whose parameters are on `device`."""
        return copy_module.deepcopy(self).to(device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; `position_weights_dict` follows by itself."""
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def pre_process_input(self, features: KeyedJaggedTensor) -> None:
        """Compute the offsets now, so that `forward` finds them there."""
        features.offsets()


def empty_position_weights(max_feature_lengths: Mapping[str, int], device: torch.device | None) -> nn.ParameterDict:
    """One uninitialised weight per place, by feature."""
    return nn.ParameterDict(
        {name: nn.Parameter(torch.empty(length, device=device)) for name, length in max_feature_lengths.items()}
    )


@torch.no_grad()
def set_to_one(weights: nn.ParameterDict) -> None:
    """The first values of position weights."""
    for weight_M in weights.values():
        weight_M.fill_(1.0)


def check_max_lengths(max_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """The same, or ValueError for a feature whose bags could hold nothing."""
    for name, length in max_feature_lengths.items():
        if length < 1:
            raise ValueError(f"feature {name!r}: a max length of at least 1 is expected, got {length}")
    return dict(max_feature_lengths)


def with_position_weights(features: KeyedJaggedTensor, position_weights: nn.ParameterDict) -> KeyedJaggedTensor:
    """The same ids, each with the weight of its position in its bag."""
    keys, offsets = features.keys(), features.offsets()
    missing = [key for key in keys if key not in position_weights]
    if missing:
        raise KeyError(f"no position weights for the features {missing}; there are some for {list(position_weights)}")
    first_bag, first_value = features.lengths_offset_per_key(), features.offset_per_key()
    pieces = []
    for index, key in enumerate(keys):
        offsets_B1 = offsets[first_bag[index] : first_bag[index + 1] + 1] - first_value[index]
        count = first_value[index + 1] - first_value[index]
        pieces.append(weights_by_position(position_weights[key], offsets_B1, count, key))
    return with_weights(features, torch.cat(pieces) if pieces else features.values().new_zeros(0, dtype=torch.float32))


def with_weights(features: KeyedJaggedTensor, weights_N: Tensor) -> KeyedJaggedTensor:
    """The same features with other weights."""
    variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        features.keys(),
        features.values(),
        weights_N,
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        inverse_indices=features.inverse_indices_or_none(),
    )
