"""What a kernel is asked to do, as data: the tables, the lanes that read them, the optimizer.

A *kernel* is the local lookup over one process's lanes. A *lane* is one (feature, table) pair: the ids that one
feature brings to one table. Everything else in this package either describes kernels (this file) or is one.

    tables       t0: 4 rows x 8        t1: 3 rows x 4
    lane_tables  (0, 0, 1)             lanes 0 and 1 read t0, lane 2 reads t1
    pooled       [B, 8 + 8 + 4]        one block of columns per lane, bags summed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from recsys_edu.types import DataType

OPTIMIZER_KINDS = ("SGD", "ADAGRAD", "ROWWISE_ADAGRAD", "ADAM", "PARTIAL_ROWWISE_ADAM", "LAMB", "LARS_SGD")


class TableMemory(Enum):
    """Where a fused kernel keeps its weights: where it computes, or, for a GPU, with the host, cached or not."""

    DEVICE = "device"
    HOST = "host"
    HOST_CACHED = "host, cached on the device"


@dataclass(frozen=True)
class TableSpec:
    """One table (or one shard of one): `num_rows` x `dim`. `name` appears in error messages."""

    name: str
    num_rows: int
    dim: int

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.dim < 1:
            raise ValueError(
                f"table {self.name!r}: expected num_rows >= 0 and dim >= 1, got {self.num_rows} x {self.dim}"
            )


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer that runs inside backward, on the rows a batch touched.

    `kind` is one of `OPTIMIZER_KINDS`; `optimizers.py` holds each one's formula. Fields that a kind does not use are
    ignored. `weight_decay` is an L2 penalty for SGD, ADAGRAD, ROWWISE_ADAGRAD and LARS_SGD, and decoupled (as in
    AdamW) for ADAM, PARTIAL_ROWWISE_ADAM and LAMB; it acts on touched rows only.

    Raises:
        ValueError: an unknown kind, or a hyperparameter outside its range.
    """

    kind: str
    learning_rate: float = 0.01
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    momentum: float = 0.9  # LARS_SGD
    eta: float = 0.001  # LARS_SGD: the trust coefficient

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZER_KINDS:
            raise ValueError(f"optimizer kind {self.kind!r}: expected one of {', '.join(OPTIMIZER_KINDS)}")
        for name in ("learning_rate", "eps", "weight_decay", "eta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{self.kind}: {name} must be >= 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{self.kind}: {name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class KernelSpec:
    """A lookup over many tables at once.

    Args:
        tables: the tables, in the order of `table_weights()` and `optimizer_state()`.
        lane_tables: for each lane the index of the table it reads. Several lanes may read one table, and a table may
            have none.
        pooled: True sums each bag (output [B, sum of lane dims]); False gives one row per id ([N, D], all dims equal).
        data_type: how weights are stored: FP32, FP16 or BF16. Output and arithmetic are float32.
        optimizer: None makes a *dense* kernel, whose weights are parameters with ordinary gradients. Otherwise the
            kernel is *fused*: backward updates the weights and leaves no gradient.
        validate_ids: check every id before the lookup. Switch off only where the caller has called `check_ids`:
            fast kernels read and write whatever memory a wrong id points at.
        lane_features: one feature name per lane, for error messages; empty means "lane 0", "lane 1", ...
        memory: of a fused kernel on a GPU; the host's needs FBGEMM, which reads it through CUDA's managed memory.
        cache_share: of the rows that the GPU keeps, for HOST_CACHED.

    Raises:
        ValueError: a lane names no table, names are too few, dims differ in a sequence kernel, or the data type is
            not a floating one.

    >>> KernelSpec((TableSpec("user", 100, 8),), lane_tables=(0,), pooled=True).output_dim
    8
    """

    tables: tuple[TableSpec, ...]
    lane_tables: tuple[int, ...]
    pooled: bool
    data_type: DataType = DataType.FP32
    optimizer: OptimizerSpec | None = None
    validate_ids: bool = True
    lane_features: tuple[str, ...] = ()
    memory: TableMemory = TableMemory.DEVICE
    cache_share: float = 0.2

    def __post_init__(self) -> None:
        for lane, table in enumerate(self.lane_tables):
            if not 0 <= table < len(self.tables):
                raise ValueError(f"lane {lane} reads table {table}, but there are {len(self.tables)} tables")
        if self.lane_features and len(self.lane_features) != len(self.lane_tables):
            raise ValueError(f"{len(self.lane_features)} feature names for {len(self.lane_tables)} lanes")
        dims = {table.dim for table in self.tables}
        if not self.pooled and len(dims) > 1:
            raise ValueError(f"a sequence kernel's tables share one dim, got {sorted(dims)}; make one kernel per dim")
        weight_dtype(self.data_type)
        if not 0 < self.cache_share <= 1:
            raise ValueError(f"cache_share {self.cache_share}: expected a share above 0, and at most 1")

    @property
    def lane_dims(self) -> tuple[int, ...]:
        return tuple(self.tables[table].dim for table in self.lane_tables)

    @property
    def lane_rows(self) -> tuple[int, ...]:
        return tuple(self.tables[table].num_rows for table in self.lane_tables)

    @property
    def lane_table_names(self) -> tuple[str, ...]:
        return tuple(self.tables[table].name for table in self.lane_tables)

    @property
    def output_dim(self) -> int:
        """Columns of the output: the lanes side by side (pooled), or one table's dim (sequence)."""
        if self.pooled:
            return sum(self.lane_dims)
        return self.tables[0].dim if self.tables else 0


class Kernel(Protocol):
    """What every kernel can do, dense or fused, PyTorch or FBGEMM. All of them are `nn.Module`s.

    Lane l's bags are `offsets[l * B : (l + 1) * B + 1]`; offsets start at 0 and end at N. Fused kernels also have a
    `learning_rate` (set it before a forward: that forward's backward uses it, as in FBGEMM) and a `step_count`.
    """

    spec: KernelSpec
    backend: str  # "pytorch" or "fbgemm": who computes the forward
    backend_reason: str  # why, in words

    def __call__(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None) -> Tensor:
        """Pooled: [B, sum of lane dims]; sequence: [N, D]; float32. With no lanes at all: [0, 0]."""
        ...

    def table_weights(self) -> list[Tensor]:
        """The live weights, [R, D] each: writing into them is seen by the next forward."""
        ...

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        """Per table the live optimizer state; dense kernels and SGD have empty dicts."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: {"weights": ..., "optimizer_state": ...}."""
        ...


def weight_dtype(data_type: DataType) -> torch.dtype:
    """The torch dtype that stores a table's weights.

    Raises:
        ValueError: a quantised type; those are for inference (recsys_edu.quant).
    """
    dtypes = {DataType.FP32: torch.float32, DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}
    if data_type not in dtypes:
        raise ValueError(f"trainable kernels store FP32, FP16 or BF16 weights, got {data_type}: quantise later")
    return dtypes[data_type]
