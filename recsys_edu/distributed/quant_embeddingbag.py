"""ShardedQuantEmbeddingBagCollection: a quantised collection cut over the devices of one process.

Counterpart: torchrec.distributed.quant_embeddingbag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import BaseQuantEmbeddingSharder
from recsys_edu.distributed.flight import Flight, LaneLookup
from recsys_edu.distributed.pooled_assembly import PooledAssembly, StartPooled, WaitPooled
from recsys_edu.distributed.quant_shards import (
    HOME,
    QuantizedShards,
    devices_of_world,
    in_stored_ids,
    named_tables,
    quantized_layout,
    stored_sizes,
)
from recsys_edu.distributed.types import ParameterSharding, ShardedModule, ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import expand_batches, in_lane_order
from recsys_edu.quant.embedding_modules import EmbeddingBagCollection
from recsys_edu.quant.tables import array_remap, remappings_of, served_lanes
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class ShardedQuantEmbeddingBagCollection(nn.Module):
    """Pooled lookups in quantised tables on several devices; answers equal the unsharded collection's.

    Batches come and answers go on the first device. The state dict is the unsharded collection's, whatever the plan, so
    rows saved under one plan load under any other.

    Args:
        module: the quantised collection; on meta: its rows come from `load_state_dict`.
        table_name_to_parameter_sharding: the plan, table by table.
        env: `ShardingEnv.from_local(world_size, 0)`: ranks are devices of this process.
        fused_params: accepted for TorchRec's callers; there is nothing to train.
        device: cpu or cuda; with cuda rank r is on cuda:r.
        devices: one per rank, in place of `device`.

    Raises:
        ValueError: the plan does not tile every table exactly.
        KeyError, IndexError: (forward) a missing feature, an id outside its table.

    Counterpart: torchrec.distributed.quant_embeddingbag.ShardedQuantEmbeddingBagCollection.
    """

    def __init__(
        self,
        module: EmbeddingBagCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        super().__init__()
        configs, remappings = module.embedding_bag_configs(), module.index_remappings
        self._configs, self._is_weighted, self._output_dtype = configs, module.is_weighted(), module.output_dtype()
        self._lanes = served_lanes(configs, list(remappings))
        layout = quantized_layout(
            configs,
            module.kernel.spec.tables,
            table_name_to_parameter_sharding,
            env.world_size,
            True,
            self._lanes,
            bool(remappings),
        )
        self._shards = QuantizedShards(layout, devices or devices_of_world(env.world_size, device), self._is_weighted)
        self._assembly = PooledAssembly(layout)
        self.embedding_bags = named_tables(self._shards, configs, remappings, module.embedding_bags, module.device)
        self._anchor = torch.zeros(0)
        self._renew_remap()
        self.register_load_state_dict_post_hook(ShardedQuantEmbeddingBagCollection._renew_remap)

    def _renew_remap(self, incompatible_keys: object = None) -> None:
        del incompatible_keys
        self._remap = array_remap(self.embedding_bags, self._lanes, self._shards.devices[HOME])

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        flights = self._shards.fly(in_stored_ids(features, self._lanes, self._remap), self._start_answer)
        # Rank 0's answer is the batch's; the others take their empty ones out of the mailboxes.
        answers = [self._finish(end, flight) for end, flight in zip(self._shards.ends, flights)]
        answer_BD, lanes = answers[HOME], self._lanes
        if features.variable_stride_per_key():
            answer_BD = expand_batches(answer_BD, in_lane_order(features, lanes.features), lanes)
        return KeyedTensor(list(lanes.names), list(lanes.dims), answer_BD.to(self._output_dtype))

    def _start_answer(self, rank: int, end: LaneLookup, flight: Flight) -> None:
        blocks = [answer.rows for answer in flight.results]
        pooled = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        flight.returned = (StartPooled.apply(pooled, self._anchor, flight, end.exchange, self._assembly),)

    def _finish(self, end: LaneLookup, flight: Flight) -> Tensor:
        return WaitPooled.apply(None, flight, end.exchange, self._assembly, None, *flight.land())

    def unsharded(self) -> EmbeddingBagCollection:
        """A quantised collection on the first device with all rows of all shards; it gives the same answers."""
        whole = EmbeddingBagCollection(
            list(self._configs),
            self._is_weighted,
            self._shards.devices[HOME],
            self._output_dtype,
            index_remappings=remappings_of(self.embedding_bags),
        )
        for name, table in whole.embedding_bags.items():
            table.fill(self.embedding_bags[name].weight)
        return whole

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        return self._output_dtype

    @property
    def shards(self) -> QuantizedShards:
        """What each device holds."""
        return self._shards


ShardedModule.register(ShardedQuantEmbeddingBagCollection)


class QuantEmbeddingBagCollectionSharder(BaseQuantEmbeddingSharder[EmbeddingBagCollection]):
    """Shards quantised collections.

    Counterpart: torchrec.distributed.quant_embeddingbag.QuantEmbeddingBagCollectionSharder.
    """

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedQuantEmbeddingBagCollection:
        return ShardedQuantEmbeddingBagCollection(module, params, env, self.fused_params, device)

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, Tensor]:
        """Table name to a tensor of the table's size, without data, for plans."""
        return stored_sizes(module, self._shardable_params)

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        return EmbeddingBagCollection
