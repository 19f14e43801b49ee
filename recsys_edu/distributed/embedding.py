"""ShardedEmbeddingCollection: the four phases of a sequence lookup, composed.

    forward = start_input, exchange_input, lookup      (flight.py)   then, when an answer is first read,
              finish                                   (sequence_assembly.py)

Counterpart: torchrec.distributed.embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recsys_edu.distributed import torchrec_phases
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.exchange import Exchange, GroupExchange
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.index_dedup import distinct_ids
from recsys_edu.distributed.pending import PendingJaggedTensors
from recsys_edu.distributed.sequence_assembly import SequenceAssembly, StartSequence, WaitSequence
from recsys_edu.distributed.shards import ShardedTables
from recsys_edu.distributed.spans import span
from recsys_edu.distributed.tables import table_source
from recsys_edu.distributed.types import CommOp, ParameterSharding, ShardedModule, ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingCollection, get_embedding_names_by_table
from recsys_edu.optim.keyed import KeyedOptimizer
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class ShardedEmbeddingCollection(nn.Module):
    """An EmbeddingCollection whose tables are cut into shards over ranks; answers equal the unsharded one's.

    Args and errors: as ShardedEmbeddingBagCollection. `use_index_dedup`: each id of a feature travels once per batch
    (index_dedup.py); worth it where sequences repeat ids.
    """

    def __init__(
        self,
        module: EmbeddingCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
        use_index_dedup: bool = False,
        module_fqn: str | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        weights = {name: table.weight for name, table in module.embeddings.items()}
        sources = {name: table_source(weight, fused_params, name) for name, weight in weights.items()}
        exchange, device = exchange or GroupExchange(env.process_group), device or torch.device("cpu")
        shards = ShardedTables(
            module.embedding_configs(),
            sources,
            table_name_to_parameter_sharding,
            exchange,
            device,
            prefix="embeddings",
            name=module_fqn,
        )
        self._codecs = (qcomm_codecs_registry or {}).get(CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name)
        self._use_index_dedup = use_index_dedup
        self._take(shards, module.need_indices())

    def _take(self, shards: ShardedTables, need_indices: bool) -> None:
        self._shards, self._lookup, self._exchange = shards, shards.lookup, shards.exchange
        self._need_indices = need_indices
        self._assembly = SequenceAssembly(shards.layout, self._codecs)
        self._names = [name for names in get_embedding_names_by_table(shards.configs) for name in names]
        self._anchor = torch.zeros(0, requires_grad=True, device=shards.device)
        self.embeddings = shards.modules

    def with_plan(self, plan: Mapping[str, ParameterSharding]) -> ShardedEmbeddingCollection:
        """The same collection under another plan, its shards not yet filled (`resharding.reshard_module` does that)."""
        fresh = ShardedEmbeddingCollection.__new__(ShardedEmbeddingCollection)
        nn.Module.__init__(fresh)
        fresh._codecs, fresh._use_index_dedup = self._codecs, self._use_index_dedup
        fresh._take(self._shards.with_plan(plan), self._need_indices)
        return fresh

    def forward(self, features: KeyedJaggedTensor | Flight) -> Mapping[str, JaggedTensor]:
        """Name to JaggedTensor at once; it finishes the flight when one of them is first read."""
        flight = features if isinstance(features, Flight) else self.start_input(features)
        if flight.phase < 2:
            self.exchange_input(flight)
        if flight.phase < 3:
            with span("lookup"):
                self.lookup(flight)
        return PendingJaggedTensors(self._names, lambda: self.finish(flight))

    def start_input(self, features: KeyedJaggedTensor) -> Flight:
        """Phase 1: route the ids into lanes and tell every rank how many are coming."""
        features, repeats = distinct_ids(features) if self._use_index_dedup else (features, None)
        flight = self._lookup.start_input(features)
        flight.repeats = repeats
        return flight

    def start_absent(self, reason: int) -> Flight:
        """Phase 1 of a rank without a batch: `exchange_input` raises NoBatch with its reason on every rank."""
        return self._lookup.start_absent(reason)

    def exchange_input(self, flight: Flight) -> None:
        """Phase 2: send lengths and ids to the ranks that own their rows."""
        self._lookup.exchange_input(flight)

    def lookup(self, flight: Flight) -> None:
        """Phase 3: look up this rank's lanes and start to return the rows."""
        self._shards.fused_optimizer.zero_grad()  # hands learning rates that were changed to the kernels
        self._lookup.lookup(flight)
        flight.places = self._assembly.places(flight)
        kernels = self._lookup.rank_kernels
        copies = [answer for answer, kernel in zip(flight.results, kernels) if kernel.everywhere]
        shared = [answer for answer, kernel in zip(flight.results, kernels) if not kernel.everywhere]
        rows = [answer.rows for answer in shared]
        flight.returned = (StartSequence.apply(self._anchor, flight, self._exchange, self._assembly, shared, *rows),)
        self._shards.replicas.keep(flight, copies, self._exchange)

    def finish(self, flight: Flight) -> dict[str, JaggedTensor]:
        """Phase 4: wait for the returned rows and hand them out by name."""
        local = self._shards.replicas.finish(flight, self._exchange)
        rows = WaitSequence.apply(*flight.land(), local, flight, self._exchange, self._assembly)
        looked_up, answers, first = flight.kjt, {}, 0
        as_given = flight.variable if flight.variable is not None else looked_up
        if flight.repeats is not None:
            as_given = flight.repeats.kjt
        lengths_F = as_given.lengths().split(as_given.stride_per_key())
        ids_F = as_given.values().split(as_given.length_per_key()) if self._need_indices else None
        for name, output in zip(self._names, self._shards.layout.outputs):
            key = looked_up.keys().index(output.feature)
            count = looked_up.length_per_key()[key]
            rows_of_name = rows[first : first + count]
            if flight.repeats is not None:
                rows_of_name = rows_of_name.index_select(0, flight.repeats.place_F[key])
            ids = ids_F[key] if ids_F is not None else None
            answers[name] = JaggedTensor(rows_of_name, lengths=lengths_F[key], weights=ids)
            first += count
        return answers

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """State and learning rate of the tables that train in backward; keys `embeddings.<table>.weight`."""
        return self._shards.fused_optimizer

    @property
    def shards(self) -> ShardedTables:
        """What this rank holds: layout, kernels, parameters, optimizer, exchange."""
        return self._shards

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs of the unsharded collection."""
        return self._shards.configs

    # the phases again, under TorchRec's names
    create_context, input_dist = torchrec_phases.create_context, torchrec_phases.input_dist
    compute, output_dist = torchrec_phases.compute, torchrec_phases.output_dist
    compute_and_output_dist = torchrec_phases.compute_and_output_dist


ShardedModule.register(ShardedEmbeddingCollection)


class EmbeddingCollectionSharder(BaseEmbeddingSharder[EmbeddingCollection]):
    """Shards EmbeddingCollections. Counterpart: torchrec.distributed.embedding.EmbeddingCollectionSharder."""

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry)
        self._use_index_dedup = use_index_dedup

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        return ShardedEmbeddingCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            self.qcomm_codecs_registry,
            self._use_index_dedup,
            module_fqn,
        )

    def shardable_parameters(self, module: EmbeddingCollection) -> dict[str, nn.Parameter]:
        """Table name to weight."""
        return {name: table.weight for name, table in module.embeddings.items()}

    @property
    def module_type(self) -> type[EmbeddingCollection]:
        return EmbeddingCollection
