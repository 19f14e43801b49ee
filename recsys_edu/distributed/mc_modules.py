"""ShardedManagedCollisionCollection: every rank manages the ids of its own rows.

    rank 0  ids 7 90 7     --ids-->      rank 0 manages rows 0 to 4 of `film`      --rows-->   0 8 0
    rank 1  ids 90 3                     rank 1 manages rows 5 to 9                            8 1

An id has a home row, a pure function of the id: its place among the ids below `input_hash_size`, or its bucket. The
rank that holds this row in the plan manages the id, with an unsharded module for its stretch of rows, which sees the
ids of all ranks in rank order. So every stretch behaves as an unsharded module of its own would, and its rows are on
the same rank as the embeddings that they number. Row numbers go back to whoever asked, and the sharded lookup behind
goes its usual way with them.

That costs three exchanges: sizes, ids, rows. Managing ids inside the lookup's own exchange would save the last one and
tie this to the engine; 8 bytes per id there and back are little beside an embedding.

Suffixes: N ids of this rank, M ids that arrived, W ranks, F features.

Counterpart: torchrec.distributed.mc_modules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder
from recsys_edu.distributed.exchange import Exchange, GroupExchange, Transfer, check_same_on_every_rank
from recsys_edu.distributed.sharding.tiling import Shard, shards_from, validate
from recsys_edu.distributed.shards import load_tiles
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor
from recsys_edu.distributed.types import (
    ParameterSharding,
    QuantizedCommCodecs,
    ShardedModule,
    ShardingEnv,
    ShardingType,
)
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig
from recsys_edu.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule, with_rows
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


@dataclass
class IdFlight:
    """One batch of raw ids in progress: what this rank asked for, and what others asked of it."""

    features: dict[str, JaggedTensor]
    order_N: Tensor
    """Where each id that is sent stands among the ids of all features."""
    sent_WF: Tensor
    problem: ValueError | None
    sizes: Transfer
    received_WF: list[list[int]] = field(default_factory=list)
    ids: Transfer | None = None
    rows: Transfer | None = None


class ManagedRows(nn.Module):
    """The stretches of one table's rows whose ids this rank manages: an unsharded module for each.

    Its state dict has the buffers of the unsharded module, those with an entry per row as TiledTensors of the whole
    table. The parts are no submodules: DDP would make them equal on all ranks.
    """

    def __init__(
        self, module: ManagedCollisionModule, shards: Sequence[Shard], rank: int, device: torch.device
    ) -> None:
        super().__init__()
        cuts = sorted({shard.rows.start for shard in shards} | {module.output_size()})
        by_row = sorted(shards, key=lambda shard: shard.rows.start)
        self._places = [place for place, shard in enumerate(by_row) if shard.rank == rank]  # of the parts, among all
        mine = [by_row[place].rows for place in self._places]
        self.starts = [rows.start for rows in mine]
        self.parts = [module.rebuild_with_output_id_range((rows.start, rows.stop), cuts, device) for rows in mine]
        self._template = (without_buffers(module),)
        self._cuts = torch.tensor(cuts[1:], device=device)
        self._rank_of_part = torch.tensor([shard.rank for shard in by_row], device=device)
        self._kinds = {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}

    @property
    def template(self) -> ManagedCollisionModule:
        """The unsharded module without its memory: it answers what depends on an id alone."""
        return self._template[0]

    def train(self, mode: bool = True) -> ManagedRows:
        super().train(mode)
        for part in self.parts:
            part.train(mode)
        return self

    def rank_of(self, ids_N: Tensor) -> Tensor:
        """Which rank manages each id."""
        return self._rank_of_part[self._part_of(ids_N)]

    def _part_of(self, ids_N: Tensor) -> Tensor:
        """Which of all ranks' parts manages each id, counted by rows."""
        return torch.searchsorted(self._cuts, self.template.home_rows(ids_N), right=True)

    def remap(self, ids_of_feature: Mapping[str, Tensor]) -> list[Tensor]:
        """The row of every id, feature by feature; -1 for one that the module drops."""
        rows = [torch.full_like(ids, -1) for ids in ids_of_feature.values()]
        part_of = [self._part_of(ids) for ids in ids_of_feature.values()]
        for place, part in zip(self._places, self.parts):
            part.check_cuts()
            mine = [part_N == place for part_N in part_of]
            jagged = {
                name: JaggedTensor(ids[here], lengths=here.sum().reshape(1))
                for (name, ids), here in zip(ids_of_feature.items(), mine)
            }
            remapped = part.remap(part.profile(jagged), mutate_miss_lengths=False)
            for row_N, here, jt in zip(rows, mine, remapped.values()):
                row_N[here] = jt.values()
        return rows

    def evict(self) -> Tensor | None:
        given = [rows for part in self.parts if (rows := part.evict()) is not None]
        return torch.cat(given) if given else None

    def open_slots(self) -> Tensor:
        return sum(
            (part.open_slots() for part in self.parts), torch.zeros(1, dtype=torch.int64, device=self._cuts.device)
        )

    def tiled(self, name: str) -> TiledTensor:
        """One buffer of the whole table as this rank knows it."""
        shape, dtype = self._kinds[name]
        per_row = shape[:1] == (self.template.output_size(),)
        held = list(zip(self.starts, self.parts))
        tiles = [
            Tile((start if per_row else 0, *[0] * (len(shape) - 1)), part.state_dict(keep_vars=True)[name])
            for start, part in (held if per_row else held[:1])  # what is no list of rows is the same everywhere
        ]
        return TiledTensor(shape, tiles, dtype, self._cuts.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: self.tiled(name) for name in self._kinds})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        targets = {name: self.tiled(name) for name in self._kinds}
        load_tiles(targets, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        try:
            for part in self.parts:
                part.validate_state()
        except ValueError as error:
            error_msgs.append(f"{prefix}: {error}")


class ShardedManagedCollisionCollection(nn.Module):
    """A ManagedCollisionCollection whose ids are managed by the ranks that hold their rows.

    `forward` gives this rank's features with row numbers of the whole tables. `evict` and `open_slots` speak of this
    rank's rows.

    Args:
        module: its ids are taken over where the kind of module can be divided (by hashing), or when it has none yet.
        table_name_to_parameter_sharding: the plan of the tables; every row has to be whole on one rank.
        embedding_shardings, qcomm_codecs_registry, use_index_dedup: for TorchRec's callers; not needed (None, []).
        exchange: this rank's end of the exchange; default: through the env's process group.

    Raises:
        ValueError: a plan that cuts columns or replicates; cuts that the module cannot follow; on every rank alike from
            `forward` when a rank has an id that its module cannot take.

    Counterpart: torchrec.distributed.mc_modules.ShardedManagedCollisionCollection.
    """

    def __init__(
        self,
        module: ManagedCollisionCollection,
        table_name_to_parameter_sharding: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        embedding_shardings: Any,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self._embedding_configs = module.embedding_configs()
        self._exchange = exchange or GroupExchange(env.process_group)
        plan = table_name_to_parameter_sharding
        shards = {
            config.name: whole_row_shards(config, plan[config.name], self._exchange.world_size)
            for config in self._embedding_configs
        }
        check_same_on_every_rank(self._exchange, shards, "tables or plan of managed collision")
        self._device = device
        self._managed_collision_modules = nn.ModuleDict(
            {
                name: ManagedRows(module._managed_collision_modules[name], cut, self._exchange.rank, self._device)
                for name, cut in shards.items()
            }
        )
        self._table_of = {feature: c.name for c in self._embedding_configs for feature in c.feature_names}
        self.train(module.training)

    def forward(self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True) -> KeyedJaggedTensor:
        flight = self.start_input(features)
        self.exchange_input(flight)
        self.remap(flight)
        return self.finish(flight, mutate_miss_lengths)

    @torch.no_grad()
    def start_input(self, features: KeyedJaggedTensor) -> IdFlight:
        """Phase 1: find the rank of every id and tell every rank how many are coming."""
        missing = [name for name in self._table_of if name not in features.keys()]
        if missing:
            raise KeyError(f"the input has no features {missing}; it has {features.keys()}")
        prepared: dict[str, JaggedTensor] = {}
        problem = None
        for config in self._embedding_configs:
            managed = self._managed_collision_modules[config.name].template
            mine = managed.preprocess({name: features[name] for name in config.feature_names})
            try:
                for jt in mine.values():
                    managed.check_ids(jt.values().long())
            except ValueError as error:  # told to all ranks with the sizes, so that none waits for this one's ids
                problem = ValueError(f"table {config.name!r}: {error}")
            prepared.update(mine)
        ranks_of_F = [
            self._managed_collision_modules[self._table_of[name]].rank_of(jt.values().long())
            for name, jt in prepared.items()
        ]
        world_size, num_features = self._exchange.world_size, len(prepared)
        feature_N = torch.cat([torch.full_like(ranks, f) for f, ranks in enumerate(ranks_of_F)])
        piece_N = torch.cat(ranks_of_F) * num_features + feature_N
        order_N = piece_N.argsort(stable=True)
        sent_WF = piece_N.bincount(minlength=world_size * num_features).view(world_size, num_features)
        if problem is not None:
            order_N, sent_WF = order_N[:0], torch.zeros_like(sent_WF)
        flags_W1 = torch.full((world_size, 1), int(problem is not None), device=sent_WF.device)
        counts_W = [num_features + 1] * world_size
        sizes = self._exchange.start(
            torch.cat([flags_W1, sent_WF], 1).flatten(), counts_W, counts_W, "sizes of raw ids"
        )
        return IdFlight(prepared, order_N, sent_WF, problem, sizes)

    @torch.no_grad()
    def exchange_input(self, flight: IdFlight) -> None:
        """Phase 2: send the ids to the ranks that manage them."""
        received = flight.sizes.wait().view(self._exchange.world_size, -1).tolist()  # host sync: sizes of the buffers
        if flight.problem is not None:
            raise flight.problem
        bad = [rank for rank, row in enumerate(received) if row[0]]
        if bad:
            raise ValueError(
                f"ranks {bad} have ids that managed collision cannot take: see their errors. No id was seen"
            )
        flight.received_WF = [row[1:] for row in received]
        ids_N = torch.cat([jt.values().long() for jt in flight.features.values()])[flight.order_N]
        send_W = flight.sent_WF.sum(1).tolist()  # host sync: all-to-all takes its split sizes from the host
        flight.ids = self._exchange.start(ids_N, send_W, [sum(row) for row in flight.received_WF], "raw ids")

    @torch.no_grad()
    def remap(self, flight: IdFlight) -> None:
        """Phase 3: note the ids of all ranks, give rows away, and start to send every rank the rows of its ids."""
        names, world_size = list(flight.features), self._exchange.world_size
        pieces = flight.ids.wait().split([n for row in flight.received_WF for n in row])
        ids_of = {name: torch.cat(pieces[f :: len(names)]) for f, name in enumerate(names)}
        rows_of: dict[str, list[Tensor]] = {}
        for config in self._embedding_configs:
            managed = self._managed_collision_modules[config.name]
            rows = managed.remap({name: ids_of[name] for name in config.feature_names})
            for name, rows_M in zip(config.feature_names, rows):
                rows_of[name] = rows_M.split([row[names.index(name)] for row in flight.received_WF])
        answer_M = torch.cat([rows_of[name][rank] for rank in range(world_size) for name in names])
        receive_W = flight.sent_WF.sum(1).tolist()  # host sync: as many rows come back as ids went out
        flight.rows = self._exchange.start(
            answer_M, [sum(row) for row in flight.received_WF], receive_W, "managed rows"
        )

    @torch.no_grad()
    def finish(self, flight: IdFlight, mutate_miss_lengths: bool = True) -> KeyedJaggedTensor:
        """Phase 4: put the rows in the places of their ids."""
        arrived_N = flight.rows.wait()
        rows_N = torch.empty_like(arrived_N)
        rows_N[flight.order_N] = arrived_N
        return KeyedJaggedTensor.from_jt_dict(with_rows(flight.features, rows_N, drop=mutate_miss_lengths))

    def embedding_configs(self) -> Sequence[BaseEmbeddingConfig]:
        """The configs as given."""
        return self._embedding_configs

    def evict(self) -> dict[str, Tensor | None]:
        """By table: rows of this rank with a new owner since the last call, numbered as in the whole table."""
        return {name: managed.evict() for name, managed in self._managed_collision_modules.items()}

    def open_slots(self) -> dict[str, Tensor]:
        """By table: rows of this rank that no id owns."""
        return {name: managed.open_slots() for name, managed in self._managed_collision_modules.items()}


ShardedModule.register(ShardedManagedCollisionCollection)


def whole_row_shards(config: BaseEmbeddingConfig, sharding: ParameterSharding, world_size: int) -> list[Shard]:
    """The shards of a table whose every row is whole on one rank, or a ValueError that says why they are not."""
    shards = shards_from(config.name, sharding, config.num_embeddings, config.embedding_dim)
    shards = [shard for shard in shards if not shard.is_empty]
    if not shards or any(shard.num_columns < config.embedding_dim for shard in shards):
        raise ValueError(
            f"table {config.name!r} is planned as {sharding.sharding_type!r}: ids are managed where their rows are, so "
            "every row has to be whole on one rank. Plan it row_wise, table_wise or table_row_wise"
        )
    validate(shards, config.num_embeddings, config.embedding_dim, world_size, config.name)
    return shards


def without_buffers(module: ManagedCollisionModule) -> ManagedCollisionModule:
    """The module with its settings alone."""
    twin = copy.copy(module)
    twin._buffers = dict.fromkeys(module._buffers)
    return twin


class ManagedCollisionCollectionSharder(BaseEmbeddingSharder[ManagedCollisionCollection]):
    """Shards the managing of ids alone; the sharders of embedding modules that take raw ids use it.

    Counterpart: torchrec.distributed.mc_modules.ManagedCollisionCollectionSharder.
    """

    def __init__(self, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)

    def shard(
        self,
        module: ManagedCollisionCollection,
        params: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        embedding_shardings: Any,
        device: torch.device | None = None,
        use_index_dedup: bool = False,
    ) -> ShardedManagedCollisionCollection:
        return ShardedManagedCollisionCollection(
            module,
            params,
            env,
            device or torch.device("cpu"),
            embedding_shardings,
            self.qcomm_codecs_registry,
            use_index_dedup,
        )

    def shardable_parameters(self, module: ManagedCollisionCollection) -> dict[str, nn.Parameter]:
        """None: the tables are those of the embedding module."""
        return {}

    @property
    def module_type(self) -> type[ManagedCollisionCollection]:
        return ManagedCollisionCollection

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value, ShardingType.TABLE_ROW_WISE.value]
