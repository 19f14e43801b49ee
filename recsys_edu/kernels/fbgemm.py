"""The lookup by FBGEMM: all tables of a process in one table-batched call.

FBGEMM wants every table in ONE flat buffer and walks it by offsets:

    flat    | t0: R0 x D0 | t1: R1 x D1 | ...        weights_offsets[lane] says where the lane's table starts
    output  | lane 0's D  | lane 1's D  | ...        D_offsets[lane] says where the lane's columns start

Its limits, found by trying (version 1.8.0, CPU), are written down in `why_not_lookup` and `why_not_fused`; the kernels
ask those first, so a spec that FBGEMM would get wrong never reaches it.
Ids stay in the integer type they come in (int32 and int64 ran equally fast); offsets follow them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.chunks import Chunk, Ids, LookupInChunks, chunks_for, lookup_in_chunks
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS
from recsys_edu.kernels.spec import KernelSpec, OptimizerSpec, TableMemory, weight_dtype

POOLING_SUM = 0  # FBGEMM's codes
OUTPUT_FP32 = 0
DIM_MULTIPLE = 4  # the width of FBGEMM's vectors


def why_not_lookup(dims: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FBGEMM cannot compute a pooled lookup here, in words; None when it can."""
    if not fbgemm_status().available:
        return fbgemm_status().reason
    odd = [dim for dim in dims if dim % DIM_MULTIPLE]
    if odd:
        return f"FBGEMM needs dims that are multiples of {DIM_MULTIPLE}, got {odd[0]}"
    if device.type not in ("cpu", "cuda"):
        return f"FBGEMM has no kernels for {device.type}"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "FBGEMM's CPU lookup has no BF16"
    return None


def why_not_fused(spec: KernelSpec, device: torch.device) -> str | None:
    """Why FBGEMM cannot run this spec's fused optimizer inside its own backward, in words; None when it can."""
    kind = spec.optimizer.kind
    if device.type not in ROW_OPTIMIZERS[kind].fbgemm_devices:
        return f"FBGEMM does not fuse {kind} on {device.type}"
    if spec.optimizer.weight_decay and kind in ("SGD", "ADAGRAD", "ROWWISE_ADAGRAD"):
        # Row-wise Adagrad has an argument for it, which its pooled CPU kernel ignores.
        return f"FBGEMM's {kind} does not apply weight decay everywhere"
    runs = [table for table, _ in itertools.groupby(spec.lane_tables)]
    if len(runs) != len(set(runs)):
        return "lanes that share a table are not side by side, which FBGEMM's backward would take for several tables"
    if not runs:
        return "there are no lanes"
    return None


def why_not_host_memory(spec: KernelSpec, device: torch.device) -> str | None:
    """Why a table that stays in the host's memory cannot be looked up and updated here; None when it can."""
    if device.type != "cuda":
        return f"it is for GPUs whose memory is too small, and this device is {device.type}"
    if spec.optimizer is None:
        return "its optimizer has to run inside backward, and the table has a dense kernel"
    dims = [table.dim for table in spec.tables]
    return why_not_lookup(dims, weight_dtype(spec.data_type), device) or why_not_fused(spec, device)


@dataclass(frozen=True)
class Layout:
    """Where FBGEMM finds each lane's table in the flat buffer and its columns in the output."""

    weights_offsets_L: Tensor
    columns: Tensor  # D_offsets, [L + 1]
    total_dim: int
    max_dim: int
    row_starts: Tensor  # hash_size_cumsum, [L + 1]
    rows_before_L: Tensor | None  # in the buffer seen as rows of one width; None where tables differ in width
    row_bits: int


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is cached while a model serves has to do for one that trains, too
def layout(shapes: tuple[tuple[int, int], ...], lane_tables: tuple[int, ...], device: torch.device) -> Layout:
    """Derive the layout of tables laid end to end. Cached: it depends on nothing but its arguments."""
    elements = list(itertools.accumulate((rows * dim for rows, dim in shapes), initial=0))
    # FBGEMM tells tables apart by where their rows start: one without rows counts as having one, never looked up.
    rows = list(itertools.accumulate((max(rows, 1) for rows, _ in shapes), initial=0))
    columns = list(itertools.accumulate((shapes[table][1] for table in lane_tables), initial=0))
    widths = {dim for _, dim in shapes}
    rows_before = (
        [elements[table] // shapes[table][1] for table in lane_tables] if len(widths) == 1 and 0 not in widths else None
    )
    return Layout(
        weights_offsets_L=torch.tensor([elements[table] for table in lane_tables], device=device),
        columns=torch.tensor(columns, dtype=torch.int32, device=device),
        total_dim=columns[-1],
        max_dim=max((shapes[table][1] for table in lane_tables), default=0),
        row_starts=torch.tensor([rows[table] for table in lane_tables] + rows[-1:], device=device),
        rows_before_L=None if rows_before is None else torch.tensor(rows_before, device=device),
        row_bits=rows[-1].bit_length(),
    )


def flat_pooled_lookup(
    flat: Tensor, where: Layout, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None
) -> Tensor:
    """The raw call: pooled sums [B, sum of lane dims] from a flat buffer, differentiable in `flat` and the weights.

    `values_N` and `offsets` share one integer type. Ids are NOT checked.
    """
    return torch.ops.fbgemm.dense_embedding_codegen_lookup_function(
        dev_weights=flat,
        weights_offsets=where.weights_offsets_L,
        D_offsets=where.columns,
        total_D=where.total_dim,
        max_D=where.max_dim,
        hash_size_cumsum=where.row_starts,
        total_hash_size_bits=where.row_bits,
        indices=values_N,
        offsets=offsets,
        pooling_mode=POOLING_SUM,
        indice_weights=per_sample_weights_N,
        feature_requires_grad=None,
        output_dtype=OUTPUT_FP32,
    )


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _single_id_offsets(count: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(count, dtype=dtype)


def single_id_lookup(
    flat: Tensor, where: Layout, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None
) -> Tensor | None:
    """`flat_pooled_lookup` without gradients where every bag holds one id; None where one does not, or on one thread.

    Bags of one id are a gather, and PyTorch's gather, slower on one thread, uses all that there are:

        ids, lane after lane [L, B]  ->  rows of the buffer, example after example [B, L]  ->  [B, L * D]
    """
    traced = type(values_N) is not Tensor or torch.compiler.is_compiling()
    if traced or values_N.device.type != "cpu" or torch.get_num_threads() == 1 or where.rows_before_L is None:
        return None
    if values_N.numel() != offsets.numel() - 1:
        return None
    if not torch.equal(offsets, _single_id_offsets(offsets.numel(), offsets.dtype)):
        return None
    num_lanes = where.rows_before_L.numel()
    ids_BL = values_N.view(num_lanes, -1).T
    rows_BL = torch.add(ids_BL, where.rows_before_L, out=torch.empty(ids_BL.shape, dtype=torch.int64))
    found_ND = flat.view(-1, where.max_dim).index_select(0, rows_BL.view(-1)).float()
    if per_sample_weights_N is not None:
        found_ND = found_ND * per_sample_weights_N.view(num_lanes, -1).T.reshape(-1, 1)
    return found_ND.view(-1, where.total_dim)


class FbgemmFusedTables(nn.Module):
    """Tables whose optimizer FBGEMM runs inside backward (SplitTableBatchedEmbeddingBagsCodegen).

    Tables that no lane reads stay outside of FBGEMM, which demands a lane for each of its tables.
    """

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        # In the order of first use: FBGEMM's backward expects the tables of its lanes to ascend.
        self.table_order = list(dict.fromkeys(spec.lane_tables))
        self.num_rows = [spec.tables[table].num_rows for table in self.table_order]
        self.cached = spec.memory is TableMemory.HOST_CACHED
        self.tbe = _table_batched(spec, self.table_order, device)
        shapes = tuple((max(rows, 1), spec.tables[table].dim) for table, rows in zip(self.table_order, self.num_rows))
        self.layout = layout(shapes, tuple(map(self.table_order.index, spec.lane_tables)), device)

    def lookup(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None) -> Tensor:
        if torch.is_inference_mode_enabled():  # where FBGEMM's operators have no kernel on a CPU
            with torch.inference_mode(False), torch.no_grad():
                return self.lookup(values_N, offsets, per_sample_weights_N)
        spec = self.spec
        if spec.pooled and not torch.is_grad_enabled():
            single = single_id_lookup(self.tbe.weights_host, self.layout, values_N, offsets, per_sample_weights_N)
            if single is not None:
                return single
        chunks = chunks_for(spec.lane_tables, spec.lane_dims, values_N, backward=torch.is_grad_enabled())
        wanted = per_sample_weights_N is not None and per_sample_weights_N.requires_grad
        # The raw call for a CPU knows bags only, and would take the gradient of sample weights from updated tables.
        if len(chunks) == 1 or not spec.pooled or wanted:
            return self.tbe(values_N, offsets, per_sample_weights_N)
        if spec.optimizer.kind == "ROWWISE_ADAGRAD":  # whose steps FBGEMM counts on a CPU: once for all chunks
            self.tbe.iter_cpu.add_(1)
            self.tbe.iter.add_(1)
        lookup = functools.partial(self._lookup_chunk, self.tbe.get_learning_rate())
        ids = (values_N, offsets, per_sample_weights_N)
        if not torch.is_grad_enabled():
            return lookup_in_chunks(lookup, chunks, len(spec.lane_tables), True, Ids(*ids))
        roots = [self.tbe.weights_host] * len(chunks)
        return LookupInChunks.apply(lookup, chunks, len(spec.lane_tables), True, *ids, *roots)

    def _lookup_chunk(self, learning_rate: float, chunk: Chunk, ids: Ids, root: Tensor | None = None) -> Tensor:
        """The call that FBGEMM's module makes on a CPU, for some of the lanes."""
        tbe, lanes, bounds = self.tbe, chunk.lanes, slice(chunk.first, chunk.last + 1)
        kind, optimizer = self.spec.optimizer.kind, {}
        if ROW_OPTIMIZERS[kind].state:
            optimizer = {
                "momentum1_host": tbe.momentum1_host,
                "momentum1_placements": tbe.momentum1_placements[lanes],
                "momentum1_offsets": tbe.momentum1_offsets[lanes],
                "eps": self.spec.optimizer.eps,
            }
        if kind == "ROWWISE_ADAGRAD":  # its defaults are of types that it does not take
            optimizer |= {"weight_decay": 0.0, "weight_decay_mode": 0, "max_norm": 0.0}
        return getattr(torch.ops.fbgemm, f"split_embedding_codegen_lookup_{kind.lower()}_function_cpu")(
            host_weights=tbe.weights_host if root is None else root,
            weights_placements=tbe.weights_placements[lanes],
            weights_offsets=tbe.weights_offsets[lanes],
            D_offsets=tbe.D_offsets[bounds] - chunk.start,
            total_D=chunk.width,
            max_D=tbe.max_D,
            hash_size_cumsum=tbe.hash_size_cumsum[bounds],
            total_hash_size_bits=tbe.total_hash_size_bits,
            indices=ids.values_N,
            offsets=ids.offsets,
            pooling_mode=tbe.pooling_mode,
            indice_weights=ids.per_sample_weights_N,
            feature_requires_grad=None,
            gradient_clipping=False,
            max_gradient=1.0,
            stochastic_rounding=False,
            learning_rate=learning_rate,
            output_dtype=OUTPUT_FP32,
            **optimizer,
        )

    @property
    def steps(self) -> Tensor:
        """FBGEMM's live step count, on the host, [1]. It counts training forwards."""
        return self.tbe.iter_cpu

    def weights(self) -> dict[int, Tensor]:
        """Table index -> live weights [R, D], settled."""
        self.settle()
        tables = zip(self.table_order, self.tbe.split_embedding_weights(), self.num_rows)
        return {table: weights[:num_rows] for table, weights, num_rows in tables}

    def settle(self) -> None:
        """Write back the rows that a cache holds, and empty it: the weights are read and written behind its back."""
        if self.cached:
            self.tbe.flush()
            self.tbe.reset_cache_states()

    def optimizer_state(self, kind: str) -> dict[int, dict[str, Tensor]]:
        """Table index -> live state."""
        names = list(ROW_OPTIMIZERS[kind].state)
        states = self.tbe.split_optimizer_states() if names else [[] for _ in self.table_order]
        return {
            table: {name: state[:num_rows] for name, state in zip(names, tensors)}
            for table, tensors, num_rows in zip(self.table_order, states, self.num_rows)
        }


def table_location(spec: KernelSpec, device: torch.device) -> Any:
    """FBGEMM's name for where the weights lie."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

    if device.type == "cpu":
        return EmbeddingLocation.HOST
    return {
        TableMemory.DEVICE: EmbeddingLocation.DEVICE,
        TableMemory.HOST: EmbeddingLocation.MANAGED,
        TableMemory.HOST_CACHED: EmbeddingLocation.MANAGED_CACHING,
    }[spec.memory]


def _table_batched(spec: KernelSpec, table_order: list[int], device: torch.device) -> nn.Module:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cpu = device.type == "cpu"
    location = table_location(spec, device)
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    tables = [spec.tables[table] for table in table_order]
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        # A table without rows gets one that no id reaches: FBGEMM tells tables apart by where their rows start.
        embedding_specs=[(max(table.num_rows, 1), table.dim, location, compute) for table in tables],
        feature_table_map=[table_order.index(table) for table in spec.lane_tables],
        weights_precision=SparseType(spec.data_type.value.lower()),
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM if spec.pooled else PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        cache_load_factor=spec.cache_share,
        stochastic_rounding=False,  # the nearest number, as the PyTorch kernel rounds
        device=device,
        table_names=[table.name for table in tables],
        **_optimizer_arguments(spec.optimizer),
    )
    for weights in tbe.split_embedding_weights():
        weights.zero_()
    return tbe


def _optimizer_arguments(optimizer: OptimizerSpec) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    kinds = {
        "SGD": EmbOptimType.EXACT_SGD,
        "ADAGRAD": EmbOptimType.EXACT_ADAGRAD,
        "ROWWISE_ADAGRAD": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "ADAM": EmbOptimType.ADAM,
        "PARTIAL_ROWWISE_ADAM": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    }
    return {
        "optimizer": kinds[optimizer.kind],
        "learning_rate": optimizer.learning_rate,
        "eps": optimizer.eps,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
    }
