"""What the sharders of embedding modules share: kernel names, optimizer names, which types run where.

Counterpart: torchrec.distributed.embedding_types
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, unique
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recsys_edu.distributed.types import (
    ModuleSharder,
    ParameterStorage,
    QuantizedCommCodecs,
    ShardingType,
    get_tensor_size_bytes,
)
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.streamable import Multistreamable

M = TypeVar("M", bound=nn.Module)


@unique
class OptimType(Enum):
    """Names of optimizers; `recsys_edu.kernels.spec.OPTIMIZER_KINDS` lists those that run inside backward."""

    SGD = "SGD"
    LARS_SGD = "LARS_SGD"
    LAMB = "LAMB"
    PARTIAL_ROWWISE_LAMB = "PARTIAL_ROWWISE_LAMB"
    ADAM = "ADAM"
    PARTIAL_ROWWISE_ADAM = "PARTIAL_ROWWISE_ADAM"
    ADAGRAD = "ADAGRAD"
    ROWWISE_ADAGRAD = "ROWWISE_ADAGRAD"
    SHAMPOO = "SHAMPOO"
    SHAMPOO_V2 = "SHAMPOO_V2"
    LION = "LION"
    ADAMW = "ADAMW"
    SHAMPOO_V2_MRS = "SHAMPOO_V2_MRS"
    SHAMPOO_MRS = "SHAMPOO_MRS"
    MUON = "MUON"
    SHAMPOO_V3_MRS = "SHAMPOO_V3_MRS"


@unique
class EmbeddingComputeKernel(Enum):
    """How a shard's lookup runs: `DENSE` leaves a gradient, `FUSED` applies the optimizer inside backward.

    FUSED_UVM keeps the weights of a GPU's shard in the host's memory, FUSED_UVM_CACHING with a cache on the GPU. The
    others are names TorchRec's plans may carry; this engine runs those four and QUANT.
    """

    DENSE = "dense"
    FUSED = "fused"
    FUSED_UVM = "fused_uvm"
    FUSED_UVM_CACHING = "fused_uvm_caching"
    QUANT = "quant"
    QUANT_UVM = "quant_uvm"
    QUANT_UVM_CACHING = "quant_uvm_caching"
    KEY_VALUE = "key_value"
    CUSTOMIZED_KERNEL = "customized_kernel"
    SSD_VIRTUAL_TABLE = "ssd_virtual_table"
    DRAM_VIRTUAL_TABLE = "dram_virtual_table"
    DRAM_SSD_VIRTUAL_TABLE = "dram_ssd_virtual_table"
    FUSED_TRITON = "fused_triton"


# Kernels whose weights stay in host memory even where they compute on the accelerator.
HOST_MEMORY_KERNELS = frozenset(
    {
        EmbeddingComputeKernel.FUSED_UVM.value,
        EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
        EmbeddingComputeKernel.QUANT_UVM.value,
        EmbeddingComputeKernel.QUANT_UVM_CACHING.value,
    }
)


class KJTList(Multistreamable):
    """A list of KeyedJaggedTensors that moves between CUDA streams as one.

    Counterpart: torchrec.distributed.embedding_types.KJTList
    """

    def __init__(self, features: list[KeyedJaggedTensor]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: int) -> KeyedJaggedTensor:
        return self.features[key]

    def __iter__(self) -> Iterator[KeyedJaggedTensor]:
        return iter(self.features)

    def record_stream(self, stream: torch.Stream) -> None:
        for feature in self.features:
            feature.record_stream(stream)


class ListOfKJTList(Multistreamable):
    """A list of `KJTList`s that moves between CUDA streams as one."""

    def __init__(self, features: list[KJTList]) -> None:
        self.features_list = features

    def __len__(self) -> int:
        return len(self.features_list)

    def __getitem__(self, key: int) -> KJTList:
        return self.features_list[key]

    def __iter__(self) -> Iterator[KJTList]:
        return iter(self.features_list)

    def record_stream(self, stream: torch.Stream) -> None:
        for features in self.features_list:
            features.record_stream(stream)


class BaseEmbeddingSharder(ModuleSharder[M]):
    """A sharder of embedding modules: every sharding type on every device, dense and fused kernels.

    `fused_params` go to the fused kernel, `{"optimizer": OptimType.SGD, "learning_rate": 0.1}`.
    TorchRec offers row_wise, table_row_wise and grid_shard on cuda only, and on the CPU only the fused kernel for
    sharded tables; here the lists are the same everywhere, with the kernel TorchRec prefers first.

    Counterpart: torchrec.distributed.embedding_types.BaseEmbeddingSharder
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._fused_params = fused_params
        self._sharded_module_order_overwrite = sharded_module_order_overwrite

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._fused_params

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [
            ShardingType.DATA_PARALLEL.value,
            ShardingType.TABLE_WISE.value,
            ShardingType.COLUMN_WISE.value,
            ShardingType.TABLE_COLUMN_WISE.value,
            ShardingType.ROW_WISE.value,
            ShardingType.TABLE_ROW_WISE.value,
            ShardingType.GRID_SHARD.value,
        ]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]  # its gradients are averaged before any optimizer sees them
        kernel = EmbeddingComputeKernel
        on_host = [kernel.FUSED_UVM, kernel.FUSED_UVM_CACHING] if compute_device_type == "cuda" else []
        return [each.value for each in (kernel.FUSED, *on_host, kernel.DENSE)]

    def storage_usage(self, tensor: Tensor, compute_device_type: str, compute_kernel: str) -> dict[str, int]:
        """Bytes of the weights per kind of memory: `{"ddr": 640}` on the CPU, `{"hbm": 640}` on cuda."""
        on_host = compute_device_type != "cuda" or compute_kernel in HOST_MEMORY_KERNELS
        kind = ParameterStorage.DDR if on_host else ParameterStorage.HBM
        return {kind.value: get_tensor_size_bytes(tensor)}


class BaseQuantEmbeddingSharder(ModuleSharder[M]):
    """A sharder of quantised modules, whose tables are read only: there is nothing to replicate or to update.

    `shardable_params` names the tables that may be sharded (default: all).
    """

    def __init__(self, fused_params: dict[str, Any] | None = None, shardable_params: list[str] | None = None) -> None:
        super().__init__()
        self._fused_params = dict(fused_params) if fused_params else None
        self._shardable_params = shardable_params

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._fused_params

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [t.value for t in ShardingType if t is not ShardingType.DATA_PARALLEL]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.QUANT.value]

    def shardable_parameters(self, module: M) -> dict[str, nn.Parameter]:
        """The quantised tables by name: `state_dict()` keys end in `<table>.weight`."""
        tables = {key.split(".")[-2]: tensor for key, tensor in module.state_dict().items() if key.endswith(".weight")}
        unknown = sorted(set(self._shardable_params or []) - set(tables))
        if unknown:
            raise ValueError(f"shardable_params {unknown}: the module's tables are {sorted(tables)}")
        wanted = self._shardable_params if self._shardable_params is not None else tables
        return {name: tensor for name, tensor in tables.items() if name in wanted}  # type: ignore[misc]

    def storage_usage(self, tensor: Tensor, compute_device_type: str, compute_kernel: str) -> dict[str, int]:
        on_host = compute_device_type != "cuda" or compute_kernel in HOST_MEMORY_KERNELS
        kind = ParameterStorage.DDR if on_host else ParameterStorage.HBM
        return {kind.value: get_tensor_size_bytes(tensor)}
