"""Embedding collections that take raw ids: managed collision in front, and rows made new for their new owners.

Counterpart: torchrec.modules.mc_embedding_modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.mc_modules import ManagedCollisionCollection
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


@torch.no_grad()
def evict(evictions: Mapping[str, Tensor | None], ebc: nn.Module) -> None:
    """Draw the rows that changed owners anew, so that a new id does not begin with a stranger's embedding."""
    for config in table_configs(ebc):
        rows = evictions.get(config.name)
        if rows is None:
            continue
        tables = ebc.embedding_bags if hasattr(ebc, "embedding_bags") else ebc.embeddings
        weight_RD = tables[config.name].weight
        fresh = torch.empty(len(rows), config.embedding_dim, device=weight_RD.device)
        fresh.uniform_(config.get_weight_init_min(), config.get_weight_init_max())
        weight_RD.index_copy_(0, rows, fresh.to(weight_RD.dtype))


def table_configs(module: nn.Module) -> list[BaseEmbeddingConfig]:
    """The configs of a pooled or a sequence collection."""
    return module.embedding_bag_configs() if hasattr(module, "embedding_bag_configs") else module.embedding_configs()


class BaseManagedCollisionEmbeddingCollection(nn.Module):
    """Remap, renew rows that changed owners, look up. Children: `_embedding_module`, `_managed_collision_collection`.

    The forward gives (the lookup's answer, the remapped features or None).

    Raises:
        ValueError: the two collections are not about the same tables.
    """

    def __init__(
        self,
        embedding_module: EmbeddingBagCollection | EmbeddingCollection,
        managed_collision_collection: ManagedCollisionCollection,
        return_remapped_features: bool = False,
        allow_in_place_embed_weight_update: bool = False,
    ) -> None:
        super().__init__()
        ours = [config.name for config in table_configs(embedding_module)]
        theirs = [config.name for config in managed_collision_collection.embedding_configs()]
        if ours != theirs:
            raise ValueError(f"the tables are {ours}, managed collision is set up for {theirs}: must be equal")
        self._embedding_module = embedding_module
        self._managed_collision_collection = managed_collision_collection
        self._return_remapped_features = return_remapped_features
        self._allow_in_place_embed_weight_update = allow_in_place_embed_weight_update

    def forward(
        self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True
    ) -> tuple[KeyedTensor | dict[str, JaggedTensor], KeyedJaggedTensor | None]:
        remapped = self._managed_collision_collection(features, mutate_miss_lengths)
        evict(self._managed_collision_collection.evict(), self._embedding_module)
        return self._embedding_module(remapped), remapped if self._return_remapped_features else None


class ManagedCollisionEmbeddingBagCollection(BaseManagedCollisionEmbeddingCollection):
    """Pooled lookups of raw ids. Counterpart: torchrec's class of this name.

    >>> from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    >>> from recsys_edu.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
    >>> tables = [EmbeddingBagConfig(name="film", num_embeddings=100, embedding_dim=8, feature_names=["seen"])]
    >>> managed = MCHManagedCollisionModule(100, torch.device("cpu"), LFU_EvictionPolicy(), eviction_interval=1)
    >>> mcc = ManagedCollisionCollection({"film": managed}, tables)
    >>> module = ManagedCollisionEmbeddingBagCollection(EmbeddingBagCollection(tables), mcc)
    >>> raw = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([10**15, 7]), torch.tensor([2]))
    >>> module(raw)[0]["seen"].shape
    torch.Size([1, 8])
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        managed_collision_collection: ManagedCollisionCollection,
        return_remapped_features: bool = False,
        allow_in_place_embed_weight_update: bool = False,
    ) -> None:
        super().__init__(
            embedding_bag_collection,
            managed_collision_collection,
            return_remapped_features,
            allow_in_place_embed_weight_update,
        )

    @property
    def _embedding_bag_collection(self) -> EmbeddingBagCollection:
        return self._embedding_module


class ManagedCollisionEmbeddingCollection(BaseManagedCollisionEmbeddingCollection):
    """Sequence lookups of raw ids. Counterpart: torchrec's class of this name."""

    def __init__(
        self,
        embedding_collection: EmbeddingCollection,
        managed_collision_collection: ManagedCollisionCollection,
        return_remapped_features: bool = False,
        allow_in_place_embed_weight_update: bool = False,
    ) -> None:
        super().__init__(
            embedding_collection,
            managed_collision_collection,
            return_remapped_features,
            allow_in_place_embed_weight_update,
        )

    @property
    def _embedding_collection(self) -> EmbeddingCollection:
        return self._embedding_module
