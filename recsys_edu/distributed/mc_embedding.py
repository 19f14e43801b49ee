"""ShardedManagedCollisionEmbeddingCollection: raw ids in, a row per id of sharded tables out.

Counterpart: torchrec.distributed.mc_embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recsys_edu.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from recsys_edu.distributed.mc_embedding_modules import (
    BaseManagedCollisionEmbeddingCollectionSharder,
    BaseShardedManagedCollisionEmbeddingCollection,
)
from recsys_edu.distributed.mc_modules import ManagedCollisionCollectionSharder
from recsys_edu.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from recsys_edu.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection


class ShardedManagedCollisionEmbeddingCollection(BaseShardedManagedCollisionEmbeddingCollection):
    """A ManagedCollisionEmbeddingCollection over ranks: ids are managed where their rows are.

    Counterpart: torchrec.distributed.mc_embedding.ShardedManagedCollisionEmbeddingCollection.
    """

    def __init__(
        self,
        module: ManagedCollisionEmbeddingCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        ec_sharder: EmbeddingCollectionSharder,
        mc_sharder: ManagedCollisionCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(module, table_name_to_parameter_sharding, ec_sharder, mc_sharder, env, device, module_fqn)

    @property
    def _embedding_collection(self) -> ShardedEmbeddingCollection:
        return self._embedding_module


class ManagedCollisionEmbeddingCollectionSharder(BaseManagedCollisionEmbeddingCollectionSharder):
    """Shards ManagedCollisionEmbeddingCollections: row_wise, table_wise, table_row_wise.

    Counterpart: torchrec.distributed.mc_embedding.ManagedCollisionEmbeddingCollectionSharder.
    """

    def __init__(
        self,
        ec_sharder: EmbeddingCollectionSharder | None = None,
        mc_sharder: ManagedCollisionCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(
            ec_sharder or EmbeddingCollectionSharder(fused_params, qcomm_codecs_registry),
            mc_sharder or ManagedCollisionCollectionSharder(qcomm_codecs_registry),
            qcomm_codecs_registry,
        )

    def shard(
        self,
        module: ManagedCollisionEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollisionEmbeddingCollection:
        return ShardedManagedCollisionEmbeddingCollection(
            module, params, self._e_sharder, self._mc_sharder, env, device or torch.device("cpu"), module_fqn
        )

    @property
    def module_type(self) -> type[ManagedCollisionEmbeddingCollection]:
        return ManagedCollisionEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedManagedCollisionEmbeddingCollection]:
        return ShardedManagedCollisionEmbeddingCollection
