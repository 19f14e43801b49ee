"""Raw ids for a model that was written for plain collections: managed collision inside, the plain answer outside.

Counterpart: torchrec.modules.mc_adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.hash_mc_modules import HashZchManagedCollisionModule
from recsys_edu.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from recsys_edu.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


def managed_tables(
    tables: Sequence[BaseEmbeddingConfig],
    input_hash_size: int,
    device: torch.device,
    eviction_interval: int,
    zch_method: str,
    mpzch_num_buckets: int | None,
    mpzch_max_probe: int | None,
) -> ManagedCollisionCollection:
    """A managed-collision module for every table: by hashing for "mpzch", sorted by frequency and recency for "".

    Raises:
        ValueError: another method, or a table that does not divide into `mpzch_num_buckets`.
    """
    modules: dict[str, ManagedCollisionModule] = {}
    for table in tables:
        if zch_method == "mpzch":
            buckets, probes = mpzch_num_buckets or 80, mpzch_max_probe or 100
            modules[table.name] = HashZchManagedCollisionModule(
                table.num_embeddings, device, buckets, probes, input_hash_size, name=table.name
            )
        elif zch_method in ("", "sort_zch"):
            modules[table.name] = MCHManagedCollisionModule(
                table.num_embeddings,
                device,
                DistanceLFU_EvictionPolicy(),
                eviction_interval,
                input_hash_size,
                lambda ids, size: ids % size,
                name=table.name,
            )
        else:
            raise ValueError(f'zch_method has to be "mpzch" or "sort_zch" (also ""), got {zch_method!r}')
    return ManagedCollisionCollection(modules, tables)


class McEmbeddingCollectionAdapter(nn.Module):
    """An EmbeddingCollection of raw ids: `forward` gives name to JaggedTensor. Child: `mc_embedding_collection`.

    Counterpart: torchrec.modules.mc_adapter.McEmbeddingCollectionAdapter.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        input_hash_size: int,
        device: torch.device,
        world_size: int,
        eviction_interval: int = 1,
        allow_in_place_embed_weight_update: bool = False,
        zch_method: str = "",
        mpzch_num_buckets: int | None = 80,
        mpzch_max_probe: int | None = 100,
    ) -> None:
        super().__init__()
        managed = managed_tables(
            tables, input_hash_size, device, eviction_interval, zch_method, mpzch_num_buckets, mpzch_max_probe
        )
        self.mc_embedding_collection = ManagedCollisionEmbeddingCollection(
            EmbeddingCollection(tables=tables, device=device), managed, False, allow_in_place_embed_weight_update
        )

    def forward(self, input: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return self.mc_embedding_collection(input)[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The tables' weights."""
        return self.mc_embedding_collection.parameters(recurse)

    def embedding_bag_configs(self) -> list[EmbeddingConfig]:
        """The tables' configs, under the name that TorchRec's adapter gives the method."""
        return self.mc_embedding_collection._embedding_collection.embedding_configs()


class McEmbeddingBagCollectionAdapter(nn.Module):
    """An EmbeddingBagCollection of raw ids: `forward` gives a KeyedTensor. Child: `mc_embedding_bag_collection`.

    >>> tables = [EmbeddingBagConfig(name="film", num_embeddings=160, embedding_dim=8, feature_names=["seen"])]
    >>> module = McEmbeddingBagCollectionAdapter(tables, 2**62, torch.device("cpu"), world_size=1, zch_method="mpzch")
    >>> raw = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([10**15, 7]), torch.tensor([2]))
    >>> module(raw)["seen"].shape
    torch.Size([1, 8])

    Counterpart: torchrec.modules.mc_adapter.McEmbeddingBagCollectionAdapter.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        input_hash_size: int,
        device: torch.device,
        world_size: int,
        eviction_interval: int = 1,
        allow_in_place_embed_weight_update: bool = False,
        zch_method: str = "",
        mpzch_num_buckets: int | None = 80,
        mpzch_max_probe: int | None = 100,
    ) -> None:
        super().__init__()
        managed = managed_tables(
            tables, input_hash_size, device, eviction_interval, zch_method, mpzch_num_buckets, mpzch_max_probe
        )
        self.mc_embedding_bag_collection = ManagedCollisionEmbeddingBagCollection(
            EmbeddingBagCollection(tables=tables, device=device), managed, False, allow_in_place_embed_weight_update
        )

    def forward(self, input_kjt: KeyedJaggedTensor) -> KeyedTensor:
        return self.mc_embedding_bag_collection(input_kjt)[0]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The tables' weights."""
        return self.mc_embedding_bag_collection.parameters(recurse)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs."""
        return self.mc_embedding_bag_collection._embedding_bag_collection.embedding_bag_configs()
