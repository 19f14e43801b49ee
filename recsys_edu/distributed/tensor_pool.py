"""ShardedTensorPool: the rows of a TensorPool over ranks.

Counterpart: torchrec.distributed.tensor_pool.
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
from recsys_edu.modules.object_pool import ObjectPool, last_of_each
from recsys_edu.modules.tensor_pool import TensorPool, check_rows


class ShardedTensorPool(ObjectPool[LazyAwaitable[Tensor]]):
    """Every rank holds a block of the rows, asks the others for theirs, and all look up and update together.

    Of a slot that several ranks update at once the highest rank's row stays.

    Raises:
        IndexError: on every rank alike, where any rank names a slot that is none.
        ValueError: (update) values of another shape or dtype.

    Counterpart: torchrec.distributed.tensor_pool.ShardedTensorPool.
    """

    def __init__(
        self,
        env: ShardingEnv,
        pool_size: int,
        dim: int,
        dtype: torch.dtype,
        sharding_plan: ObjectPoolShardingPlan,
        device: torch.device | None = None,
        enable_uvm: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self._exchange = exchange or pool_exchange(env)
        self._blocks = slot_blocks(pool_size, sharding_plan, env)
        self._pool_size = pool_size
        self._mine = self._blocks.of_rank(env.rank)
        self._rows = torch.zeros(len(self._mine), dim, dtype=dtype, device=device)

    @property
    def pool_size(self) -> int:
        return self._pool_size

    @property
    def dim(self) -> int:
        return self._rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def lookup(self, ids: Tensor) -> LazyAwaitable[Tensor]:
        questions = ask(self._exchange, ids, self._blocks, all_copies=False)
        return LazyNoWait(questions.answer(self._rows[questions.slots_M], "rows of the pool"))

    @torch.no_grad()
    def update(self, ids: Tensor, values: Tensor) -> None:
        check_rows(values, len(ids), self.dim, self.dtype)
        questions = ask(self._exchange, ids, self._blocks, all_copies=True)
        values_M = questions.send_along(values, "new rows of the pool")
        last = last_of_each(questions.slots_M)
        self._rows[questions.slots_M[last]] = values_M[last]

    def tiled(self) -> TiledTensor:
        """The whole pool as this rank knows it."""
        return TiledTensor((self._pool_size, self.dim), [Tile((self._mine.start, 0), self._rows)])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}_pool"] = self.tiled()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        load_tiles({"_pool": self.tiled()}, state_dict, prefix, *rest)


ShardedModule.register(ShardedTensorPool)


class TensorPoolSharder(ModuleSharder[TensorPool]):
    """Shards TensorPools; the rows are taken over. Counterpart: torchrec.distributed.tensor_pool.TensorPoolSharder."""

    def __init__(self) -> None:
        super().__init__()

    def shard(
        self,
        module: TensorPool,
        plan: ObjectPoolShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedTensorPool:
        sharded = ShardedTensorPool(env, module.pool_size, module.dim, module.dtype, plan, device)
        sharded.load_state_dict(module.state_dict())
        return sharded

    @property
    def module_type(self) -> type[TensorPool]:
        return TensorPool
