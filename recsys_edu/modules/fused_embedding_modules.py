"""Embedding collections whose optimizer runs inside backward.

    forward     kernel looks the rows up
    backward    kernel adds up each touched row's gradient and updates row and state at once
    step()      nothing left to do

No gradient of a table's size is ever made. The classes equal EmbeddingBagCollection and
EmbeddingCollection trained by the same optimizer, except that only the rows of a batch are touched (with
Adam's moments and weight decay that is a difference: an absent row does not decay).

Shapes: B batch, N values, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    common_embedding_dim,
    divide_means,
    expand_batches,
    get_embedding_names_by_table,
    sample_weights,
    split_sequences,
    uniform_batches,
)
from recsys_edu.modules.fused_tables import FusedTables
from recsys_edu.optim.fused import FusedOptimizerModule
from recsys_edu.optim.keyed import KeyedOptimizer
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


class FusedEmbeddingBagCollection(EmbeddingBagCollectionInterface, FusedOptimizerModule):
    """An EmbeddingBagCollection that `optimizer_type(**optimizer_kwargs)` trains during backward.

    >>> film = EmbeddingBagConfig(name="film", num_embeddings=100, embedding_dim=8, feature_names=["film"])
    >>> ebc = FusedEmbeddingBagCollection([film], torch.optim.SGD, {"lr": 0.5})
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["film"], torch.tensor([7]), torch.tensor([1]))
    >>> before = ebc.state_dict()["embedding_bags.film.weight"][7].clone()
    >>> ebc(ids).values().sum().backward()                                   # gradient 1 for row 7
    >>> bool(torch.allclose(ebc.state_dict()["embedding_bags.film.weight"][7], before - 0.5))
    True

    Input, output and state_dict keys are EmbeddingBagCollection's. `location` is accepted for TorchRec's
    callers; the kernel of the device decides where memory lies.

    Raises:
        ValueError: an optimizer, or an argument of it, that no kernel fuses.
        RuntimeError: (forward) the collection is still on the meta device.

    Counterpart: torchrec.modules.fused_embedding_modules.FusedEmbeddingBagCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        is_weighted: bool = False,
        device: torch.device | None = None,
        location: Any | None = None,
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._embedding_bag_configs = tables
        self._optimizer_type, self._optimizer_kwargs = optimizer_type, optimizer_kwargs
        self.embedding_bags = FusedTables(
            "embedding_bags", tables, optimizer_type, optimizer_kwargs, device, pooled=True
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        lanes = self.embedding_bags.lanes
        if not lanes.features:
            return KeyedTensor([], [], torch.empty(features.stride(), 0, device=features.device()))
        features = self.embedding_bags.in_lane_order(features)
        pooled_BD = self.embedding_bags.lookup(features, sample_weights(features) if self._is_weighted else None)
        pooled_BD = divide_means(pooled_BD, uniform_batches(features)[1], lanes)
        pooled_BD = expand_batches(pooled_BD, features, lanes)
        return KeyedTensor(keys=list(lanes.names), length_per_key=list(lanes.dims), values=pooled_BD)

    def fused_optimizer(self) -> KeyedOptimizer:
        """The state, the learning rate and nothing to step; keys are `embedding_bags.<table>.weight`."""
        return self.embedding_bags.optimizer()

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs as given."""
        return self._embedding_bag_configs

    def is_weighted(self) -> bool:
        """Whether looked-up rows are multiplied by the KJT's weights."""
        return self._is_weighted

    def optimizer_type(self) -> type[torch.optim.Optimizer]:
        """The optimizer class as given."""
        return self._optimizer_type

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Its arguments as given."""
        return self._optimizer_kwargs

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.embedding_bags.device()


class FusedEmbeddingCollection(EmbeddingCollectionInterface, FusedOptimizerModule):
    """An EmbeddingCollection that `optimizer_type(**optimizer_kwargs)` trains during backward.

    Input, output and state_dict keys (`embeddings.<table>.weight`) are EmbeddingCollection's.

    Raises:
        ValueError: as EmbeddingCollection; or an optimizer, or an argument of it, that no kernel fuses.
        RuntimeError: (forward) the collection is still on the meta device.

    Counterpart: torchrec.modules.fused_embedding_modules.FusedEmbeddingCollection.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | None = None,
        need_indices: bool = False,
        location: Any | None = None,
    ) -> None:
        super().__init__()
        self._need_indices = need_indices
        self._embedding_dim = common_embedding_dim(tables)
        self._embedding_configs = tables
        self._optimizer_type, self._optimizer_kwargs = optimizer_type, optimizer_kwargs
        self.embeddings = FusedTables("embeddings", tables, optimizer_type, optimizer_kwargs, device, pooled=False)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        lanes = self.embeddings.lanes
        if not lanes.features:
            return {}
        features = self.embeddings.in_lane_order(features)
        rows_ND = self.embeddings.lookup(features, None)
        return split_sequences(rows_ND, features, lanes.names, self._need_indices)

    def fused_optimizer(self) -> KeyedOptimizer:
        """The state, the learning rate and nothing to step; keys are `embeddings.<table>.weight`."""
        return self.embeddings.optimizer()

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs as given."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """For each table the names of its outputs."""
        return get_embedding_names_by_table(self._embedding_configs)

    def embedding_dim(self) -> int:
        """The width that all tables share; -1 without tables."""
        return self._embedding_dim

    def need_indices(self) -> bool:
        """Whether the ids come back as the outputs' weights."""
        return self._need_indices

    def optimizer_type(self) -> type[torch.optim.Optimizer]:
        """The optimizer class as given."""
        return self._optimizer_type

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Its arguments as given."""
        return self._optimizer_kwargs

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.embeddings.device()


def fuse_embedding_optimizer(
    model: nn.Module,
    optimizer_type: type[torch.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    device: torch.device,
    location: Any | None = None,
) -> nn.Module:
    """Replace every EmbeddingBagCollection and EmbeddingCollection inside `model` by its fused form.

    The model is changed in place and returned (a collection itself: its fused form is returned). Weights
    are kept where they exist; state_dict keys stay.

    Counterpart: torchrec.modules.fused_embedding_modules.fuse_embedding_optimizer.
    """
    if isinstance(model, EmbeddingBagCollection):
        fused: nn.Module = FusedEmbeddingBagCollection(
            model.embedding_bag_configs(), optimizer_type, optimizer_kwargs, model.is_weighted(), device, location
        )
    elif isinstance(model, EmbeddingCollection):
        fused = FusedEmbeddingCollection(
            model.embedding_configs(), optimizer_type, optimizer_kwargs, device, model.need_indices(), location
        )
    else:
        for name, child in model.named_children():
            setattr(model, name, fuse_embedding_optimizer(child, optimizer_type, optimizer_kwargs, device, location))
        return model
    if model.device.type != "meta" and torch.device(device).type != "meta":
        fused.load_state_dict(model.state_dict())
    return fused


def convert_optimizer_type_and_kwargs(
    optimizer_type: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """FBGEMM's name for an optimizer class, and its arguments renamed; None for classes it does not know.

    >>> convert_optimizer_type_and_kwargs(torch.optim.RMSprop, {"lr": 0.1}) is None
    True

    `lr` becomes `learning_rate`, `betas` becomes `beta1` and `beta2`. The name is an FBGEMM EmbOptimType
    where FBGEMM is installed and that enum's member name, a string, elsewhere.

    Counterpart: torchrec.modules.fused_embedding_modules.convert_optimizer_type_and_kwargs.
    """
    names = {
        "torch.optim.sgd.SGD": "EXACT_SGD",
        "torch.optim.adagrad.Adagrad": "EXACT_ADAGRAD",
        "torch.optim.adam.Adam": "ADAM",
        "recsys_edu.optim.rowwise_adagrad.RowWiseAdagrad": "EXACT_ROWWISE_ADAGRAD",
    }
    name = names.get(f"{optimizer_type.__module__}.{optimizer_type.__qualname__}")
    if name is None:
        return None
    renamed = dict(optimizer_kwargs)
    if "lr" in renamed:
        renamed["learning_rate"] = renamed.pop("lr")
    if "betas" in renamed:
        renamed["beta1"], renamed["beta2"] = renamed.pop("betas")
    if not fbgemm_status().available:
        return name, renamed
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    return EmbOptimType[name], renamed
