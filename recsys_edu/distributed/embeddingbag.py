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

from recsys_edu.distributed import torchrec_phases
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.exchange import Exchange, GroupExchange
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.host_sums import HostSums, SumBetweenHosts, SumInsideHost
from recsys_edu.distributed.pending import PendingKeyedTensor
from recsys_edu.distributed.pooled_assembly import PooledAssembly, StartPooled, WaitPooled
from recsys_edu.distributed.shards import ShardedTables
from recsys_edu.distributed.spans import span
from recsys_edu.distributed.tables import table_source
from recsys_edu.distributed.types import CommOp, ParameterSharding, ShardedModule, ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import (
    EmbeddingBagCollection,
    expand_batches,
    get_embedding_names_by_table,
    in_lane_order,
    lanes_of,
)
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
        sharded_module_order_overwrite: list[str] | None = None,
        exchange: Exchange | None = None,
        local_size: int | None = None,
    ) -> None:
        super().__init__()
        weights = {name: bag.weight for name, bag in module.embedding_bags.items()}
        sources = {name: table_source(weight, fused_params, name) for name, weight in weights.items()}
        exchange, device = exchange or GroupExchange(env.process_group), device or torch.device("cpu")
        self._codecs = (qcomm_codecs_registry or {}).get(CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name)
        self._take(
            ShardedTables(
                module.embedding_bag_configs(),
                sources,
                table_name_to_parameter_sharding,
                exchange,
                device,
                prefix="embedding_bags",
                weighted=module.is_weighted(),
                local_size=local_size,
                name=module_fqn,
            )
        )

    def _take(self, shards: ShardedTables) -> None:
        self._shards, self._lookup, self._exchange = shards, shards.lookup, shards.exchange
        layout = shards.layout
        self._assembly = PooledAssembly(layout, shards.tables.local_columns, self._codecs)
        self._hosts = HostSums(layout, shards.exchange.rank, self._codecs) if any(layout.width_H) else None
        kernels = shards.lookup.rank_kernels
        # A rank without lanes still answers: one block of no columns.
        self._everywhere = [kernel.everywhere for kernel in kernels] or [False]
        self._widths_of_kernel = [kernel.widths for kernel in kernels if not kernel.everywhere] or [(0, 0)]
        self._names = [name for names in get_embedding_names_by_table(shards.configs) for name in names]
        self._lanes = lanes_of(shards.configs)
        self._widths = [config.embedding_dim for config in shards.configs for _ in config.feature_names]
        self._anchor = torch.zeros(0, requires_grad=True, device=shards.device)
        self.embedding_bags = shards.modules

    def with_plan(self, plan: Mapping[str, ParameterSharding]) -> ShardedEmbeddingBagCollection:
        """The same collection under another plan, its shards not yet filled (`resharding.reshard_module` does that)."""
        fresh = ShardedEmbeddingBagCollection.__new__(ShardedEmbeddingBagCollection)
        nn.Module.__init__(fresh)
        fresh._codecs = self._codecs
        fresh._take(self._shards.with_plan(plan))
        return fresh

    def forward(self, features: KeyedJaggedTensor | Flight) -> KeyedTensor:
        """A KeyedTensor at once; it finishes the flight when its values are first read."""
        flight = features if isinstance(features, Flight) else self.start_input(features)
        if flight.phase < 2:
            self.exchange_input(flight)
        if flight.phase < 3:
            with span("lookup"):
                self.lookup(flight)
        if flight.phase < 4:
            self.sum_hosts(flight)
        return PendingKeyedTensor(self._names, self._widths, self._shards.device, lambda: self.finish(flight))

    def start_input(self, features: KeyedJaggedTensor) -> Flight:
        """Phase 1: route the ids into lanes and tell every rank how many are coming."""
        return self._lookup.start_input(features)

    def start_absent(self, reason: int) -> Flight:
        """Phase 1 of a rank without a batch: `exchange_input` raises NoBatch with its reason on every rank."""
        return self._lookup.start_absent(reason)

    def exchange_input(self, flight: Flight) -> None:
        """Phase 2: send lengths and ids to the ranks that own their rows."""
        self._lookup.exchange_input(flight)

    def lookup(self, flight: Flight) -> None:
        """Phase 3: look up this rank's lanes and start to return the pooled columns."""
        self._shards.fused_optimizer.zero_grad()  # hands learning rates that were changed to the kernels
        self._lookup.lookup(flight)
        copies = [answer for answer, everywhere in zip(flight.results, self._everywhere) if everywhere]
        pooled = [answer.rows for answer, everywhere in zip(flight.results, self._everywhere) if not everywhere]
        pooled = pooled or [copies[0].rows[:, :0].detach()]
        partial: list[Tensor] = []
        if self._hosts is not None:
            parts = [rows.split(list(widths), dim=1) for rows, widths in zip(pooled, self._widths_of_kernel)]
            pooled, partial = ([part[side] for part in parts] for side in (0, 1))
        returned = StartPooled.apply(_side_by_side(pooled), self._anchor, flight, self._exchange, self._assembly)
        flight.returned = (returned,)
        if self._hosts is not None:
            sums = SumInsideHost.apply(_side_by_side(partial), self._anchor, flight, self._exchange, self._hosts)
            flight.returned += (sums,)
        self._shards.replicas.keep(flight, copies, self._exchange)

    def sum_hosts(self, flight: Flight) -> None:
        """Phase 4, where tables are split over the ranks of one of several hosts: sum there, then start to return."""
        if self._hosts is not None:
            returned, partial = flight.returned
            flight.returned = (returned, SumBetweenHosts.apply(partial, flight, self._exchange, self._hosts))
        flight.phase = 4

    def finish(self, flight: Flight) -> Tensor:
        """Phase 5: wait for the returned columns and put them together, [B, D]."""
        local = self._shards.replicas.finish(flight, self._exchange)
        answer_BD = WaitPooled.apply(local, flight, self._exchange, self._assembly, self._hosts, *flight.land())
        if flight.variable is None:
            return answer_BD
        return expand_batches(answer_BD, in_lane_order(flight.variable, self._lanes.features), self._lanes)

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """State and learning rate of the tables that train in backward; keys `embedding_bags.<table>.weight`."""
        return self._shards.fused_optimizer

    @property
    def shards(self) -> ShardedTables:
        """What this rank holds: layout, kernels, parameters, optimizer, exchange."""
        return self._shards

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the unsharded collection."""
        return self._shards.configs

    def is_weighted(self) -> bool:
        return self._lookup.weighted

    # the phases again, under TorchRec's names
    create_context, input_dist = torchrec_phases.create_context, torchrec_phases.input_dist
    compute, output_dist = torchrec_phases.compute, torchrec_phases.output_dist
    compute_and_output_dist = torchrec_phases.compute_and_output_dist


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
