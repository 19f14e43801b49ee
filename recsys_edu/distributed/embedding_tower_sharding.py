"""Sharded towers: the tables of each tower over ranks, its interaction layers on every rank.

    my batch -> sharded embeddings of the tower -> its interaction module (each rank its copy) -> [B, width]

TorchRec puts a whole tower, layers included, on the ranks of one host, and sends the towers' outputs instead of the
embeddings; that saves bytes between hosts where a tower's output is narrower than its embeddings. Here any plan is
accepted and the layers are data-parallel like every other dense layer, which gives the same numbers and gradients.

Counterpart: torchrec.distributed.embedding_tower_sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recsys_edu.distributed.embedding import EmbeddingCollectionSharder
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder
from recsys_edu.distributed.types import (
    ParameterSharding,
    QuantizedCommCodecs,
    ShardedModule,
    ShardingEnv,
)
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection, tower_input_params


class ShardedEmbeddingTower(EmbeddingTower):
    """A tower whose tables are cut into shards over ranks; children `embedding` and `interaction` as unsharded.

    Args:
        module: its weights are taken over bit for bit.
        embedding_sharder: shards the tower's embedding module.
        kjt_features, wkjt_features: the features it takes, without and with weights; for information.

    Counterpart: torchrec.distributed.embedding_tower_sharding.ShardedEmbeddingTower.
    """

    def __init__(
        self,
        module: EmbeddingTower,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        embedding_sharder: BaseEmbeddingSharder[Any],
        kjt_features: list[str],
        wkjt_features: list[str],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
    ) -> None:
        path = f"{module_fqn}.embedding" if module_fqn else None
        embedding = embedding_sharder.shard(module.embedding, table_name_to_parameter_sharding, env, device, path)
        super().__init__(embedding, module.interaction, device)
        self.kjt_features, self.wkjt_features = kjt_features, wkjt_features

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The unsharded keys; tables are TiledTensors. The arguments may also be given by position."""
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


class ShardedEmbeddingTowerCollection(EmbeddingTowerCollection):
    """An EmbeddingTowerCollection of sharded towers; children `towers.<i>` as unsharded.

    Counterpart: torchrec.distributed.embedding_tower_sharding.ShardedEmbeddingTowerCollection.
    """

    def __init__(
        self,
        module: EmbeddingTowerCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        tower_sharder: EmbeddingTowerSharder,
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
    ) -> None:
        input_params = [tower_input_params(tower.embedding) for tower in module.towers]
        towers = []
        for index, tower in enumerate(module.towers):
            names = tower_sharder.shardable_parameters(tower)
            params = {name: table_name_to_parameter_sharding[name] for name in names}
            path = f"{module_fqn}.towers.{index}" if module_fqn else None
            towers.append(tower_sharder.shard(tower, params, env, device, path))
        super().__init__(towers)
        self._input_params = input_params  # a sharded collection no longer tells by its type

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The unsharded keys; tables are TiledTensors. The arguments may also be given by position."""
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


ShardedModule.register(ShardedEmbeddingTower)
ShardedModule.register(ShardedEmbeddingTowerCollection)


class EmbeddingTowerSharder(BaseEmbeddingSharder[EmbeddingTower]):
    """Shards EmbeddingTowers around an EmbeddingBagCollection or EmbeddingCollection.

    Counterpart: torchrec.distributed.embedding_tower_sharding.EmbeddingTowerSharder.
    """

    def embedding_sharder(self, module: EmbeddingTower) -> BaseEmbeddingSharder[Any]:
        """The sharder of the tower's embedding module; ValueError for a module that none knows."""
        if isinstance(module.embedding, EmbeddingBagCollection):
            return EmbeddingBagCollectionSharder(self.fused_params, self.qcomm_codecs_registry)
        if isinstance(module.embedding, EmbeddingCollection):
            return EmbeddingCollectionSharder(self.fused_params, self.qcomm_codecs_registry)
        raise ValueError(
            "a tower's embedding module has to be an EmbeddingBagCollection or EmbeddingCollection to be sharded,"
            f" got {type(module.embedding).__name__}"
        )

    def embedding_feature_names(self, module: EmbeddingTower) -> tuple[list[str], list[str]]:
        """(features without weights, features with weights)."""
        collection = module.embedding
        pooled = hasattr(collection, "embedding_bag_configs")
        configs = collection.embedding_bag_configs() if pooled else collection.embedding_configs()
        names = list(dict.fromkeys(name for config in configs for name in config.feature_names))
        return ([], names) if tower_input_params(collection)[1] else (names, [])

    def shard(
        self,
        module: EmbeddingTower,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingTower:
        features, weighted = self.embedding_feature_names(module)
        sharder = self.embedding_sharder(module)
        return ShardedEmbeddingTower(
            module, params, sharder, features, weighted, env, device=device, module_fqn=module_fqn
        )

    def shardable_parameters(self, module: EmbeddingTower) -> dict[str, nn.Parameter]:
        """Table name to weight."""
        return self.embedding_sharder(module).shardable_parameters(module.embedding)

    @property
    def module_type(self) -> type[EmbeddingTower]:
        return EmbeddingTower


class EmbeddingTowerCollectionSharder(BaseEmbeddingSharder[EmbeddingTowerCollection]):
    """Shards EmbeddingTowerCollections; table names have to differ between towers.

    Counterpart: torchrec.distributed.embedding_tower_sharding.EmbeddingTowerCollectionSharder.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry)
        self._tower_sharder = EmbeddingTowerSharder(fused_params, qcomm_codecs_registry)

    def shard(
        self,
        module: EmbeddingTowerCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingTowerCollection:
        return ShardedEmbeddingTowerCollection(
            module, params, self._tower_sharder, env, device=device, module_fqn=module_fqn
        )

    def shardable_parameters(self, module: EmbeddingTowerCollection) -> dict[str, nn.Parameter]:
        """Table name to weight, of all towers; ValueError for a name that two towers use."""
        found: dict[str, nn.Parameter] = {}
        for index, tower in enumerate(module.towers):
            for name, parameter in self._tower_sharder.shardable_parameters(tower).items():
                if name in found:
                    raise ValueError(f"tower {index} has a second table {name!r}: a plan goes by names, rename one")
                found[name] = parameter
        return found

    @property
    def module_type(self) -> type[EmbeddingTowerCollection]:
        return EmbeddingTowerCollection
