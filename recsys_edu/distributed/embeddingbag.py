"""ShardedEmbeddingBagCollection: the four phases of a pooled lookup, composed.

    forward = start_input, exchange_input, lookup      (flight.py)   then, when the answer is first read,
              finish                                   (pooled_assembly.py)

Counterpart: torchrec.distributed.embeddingbag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.exchange import Exchange, GroupExchange, check_same_on_every_rank
from recsys_edu.distributed.flight import Flight, LaneLookup
from recsys_edu.distributed.host_sums import HostSums, SumBetweenHosts, SumInsideHost
from recsys_edu.distributed.pending import PendingKeyedTensor
from recsys_edu.distributed.pooled_assembly import PooledAssembly, StartPooled, WaitPooled
from recsys_edu.distributed.replicas import Replicas
from recsys_edu.distributed.shards import fused_tables_optimizer, local_shards, plan_tables, table_modules
from recsys_edu.distributed.types import ParameterSharding, ShardedModule, ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from recsys_edu.optim.keyed import KeyedOptimizer
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class ShardedEmbeddingBagCollection(nn.Module):
    """An EmbeddingBagCollection whose tables are cut into shards over ranks; answers equal the unsharded one's.

    Args:
        module: the unsharded collection; its weights are taken over bit for bit (on meta: initialised per shard).
        table_name_to_parameter_sharding: the plan, table by table.
        env: world size, rank, process group.
        fused_params: optimizer settings of tables without an optimizer attached to their parameter.
        device: where shards and batches are.
        exchange: this rank's end of the exchange; default: through env's process group.
        local_size: ranks per host; default: from the environment (LOCAL_WORLD_SIZE).

    Raises:
        ValueError: the plan does not tile every table exactly, or differs between ranks.
    """

    def __init__(
        self,
        module: EmbeddingBagCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
        module_fqn: str | None = None,
        exchange: Exchange | None = None,
        local_size: int | None = None,
    ) -> None:
        super().__init__()
        self._configs = module.embedding_bag_configs()
        self._is_weighted = module.is_weighted()
        self._device = device or torch.device("cpu")
        self._exchange = exchange or GroupExchange(env.process_group)
        weights = {name: bag.weight for name, bag in module.embedding_bags.items()}
        self._tables = plan_tables(
            self._configs, weights, table_name_to_parameter_sharding, env.world_size, fused_params, local_size
        )
        layout = self._tables.layout
        check_same_on_every_rank(self._exchange, layout, f"tables or plan of {module_fqn or 'the module'}")
        self._lookup = LaneLookup(layout, self._exchange, self._device, self._is_weighted)
        self._replicas = Replicas(self._tables, self._device, self._is_weighted)
        self._assembly = PooledAssembly(layout, self._tables.local_columns)
        self._names = [name for names in get_embedding_names_by_table(self._configs) for name in names]
        self._widths = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        local = local_shards(self._lookup.rank_kernels, self._lookup.kernels)
        self.embedding_bags = table_modules(self._tables, local, self._replicas.parameters(), weights)
        self._fused_optimizer = fused_tables_optimizer(self.embedding_bags, "embedding_bags", self._lookup.kernels)
        self._hosts = HostSums(layout, self._exchange.rank) if any(layout.width_H) else None
        self._anchor = torch.zeros(0, requires_grad=True, device=self._device)

    def forward(self, features: KeyedJaggedTensor | Flight) -> KeyedTensor:
        """A KeyedTensor at once; it finishes the flight when its values are first read."""
        flight = features if isinstance(features, Flight) else self.start_input(features)
        if flight.phase < 2:
            self.exchange_input(flight)
        if flight.phase < 3:
            self.lookup(flight)
        if flight.phase < 4:
            self.sum_hosts(flight)
        return PendingKeyedTensor(self._names, self._widths, self._device, lambda: self.finish(flight))

    def start_input(self, features: KeyedJaggedTensor) -> Flight:
        """Phase 1: route the ids into lanes and tell every rank how many are coming."""
        return self._lookup.start_input(features)

    def exchange_input(self, flight: Flight) -> None:
        """Phase 2: send lengths and ids to the ranks that own their rows."""
        self._lookup.exchange_input(flight)

    def lookup(self, flight: Flight) -> None:
        """Phase 3: look up this rank's lanes and start to return the pooled columns."""
        self._lookup.lookup(flight)
        alone, partial = flight.results, []
        if self._hosts is not None:
            widths = [kernel.widths for kernel in self._lookup.rank_kernels] or [(0, 0)]
            parts = [pooled.split(list(pair), dim=1) for pooled, pair in zip(flight.results, widths)]
            alone, partial = map(list, zip(*parts))
        flight.returned = (
            StartPooled.apply(_side_by_side(alone), self._anchor, flight, self._exchange, self._assembly),
        )
        if self._hosts is not None:
            partial = _side_by_side(partial)
            flight.returned += (SumInsideHost.apply(partial, self._anchor, flight, self._exchange, self._hosts),)
        flight.local = self._replicas.lookup(flight.kjt)

    def sum_hosts(self, flight: Flight) -> None:
        """Phase 4, where tables are split over the ranks of one of several hosts: sum there, then start to return."""
        if self._hosts is not None:
            returned, partial = flight.returned
            flight.returned = (returned, SumBetweenHosts.apply(partial, flight, self._exchange, self._hosts))
        flight.phase = 4

    def finish(self, flight: Flight) -> Tensor:
        """Phase 5: wait for the returned columns and put them together, [B, D]."""
        return WaitPooled.apply(flight.local, flight, self._exchange, self._assembly, self._hosts, *flight.returned)

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """State and learning rate of the tables that train in backward; keys `embedding_bags.<table>.weight`."""
        return self._fused_optimizer

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the unsharded collection."""
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


ShardedModule.register(ShardedEmbeddingBagCollection)


class EmbeddingBagCollectionSharder(BaseEmbeddingSharder[EmbeddingBagCollection]):
    """Shards EmbeddingBagCollections. Counterpart: torchrec.distributed.embeddingbag.EmbeddingBagCollectionSharder."""

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        return ShardedEmbeddingBagCollection(
            module, params, env, self.fused_params, device, self.qcomm_codecs_registry, module_fqn
        )

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Table name to weight."""
        return {name: bag.weight for name, bag in module.embedding_bags.items()}

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        return EmbeddingBagCollection
