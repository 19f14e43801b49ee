"""ShardedQuantEmbeddingCollection: quantised sequence lookups over the devices of one process.

Counterpart: torchrec.distributed.quant_embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import BaseQuantEmbeddingSharder
from recsys_edu.distributed.flight import Flight, LaneLookup
from recsys_edu.distributed.quant_shards import (
    HOME,
    QuantizedShards,
    devices_of_world,
    in_stored_ids,
    named_tables,
    quantized_layout,
    stored_sizes,
)
from recsys_edu.distributed.sequence_assembly import SequenceAssembly, StartSequence, WaitSequence
from recsys_edu.distributed.types import ParameterSharding, ShardedModule, ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingConfig
from recsys_edu.modules.embedding_modules import in_lane_order, split_sequences
from recsys_edu.quant.embedding_modules import EmbeddingCollection
from recsys_edu.quant.tables import array_remap, remappings_of, served_lanes
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class ShardedQuantEmbeddingCollection(nn.Module):
    """Sequence lookups in quantised tables on several devices; arguments and errors as in its pooled sister.

    Counterpart: torchrec.distributed.quant_embedding.ShardedQuantEmbeddingCollection.
    """

    def __init__(
        self,
        module: EmbeddingCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        super().__init__()
        configs, remappings = module.embedding_configs(), module.index_remappings
        self._configs, self._need_indices, self._output_dtype = configs, module.need_indices(), module.output_dtype()
        self._lanes = served_lanes(configs, list(remappings))
        layout = quantized_layout(
            configs,
            module.kernel.spec.tables,
            table_name_to_parameter_sharding,
            env.world_size,
            False,
            self._lanes,
            bool(remappings),
        )
        self._shards = QuantizedShards(layout, devices or devices_of_world(env.world_size, device))
        self._assembly = SequenceAssembly(layout)
        self.embeddings = named_tables(self._shards, configs, remappings, module.embeddings, module.device)
        self._anchor = torch.zeros(0)
        self._renew_remap()
        self.register_load_state_dict_post_hook(ShardedQuantEmbeddingCollection._renew_remap)

    def _renew_remap(self, incompatible_keys: object = None) -> None:
        del incompatible_keys
        self._remap = array_remap(self.embeddings, self._lanes, self._shards.devices[HOME])

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        flights = self._shards.fly(in_stored_ids(features, self._lanes, self._remap), self._start_answer)
        answers = [self._finish(end, flight) for end, flight in zip(self._shards.ends, flights)]
        rows_ND, in_order = answers[HOME].to(self._output_dtype), in_lane_order(features, self._lanes.features)
        return split_sequences(rows_ND, in_order, self._lanes.names, self._need_indices)

    def _start_answer(self, rank: int, end: LaneLookup, flight: Flight) -> None:
        flight.places = self._assembly.places(flight)
        rows = [answer.rows for answer in flight.results]
        anchor = self._anchor.to(end.device)
        flight.returned = (StartSequence.apply(anchor, flight, end.exchange, self._assembly, flight.results, *rows),)

    def _finish(self, end: LaneLookup, flight: Flight) -> Tensor:
        return WaitSequence.apply(*flight.land(), None, flight, end.exchange, self._assembly)

    def unsharded(self) -> EmbeddingCollection:
        """A quantised collection on the first device with all rows of all shards; it gives the same answers."""
        whole = EmbeddingCollection(
            list(self._configs),
            self._shards.devices[HOME],
            self._need_indices,
            self._output_dtype,
            index_remappings=remappings_of(self.embeddings),
        )
        for name, table in whole.embeddings.items():
            table.fill(self.embeddings[name].weight)
        return whole

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def need_indices(self) -> bool:
        return self._need_indices

    def output_dtype(self) -> torch.dtype:
        return self._output_dtype

    @property
    def shards(self) -> QuantizedShards:
        """What each device holds."""
        return self._shards


ShardedModule.register(ShardedQuantEmbeddingCollection)


class QuantEmbeddingCollectionSharder(BaseQuantEmbeddingSharder[EmbeddingCollection]):
    """Shards quantised sequence collections.

    Counterpart: torchrec.distributed.quant_embedding.QuantEmbeddingCollectionSharder.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedQuantEmbeddingCollection:
        return ShardedQuantEmbeddingCollection(module, params, env, self.fused_params, device)

    def shardable_parameters(self, module: EmbeddingCollection) -> dict[str, Tensor]:
        """Table name to a tensor of the table's size, without data."""
        return stored_sizes(module, self._shardable_params)

    @property
    def module_type(self) -> type[EmbeddingCollection]:
        return EmbeddingCollection
