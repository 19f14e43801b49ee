"""ShardedManagedCollisionEmbeddingBagCollection: raw ids in, pooled rows of sharded tables out.

Counterpart: torchrec.distributed.mc_embeddingbag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from recsys_edu.distributed.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollectionSharder,
    BaseShardedManagedCollisionEmbeddingCollection,
)
from recsys_edu.distributed.mc_modules import ManagedCollisionCollectionSharder
from recsys_edu.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from recsys_edu.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection


class ShardedManagedCollisionEmbeddingBagCollection(BaseShardedManagedCollisionEmbeddingCollection):
    """A ManagedCollisionEmbeddingBagCollection over ranks: ids are managed where their rows are.

    Counterpart: torchrec.distributed.mc_embeddingbag.ShardedManagedCollisionEmbeddingBagCollection.
    """

    def __init__(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        mc_sharder: ManagedCollisionCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(module, table_name_to_parameter_sharding, ebc_sharder, mc_sharder, env, device, module_fqn)

    @property
    def _embedding_bag_collection(self) -> ShardedEmbeddingBagCollection:
        return self._embedding_module


class ManagedCollisionEmbeddingBagCollectionSharder(BaseManagedCollisionEmbeddingCollectionSharder):
    """Shards ManagedCollisionEmbeddingBagCollections: row_wise, table_wise, table_row_wise.

    Counterpart: torchrec.distributed.mc_embeddingbag.ManagedCollisionEmbeddingBagCollectionSharder.
    """

    def __init__(
        self,
        ebc_sharder: EmbeddingBagCollectionSharder | None = None,
        mc_sharder: ManagedCollisionCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(
            ebc_sharder or EmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry),
            mc_sharder or ManagedCollisionCollectionSharder(qcomm_codecs_registry),
            qcomm_codecs_registry,
        )

    def shard(
        self,
        module: ManagedCollisionEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollisionEmbeddingBagCollection:
        return ShardedManagedCollisionEmbeddingBagCollection(
            module, params, self._e_sharder, self._mc_sharder, env, device or torch.device("cpu"), module_fqn
        )

    @property
    def module_type(self) -> type[ManagedCollisionEmbeddingBagCollection]:
        return ManagedCollisionEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedManagedCollisionEmbeddingBagCollection]:
        return ShardedManagedCollisionEmbeddingBagCollection
