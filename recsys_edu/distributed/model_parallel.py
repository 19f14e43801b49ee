"""DistributedModelParallel: any model with its embedding collections sharded and the rest data-parallel.

    model                              DistributedModelParallel(model)
      sparse_arch                        sparse_arch
        embedding_bag_collection           ShardedEmbeddingBagCollection      each rank its shards
      dense_arch, over_arch              the same modules, under DDP          each rank a copy, gradients averaged

Counterpart: torchrec.distributed.model_parallel.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_edu.distributed.resharding import reshard_module
from recsys_edu.distributed.shard import default_env, default_plan, shard_modules
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.shards import TableShards
from recsys_edu.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingEnv, ShardingPlan
from recsys_edu.distributed.utils import append_prefix, init_parameters
from recsys_edu.optim.fused import FusedOptimizerModule
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizer

# torch renamed this argument of DDP on the way from 2.11 to 2.13.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"


class DataParallelWrapper(ABC):
    """How to make the unsharded part of a model data-parallel. Counterpart: torchrec's class of this name."""

    @abstractmethod
    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Replace `dmp._dmp_wrapped_module` by a data-parallel one."""


class DefaultDataParallelWrapper(DataParallelWrapper):
    """torch's DDP over everything that is not sharded; nothing where no such parameter or no process group is.

    Args: as DistributedDataParallel's; `params_to_ignore` adds names to those of the sharded tables.
    """

    def __init__(
        self,
        bucket_cap_mb: int = 25,
        static_graph: bool = True,
        find_unused_parameters: bool = False,
        allreduce_comm_precision: str | None = None,
        params_to_ignore: list[str] | None = None,
        ddp_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._precision = allreduce_comm_precision
        self._params_to_ignore = params_to_ignore or []
        self._ddp_kwargs = {
            "bucket_cap_mb": bucket_cap_mb,
            "static_graph": static_graph,
            "find_unused_parameters": find_unused_parameters,
            "gradient_as_bucket_view": True,
            _SYNC_BUFFERS: False,
        } | (ddp_kwargs or {})

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        module = dmp.module
        ignored = [*sharded_parameter_names(module), *self._params_to_ignore]
        trained = [name for name, p in module.named_parameters() if p.requires_grad and name not in set(ignored)]
        group = getattr(env, "global_pg", env.process_group)  # 2D parallelism: the dense part spans all ranks
        if group is None or not trained:
            return
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        device_ids = None if device.type == "cpu" else [device]
        ddp = DistributedDataParallel(module, device_ids=device_ids, process_group=group, **self._ddp_kwargs)
        if self._precision is not None:
            ddp.register_comm_hook(None, _compression_hook(self._precision))
        dmp._dmp_wrapped_module = ddp


class DistributedModelParallel(nn.Module, FusedOptimizerModule):
    """A model trained by all ranks together: tables sharded, everything else replicated under DDP.

    >>> model = DistributedModelParallel(DLRM(EmbeddingBagCollection(tables, device=torch.device("meta")), ...))
    ... # doctest: +SKIP

    Modules on the meta device get memory here, tables shard by shard, so that no process ever holds a whole one. A
    module that has weights keeps them, bit for bit. The gradients are those of one process with the joined batch (of
    ranks with equal batch sizes; with unequal ones each rank's mean counts the same, as in DDP). Names of parameters
    and of the state dict are the unsharded model's.

    Args:
        module: changed in place.
        env: default: the world process group, or one process.
        device: default: cpu.
        plan: default: made by the planner, the same on all ranks.
        sharders: default: for both embedding collections.
        init_data_parallel: wrap the dense part now; otherwise call `init_data_parallel()` before training.
        init_parameters: give meta modules memory and first values.
        data_parallel_wrapper: default: DDP.
        model_tracker_configs: not supported; a value is refused.

    Raises:
        ValueError: a plan that does not fit the model, or differs between ranks.

    Counterpart: torchrec.distributed.model_parallel.DistributedModelParallel.
    """

    def __init__(
        self,
        module: nn.Module,
        env: ShardingEnv | None = None,
        device: torch.device | None = None,
        plan: ShardingPlan | None = None,
        sharders: list[ModuleSharder[Any]] | None = None,
        init_data_parallel: bool = True,
        init_parameters: bool = True,
        data_parallel_wrapper: DataParallelWrapper | None = None,
        model_tracker_configs: Any | None = None,
    ) -> None:
        super().__init__()
        if model_tracker_configs is not None:
            raise NotImplementedError("model_tracker_configs: tracking which rows changed is not part of recsys_edu")
        self._env = env or default_env()
        self._device = device or torch.device("cpu")
        sharders = sharders or get_default_sharders()
        self._plan = plan or default_plan(module, self._env, self._device, sharders)
        self._wrapper = data_parallel_wrapper or DefaultDataParallelWrapper()
        self._initialised = init_parameters
        self._dmp_wrapped_module = shard_modules(
            module, self._env, self._device, self._plan, sharders, init_params=init_parameters
        )
        self._fused_optimizer = _combined_optimizer(self._dmp_wrapped_module)
        if init_data_parallel:
            self.init_data_parallel()

    @property
    def module(self) -> nn.Module:
        """The model itself, without DDP around it."""
        return get_unwrapped_module(self._dmp_wrapped_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._dmp_wrapped_module(*args, **kwargs)

    def init_data_parallel(self) -> None:
        """Wrap the dense part in DDP, once; dense weights of rank 0 go to all."""
        if isinstance(self._dmp_wrapped_module, DistributedDataParallel):
            return
        if not self._initialised:
            init_parameters(self._dmp_wrapped_module, self._device)
            self._initialised = True
        self._wrapper.wrap(self, self._env, self._device)

    @property
    def plan(self) -> ShardingPlan:
        """The plan in use."""
        return self._plan

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """The optimizers of all sharded tables; they act in backward, `step` only hands over learning rates."""
        return self._fused_optimizer

    def state_dict(  # type: ignore[override]
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The unsharded model's keys; sharded tables are TiledTensors."""
        return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Tensor], prefix: str = "", strict: bool = True
    ) -> Any:
        """Load whole tensors or tiles cut as this rank's; every rank reads its part.

        Raises:
            RuntimeError: missing or unexpected keys (strict), other sizes, tiles cut otherwise.
        """
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        return self.module.load_state_dict(own, strict=strict)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names as in the unsharded model; of a sharded table this rank's shard."""
        yield from self.module.named_parameters(prefix, recurse, remove_duplicate)

    def bare_named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Without the tables that train in backward."""
        trained = {append_prefix(prefix, name) for name in sharded_parameter_names(self.module, fused_only=True)}
        for name, parameter in self.named_parameters(prefix, recurse):
            if name not in trained:
                yield name, parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_buffers(prefix, recurse, remove_duplicate)

    def reshard(
        self,
        changed_shard_to_params: Mapping[str, tuple[float, EmbeddingModuleShardingPlan]],
        sharded_module_fqn: str | None = None,
    ) -> float:
        """Give sharded modules other plans while training; weights and optimizer state move with one all-to-all each.

        Args:
            changed_shard_to_params: path to (expected cost, new plan); with `sharded_module_fqn` only that path.

        Returns:
            The sum of the costs given. Optimizers made from `fused_optimizer` before have to be made again.
        """
        total = 0.0
        for path, (cost, plan) in changed_shard_to_params.items():
            if sharded_module_fqn is None or path == sharded_module_fqn:
                self._replace(path, reshard_module(self.module.get_submodule(path), plan))
                self._plan.plan[path] = plan
                total += cost
        self._fused_optimizer = _combined_optimizer(self.module)
        return total

    def _replace(self, path: str, module: nn.Module) -> None:
        if not path:
            self._dmp_wrapped_module = module
            return
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, module)

    def sparse_grad_parameter_names(self, destination: list[str] | None = None, prefix: str = "") -> list[str]:
        """Names of parameters with sparse gradients: none, tables train in backward or have dense ones."""
        return destination if destination is not None else []


def get_unwrapped_module(module: nn.Module) -> nn.Module:
    """The model inside DDP and DistributedModelParallel."""
    while isinstance(module, (DistributedDataParallel, DistributedModelParallel)):
        module = module.module
    return module


def get_module(module: nn.Module) -> nn.Module:
    """As `get_unwrapped_module`."""
    return get_unwrapped_module(module)


def sharded_parameter_names(module: nn.Module, fused_only: bool = False) -> list[str]:
    """Paths of this rank's shards."""
    return [
        append_prefix(path, name)
        for path, child in module.named_modules()
        if isinstance(child, TableShards) and (child.table.optimizer is not None or not fused_only)
        for name, _ in child.named_parameters()
    ]


def _combined_optimizer(module: nn.Module) -> CombinedOptimizer:
    return CombinedOptimizer(
        [
            (path, child.fused_optimizer)
            for path, child in module.named_modules()
            if any(isinstance(table, TableShards) for tables in child.children() for table in tables.children())
            and hasattr(child, "fused_optimizer")
        ]
    )


def _compression_hook(precision: str) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    if precision not in hooks:
        raise ValueError(f"allreduce_comm_precision {precision!r}: expected one of {sorted(hooks)}")
    return hooks[precision]


def __getattr__(name: str) -> Any:
    if name == "DMPCollection":  # TorchRec has it in this module; it builds on this one, so it is loaded when asked for
        from recsys_edu.distributed.collection_2d import DMPCollection

        return DMPCollection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
