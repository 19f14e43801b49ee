"""What the sharded pooled and sequence collections of raw ids share: manage, renew rows that changed owners, look up.

Counterpart: torchrec.distributed.mc_embedding_modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding import EmbeddingCollectionSharder
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder
from recsys_edu.distributed.mc_modules import ManagedCollisionCollectionSharder
from recsys_edu.distributed.shards import ShardedTables, TableShards, fill_shard
from recsys_edu.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardedModule, ShardingEnv
from recsys_edu.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

Answer = KeyedTensor | Mapping[str, JaggedTensor]


class BaseShardedManagedCollisionEmbeddingCollection(nn.Module):
    """Children and names as unsharded: `_managed_collision_collection`, `_embedding_module`.

    Args:
        module: its weights are taken over bit for bit.
        table_name_to_parameter_sharding: the plan; every row of a table has to be whole on one rank.
        e_sharder, mc_sharder: shard the two children.
    """

    def __init__(
        self,
        module: BaseManagedCollisionEmbeddingCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        e_sharder: EmbeddingBagCollectionSharder | EmbeddingCollectionSharder,
        mc_sharder: ManagedCollisionCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__()
        plan = table_name_to_parameter_sharding
        self._managed_collision_collection = mc_sharder.shard(
            module._managed_collision_collection, plan, env, None, device
        )
        path = f"{module_fqn}._embedding_module" if module_fqn else None
        self._embedding_module = e_sharder.shard(module._embedding_module, plan, env, device, path)
        self._return_remapped_features = module._return_remapped_features
        self.train(module.training)

    def forward(
        self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True
    ) -> tuple[Answer, KeyedJaggedTensor | None]:
        """(the lookup's answer, which arrives when it is first read; this rank's features with row numbers or None)."""
        remapped = self._managed_collision_collection(features, mutate_miss_lengths)
        renew_rows(self._embedding_module.shards, self._managed_collision_collection.evict())
        return self._embedding_module(remapped), remapped if self._return_remapped_features else None


ShardedModule.register(BaseShardedManagedCollisionEmbeddingCollection)


@torch.no_grad()
def renew_rows(shards: ShardedTables, evictions: Mapping[str, Tensor | None]) -> None:
    """Draw rows of this rank's shards anew and forget what the optimizer knows of them.

    Args:
        evictions: by table the rows, numbered as in the whole table.
    """
    for config in shards.configs:
        rows, table = evictions.get(config.name), shards.modules[config.name]
        if rows is None:
            continue
        if not isinstance(table, TableShards):
            raise ValueError(f"table {config.name!r} is replicated: rows of raw ids have to be on one rank")
        for local in table.local:
            mine = rows[(rows >= local.shard.rows.start) & (rows < local.shard.rows.stop)] - local.shard.rows.start
            fresh = torch.empty_like(local.weight[mine])
            fill_shard(fresh, local.shard, config, torch.empty(0, device="meta"))
            local.weight[mine] = fresh
            for state in local.state.values():
                if state.shape[:1] == local.weight.shape[:1]:  # not the count of steps
                    state[mine] = 0


class BaseManagedCollisionEmbeddingCollectionSharder(BaseEmbeddingSharder[BaseManagedCollisionEmbeddingCollection]):
    """Shards modules that take raw ids, with the sharding types that keep every row on one rank."""

    def __init__(
        self,
        e_sharder: EmbeddingBagCollectionSharder | EmbeddingCollectionSharder,
        mc_sharder: ManagedCollisionCollectionSharder,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._e_sharder, self._mc_sharder = e_sharder, mc_sharder

    def shardable_parameters(self, module: BaseManagedCollisionEmbeddingCollection) -> dict[str, nn.Parameter]:
        """Table name to weight."""
        return self._e_sharder.shardable_parameters(module._embedding_module)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self._e_sharder.compute_kernels(sharding_type, compute_device_type)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._mc_sharder.sharding_types(compute_device_type)

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._e_sharder.fused_params
