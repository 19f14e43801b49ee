"""Rows of a table in fewer bits: how numbers become codes and come back, byte for byte as FBGEMM stores them.

    INT8, dim 4       | scale fp16 | bias fp16 | c0 | c1 | c2 | c3 |            value = code * scale + bias
    INT4, dim 4       | scale fp16 | bias fp16 | c1 c0 | c3 c2 |                two codes a byte, the first one low
    INT2, dim 4       | scale fp16 | bias fp16 | c3 c2 c1 c0 |
    FP16, NFP8, FP32  | the numbers themselves |

Every row has its own scale and bias: the row's smallest number is its bias, and its codes 0 ... 2**bits - 1 reach to
its largest one. So one large row does not cost the others their precision.

Shapes: R rows, D columns, P bytes of a row.
Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables, arXiv:1911.02079; FBGEMM's row layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.types import DataType

CODE_BITS = {DataType.INT8: 8, DataType.INT4: 4, DataType.INT2: 2}
FLOAT_ROWS = {DataType.FP32: torch.float32, DataType.FP16: torch.float16, DataType.NFP8: torch.float8_e4m3fn}
SCALE_BIAS_BYTES = 4
CUDA_ALIGNMENT = 16  # FBGEMM's CUDA kernels load 16 bytes at a time

QUANTIZED_TYPES = (*CODE_BITS, DataType.FP16, DataType.NFP8, DataType.FP32)
"""What a quantised table can be stored as; FP32 is there to compare with."""


@dataclass(frozen=True)
class RowFormat:
    """How one row of `dim` numbers lies in memory.

    >>> [RowFormat(kind, 64).num_bytes for kind in (DataType.FP32, DataType.FP16, DataType.INT8, DataType.INT4)]
    [256, 128, 68, 36]

    Args:
        data_type: one of `QUANTIZED_TYPES`.
        dim: D, a multiple of the codes in a byte.
        alignment: rows are padded with zero bytes to a multiple of it. 1 on CPU; FBGEMM's CUDA kernels need 16.

    Raises:
        ValueError: a type that tables are not served in, or a dim whose codes do not fill their last byte.
    """

    data_type: DataType
    dim: int
    alignment: int = 1

    def __post_init__(self) -> None:
        if self.data_type not in QUANTIZED_TYPES:
            known = ", ".join(map(str, QUANTIZED_TYPES))
            raise ValueError(f"tables are served as one of {known}, got {self.data_type}")
        if self.dim % self.codes_per_byte:
            raise ValueError(
                f"{self.data_type} packs {self.codes_per_byte} numbers into a byte: embedding_dim {self.dim} is no "
                f"multiple of {self.codes_per_byte}"
            )

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return CODE_BITS.get(self.data_type) or 8 * FLOAT_ROWS[self.data_type].itemsize

    @property
    def has_codes(self) -> bool:
        """Whether rows hold codes with a scale and a bias, rather than floating-point numbers."""
        return self.data_type in CODE_BITS

    @property
    def codes_per_byte(self) -> int:
        return max(8 // self.bits, 1)

    @property
    def header_bytes(self) -> int:
        return SCALE_BIAS_BYTES if self.has_codes else 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of a row without padding."""
        return self.header_bytes + self.dim * self.bits // 8

    @property
    def num_bytes(self) -> int:
        """Bytes from the start of one row to the start of the next."""
        return -(-self.packed_bytes // self.alignment) * self.alignment


def row_alignment(device_type: str) -> int:
    """What rows in a device's memory are padded to a multiple of: "cuda" 16, "cpu" 1 (none)."""
    return CUDA_ALIGNMENT if device_type == "cuda" else 1


def quantize_rows(weight_RD: Tensor, data_type: DataType, table: str = "", alignment: int = 1) -> Tensor:
    """The rows of a table as bytes: [R, P] uint8.

    >>> quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 255.0]]), DataType.INT8)
    tensor([[  0,  60,   0,   0,   0,   1,   2, 255]], dtype=torch.uint8)

    A number comes back with an error of at most half a step, the row's scale. Two things can make it larger: a row
    that is nearly constant far away from zero (the bias has 11 significant bits), and one so narrow that its step is
    below the smallest float16 (then the whole row becomes its bias).

    Args:
        weight_RD: floating-point rows.
        table: its name, for errors.

    Raises:
        ValueError: a NaN or infinity, or a number beyond what the type reaches; it names table and row.

    Counterpart: fbgemm's FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf, which puts scale and bias last.
    """
    form = RowFormat(data_type, weight_RD.shape[1], alignment)
    weight_RD = weight_RD.detach().float()
    _refuse_rows(
        ~weight_RD.isfinite(), weight_RD, table, "which has no code: look for the step in which training diverged"
    )
    if form.has_codes:
        packed_RP = torch.cat(_scale_bias_codes(weight_RD, form, table), dim=1)
    else:
        dtype = FLOAT_ROWS[data_type]
        largest = torch.finfo(dtype).max
        _refuse_rows(
            weight_RD.abs() > largest, weight_RD, table, f"but {data_type} ends at {largest:g}: clip the table"
        )
        packed_RP = weight_RD.to(dtype).view(torch.uint8)
    return torch.nn.functional.pad(packed_RP, (0, form.num_bytes - form.packed_bytes))


def _scale_bias_codes(weight_RD: Tensor, form: RowFormat, table: str) -> tuple[Tensor, Tensor, Tensor]:
    if weight_RD.numel() == 0:
        header = weight_RD.new_empty(weight_RD.shape[0], 2, dtype=torch.uint8)
        return header, header, header.new_empty(weight_RD.shape[0], form.packed_bytes - SCALE_BIAS_BYTES)
    largest_code = 2**form.bits - 1
    low_R, high_R = weight_RD.amin(1), weight_RD.amax(1)
    bias_R = low_R.half() + 0.0  # no -0.0: one zero row has one form
    range_R = high_R - bias_R.float()
    # A row of one value has no range: any scale does, and 1 is what FBGEMM writes.
    scale_R = torch.where(range_R == 0, torch.ones_like(range_R), range_R / largest_code).half()
    too_wide_R1 = (bias_R.isinf() | scale_R.isinf()).unsqueeze(1)
    beyond = "but scale and bias are float16, which ends at 65504: clip the table"
    _refuse_rows(too_wide_R1 & (weight_RD.abs() == weight_RD.abs().amax(1, keepdim=True)), weight_RD, table, beyond)
    inverse_R = scale_R.float().reciprocal()
    no_step_R = inverse_R.isinf()  # the step is too small for float16: the row becomes its bias
    scale_R = torch.where(no_step_R, torch.ones_like(scale_R), scale_R)
    inverse_R = torch.where(no_step_R, torch.ones_like(inverse_R), inverse_R)
    codes_RD = ((weight_RD - bias_R.float().unsqueeze(1)) * inverse_R.unsqueeze(1)).round().clamp(0, largest_code)
    codes_RD = codes_RD.to(torch.uint8).view(weight_RD.shape[0], -1, form.codes_per_byte)
    packed = codes_RD[..., 0].clone()
    for place in range(1, form.codes_per_byte):
        packed |= codes_RD[..., place] << (form.bits * place)
    return scale_R.unsqueeze(1).view(torch.uint8), bias_R.unsqueeze(1).view(torch.uint8), packed


def _refuse_rows(bad_RD: Tensor, weight_RD: Tensor, table: str, why: str) -> None:
    if not bad_RD.any():  # host sync: an error has to be raised here, once per table
        return
    row, column = bad_RD.nonzero()[0].tolist()
    raise ValueError(f"table {table!r}, row {row}, column {column}: {weight_RD[row, column].item():g}, {why}")


def dequantize_rows(rows_NP: Tensor, data_type: DataType, dim: int) -> Tensor:
    """Numbers from bytes: [N, D] float32. Padding at the end of rows is ignored.

    >>> dequantize_rows(quantize_rows(torch.tensor([[0.0, 1.0, 2.0, 255.0]]), DataType.INT8), DataType.INT8, 4)
    tensor([[  0.,   1.,   2., 255.]])
    """
    form = RowFormat(data_type, dim)
    if not form.has_codes:
        return _own_memory(rows_NP[:, : form.packed_bytes]).view(FLOAT_ROWS[data_type]).float()
    scale_bias_N2 = _own_memory(rows_NP[:, :SCALE_BIAS_BYTES]).view(torch.float16).float()
    return unpack_codes(rows_NP, form) * scale_bias_N2[:, :1] + scale_bias_N2[:, 1:]


def _own_memory(some_bytes: Tensor) -> Tensor:
    """A copy: rows of an odd number of bytes begin anywhere, and wider numbers may not."""
    return some_bytes.clone(memory_format=torch.contiguous_format)


def unpack_codes(rows_NP: Tensor, form: RowFormat) -> Tensor:
    """The codes of rows, one float32 each: [N, D]."""
    packed = rows_NP[:, form.header_bytes : form.packed_bytes]
    if form.codes_per_byte == 1:
        return packed.float()
    places = [(packed >> (form.bits * place)) & (2**form.bits - 1) for place in range(form.codes_per_byte)]
    return torch.stack(places, dim=-1).flatten(1).float()


def realign(rows_RP: Tensor, form: RowFormat) -> Tensor:
    """The same rows with the padding of `form`.

    Raises:
        ValueError: rows shorter than `form` needs.
    """
    have, wanted = rows_RP.shape[1], form.num_bytes
    if have < form.packed_bytes:
        raise ValueError(f"a row of {form.dim} numbers as {form.data_type} has {form.packed_bytes} bytes, got {have}")
    if have == wanted:
        return rows_RP
    return torch.nn.functional.pad(rows_RP[:, : form.packed_bytes], (0, wanted - form.packed_bytes))


def cut_columns(rows_RP: Tensor, form: RowFormat, columns: range) -> Tensor:
    """Rows of the columns alone: the same codes under the same scale and bias, so the same numbers to the bit.

    Raises:
        ValueError: a cut inside a byte.
    """
    ends = (columns.start, columns.stop)
    if any(end % form.codes_per_byte for end in ends):
        raise ValueError(f"columns {ends[0]}:{ends[1]} cut a byte of {form.codes_per_byte} {form.data_type} codes")
    first, last = (form.header_bytes + end * form.bits // 8 for end in ends)
    part = torch.cat([rows_RP[:, : form.header_bytes], rows_RP[:, first:last]], dim=1)
    return realign(part, RowFormat(form.data_type, len(columns), form.alignment))


def paste_columns(rows_RP: Tensor, form: RowFormat, columns: range, part_RP: Tensor) -> None:
    """The inverse of `cut_columns`: write rows of some columns, scale and bias included, into whole rows, in place."""
    first, last = (form.header_bytes + end * form.bits // 8 for end in (columns.start, columns.stop))
    rows_RP[:, : form.header_bytes] = part_RP[:, : form.header_bytes]
    rows_RP[:, first:last] = part_RP[:, form.header_bytes : form.header_bytes + last - first]


def split_scale_bias(rows_RP: Tensor, form: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [R, bytes] as a view of the rows, scales [R, 1] and biases [R, 1] (float16) as copies."""
    codes = rows_RP[:, SCALE_BIAS_BYTES : form.packed_bytes]
    header = _own_memory(rows_RP[:, :SCALE_BIAS_BYTES]).view(torch.float16)
    return codes, header[:, :1], header[:, 1:]


def error_bound(rows_RP: Tensor, data_type: DataType, dim: int) -> Tensor:
    """How far a number of each row may be from what it was quantised from: [R].

    Codes: half a step, or the rounding of the bias where that is more. Floats: half a unit in the last place of the
    row's largest number, or half the type's smallest step.
    """
    form = RowFormat(data_type, dim)
    if form.has_codes:
        _, scale_R1, bias_R1 = split_scale_bias(rows_RP, form)
        tiny = torch.finfo(torch.float16).smallest_normal / 2**11  # half of float16's smallest step
        steps_R = scale_R1.float().abs().squeeze(1) / 2
        empty_R = unpack_codes(rows_RP, form).amax(1) == 0  # a constant row: its scale of 1 means nothing
        bias_error_R = (bias_R1.float().abs().squeeze(1) / 2**11).clamp(min=tiny)
        narrow_R = bias_error_R + tiny * (2**form.bits)  # steps below float16's smallest vanish with the whole range
        return torch.where(empty_R, narrow_R, torch.maximum(steps_R, bias_error_R) + tiny * 2**form.bits) * (1 + 1e-3)
    info = torch.finfo(FLOAT_ROWS[data_type])
    largest_R = dequantize_rows(rows_RP, data_type, dim).abs().amax(1)
    return torch.maximum(largest_R * info.eps / 2, torch.full_like(largest_R, info.smallest_normal * info.eps / 2)) * (
        1 + 1e-3
    )
