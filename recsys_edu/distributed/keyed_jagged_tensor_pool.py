"""ShardedKeyedJaggedTensorPool: the slots of a KeyedJaggedTensorPool over ranks.

Lengths travel first, then values (and weights) without padding.

Counterpart: torchrec.distributed.keyed_jagged_tensor_pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recsys_edu.distributed.awaitable import LazyAwaitable, LazyNoWait
from recsys_edu.distributed.exchange import Exchange
from recsys_edu.distributed.object_pool import ask, pool_exchange, slot_blocks
from recsys_edu.distributed.shards import load_tiles
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor
from recsys_edu.distributed.types import ModuleSharder, ObjectPoolShardingPlan, ShardedModule, ShardingEnv
from recsys_edu.modules.keyed_jagged_tensor_pool import (
    KeyedJaggedTensorPool,
    by_feature,
    by_slot,
    fitting,
    padded,
)
from recsys_edu.modules.object_pool import ObjectPool, last_of_each
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class ShardedKeyedJaggedTensorPool(ObjectPool[LazyAwaitable[KeyedJaggedTensor]]):
    """Every rank holds a block of the slots, asks the others for theirs, and all look up and update together.

    Of a slot that several ranks update at once the highest rank's bags stay.

    Raises: as KeyedJaggedTensorPool; IndexError on every rank alike, where any rank names a slot that is none.

    Counterpart: torchrec.distributed.keyed_jagged_tensor_pool.ShardedKeyedJaggedTensorPool.
    """

    def __init__(
        self,
        pool_size: int,
        feature_max_lengths: dict[str, int],
        values_dtype: torch.dtype,
        is_weighted: bool,
        sharding_env: ShardingEnv,
        sharding_plan: ObjectPoolShardingPlan,
        device: torch.device | None = None,
        enable_uvm: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self._exchange = exchange or pool_exchange(sharding_env)
        self._blocks = slot_blocks(pool_size, sharding_plan, sharding_env)
        self._pool_size = pool_size
        self._mine = self._blocks.of_rank(sharding_env.rank)
        # An unsharded pool of this rank's slots; no submodule: its buffers are tiles of the whole pool's.
        self._local = (KeyedJaggedTensorPool(len(self._mine), feature_max_lengths, values_dtype, is_weighted, device),)

    @property
    def local(self) -> KeyedJaggedTensorPool:
        """This rank's slots."""
        return self._local[0]

    @property
    def pool_size(self) -> int:
        return self._pool_size

    @property
    def feature_max_lengths(self) -> dict[str, int]:
        return self.local.feature_max_lengths

    @property
    def values_dtype(self) -> torch.dtype:
        return self.local.values_dtype

    @property
    def is_weighted(self) -> bool:
        return self.local.is_weighted

    @property
    def device(self) -> torch.device:
        return self.local.values.device

    def lookup(self, ids: Tensor) -> LazyAwaitable[KeyedJaggedTensor]:
        questions = ask(self._exchange, ids, self._blocks, all_copies=False)
        lengths_MF, values, weights = by_slot(self.local.lookup(questions.slots_M))
        lengths_NF = questions.answer(lengths_MF, "lengths of the pool")
        lengths = (lengths_MF.sum(1), lengths_NF.sum(1))
        values = questions.answer_bags(values, *lengths, "values of the pool")
        if weights is not None:
            weights = questions.answer_bags(weights, *lengths, "weights of the pool")
        return LazyNoWait(by_feature(list(self.feature_max_lengths), lengths_NF, values, weights))

    @torch.no_grad()
    def update(self, ids: Tensor, values: KeyedJaggedTensor) -> None:
        local = self.local
        values = fitting(values, len(ids), local.feature_max_lengths, local.is_weighted, local.values_dtype)
        lengths_NF, values_V, weights_V = by_slot(values)
        questions = ask(self._exchange, ids, self._blocks, all_copies=True)
        lengths_MF = questions.send_along(lengths_NF.to(local.key_lengths.dtype), "new lengths of the pool")
        lengths = (lengths_NF.sum(1), lengths_MF.sum(1))
        last, width = last_of_each(questions.slots_M), local.values.shape[1]
        slots = questions.slots_M[last]
        values_V = questions.send_bags_along(values_V, *lengths, "new values of the pool")
        local.key_lengths[slots] = lengths_MF[last]
        local.values[slots] = padded(lengths_MF, values_V, width)[last]
        if weights_V is not None and local.is_weighted:
            weights_V = questions.send_bags_along(weights_V.float(), *lengths, "new weights of the pool")
            local.weights[slots] = padded(lengths_MF, weights_V, width)[last]

    def tiled(self) -> dict[str, TiledTensor]:
        """The buffers of the whole pool as this rank knows them."""
        first, size = self._mine.start, self._pool_size
        return {
            name: TiledTensor((size, buffer.shape[1]), [Tile((first, 0), buffer)])
            for name, buffer in self.local.named_buffers()
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: whole for name, whole in self.tiled().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        load_tiles(self.tiled(), state_dict, prefix, *rest)


ShardedModule.register(ShardedKeyedJaggedTensorPool)


class KeyedJaggedTensorPoolSharder(ModuleSharder[KeyedJaggedTensorPool]):
    """Shards KeyedJaggedTensorPools; the slots' bags are taken over.

    Counterpart: torchrec.distributed.keyed_jagged_tensor_pool.KeyedJaggedTensorPoolSharder.
    """

    def __init__(self) -> None:
        super().__init__()

    def shard(
        self,
        module: KeyedJaggedTensorPool,
        plan: ObjectPoolShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedKeyedJaggedTensorPool:
        sharded = ShardedKeyedJaggedTensorPool(
            module.pool_size,
            module.feature_max_lengths,
            module.values_dtype,
            module.is_weighted,
            env,
            plan,
            device,
        )
        sharded.load_state_dict(module.state_dict())
        return sharded

    @property
    def module_type(self) -> type[KeyedJaggedTensorPool]:
        return KeyedJaggedTensorPool
