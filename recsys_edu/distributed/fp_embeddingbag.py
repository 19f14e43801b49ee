"""ShardedFeatureProcessedEmbeddingBagCollection: processors on every rank, the tables behind them sharded.

    my batch -> processors (each rank its copy) -> ids with weights -> ShardedEmbeddingBagCollection

The processors see this rank's own bags before anything is sent, so a position is a position in the whole bag whatever
the plan does with the rows. Their parameters are small: every rank has all of them, and DistributedModelParallel
averages their gradients with the rest of the dense part. The gradient of a weight comes back through the exchange that
carried it.

Counterpart: torchrec.distributed.fp_embeddingbag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder
from recsys_edu.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardedModule, ShardingEnv
from recsys_edu.modules.fp_embedding_modules import (
    FeatureProcessedEmbeddingBagCollection,
    only,
    run_processors,
    table_features,
)
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class ShardedFeatureProcessedEmbeddingBagCollection(nn.Module):
    """A FeatureProcessedEmbeddingBagCollection whose tables are cut into shards over ranks.

    Children and names as unsharded: `_feature_processors`, `_embedding_bag_collection`. Pipelines do not start its
    input ahead of time: the weights that travel depend on parameters that the step before still changes.

    Args:
        module: its weights are taken over bit for bit, its processors as they are.
        table_name_to_parameter_sharding: the plan, table by table.
        ebc_sharder: shards the collection inside.

    Counterpart: torchrec.distributed.fp_embeddingbag.ShardedFeatureProcessedEmbeddingBagCollection.
    """

    def __init__(
        self,
        module: FeatureProcessedEmbeddingBagCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__()
        collection = module.split()[1]
        self._feature_names = table_features(collection)
        self._feature_processors = module._feature_processors.to(device)
        path = f"{module_fqn}._embedding_bag_collection" if module_fqn else None
        self._embedding_bag_collection = ebc_sharder.shard(
            collection, table_name_to_parameter_sharding, env, device, path
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """A KeyedTensor at once; its values arrive when they are first read."""
        return self._embedding_bag_collection(
            run_processors(self._feature_processors, only(features, self._feature_names))
        )


ShardedModule.register(ShardedFeatureProcessedEmbeddingBagCollection)


class FeatureProcessedEmbeddingBagCollectionSharder(BaseEmbeddingSharder[FeatureProcessedEmbeddingBagCollection]):
    """Shards FeatureProcessedEmbeddingBagCollections, with every sharding type.

    Counterpart: torchrec.distributed.fp_embeddingbag.FeatureProcessedEmbeddingBagCollectionSharder.
    """

    def __init__(
        self,
        ebc_sharder: EmbeddingBagCollectionSharder | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._ebc_sharder = ebc_sharder or EmbeddingBagCollectionSharder(qcomm_codecs_registry=qcomm_codecs_registry)

    def shard(
        self,
        module: FeatureProcessedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFeatureProcessedEmbeddingBagCollection:
        device = device or torch.device("cpu")
        return ShardedFeatureProcessedEmbeddingBagCollection(module, params, self._ebc_sharder, env, device, module_fqn)

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._ebc_sharder.fused_params

    def shardable_parameters(self, module: FeatureProcessedEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Table name to weight."""
        return self._ebc_sharder.shardable_parameters(module.split()[1])

    @property
    def module_type(self) -> type[FeatureProcessedEmbeddingBagCollection]:
        return FeatureProcessedEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedFeatureProcessedEmbeddingBagCollection]:
        return ShardedFeatureProcessedEmbeddingBagCollection
