"""The lookup in quantised tables: one call over tables of any types, in PyTorch and in FBGEMM.

    rows      | table 0: R0 rows of P0 bytes | table 1: R1 rows of P1 bytes | ...     one uint8 buffer
    lookup    ids pick rows, rows become numbers (quantized_rows.py), bags are summed

Nothing of a table is ever widened but the rows that a batch touches: an int8 table stays a quarter of its size, and a
lookup reads a quarter of the bytes.

Shapes: B batch, L lanes, N values, R rows, D columns, P bytes of a row.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_edu.kernels import lookup, reference
from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.checks import check_ids
from recsys_edu.kernels.chunks import Chunk, Ids, chunks_for, lookup_in_chunks
from recsys_edu.kernels.quantized_rows import RowFormat, dequantize_rows, realign, row_alignment
from recsys_edu.kernels.spec import TableSpec
from recsys_edu.types import DataType

OUTPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLE_ALIGNMENT = 128
DIM_MULTIPLE = 4
HUGE_PAGE = 2**21
MADV_HUGEPAGE = 14  # Linux

# FBGEMM's numbers for types, places and poolings.
_TYPE_CODES = {
    DataType.FP32: 0, DataType.FP16: 1, DataType.INT8: 2, DataType.INT4: 3, DataType.INT2: 4, DataType.NFP8: 6,
}  # fmt: skip
_OUTPUT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 5}
_ON_DEVICE, _ON_HOST = 0, 3
_POOLING_SUM, _POOLING_NONE = 0, 2
_FP8_EXPONENT_BITS, _FP8_EXPONENT_BIAS = 4, 7  # float8_e4m3fn


@dataclass(frozen=True)
class QuantizedSpec:
    """A lookup over quantised tables: what KernelSpec is to trainable ones.

    Args:
        tables: name, rows, columns.
        data_types: how each table is stored, see `quantized_rows.QUANTIZED_TYPES`.
        lane_tables: for each lane the index of the table it reads.
        pooled: True sums each bag, [B, sum of lane dims]; False gives one row per id, [N, D].
        output_dtype: float32, float16 or bfloat16. Sums are made in float32 and rounded once.
        validate_ids: check every id before the lookup; off where the caller has called `check_ids`.
        lane_features: one feature name per lane, for errors.

    Raises:
        ValueError: numbers that do not fit together, a type that tables or answers cannot have.
    """

    tables: tuple[TableSpec, ...]
    data_types: tuple[DataType, ...]
    lane_tables: tuple[int, ...]
    pooled: bool
    output_dtype: torch.dtype = torch.float32
    validate_ids: bool = True
    lane_features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.data_types) != len(self.tables):
            raise ValueError(f"{len(self.tables)} tables need as many data types, got {len(self.data_types)}")
        for lane, table in enumerate(self.lane_tables):
            if not 0 <= table < len(self.tables):
                raise ValueError(f"lane {lane} reads table {table}, but there are {len(self.tables)} tables")
        if not self.pooled and len({table.dim for table in self.tables}) > 1:
            dims = sorted({table.dim for table in self.tables})
            raise ValueError(f"a sequence kernel's tables share one dim, got {dims}; make one kernel per dim")
        if self.output_dtype not in OUTPUT_TYPES:
            raise ValueError(f"answers are one of {', '.join(map(str, OUTPUT_TYPES))}, got {self.output_dtype}")
        for table, data_type in zip(self.tables, self.data_types):
            try:
                RowFormat(data_type, table.dim)
            except ValueError as error:
                raise ValueError(f"table {table.name!r}: {error}") from error

    @property
    def lane_dims(self) -> tuple[int, ...]:
        return tuple(self.tables[table].dim for table in self.lane_tables)

    @property
    def output_dim(self) -> int:
        """Columns of the output: the lanes side by side (pooled), or one table's dim (sequence)."""
        if self.pooled:
            return sum(self.lane_dims)
        return self.tables[0].dim if self.tables else 0


def why_not_fbgemm(spec: QuantizedSpec, device: torch.device) -> str | None:
    """Why FBGEMM cannot look these tables up, in words; None when it can."""
    if not fbgemm_status().available:
        return fbgemm_status().reason
    if device.type not in ("cpu", "cuda"):
        return f"FBGEMM has no kernels for {device.type}"
    odd = [table for table in spec.tables if table.dim % DIM_MULTIPLE]
    if odd:
        return f"FBGEMM needs dims that are multiples of {DIM_MULTIPLE}, table {odd[0].name!r} has {odd[0].dim}"
    if device.type == "cpu" and spec.output_dtype == torch.bfloat16:
        return "FBGEMM's CPU kernels do not round to the nearest bfloat16"
    return None


class QuantizedKernel(nn.Module):
    """Quantised tables in one buffer, and their lookup.

    >>> from recsys_edu.kernels.quantized_rows import quantize_rows
    >>> spec = QuantizedSpec((TableSpec("film", 2, 4),), (DataType.INT8,), (0,), pooled=True)
    >>> kernel = QuantizedKernel(spec)
    >>> kernel.assign(0, quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 255.0], [1.0, 1.0, 1.0, 1.0]]), DataType.INT8))
    >>> kernel(torch.tensor([0, 1]), torch.tensor([0, 2]))
    tensor([[  1.,   2.,   3., 256.]])

    Args:
        spec: tables and lanes.
        device: default cpu.
        backend: None takes FBGEMM where it can serve the spec, "pytorch" never, "fbgemm" demands it.

    Raises:
        ValueError: an unknown backend, or "fbgemm" for what FBGEMM cannot serve.

    Counterpart: fbgemm's IntNBitTableBatchedEmbeddingBagsCodegen.
    """

    def __init__(self, spec: QuantizedSpec, device: torch.device | str = "cpu", backend: str | None = None) -> None:
        super().__init__()
        if backend not in (None, *lookup.BACKENDS):
            raise ValueError(f"backend {backend!r}: expected None or one of {', '.join(lookup.BACKENDS)}")
        self.spec = spec
        device = torch.device(device)
        reason = why_not_fbgemm(spec, device) if backend != "pytorch" else "asked for"
        if backend == "fbgemm" and reason:
            raise ValueError(f"backend='fbgemm' was asked for, but {reason}")
        self.backend, self.backend_reason = ("pytorch" if reason else "fbgemm"), reason or "FBGEMM serves this spec"
        self._place(device)
        self.register_buffer("rows", zero_rows(self._starts[-1], device), persistent=False)

    def _place(self, device: torch.device) -> None:
        """Where each table begins, and FBGEMM's constants; they depend on the device's alignment."""
        spec = self.spec
        alignment = row_alignment(device.type)
        self.formats = [RowFormat(kind, table.dim, alignment) for kind, table in zip(spec.data_types, spec.tables)]
        sizes = [table.num_rows * form.num_bytes for table, form in zip(spec.tables, self.formats)]
        padded = [-(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT for size in sizes]
        self._starts = list(itertools.accumulate(padded, initial=0))
        self._alignment = alignment
        columns = list(itertools.accumulate(spec.lane_dims, initial=0))
        place = _ON_DEVICE if device.type == "cuda" else _ON_HOST
        constants = {
            "weights_placements": torch.full((len(spec.lane_tables),), place, dtype=torch.int32),
            "weights_offsets": torch.tensor([self._starts[table] for table in spec.lane_tables], dtype=torch.int64),
            "weights_tys": torch.tensor(
                [_TYPE_CODES[spec.data_types[table]] for table in spec.lane_tables], dtype=torch.uint8
            ),
            "D_offsets": torch.tensor(columns, dtype=torch.int32),
            "uvm_weights": torch.empty(0, dtype=torch.uint8),
        }
        self._constants = {name: value.to(device) for name, value in constants.items()}

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before, was_meta = self.table_rows(), self.rows.is_meta
        device = function(self.rows).device  # .half() and the like are for the dense part of a model: codes stay bytes
        if device == self.rows.device:
            return self
        self._place(device)
        self.rows = zero_rows(self._starts[-1], device)
        reason = why_not_fbgemm(self.spec, device)
        if self.backend == "fbgemm" and reason and device.type != "meta":
            self.backend, self.backend_reason = "pytorch", reason
        if not was_meta and device.type != "meta":
            for table, rows in enumerate(before):
                self.assign(table, rows.to(device))
        return self

    def table_rows(self) -> list[Tensor]:
        """The live rows of each table, [R, P] uint8."""
        return [
            self.rows[start : start + table.num_rows * form.num_bytes].view(table.num_rows, form.num_bytes)
            for start, table, form in zip(self._starts, self.spec.tables, self.formats)
        ]

    def rows_of(self, table: int) -> Tensor:
        """The live rows of one table, [R, P] uint8."""
        return self.table_rows()[table]

    def assign(self, table: int, rows_RP: Tensor) -> None:
        """Fill one table with rows of any padding.

        Raises:
            ValueError: another number of rows, or rows too short for the table's type.
        """
        spec, form = self.spec.tables[table], self.formats[table]
        if rows_RP.shape[0] != spec.num_rows:
            raise ValueError(f"table {spec.name!r} has {spec.num_rows} rows, got {rows_RP.shape[0]}")
        try:
            self.rows_of(table).copy_(realign(rows_RP, form))
        except ValueError as error:
            raise ValueError(f"table {spec.name!r}: {error}") from error

    def table_weights(self) -> list[Tensor]:
        """The numbers of each table, widened: [R, D] float32 copies."""
        return [
            dequantize_rows(rows, data_type, table.dim)
            for rows, data_type, table in zip(self.table_rows(), self.spec.data_types, self.spec.tables)
        ]

    def forward(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None) -> Tensor:
        """Pooled: [B, sum of lane dims]; sequence: [N, D]; in the spec's output dtype. An id of -1 finds zeros.

        Raises:
            IndexError: an id outside its table (unless the spec says that ids were checked).
        """
        spec = self.spec
        if per_sample_weights_N is not None and not spec.pooled:
            raise ValueError("a sequence lookup has no bags to weight: multiply its output instead")
        values_N, offsets, per_sample_weights_N = lookup.prepare(values_N, offsets, per_sample_weights_N)
        batch_size = reference.batch_size_of(offsets, len(spec.lane_tables))
        if spec.validate_ids:
            self._check(values_N, offsets)
        if not spec.lane_tables or (spec.pooled and batch_size == 0) or (not spec.pooled and values_N.numel() == 0):
            return torch.zeros(0, spec.output_dim, dtype=spec.output_dtype, device=values_N.device)
        # FBGEMM's NFP8 lookup leaves out the rest of a bag, or of the batch, after an id of -1.
        # host sync: only where there are NFP8 tables
        needs_care = DataType.NFP8 in spec.data_types and bool((values_N < 0).any())
        if self.backend == "fbgemm" and not needs_care:
            return self._fbgemm(values_N, offsets, per_sample_weights_N)
        return quantized_lookup(self.table_rows(), spec, values_N, offsets, per_sample_weights_N)

    def _check(self, values_N: Tensor, offsets: Tensor) -> None:
        spec = self.spec
        lanes = range(len(spec.lane_tables))
        if bool((offsets[1:] < offsets[:-1]).any()):  # host sync: a bag of negative length reads foreign memory
            raise ValueError("offsets decrease: a bag has a negative length")
        check_ids(
            values_N,
            reference.lane_bounds(offsets, len(spec.lane_tables)),
            spec.lane_features or tuple(f"lane {lane}" for lane in lanes),
            [spec.tables[table].name for table in spec.lane_tables],
            [spec.tables[table].num_rows for table in spec.lane_tables],
        )

    def _fbgemm(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None) -> Tensor:
        spec = self.spec
        if values_N.device.type == "cuda":  # its kernels index with 32 bits
            values_N, offsets = values_N.int(), offsets.int()
        widest = {kind: 0 for kind in _TYPE_CODES}
        for table, kind in zip(spec.tables, spec.data_types):
            widest[kind] = max(widest[kind], table.dim)
        chunks = chunks_for(spec.lane_tables, spec.lane_dims, values_N, backward=False)
        return lookup_in_chunks(
            functools.partial(self._fbgemm_chunk, widest),
            chunks,
            len(spec.lane_tables),
            spec.pooled,
            Ids(values_N, offsets, per_sample_weights_N),
            spec.output_dtype,
        )

    def _fbgemm_chunk(self, widest: dict[DataType, int], chunk: Chunk, ids: Ids) -> Tensor:
        spec, constants = self.spec, self._constants
        if chunk.num_lanes < len(spec.lane_tables):
            of_lanes = {name: constants[name][chunk.lanes] for name in constants if name.startswith("weights_")}
            columns = constants["D_offsets"][chunk.first : chunk.last + 1] - chunk.start
            constants = constants | of_lanes | {"D_offsets": columns}
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.rows,
            **constants,
            total_D=chunk.width if spec.pooled else spec.output_dim,
            max_int2_D=widest[DataType.INT2],
            max_int4_D=widest[DataType.INT4],
            max_int8_D=widest[DataType.INT8],
            max_float8_D=widest[DataType.NFP8],
            max_float16_D=widest[DataType.FP16],
            max_float32_D=widest[DataType.FP32],
            indices=ids.values_N,
            offsets=ids.offsets,
            pooling_mode=_POOLING_SUM if spec.pooled else _POOLING_NONE,
            indice_weights=ids.per_sample_weights_N,
            output_dtype=_OUTPUT_CODES[spec.output_dtype],
            row_alignment=self._alignment,
            fp8_exponent_bits=_FP8_EXPONENT_BITS,
            fp8_exponent_bias=_FP8_EXPONENT_BIAS,
        )

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: {"weights": ..., "optimizer_state": 0}."""
        tables = zip(self.spec.tables, self.formats)
        return {"weights": sum(table.num_rows * form.num_bytes for table, form in tables), "optimizer_state": 0}

    def extra_repr(self) -> str:
        kinds = sorted({str(kind) for kind in self.spec.data_types})
        return (
            f"{len(self.spec.tables)} tables ({', '.join(kinds)}), {len(self.spec.lane_tables)} lanes, "
            f"{'pooled' if self.spec.pooled else 'sequence'}, backend {self.backend} ({self.backend_reason})"
        )


def zero_rows(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes for rows; on Linux in pages of 2 MiB where the kernel has some.

    Random rows of a large table lie on a page each, and a processor remembers where a few thousand pages are.
    Measured with 26 tables of 100,000 int8 rows of 64 columns: lookups take 4% less time.
    """
    rows = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if device.type == "cpu" and sys.platform == "linux" and num_bytes >= 2 * HUGE_PAGE:
        first = -(-rows.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (rows.data_ptr() + num_bytes - first) // HUGE_PAGE * HUGE_PAGE
        # Before the first write, which gives the memory its pages. A mere hint: where it fails nothing changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return rows.zero_()


def quantized_lookup(
    table_rows: Sequence[Tensor],
    spec: QuantizedSpec,
    values_N: Tensor,
    offsets: Tensor,
    per_sample_weights_N: Tensor | None = None,
) -> Tensor:
    """The lookup in plain PyTorch: the specification of every quantised kernel, and the kernel without FBGEMM."""
    num_lanes = len(spec.lane_tables)
    batch_size, bounds = reference.batch_size_of(offsets, num_lanes), reference.lane_bounds(offsets, num_lanes)
    lanes = []
    for lane, table in enumerate(spec.lane_tables):
        span = slice(bounds[lane], bounds[lane + 1])
        rows_ND = found_rows(table_rows[table], spec.data_types[table], spec.tables[table].dim, values_N[span])
        if spec.pooled:
            starts_B = offsets[lane * batch_size : (lane + 1) * batch_size + 1] - bounds[lane]
            sample_weights = None if per_sample_weights_N is None else per_sample_weights_N[span]
            lanes.append(sum_bags(rows_ND, starts_B, sample_weights).to(spec.output_dtype))
        else:
            lanes.append(rows_ND.to(spec.output_dtype))
    return torch.cat(lanes, dim=1 if spec.pooled else 0)


def found_rows(rows_RP: Tensor, data_type: DataType, dim: int, ids_N: Tensor) -> Tensor:
    """The numbers of the rows that ids pick, [N, D] float32; zeros for an id of -1."""
    rows_ND = dequantize_rows(rows_RP[ids_N.clamp(min=0).long()], data_type, dim)
    return rows_ND * (ids_N >= 0).unsqueeze(1)


def sum_bags(rows_ND: Tensor, offsets: Tensor, sample_weights_N: Tensor | None) -> Tensor:
    """Sums of neighbouring rows, [B, D]: bag b holds rows `offsets[b]` to `offsets[b + 1]`."""
    places_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
    if sample_weights_N is not None:
        sample_weights_N = sample_weights_N.float()
    return F.embedding_bag(
        places_N, rows_ND, offsets.long(), mode="sum", per_sample_weights=sample_weights_N, include_last_offset=True
    )
