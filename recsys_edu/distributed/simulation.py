"""W ranks in one process: run a phase on every simulated rank, look at anything, run the next.

>>> modules = simulate(collection, plan, world_size=2)                     # doctest: +SKIP
>>> answers = forward_all(modules, batches)                                # doctest: +SKIP
>>> torch.stack([answer.values().sum() for answer in answers]).sum().backward()   # one backward for all ranks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from recsys_edu.distributed.exchange import LocalExchange, SimulatedWorld
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.types import ParameterSharding, ShardingEnv
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


def simulate(
    module: nn.Module,
    plan: Mapping[str, ParameterSharding],
    world_size: int,
    shard: Callable[..., nn.Module] | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> list[nn.Module]:
    """The sharded module of every rank of a simulated world, each with its own shards.

    Args:
        module: an EmbeddingBagCollection or EmbeddingCollection.
        plan: ParameterSharding per table.
        world_size: number of simulated ranks.
        shard: the sharded class; default: the one for the module's type.
    """
    world = SimulatedWorld(world_size)
    return [shard_one(module, plan, world.exchange(rank), device, shard, **kwargs) for rank in range(world_size)]


def shard_one(
    module: nn.Module,
    plan: Mapping[str, ParameterSharding],
    exchange: LocalExchange,
    device: torch.device | None = None,
    shard: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The sharded module of the one rank whose end of a simulated world `exchange` is; arguments as in `simulate`."""
    shard = shard or _sharded_class(module)
    env = ShardingEnv.from_local(exchange.world_size, exchange.rank)
    return shard(module, plan, env, device=device, exchange=exchange, **kwargs)


def fly_all(modules: Sequence[nn.Module], batches: Sequence[KeyedJaggedTensor]) -> list[Flight]:
    """All phases but the last on every rank, phase by phase."""
    flights = [module.start_input(batch) for module, batch in zip(modules, batches)]
    for phase in ("exchange_input", "lookup", "sum_hosts"):
        for module, flight in zip(modules, flights):
            if hasattr(module, phase):
                getattr(module, phase)(flight)
    return flights


def forward_all(modules: Sequence[nn.Module], batches: Sequence[KeyedJaggedTensor]) -> list[Any]:
    """The finished answer of every rank to its own batch."""
    flights = fly_all(modules, batches)
    return [module(flight).wait() for module, flight in zip(modules, flights)]


def _sharded_class(module: nn.Module) -> Callable[..., nn.Module]:
    from recsys_edu.distributed.embedding import ShardedEmbeddingCollection
    from recsys_edu.distributed.embeddingbag import ShardedEmbeddingBagCollection

    pooled = hasattr(module, "embedding_bag_configs")
    return ShardedEmbeddingBagCollection if pooled else ShardedEmbeddingCollection
