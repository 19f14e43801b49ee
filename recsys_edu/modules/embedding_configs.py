"""What one embedding table is: its size, its features, how it starts and how it pools.

The config classes are plain, mutable dataclasses because that is what TorchRec's users construct,
copy and edit; everything derived from them is a function in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any, NamedTuple

import torch

from recsys_edu.types import DataType


@unique
class PoolingType(Enum):
    """How the rows that one bag of ids selects become one vector.

    SUM adds them, MEAN divides the sum by the number of ids (also when ids carry weights: the divisor
    is the count, not the total weight), NONE keeps them apart. An empty bag gives zeros.

    Counterpart: torchrec.modules.embedding_configs.PoolingType.
    """

    SUM = "SUM"
    MEAN = "MEAN"
    NONE = "NONE"


@dataclass
class BaseEmbeddingConfig:
    """The fields that pooled and sequence tables share.

    >>> BaseEmbeddingConfig(num_embeddings=100, embedding_dim=8, name="film").feature_names
    []

    `num_embeddings` rows of `embedding_dim` numbers, stored as `data_type`. A table starts from
    `init_fn(weight)` where one is given, else uniformly between the two `weight_init` bounds
    (default: plus and minus sqrt(1 / num_embeddings)). The fields from `need_pos` on are accepted so
    that TorchRec's configs can be passed along; the core library does not act on them.

    Raises:
        ValueError: `num_embeddings` or `embedding_dim` below 1.

    Counterpart: torchrec.modules.embedding_configs.BaseEmbeddingConfig.
    """

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    data_type: DataType = DataType.FP32
    feature_names: list[str] = field(default_factory=list)
    weight_init_max: float | None = None
    weight_init_min: float | None = None
    num_embeddings_post_pruning: int | None = None
    init_fn: Callable[[torch.Tensor], torch.Tensor | None] | None = None
    need_pos: bool = False
    input_dim: int | None = None
    total_num_buckets: int | None = None
    use_virtual_table: bool = False
    virtual_table_eviction_policy: Any | None = None
    enable_embedding_update: bool = False
    stash_weights: bool = False

    def __post_init__(self) -> None:
        for size_name in ("num_embeddings", "embedding_dim"):
            size = getattr(self, size_name)
            if size < 1:
                raise ValueError(f"table {self.name!r}: {size_name} is {size}, expected at least 1")

    def get_weight_init_max(self) -> float:
        """Upper bound of the uniform start."""
        return math.sqrt(1 / self.num_embeddings) if self.weight_init_max is None else self.weight_init_max

    def get_weight_init_min(self) -> float:
        """Lower bound of the uniform start."""
        return -math.sqrt(1 / self.num_embeddings) if self.weight_init_min is None else self.weight_init_min

    def num_features(self) -> int:
        """How many features read this table."""
        return len(self.feature_names)


@dataclass
class EmbeddingTableConfig(BaseEmbeddingConfig):
    """A table as the sharding code sees it: also its pooling, weighting and output names.

    Counterpart: torchrec.modules.embedding_configs.EmbeddingTableConfig.
    """

    pooling: PoolingType = PoolingType.SUM
    is_weighted: bool = False
    has_feature_processor: bool = False
    embedding_names: list[str] = field(default_factory=list)


@dataclass
class EmbeddingBagConfig(BaseEmbeddingConfig):
    """A pooled table: every bag of ids becomes one vector.

    >>> EmbeddingBagConfig(num_embeddings=1682, embedding_dim=16, name="film", feature_names=["film"]).pooling
    <PoolingType.SUM: 'SUM'>

    Counterpart: torchrec.modules.embedding_configs.EmbeddingBagConfig.
    """

    pooling: PoolingType = PoolingType.SUM


@dataclass
class EmbeddingConfig(BaseEmbeddingConfig):
    """A sequence table: every id becomes its own vector.

    Counterpart: torchrec.modules.embedding_configs.EmbeddingConfig.
    """


class QuantConfig(NamedTuple):
    """Which observers and types a quantised collection is made with.

    Counterpart: torchrec.modules.embedding_configs.QuantConfig.
    """

    activation: Any
    weight: Any
    per_table_weight_dtype: dict[str, torch.dtype] | None = None


def init_table(config: BaseEmbeddingConfig, weight_RD: torch.Tensor) -> None:
    """Fill `weight_RD` in place with the table's starting values; a meta tensor is left alone.

    `init_fn` may write in place or return the values. float16 and bfloat16 tables are drawn in their
    own type.
    """
    with torch.no_grad():
        if weight_RD.is_meta:
            return
        if config.init_fn is None:
            weight_RD.uniform_(config.get_weight_init_min(), config.get_weight_init_max())
            return
        values = config.init_fn(weight_RD)
        if isinstance(values, torch.Tensor) and values is not weight_RD:
            weight_RD.copy_(values)


def dtype_to_data_type(dtype: torch.dtype) -> DataType:
    """The DataType that stores `dtype`, quantised types included.

    >>> dtype_to_data_type(torch.float16)
    <DataType.FP16: 'FP16'>

    Raises:
        ValueError: no table type stores `dtype`.
    """
    known = _data_type_by_dtype()
    if dtype not in known:
        raise ValueError(f"no DataType stores {dtype}; known: {', '.join(str(d) for d in known)}")
    return known[dtype]


def data_type_to_dtype(data_type: DataType) -> torch.dtype:
    """The torch dtype of a table of `data_type`.

    >>> data_type_to_dtype(DataType.BF16)
    torch.bfloat16

    Raises:
        ValueError: `data_type` is not a DataType.
    """
    known = {
        DataType.FP32: torch.float32,
        DataType.FP16: torch.float16,
        DataType.BF16: torch.bfloat16,
        DataType.INT64: torch.int64,
        DataType.INT32: torch.int32,
        DataType.INT8: torch.int8,
        DataType.UINT8: torch.uint8,
        DataType.INT4: torch.quint4x2,
        DataType.INT2: torch.quint2x4,
        DataType.NFP8: torch.float8_e4m3fn,
    }
    if data_type not in known:
        raise ValueError(f"unknown DataType {data_type!r}")
    return known[data_type]


def data_type_to_sparse_type(data_type: DataType) -> Any:
    """FBGEMM's SparseType for `data_type`.

    Raises:
        ImportError: FBGEMM is not installed.
        ValueError: FBGEMM's tables do not store `data_type`.
    """
    from fbgemm_gpu.split_embedding_configs import SparseType

    known = {
        DataType.FP32: SparseType.FP32,
        DataType.FP16: SparseType.FP16,
        DataType.BF16: SparseType.BF16,
        DataType.INT8: SparseType.INT8,
        DataType.UINT8: SparseType.INT8,
        DataType.INT4: SparseType.INT4,
        DataType.INT2: SparseType.INT2,
        DataType.NFP8: SparseType.NFP8,
    }
    if data_type not in known:
        raise ValueError(f"FBGEMM has no table type for {data_type}")
    return known[data_type]


def pooling_type_to_pooling_mode(pooling_type: PoolingType, sharding_type: Any | None = None) -> Any:
    """FBGEMM's PoolingMode; row-split tables SUM their parts whatever the pooling, the divisor comes later.

    `sharding_type` is a ShardingType (or its string value) and matters only for MEAN.

    Raises:
        ImportError: FBGEMM is not installed.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

    row_split = getattr(sharding_type, "value", sharding_type) in ("row_wise", "table_row_wise", "grid_shard")
    if pooling_type is PoolingType.MEAN and row_split:
        return PoolingMode.SUM
    return {
        PoolingType.SUM: PoolingMode.SUM,
        PoolingType.MEAN: PoolingMode.MEAN,
        PoolingType.NONE: PoolingMode.NONE,
    }[pooling_type]


def pooling_type_to_str(pooling_type: PoolingType) -> str:
    """The `mode` argument of nn.EmbeddingBag: "sum" or "mean".

    Raises:
        ValueError: PoolingType.NONE, which nn.EmbeddingBag does not have.
    """
    if pooling_type not in (PoolingType.SUM, PoolingType.MEAN):
        raise ValueError(f"pooling {pooling_type} has no nn.EmbeddingBag mode; expected SUM or MEAN")
    return pooling_type.value.lower()


def _data_type_by_dtype() -> dict[torch.dtype, DataType]:
    return {
        torch.float32: DataType.FP32,
        torch.float16: DataType.FP16,
        torch.bfloat16: DataType.BF16,
        torch.int64: DataType.INT64,
        torch.int32: DataType.INT32,
        torch.int8: DataType.INT8,
        torch.uint8: DataType.UINT8,
        torch.qint8: DataType.INT8,
        torch.quint8: DataType.INT8,
        torch.quint4x2: DataType.INT4,
        torch.quint2x4: DataType.INT2,
        torch.float8_e4m3fn: DataType.NFP8,
    }
