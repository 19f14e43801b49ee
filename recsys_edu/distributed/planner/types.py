"""The planner's language: a sharding option, what the user may demand, what can go wrong, and the parts' interfaces.

    ParameterConstraints   what you allow for a table
    ShardingOption         one way to shard one table: a type, a kernel, and its shards with bytes and milliseconds
    PlannerError           nothing fits, or the demands contradict each other

Counterpart: torchrec.distributed.planner.types
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from recsys_edu.distributed.planner.topology import (
    BasicCommsBandwidths,
    CollectiveType,
    CustomTopologyData,
    DeviceHardware,
    GeneralizedCommsBandwidth,
    Perf,
    Storage,
    Topology,
)
from recsys_edu.distributed.planner.utils import sharder_name
from recsys_edu.distributed.types import CacheParams, KeyValueParams, ModuleSharder, ShardingPlan
from recsys_edu.types import DataType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "BasicCommsBandwidths",
    "CollectiveType",
    "CustomTopologyData",
    "DeviceHardware",
    "Enumerator",
    "GeneralizedCommsBandwidth",
    "ParameterConstraints",
    "PartitionByType",
    "Partitioner",
    "Perf",
    "PerfModel",
    "PlanDebugStats",
    "PlanLoader",
    "PlannerError",
    "PlannerErrorType",
    "Proposer",
    "Shard",
    "ShardEstimator",
    "SharderData",
    "ShardingOption",
    "Stats",
    "Storage",
    "StorageReservation",
    "StorageUsageType",
    "Topology",
    "sharder_data_of",
]


class PartitionByType(Enum):
    """How an option has to be placed: shards on any ranks, on the ranks of one host, on all ranks, on several hosts."""

    DEVICE = "device"
    HOST = "host"
    UNIFORM = "uniform"
    MULTI_HOST = "multi_host"


class PlannerErrorType(Enum):
    """Reason codes of `PlannerError`."""

    INSUFFICIENT_STORAGE = "insufficient_storage"
    STRICT_CONSTRAINTS = "strict_constraints"
    PARTITION = "partition"
    OTHER = "other"
    PLANNER_INPUT_CONTEXT_MISMATCH = "planner_input_context_mismatch"
    PLAN_LOADING_FAILED = "plan_loading_failed"
    INVALID_RANK_ASSIGNMENT = "invalid_rank_assignment"
    INPUT_VALIDATION = "input_validation"
    MISSING_MODULE_IN_PLAN = "missing_module_in_plan"
    INVALID_COMPUTE_KERNEL = "invalid_compute_kernel"


class PlannerError(Exception):
    """No plan, and why."""

    def __init__(self, message: str, error_type: PlannerErrorType = PlannerErrorType.OTHER) -> None:
        super().__init__(message)
        self.error_type = error_type


@dataclass
class ParameterConstraints:
    """What you allow or know about one table; None leaves it to the planner.

        constraints = {"user": ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[20.0])}

    Args:
        sharding_types, compute_kernels: the allowed ones, by their values ("table_wise", "fused").
        min_partition: width of column blocks (default 128).
        pooling_factors: ids per example, one number per feature (default 1.0).
        num_poolings: pooled lookups per example, per feature (default 1.0).
        batch_sizes: examples per rank, per feature (default: the planner's batch_size).
        is_weighted: accepted as in TorchRec, which reads it from the module.
        cache_params: of a table cached on the device (its `load_factor`, `stats`, `prefetch_pipeline`).
        enforce_hbm, stochastic_rounding, bounds_check_mode, key_value_params: handed on to the plan.
        feature_names: the features that the lists above are about (default: the table's, in config order).
        output_dtype: of the embeddings that come back; only their memory is counted in it.
        device_group: "cuda" or "cpu": leave the table out of plans for another device.
        ranks, hosts: only these may hold a part of the table (ours).
        forbidden_ranks, forbidden_hosts: these may not (ours).
        together: a name; all tables that carry it lie whole on one and the same rank (ours).

    Counterpart: torchrec.distributed.planner.types.ParameterConstraints
    """

    sharding_types: list[str] | None = None
    compute_kernels: list[str] | None = None
    min_partition: int | None = None
    pooling_factors: list[float] = field(default_factory=lambda: [1.0])
    num_poolings: list[float] | None = None
    batch_sizes: list[int] | None = None
    is_weighted: bool = False
    cache_params: CacheParams | None = None
    enforce_hbm: bool | None = None
    stochastic_rounding: bool | None = None
    bounds_check_mode: Any | None = None
    feature_names: list[str] | None = None
    output_dtype: DataType | None = None
    device_group: str | None = None
    key_value_params: KeyValueParams | None = None
    use_virtual_table: bool = False
    ranks: list[int] | None = None
    forbidden_ranks: list[int] | None = None
    hosts: list[int] | None = None
    forbidden_hosts: list[int] | None = None
    together: str | None = None


@dataclass
class Shard:
    """A rectangle of a table: `size` and `offset` as [rows, columns], what it costs, and the rank once it is placed."""

    size: list[int]
    offset: list[int]
    storage: Storage | None = None
    perf: Perf | None = None
    rank: int | None = None

    def __hash__(self) -> int:
        return hash((*self.size, *self.offset, self.storage, self.perf, self.rank))


class ShardingOption:
    """One way to shard one table: type, kernel, and shards with their bytes and milliseconds.

    Equal in all but the ranks means equal; a deep copy copies shards and shares tensor and module.

    Counterpart: torchrec.distributed.planner.types.ShardingOption
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        module: tuple[str, nn.Module],
        input_lengths: list[float],
        batch_size: int,
        sharding_type: str,
        partition_by: str,
        compute_kernel: str,
        shards: list[Shard],
        cache_params: CacheParams | None = None,
        enforce_hbm: bool | None = None,
        stochastic_rounding: bool | None = None,
        bounds_check_mode: Any | None = None,
        dependency: str | None = None,
        is_pooled: bool | None = None,
        feature_names: list[str] | None = None,
        output_dtype: DataType | None = None,
        key_value_params: KeyValueParams | None = None,
        num_poolings: list[float] | None = None,
    ) -> None:
        self.name = name
        self._tensor = tensor
        self._module = module
        self.input_lengths = input_lengths
        self.batch_size = batch_size
        self.sharding_type = sharding_type
        self.partition_by = partition_by
        self.compute_kernel = compute_kernel
        self.shards = shards
        self.cache_params = cache_params
        self.enforce_hbm = enforce_hbm
        self.stochastic_rounding = stochastic_rounding
        self.bounds_check_mode = bounds_check_mode
        self.dependency = dependency
        self._is_pooled = is_pooled
        self.is_weighted: bool | None = None
        self.feature_names = feature_names
        self.output_dtype = output_dtype
        self.key_value_params = key_value_params
        self.num_poolings = num_poolings

    @property
    def tensor(self) -> Tensor:
        return self._tensor

    @property
    def module(self) -> tuple[str, nn.Module]:
        """(path, module)."""
        return self._module

    @property
    def path(self) -> str:
        return self._module[0]

    @property
    def fqn(self) -> str:
        """`<module path>.<table>`."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def module_type_key(self) -> str:
        """By which name the module's sharder is found."""
        return sharder_name(type(self._module[1]))

    @property
    def is_pooled(self) -> bool:
        if self._is_pooled is None:
            self._is_pooled = self.module_pooled(self._module[1], self.name)
        return self._is_pooled

    @staticmethod
    def module_pooled(module: nn.Module, sharding_option_name: str) -> bool:
        """False for modules that return one embedding per id."""
        from recsys_edu.modules.embedding_modules import EmbeddingCollectionInterface

        inner = [module, *(child for child in module.children())]
        return not any(isinstance(child, EmbeddingCollectionInterface) for child in inner)

    @property
    def has_feature_processor(self) -> bool:
        return bool(getattr(self._module[1], "has_feature_processor", False))

    @property
    def total_storage(self) -> Storage:
        return sum((shard.storage for shard in self.shards if shard.storage is not None), Storage(0, 0))

    @property
    def total_perf(self) -> float:
        """Milliseconds, summed over shards."""
        return sum(shard.perf.total for shard in self.shards if shard.perf is not None)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def num_inputs(self) -> int:
        """Number of features."""
        return len(self.input_lengths)

    @property
    def cache_load_factor(self) -> float | None:
        return None if self.cache_params is None else self.cache_params.load_factor

    def get_shards_assignment(self) -> list[int | None]:
        """The rank of each shard."""
        return [shard.rank for shard in self.shards]

    def storage_hash(self) -> int:
        """The same number in every process for the same table, type, kernel and shard sizes."""
        facts = (self.fqn, self.sharding_type, self.compute_kernel, [(s.size, s.offset) for s in self.shards])
        return int(hashlib.sha256(repr(facts).encode()).hexdigest()[:15], 16)

    def __hash__(self) -> int:
        return hash((self.fqn, self.sharding_type, self.compute_kernel, tuple(self.shards), self.cache_load_factor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardingOption) and hash(self) == hash(other)

    def __deepcopy__(self, memo: dict[int, Any] | None) -> ShardingOption:
        twin = copy.copy(self)
        twin.shards = copy.deepcopy(self.shards, memo)
        return twin

    def __repr__(self) -> str:
        sizes = self.shards[0].size if self.shards else []
        return f"ShardingOption({self.fqn}, {self.sharding_type}, {self.compute_kernel}, {self.num_shards} x {sizes})"


class StorageUsageType(Enum):
    """Which family of sharders counts the storage."""

    BASE_QUANT = "BaseQuantEmbeddingSharder"
    BASE = "BaseEmbeddingSharder"
    DEFAULT = "ModuleSharder"


@dataclass
class SharderData:
    """What estimators need to know of a sharder; sizes in bytes per number, forward and backward."""

    fused_params: dict[str, Any]
    qcomm_dtype_sizes: dict[str, tuple[float, float]]
    storage_usage_type: StorageUsageType


def sharder_data_of(sharders: Iterable[ModuleSharder[Any]]) -> dict[str, SharderData]:
    """The `sharder_data_map` that estimators take: by the name of the module type."""
    return {
        sharder_name(s.module_type): SharderData(getattr(s, "fused_params", None) or {}, {}, StorageUsageType.BASE)
        for s in sharders
    }


@dataclass
class PlanDebugStats:
    """Further facts that a planner may hand to its `Stats`."""

    planner_type: str
    timeout_seconds: int | None


# ---------------------------------------------------------------- the parts of a planner


class StorageReservation(ABC):
    """Keeps memory back that is not for tables: the dense model, the batch, a margin."""

    @abstractmethod
    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """A topology with what is left."""

    @property
    @abstractmethod
    def last_reserved_topology(self) -> Topology | None: ...


class PerfModel(ABC):
    """The cost of a whole plan; smaller is better."""

    @abstractmethod
    def rate(self, plan: list[ShardingOption]) -> float: ...


class ShardEstimator(ABC):
    """Fills in the storage or the perf of every shard."""

    @abstractmethod
    def __init__(self, topology: Topology, constraints: dict[str, ParameterConstraints] | None = None) -> None: ...

    @abstractmethod
    def estimate(
        self,
        sharding_options: list[ShardingOption],
        sharder_data_map: dict[str, SharderData],
    ) -> None: ...


class Enumerator(ABC):
    """Lists every option of every table of a model."""

    @abstractmethod
    def __init__(
        self,
        topology: Topology,
        batch_size: int = 512,
        constraints: dict[str, ParameterConstraints] | None = None,
        estimator: ShardEstimator | list[ShardEstimator] | None = None,
    ) -> None: ...

    @abstractmethod
    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]: ...

    @abstractmethod
    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None: ...


class Proposer(ABC):
    """Proposes one option per table, hears how good that was, and proposes again; None when it has no more ideas."""

    @abstractmethod
    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None: ...

    @abstractmethod
    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None: ...

    @abstractmethod
    def propose(self) -> list[ShardingOption] | None: ...


class Partitioner(ABC):
    """Gives every shard a rank, or raises PlannerError."""

    @abstractmethod
    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]: ...


class Stats(ABC):
    """Tells people how planning went."""

    @abstractmethod
    def log(
        self,
        sharding_plan: ShardingPlan,
        topology: Topology,
        batch_size: int,
        storage_reservation: StorageReservation,
        num_proposals: int,
        num_plans: int,
        run_time: float,
        best_plan: list[ShardingOption],
        constraints: dict[str, ParameterConstraints] | None = None,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        enumerator: Enumerator | None = None,
        debug: bool = False,
        debug_stats: PlanDebugStats | None = None,
    ) -> None: ...


class PlanLoader(ABC):
    """Supplies a plan made earlier: options by storage hash, and the hash of the inputs it was made from."""

    @abstractmethod
    def load(self) -> Mapping[int, ShardingOption] | None: ...

    @abstractmethod
    def plan_context_hash(self) -> str | None: ...
