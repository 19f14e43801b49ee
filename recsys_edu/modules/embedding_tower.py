"""Towers: an embedding module and the layers that use its output, as a unit that is placed and sharded together.

    features -> embedding_module -> interaction_module -> [B, width]        EmbeddingTower
    towers side by side                                -> [B, sum of widths]  EmbeddingTowerCollection

Counterpart: torchrec.modules.embedding_tower.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


def tower_input_params(module: nn.Module) -> tuple[bool, bool]:
    """Whether a tower's embedding module takes (features, weighted features).

    >>> from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
    >>> tower_input_params(EmbeddingBagCollection([], is_weighted=True))
    (False, True)

    The collections say so themselves; another module by the arguments of its forward, `features` and
    `weighted_features`. One that has neither takes the features.
    """
    if isinstance(module, EmbeddingBagCollectionInterface):
        return not module.is_weighted(), module.is_weighted()
    if isinstance(module, EmbeddingCollectionInterface):
        return True, False
    names = inspect.signature(module.forward).parameters
    takes = ("features" in names, "weighted_features" in names)
    return takes if any(takes) else (True, False)


class EmbeddingTower(nn.Module):
    """`interaction_module(embedding_module(...))`. `device` moves the interaction module.

    Counterpart: torchrec.modules.embedding_tower.EmbeddingTower.
    """

    def __init__(
        self, embedding_module: nn.Module, interaction_module: nn.Module, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.embedding = embedding_module
        self.interaction = interaction_module
        if device is not None:
            self.interaction.to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.interaction(self.embedding(*args, **kwargs))


class EmbeddingTowerCollection(nn.Module):
    """Several towers; each gets the features it takes, and their outputs are concatenated along dim 1.

    >>> from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    >>> from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
    >>> class First(nn.Module):
    ...     def forward(self, pooled):
    ...         return pooled.values()[:, :1]
    >>> tables = [EmbeddingBagConfig(name="film", num_embeddings=9, embedding_dim=4, feature_names=["seen"])]
    >>> towers = EmbeddingTowerCollection([EmbeddingTower(EmbeddingBagCollection(tables), First()) for _ in range(3)])
    >>> towers(KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([7]), torch.tensor([1]))).shape
    torch.Size([1, 3])

    Raises:
        ValueError: (forward) a tower wants features or weighted features that were not given.

    Counterpart: torchrec.modules.embedding_tower.EmbeddingTowerCollection.
    """

    def __init__(self, towers: list[EmbeddingTower], device: torch.device | None = None) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self._input_params = [tower_input_params(tower.embedding) for tower in towers]
        if device is not None:
            for tower in towers:
                tower.interaction.to(device)

    def forward(
        self, features: KeyedJaggedTensor | None = None, weighted_features: KeyedJaggedTensor | None = None
    ) -> Tensor:
        outputs = []
        for index, (tower, wanted) in enumerate(zip(self.towers, self._input_params)):
            given = (("features", features), ("weighted_features", weighted_features))
            inputs = [value for (_, value), is_wanted in zip(given, wanted) if is_wanted]
            missing = [name for (name, value), is_wanted in zip(given, wanted) if is_wanted and value is None]
            if missing:
                raise ValueError(f"tower {index} takes {' and '.join(missing)}, which this call does not pass")
            outputs.append(tower(*inputs))
        return torch.cat(outputs, dim=1)
