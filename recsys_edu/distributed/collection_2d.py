"""2D parallelism: tables sharded inside groups of ranks, and a copy of them in every group.

    8 ranks, sharding_group_size 4       group 0: ranks 0 2 4 6     each group holds all tables, cut by one plan
                                         group 1: ranks 1 3 5 7
                                         replicas: (0, 1) (2, 3) (4, 5) (6, 7) hold the same shards

Inside a group a step is an ordinary sharded step, so its exchanges span 4 ranks and not 8. The copies drift apart, each
trained by its group's batches; every few steps `sync()` averages them over the replicas. The dense part stays under
DDP over all ranks.

Counterpart: torchrec.distributed.model_parallel.DMPCollection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from recsys_edu.distributed.exchange import average, copy_from_first
from recsys_edu.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from recsys_edu.distributed.shards import TableShards
from recsys_edu.distributed.types import ModuleSharder, ShardingEnv2D, ShardingPlan, ShardingStrategy


class DMPCollection(DistributedModelParallel):
    """DistributedModelParallel in replicated groups.

    >>> model = DMPCollection(model, device, plan, world_size=8, sharding_group_size=4, global_pg=dist.group.WORLD)
    >>> for step, batch in enumerate(batches):                                     # doctest: +SKIP
    ...     train_one(model, batch)
    ...     if step % 16 == 15:
    ...         model.sync()

    Args:
        module, device, sharders, init_data_parallel, init_parameters, data_parallel_wrapper: as
            DistributedModelParallel's.
        plan: for the ranks 0 to sharding_group_size - 1 of a group; all groups use it.
        world_size: of all ranks; a multiple of `sharding_group_size`.
        global_pg: the group of all ranks.
        custom_all_reduce: averages a list of tensors over the replicas in place of the built-in way.

    Raises:
        ValueError: world_size is not the size of global_pg, or no multiple of sharding_group_size.
        NotImplementedError: options of TorchRec that are about hardware topologies not built here.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        plan: ShardingPlan,
        world_size: int,
        sharding_group_size: int,
        global_pg: dist.ProcessGroup,
        sharding_strategy: ShardingStrategy = ShardingStrategy.DEFAULT,
        node_group_size: int | None = None,
        sharders: list[ModuleSharder[Any]] | None = None,
        init_data_parallel: bool = True,
        init_parameters: bool = True,
        data_parallel_wrapper: DataParallelWrapper | None = None,
        use_inter_host_allreduce: bool = False,
        custom_all_reduce: Callable[[list[Tensor]], None] | None = None,
        submodule_configs: list[Any] | None = None,
        rs_awaitable_hook_module: str | None = None,
        use_sharded_relay: bool = False,
    ) -> None:
        _refuse_unbuilt(
            sharding_strategy=sharding_strategy is not ShardingStrategy.DEFAULT,
            use_inter_host_allreduce=use_inter_host_allreduce,
            submodule_configs=bool(submodule_configs),
            rs_awaitable_hook_module=rs_awaitable_hook_module is not None,
            use_sharded_relay=use_sharded_relay,
        )
        if world_size != dist.get_world_size(global_pg) or world_size % sharding_group_size:
            raise ValueError(
                f"world_size={world_size}, sharding_group_size={sharding_group_size}: expected the size of global_pg "
                f"({dist.get_world_size(global_pg)}) and a divisor of it"
            )
        env = _make_groups(world_size, sharding_group_size, global_pg, device, node_group_size)
        super().__init__(
            module,
            env,
            device,
            plan,
            sharders,
            init_data_parallel,
            init_parameters,
            data_parallel_wrapper,
        )
        self._average = custom_all_reduce or (lambda tensors: average(tensors, env.replica_pg))
        copy_from_first(self._shard_tensors(include_optimizer_state=True), env.replica_pg)

    @torch.no_grad()
    def sync(self, include_optimizer_state: bool = True) -> None:
        """Average the shards, and the optimizer state with them, over the replicas; called by all ranks."""
        self._average(self._shard_tensors(include_optimizer_state))

    def set_all_reduce_hook(self, reduce_hook: Callable[[list[Tensor]], None]) -> None:
        """Average by `reduce_hook(tensors)`, in place, from now on."""
        self._average = reduce_hook

    @property
    def device_mesh(self) -> DeviceMesh:
        """Dimensions "replicate" (groups) and "shard" (ranks of a group)."""
        return self._env.device_mesh

    def _shard_tensors(self, include_optimizer_state: bool) -> list[Tensor]:
        """This rank's shards and, if asked for, their floating-point state, in an order equal on all replicas."""
        tensors = []
        for module in self.module.modules():
            if not isinstance(module, TableShards):
                continue
            for shard in module.local:
                tensors.append(shard.weight.detach())
                if include_optimizer_state:
                    tensors += [state for state in shard.state.values() if state.is_floating_point()]
        return tensors


def _make_groups(
    world_size: int, group_size: int, global_pg: dist.ProcessGroup, device: torch.device, node_group_size: int | None
) -> ShardingEnv2D:
    num_groups, me = world_size // group_size, dist.get_rank(global_pg)
    sharding = [list(range(group, world_size, num_groups)) for group in range(num_groups)]
    replicas = [list(range(first, first + num_groups)) for first in range(0, world_size, num_groups)]
    # Every rank has to take part in making every group, its own or not.
    sharding_groups = [dist.new_group(ranks) for ranks in sharding]
    replica_groups = [dist.new_group(ranks) for ranks in replicas]
    mesh = DeviceMesh(device.type, torch.tensor(sharding), mesh_dim_names=("replicate", "shard"))
    return ShardingEnv2D(
        sharding_groups[me % num_groups], replica_groups[me // num_groups], global_pg, mesh, node_group_size
    )


def _refuse_unbuilt(**asked_for: bool) -> None:
    for name, is_set in asked_for.items():
        if is_set:
            raise NotImplementedError(f"DMPCollection({name}=...) is not built in recsys_edu; leave it at its default")
