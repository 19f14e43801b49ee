"""Sharding as functions: replace one module, or every module a sharder knows, by its sharded form.

Counterpart: torchrec.distributed.shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.sharding_plan import (
    construct_module_sharding_plan,
    default_compute_kernel,
    default_sharder_for,
    get_default_sharders,
)
from recsys_edu.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ModuleShardingPlan,
    ShardingEnv,
    ShardingPlan,
)
from recsys_edu.distributed.utils import append_prefix, init_parameters
from recsys_edu.kernels.backend import fbgemm_status


def shard(
    module: nn.Module,
    plan: ModuleShardingPlan | dict[str, Callable[..., Any]] | Callable[..., Any],
    env: ShardingEnv | None = None,
    device: torch.device | None = None,
    sharder: ModuleSharder[Any] | None = None,
) -> nn.Module:
    """The sharded form of one module.

    >>> shard(collection, row_wise())                                        # doctest: +SKIP
    >>> shard(collection, {"user": row_wise(), "item": table_wise(rank=0)})  # doctest: +SKIP

    Args:
        module: an EmbeddingBagCollection, an EmbeddingCollection, or what `sharder` knows.
        plan: a module plan; or what `recsys_edu.distributed.sharding_plan` makes, per table or one for all.
        env: default: the world group, or a single process without one.
        device: default: cpu.

    Raises:
        ValueError: no sharder knows the module; a plan that does not fit its tables.
    """
    env, device = env or default_env(), device or torch.device("cpu")
    sharder = sharder or default_sharder_for(module)
    if not isinstance(plan, ModuleShardingPlan):
        tables = sharder.shardable_parameters(module)
        generators = plan if isinstance(plan, dict) else dict.fromkeys(tables, plan)
        plan = construct_module_sharding_plan(
            module, generators, sharder, get_local_size(env.world_size), env.world_size, device.type
        )
    return sharder.shard(module, plan, env, device)


def shard_modules(
    module: nn.Module,
    env: ShardingEnv | None = None,
    device: torch.device | None = None,
    plan: ShardingPlan | None = None,
    sharders: list[ModuleSharder[Any]] | None = None,
    init_params: bool = False,
) -> nn.Module:
    """Replace every submodule that a sharder knows and the plan names; the root itself may be one.

    Args:
        module: changed in place (unless it is itself sharded); returned.
        plan: paths to module plans; default: what the planner makes.
        init_params: materialise and initialise what is left on meta.
    """
    env, device = env or default_env(), device or torch.device("cpu")
    sharders = sharders or get_default_sharders()
    plan = plan or default_plan(module, env, device, sharders)
    if hasattr(plan, "check_world"):  # a planner's plan knows what it was made for
        plan.check_world(env.world_size, get_local_size(env.world_size), device.type)
    known = {sharder.module_type: sharder for sharder in sharders}
    _check_paths(module, plan, known)
    sharded = _shard_tree(module, "", env, device, plan, known)
    if init_params:
        init_parameters(sharded, device)
    return sharded


def default_env() -> ShardingEnv:
    """The world group where one is initialised, a single process otherwise."""
    if dist.is_available() and dist.is_initialized():
        return ShardingEnv.from_process_group(dist.group.WORLD)
    return ShardingEnv.from_local(1, 0)


def default_plan(
    module: nn.Module, env: ShardingEnv, device: torch.device, sharders: Iterable[ModuleSharder[Any]]
) -> ShardingPlan:
    """What the planner makes of the model for this world: the same on every rank, without asking anyone.

    Tables train as their parameters say: inside backward where an optimizer is attached, else with a gradient.
    """
    from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from recsys_edu.distributed.planner.workload import shardable_modules

    known = {sharder.module_type: sharder for sharder in sharders}
    if not any(type(child) in known for child in module.modules()):
        return ShardingPlan({})
    topology = Topology(env.world_size, device.type, local_world_size=get_local_size(env.world_size))
    constraints = {}
    for path in shardable_modules(module, list(known.values())):
        child = module.get_submodule(path)
        for name, parameter in known[type(child)].shardable_parameters(child).items():
            kernels = _kernels_here(default_compute_kernel(parameter, known[type(child)]), device)
            constraints[name] = ParameterConstraints(compute_kernels=kernels)
    return EmbeddingShardingPlanner(topology, constraints=constraints).plan(module, list(known.values()))


def _kernels_here(kernel: str, device: torch.device) -> list[str]:
    """The kernels to choose from for a table that trains by `kernel`: host memory only where it can be read.

    A dense one is always among them: that of data-parallel tables.
    """
    fused, dense = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value
    can_read_host = kernel == fused and device.type == "cuda" and fbgemm_status().available
    on_host = [EmbeddingComputeKernel.FUSED_UVM_CACHING.value, EmbeddingComputeKernel.FUSED_UVM.value]
    return [kernel, *(on_host if can_read_host else []), *([dense] if kernel != dense else [])]


def _check_paths(module: nn.Module, plan: ShardingPlan, known: dict[type, ModuleSharder[Any]]) -> None:
    modules = dict(module.named_modules())
    for path in plan.plan:
        if path not in modules:
            shardable = [name for name, child in modules.items() if type(child) in known]
            raise ValueError(f"the plan names {path!r}, which is no module of the model; it can shard {shardable}")
        if type(modules[path]) not in known:
            raise ValueError(
                f"the plan names {path!r}, a {type(modules[path]).__name__}, which no given sharder shards"
            )


def _shard_tree(
    module: nn.Module,
    path: str,
    env: ShardingEnv,
    device: torch.device,
    plan: ShardingPlan,
    known: dict[type, ModuleSharder[Any]],
) -> nn.Module:
    module_plan = plan.get_plan_for_module(path)
    if module_plan is not None:
        return known[type(module)].shard(module, EmbeddingModuleShardingPlan(module_plan), env, device, path)
    for name, child in list(module.named_children()):
        replacement = _shard_tree(child, append_prefix(path, name), env, device, plan, known)
        if replacement is not child:
            setattr(module, name, replacement)
    return module
