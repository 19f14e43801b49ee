"""The public language of distribution: enums, handles of results to come, plans, environments, sharders.

Names and meaning are TorchRec's (Counterpart: torchrec.distributed.types). A plan reads from the outside in:

    ShardingPlan                    {"sparse.ebc": ...}             one entry per sharded module
      EmbeddingModuleShardingPlan   {"user": ..., "item": ...}      one entry per table
        ParameterSharding           sharding type, kernel, and the rectangles with their ranks

`recsys_edu.distributed.sharding.tiling` turns the rectangles into `Shard`s, which is all the engine reads.
"""

from __future__ import annotations

import functools
import html
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardingSpec

from recsys_edu.distributed.awaitable import (
    Awaitable,
    GetItemLazyAwaitable,
    LazyAwaitable,
    LazyGetItemMixin,
    LazyNoWait,
    NoWait,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from recsys_edu.types import DataType

W = TypeVar("W")
M = TypeVar("M", bound=nn.Module)


# ---------------------------------------------------------------- enums


@unique
class ShardingType(Enum):
    """The named ways to cut a table; `recsys_edu.distributed.sharding` has one file for each."""

    DATA_PARALLEL = "data_parallel"
    TABLE_WISE = "table_wise"
    COLUMN_WISE = "column_wise"
    ROW_WISE = "row_wise"
    TABLE_ROW_WISE = "table_row_wise"
    TABLE_COLUMN_WISE = "table_column_wise"
    GRID_SHARD = "grid_shard"


@unique
class PipelineType(Enum):
    """Which training pipeline a storage estimate is for: each keeps another number of batches in flight."""

    NONE = "none"
    TRAIN_BASE = "train_base"
    TRAIN_SPARSE_DIST = "train_sparse_dist"
    TRAIN_PREFETCH_SPARSE_DIST = "train_prefetch_sparse_dist"


@unique
class ParameterStorage(Enum):
    """Kinds of memory: on the accelerator (`HBM`) or on the host (`DDR`)."""

    HBM = "hbm"
    DDR = "ddr"


@unique
class ComputeKernel(Enum):
    """The kernel of a module that has only one; embeddings use `embedding_types.EmbeddingComputeKernel`."""

    DEFAULT = "default"


@unique
class CommOp(Enum):
    """The exchanges a quantised-communication codec may be registered for."""

    POOLED_EMBEDDINGS_ALL_TO_ALL = "pooled_embeddings_all_to_all"
    POOLED_EMBEDDINGS_REDUCE_SCATTER = "pooled_embeddings_reduce_scatter"
    SEQUENCE_EMBEDDINGS_ALL_TO_ALL = "sequence_embeddings_all_to_all"


@unique
class ShardingStrategy(Enum):
    """How 2D parallelism splits memory between the replicas of a sharding group."""

    DEFAULT = "default"
    PER_MODULE = "per_module"
    FULLY_SHARDED = "fully_sharded"


# ---------------------------------------------------------------- lower-precision communication


class QuantizedCommCodec:
    """Encodes a tensor before an exchange and decodes it after: fewer bytes for some precision.

    Subclass it, or use `NoOpQuantizedCommCodec` where nothing should change.

    Counterpart: torchrec.distributed.types.QuantizedCommCodec
    """

    def encode(self, input_tensor: Tensor, ctx: Any | None = None) -> Tensor:
        raise NotImplementedError

    def decode(self, input_grad: Tensor, ctx: Any | None = None) -> Tensor:
        raise NotImplementedError

    @property
    def quantized_dtype(self) -> torch.dtype:
        """dtype of what travels."""
        raise NotImplementedError

    def calc_quantized_size(self, input_len: int, ctx: Any | None = None) -> int:
        """Number of `quantized_dtype` elements that `input_len` elements become."""
        raise NotImplementedError

    def create_context(self) -> Any | None:
        """Anything `encode` wants to hand to `decode`, made once per exchange."""
        return None

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: Any
    ) -> tuple[int, int]:
        """(padded row width for this rank, total padding); no padding unless a codec works in blocks."""
        del qcomm_ctx
        return dim_per_rank[my_rank] if input_tensor.ndim == 1 else input_tensor.shape[1], 0


class NoOpQuantizedCommCodec(QuantizedCommCodec):
    """Sends tensors as they are."""

    def encode(self, input_tensor: Tensor, ctx: Any | None = None) -> Tensor:
        return input_tensor

    def decode(self, input_grad: Tensor, ctx: Any | None = None) -> Tensor:
        return input_grad

    @property
    def quantized_dtype(self) -> torch.dtype:
        return torch.float32

    def calc_quantized_size(self, input_len: int, ctx: Any | None = None) -> int:
        return input_len


@dataclass
class QuantizedCommCodecs:
    """A codec for the forward exchange and one for its gradient."""

    forward: QuantizedCommCodec = field(default_factory=NoOpQuantizedCommCodec)
    backward: QuantizedCommCodec = field(default_factory=NoOpQuantizedCommCodec)


# ---------------------------------------------------------------- plans


@dataclass
class CacheParams:
    """How a table larger than the device's memory is cached there; units: a fraction, GiB, a dtype."""

    algorithm: Any | None = None
    load_factor: float | None = None
    reserved_memory: float | None = None
    precision: DataType | None = None
    prefetch_pipeline: bool | None = None
    stats: Any | None = None
    multipass_prefetch_config: Any | None = None


@dataclass
class KeyValueParams:
    """Where a table that lives on disk or on a parameter server keeps its rows, and how many of them memory holds.

    Fields and their order are TorchRec's, so that its plans can be written down here; no kernel here reads them.

    Counterpart: torchrec.distributed.types.KeyValueParams
    """

    ssd_storage_directory: str | None = None
    ssd_rocksdb_write_buffer_size: int | None = None
    ssd_rocksdb_shards: int | None = None
    gather_ssd_cache_stats: bool | None = None
    stats_reporter_config: Any | None = None
    use_passed_in_path: bool = True
    l2_cache_size: int | None = None
    max_l1_cache_size: int | None = None
    enable_async_update: bool | None = None
    bulk_init_chunk_size: int | None = None
    lazy_bulk_init_enabled: bool | None = None
    enable_raw_embedding_streaming: bool | None = None
    res_store_shards: int | None = None
    kvzch_tbe_config: Any | None = None
    load_ckpt_without_opt: bool = False
    ps_hosts: tuple[tuple[str, int], ...] | None = None
    ps_client_thread_num: int | None = None
    ps_max_key_per_request: int | None = None
    ps_max_local_index_length: int | None = None


@dataclass
class ParameterSharding:
    """How one table is sharded: a name for people, a kernel, and a `sharding_spec` for the engine.

    `sharding_spec` is an EnumerableShardingSpec with one ShardMetadata per shard: offsets `[row, column]`,
    sizes `[rows, columns]`, placement `"rank:1/cpu"` or `"rank:1/cuda:1"`. It is None for data_parallel.

    Counterpart: torchrec.distributed.types.ParameterSharding
    """

    sharding_type: str
    compute_kernel: str
    ranks: list[int] | None = None
    sharding_spec: ShardingSpec | None = None
    cache_params: CacheParams | None = None
    enforce_hbm: bool | None = None
    stochastic_rounding: bool | None = None
    bounds_check_mode: Any | None = None
    output_dtype: DataType | None = None
    key_value_params: KeyValueParams | None = None


class ModuleShardingPlan:
    """The plan of one module; `EmbeddingModuleShardingPlan` is the one embeddings use."""


class EmbeddingModuleShardingPlan(ModuleShardingPlan, dict[str, ParameterSharding]):
    """A dict from table name to `ParameterSharding`; `str()` prints it as two tables, Jupyter shows it as one.

        param | sharding type | compute kernel | ranks
        ----- | ------------- | -------------- | ------
        user  | row_wise      | fused          | [0, 1]

    Counterpart: torchrec.distributed.types.EmbeddingModuleShardingPlan
    """

    def __str__(self) -> str:
        summary = [[name, p.sharding_type, p.compute_kernel, str(p.ranks)] for name, p in self.items()]
        pieces = [[name, *cells] for name, p in self.items() for cells in _shard_cells(p)]
        summary_text = text_table(["param", "sharding type", "compute kernel", "ranks"], summary)
        return f"{summary_text}\n\n{text_table(['param', 'shard offsets', 'shard sizes', 'placement'], pieces)}"

    def _repr_html_(self) -> str:
        heads = ["table", "sharding type", "compute kernel", "rows", "columns", "placement"]
        body = []
        for name, sharding in self.items():
            spec = sharding.sharding_spec
            if spec is None:
                ranks = f"a copy on each of ranks {sharding.ranks}" if sharding.ranks else "a copy on every rank"
                body.append([name, sharding.sharding_type, sharding.compute_kernel, "all", "all", ranks])
            for metadata in getattr(spec, "shards", []):
                spans = [f"{o}:{o + s}" for o, s in zip(metadata.shard_offsets, metadata.shard_sizes)]
                place = str(metadata.placement)
                body.append([name, sharding.sharding_type, sharding.compute_kernel, *spans, place])
        head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
        rows = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in body)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _shard_cells(sharding: ParameterSharding) -> list[list[str]]:
    shards = getattr(sharding.sharding_spec, "shards", [])
    return [[str(s.shard_offsets), str(s.shard_sizes), str(s.placement)] for s in shards]


def text_table(heads: list[str], rows: list[list[str]]) -> str:
    """Rows under their heads, columns aligned.

    >>> print(text_table(["table", "rows"], [["user", "10"]]))
    table | rows
    ----- | ----
    user  | 10
    """
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


@dataclass
class ShardingPlan:
    """The whole model's plan: `plan` maps a module's path to its module plan.

    Counterpart: torchrec.distributed.types.ShardingPlan
    """

    plan: dict[str, ModuleShardingPlan]

    def get_plan_for_module(self, module_path: str) -> ModuleShardingPlan | None:
        return self.plan.get(module_path)

    def __str__(self) -> str:
        return "\n\n".join(f"module: {path}\n\n{module_plan}" for path, module_plan in self.plan.items())

    def _repr_html_(self) -> str:
        parts = []
        for path, module_plan in self.plan.items():
            shown = getattr(module_plan, "_repr_html_", lambda m=module_plan: f"<pre>{html.escape(str(m))}</pre>")
            parts.append(f"<p>module: <code>{html.escape(path) or '(the model itself)'}</code></p>{shown()}")
        return "".join(parts)


@unique
class ObjectPoolShardingType(Enum):
    """Where the slots of a pool are: in blocks over all ranks, or over the ranks of each host, with a copy per host."""

    ROW_WISE = "row_wise"
    REPLICATED_ROW_WISE = "replicated_row_wise"


@dataclass
class ObjectPoolShardingPlan:
    """The plan of a pool. `memory_capacity_per_rank` divides the slots in these proportions (default: equally).

    Counterpart: torchrec.distributed.types.ObjectPoolShardingPlan
    """

    sharding_type: ObjectPoolShardingType
    inference: bool = False
    memory_capacity_per_rank: list[int] | None = None


# ---------------------------------------------------------------- environment


class ShardingEnv:
    """World size, this rank, and the process group that shards talk over (None: no group, as in a simulated world).

    Counterpart: torchrec.distributed.types.ShardingEnv
    """

    def __init__(
        self, world_size: int, rank: int, pg: dist.ProcessGroup | None = None, output_dtensor: bool = False
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of the ranks 0 to {world_size - 1} (world_size={world_size})")
        self.world_size = world_size
        self.rank = rank
        self.process_group = pg
        self.output_dtensor = output_dtensor

    @classmethod
    def from_process_group(cls, pg: dist.ProcessGroup) -> ShardingEnv:
        return cls(dist.get_world_size(pg), dist.get_rank(pg), pg)

    @classmethod
    def from_local(cls, world_size: int, rank: int) -> ShardingEnv:
        return cls(world_size, rank, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardingEnv:
        return self  # ranks and groups are what they are, and nothing changes them

    def __repr__(self) -> str:
        group = "no process group" if self.process_group is None else "a process group"
        return f"{type(self).__name__}(world_size={self.world_size}, rank={self.rank}, {group})"


class ShardingEnv2D(ShardingEnv):
    """Sharding inside `sharding_pg`, copies of it across `replica_pg`.

        8 ranks, sharding groups of 4:    group 0: ranks 0 2 4 6     replicas: (0, 1) (2, 3) (4, 5) (6, 7)
                                          group 1: ranks 1 3 5 7

    `world_size` is that of the sharding group, `rank` this process's rank in it.
    """

    def __init__(
        self,
        sharding_pg: dist.ProcessGroup,
        replica_pg: dist.ProcessGroup,
        global_pg: dist.ProcessGroup,
        device_mesh: DeviceMesh,
        node_group_size: int | None = None,
        use_inter_host_allreduce: bool = False,
        sharding_strategy: ShardingStrategy = ShardingStrategy.DEFAULT,
    ) -> None:
        super().__init__(dist.get_world_size(sharding_pg), dist.get_rank(sharding_pg), sharding_pg)
        self.sharding_pg = sharding_pg
        self.replica_pg = replica_pg
        self.global_pg = global_pg
        self.device_mesh = device_mesh
        self.node_group_size = node_group_size
        self.use_inter_host_allreduce = use_inter_host_allreduce
        self.sharding_strategy = sharding_strategy

    def num_sharding_groups(self) -> int:
        """How many copies of the sharded tables exist."""
        return dist.get_world_size(self.global_pg) // dist.get_world_size(self.sharding_pg)


# ---------------------------------------------------------------- modules and sharders


class ShardedModule(nn.Module, ABC):
    """What a sharded module can do: `forward` is four phases, so that a pipeline may interleave batches.

        create_context -> input_dist -> compute -> output_dist

    Subclass it for a module of your own; a class that has the methods already may be registered instead
    (`ShardedModule.register(MyModule)`), which makes `isinstance` true and inherits nothing.

    Counterpart: torchrec.distributed.types.ShardedModule
    """

    def __init__(self, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None) -> None:
        super().__init__()
        self._qcomm_codecs_registry = qcomm_codecs_registry or {}

    @property
    def qcomm_codecs_registry(self) -> dict[str, QuantizedCommCodecs]:
        return self._qcomm_codecs_registry

    @abstractmethod
    def create_context(self) -> Any:
        """Room for what this batch's phases have to tell one another."""

    @abstractmethod
    def input_dist(self, ctx: Any, *input: Any, **kwargs: Any) -> Awaitable[Awaitable[Any]]:
        """Start sending ids to the ranks that own them; the first wait gives the sizes, the second the ids."""

    @abstractmethod
    def compute(self, ctx: Any, dist_input: Any) -> Any:
        """Look up the local shards."""

    @abstractmethod
    def output_dist(self, ctx: Any, output: Any) -> LazyAwaitable[Any]:
        """Start sending embeddings back."""

    def compute_and_output_dist(self, ctx: Any, input: Any) -> LazyAwaitable[Any]:
        return self.output_dist(ctx, self.compute(ctx, input))

    def forward(self, *input: Any, **kwargs: Any) -> LazyAwaitable[Any]:
        ctx = self.create_context()
        return self.compute_and_output_dist(ctx, self.input_dist(ctx, *input, **kwargs).wait().wait())


class ModuleSharder(Generic[M]):
    """Knows one module type: its shardable parameters, the allowed types and kernels, and how to shard it.

    A subclass gives `shard` and `module_type`; the rest has defaults that suit a module without embeddings.

    Counterpart: torchrec.distributed.types.ModuleSharder
    """

    def __init__(self, qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None) -> None:
        self._qcomm_codecs_registry = qcomm_codecs_registry

    def shard(
        self,
        module: M,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} does not say how to shard a {type(module).__name__}")

    @property
    def module_type(self) -> type[M]:
        raise NotImplementedError(f"{type(self).__name__} does not say which module type it shards")

    @property
    def qcomm_codecs_registry(self) -> dict[str, QuantizedCommCodecs] | None:
        return self._qcomm_codecs_registry

    def shardable_parameters(self, module: M) -> dict[str, nn.Parameter]:
        """The parameters a plan may name, by the name it uses."""
        return dict(module.named_parameters())

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.DATA_PARALLEL.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [ComputeKernel.DEFAULT.value]

    def storage_usage(self, tensor: Tensor, compute_device_type: str, compute_kernel: str) -> dict[str, int]:
        """Bytes per kind of memory, `{"ddr": 640}` on the CPU."""
        kind = ParameterStorage.HBM if compute_device_type == "cuda" else ParameterStorage.DDR
        return {kind.value: get_tensor_size_bytes(tensor)}


class ShardingPlanner(ABC):
    """Makes a `ShardingPlan` for a model; `collective_plan` makes the same one on every rank of a group."""

    @abstractmethod
    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        """The plan, from this process's knowledge alone."""

    @abstractmethod
    def collective_plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        """Rank 0 plans and tells the others."""


# ---------------------------------------------------------------- small helpers


def rank_device(device_type: str, rank: int) -> torch.device:
    """The device of a rank: `cpu`, or `cuda:<rank modulo the devices of this host>`."""
    if device_type == "cpu":
        return torch.device("cpu")
    num_devices = max(1, torch.cuda.device_count())
    return torch.device(device_type, rank % num_devices)


def get_tensor_size_bytes(t: Tensor) -> int:
    """Bytes of the tensor's elements."""
    return t.element_size() * t.numel()


def scope(method: Callable[..., W]) -> Callable[..., W]:
    """Make a method show up in torch.profiler under its own name, `ShardedEmbeddingBagCollection.lookup`."""

    @functools.wraps(method)
    def named(*args: Any, **kwargs: Any) -> W:
        with torch.profiler.record_function(method.__qualname__):
            return method(*args, **kwargs)

    return named


__all__ = [
    "Awaitable",
    "CacheParams",
    "CommOp",
    "ComputeKernel",
    "EmbeddingModuleShardingPlan",
    "EnumerableShardingSpec",
    "GetItemLazyAwaitable",
    "KeyValueParams",
    "LazyAwaitable",
    "LazyGetItemMixin",
    "LazyNoWait",
    "ModuleSharder",
    "ModuleShardingPlan",
    "NoOpQuantizedCommCodec",
    "NoWait",
    "ParameterSharding",
    "ParameterStorage",
    "PipelineType",
    "QuantizedCommCodec",
    "QuantizedCommCodecs",
    "ShardMetadata",
    "ShardedModule",
    "ShardedTensor",
    "ShardingEnv",
    "ShardingEnv2D",
    "ShardingPlan",
    "ShardingPlanner",
    "ShardingSpec",
    "ShardingStrategy",
    "ShardingType",
    "get_tensor_size_bytes",
    "rank_device",
    "scope",
]
