"""Rows as bytes: the layout is FBGEMM's, the error is within its bound, what has no code is refused by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.quantized_rows import (
    CODE_BITS,
    QUANTIZED_TYPES,
    RowFormat,
    cut_columns,
    dequantize_rows,
    error_bound,
    paste_columns,
    quantize_rows,
    realign,
    split_scale_bias,
)
from recsys_edu.types import DataType

needs_fbgemm = pytest.mark.skipif(not fbgemm_status().available, reason=fbgemm_status().reason)


def awkward_table(dim: int, magnitude: float, seed: int) -> torch.Tensor:
    """Random rows, and rows of zeros, of one value, of one value but one, of denormals."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(12, dim, generator=generator) * magnitude).clamp(-6e4, 6e4)
    weight[1] = 0
    weight[2] = -1e-9
    weight[3] = 1000.3
    weight[4] = 1000.3
    weight[4, 0] = -1000.1
    weight[5] *= 1e-30
    weight[6] = weight[6].abs() + 100
    return weight


magnitudes = st.sampled_from([1e-20, 1e-8, 1e-6, 1e-3, 0.1, 1.0, 100.0, 1e4])


@given(st.sampled_from([4, 8, 20, 64]), magnitudes, st.integers(0, 10**6), st.sampled_from(QUANTIZED_TYPES))
@settings(max_examples=80, deadline=None)
def test_error_is_within_its_bound(dim: int, magnitude: float, seed: int, data_type: DataType) -> None:
    weight = awkward_table(dim, magnitude, seed)
    if data_type is DataType.NFP8:
        weight = weight.clamp(-448, 448)
    rows = quantize_rows(weight, data_type, "t")
    error = (dequantize_rows(rows, data_type, dim) - weight).abs().amax(1)
    bound = error_bound(rows, data_type, dim)
    assert (error <= bound).all(), (error / bound).max()
    if data_type in CODE_BITS:
        assert dequantize_rows(rows, data_type, dim)[1].eq(0).all(), "a row of zeros has to stay exact"


@pytest.mark.parametrize("data_type", [*CODE_BITS])
def test_ordinary_rows_are_within_half_a_step(data_type: DataType) -> None:
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    rows = quantize_rows(weight, data_type)
    step = (weight.amax(1) - weight.amin(1)) / (2 ** CODE_BITS[data_type] - 1)
    error = (dequantize_rows(rows, data_type, 32) - weight).abs().amax(1)
    assert (error <= step / 2 * 1.01 + 1e-3).all()
    assert error.max() > step.max() / 4, "so small an error means that nothing was quantised"


@needs_fbgemm
@given(st.sampled_from([8, 16, 64]), magnitudes, st.integers(0, 10**6), st.sampled_from([*CODE_BITS]))
@settings(max_examples=60, deadline=None)
def test_bytes_are_fbgemms(dim: int, magnitude: float, seed: int, data_type: DataType) -> None:
    weight = awkward_table(dim, magnitude, seed)
    theirs = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(weight, CODE_BITS[data_type])
    front = torch.cat([theirs[:, -4:], theirs[:, :-4]], dim=1)
    negative_zero = (front[:, 2] == 0) & (front[:, 3] == 128)  # its sign depends on where FBGEMM looked first
    front[negative_zero, 3] = 0
    assert torch.equal(quantize_rows(weight, data_type), front)


def test_by_hand() -> None:
    rows = quantize_rows(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), DataType.INT2)
    codes, scale, bias = split_scale_bias(rows, RowFormat(DataType.INT2, 4))
    assert (scale.item(), bias.item()) == (1.0, -1.0)
    assert codes.tolist() == [[0b11_10_01_00]]


@pytest.mark.parametrize(("data_type", "packed"), [(DataType.INT8, 68), (DataType.INT4, 36), (DataType.INT2, 20)])
def test_padding_changes_nothing(data_type: DataType, packed: int) -> None:
    weight = torch.randn(5, 64)
    tight, padded = quantize_rows(weight, data_type), quantize_rows(weight, data_type, alignment=16)
    assert tight.shape[1] == packed and padded.shape[1] % 16 == 0
    assert torch.equal(realign(padded, RowFormat(data_type, 64)), tight)
    assert torch.equal(realign(tight, RowFormat(data_type, 64, 16)), padded)
    with pytest.raises(ValueError, match=f"has {packed} bytes, got 10"):
        realign(tight[:, :10], RowFormat(data_type, 64))


@pytest.mark.parametrize("data_type", QUANTIZED_TYPES)
def test_columns_keep_their_numbers_to_the_bit(data_type: DataType) -> None:
    weight = torch.randn(6, 20)
    rows, form = quantize_rows(weight, data_type), RowFormat(data_type, 20)
    whole, again = dequantize_rows(rows, data_type, 20), torch.zeros_like(rows)
    for columns in (range(8), range(8, 12), range(12, 20)):
        part = cut_columns(rows, form, columns)
        assert torch.equal(dequantize_rows(part, data_type, len(columns)), whole[:, columns.start : columns.stop])
        paste_columns(again, form, columns, part)
    assert torch.equal(again, rows)


@pytest.mark.parametrize("data_type", QUANTIZED_TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_has_no_code_is_refused_by_name(data_type: DataType, value: float) -> None:
    weight = torch.ones(9, 8)
    weight[7, 2] = value
    with pytest.raises(ValueError, match=r"table 'film', row 7, column 2: -?(nan|inf)"):
        quantize_rows(weight, data_type, "film")


@pytest.mark.parametrize(
    ("data_type", "value"),
    [(DataType.INT8, -7e4), (DataType.INT4, 1e38), (DataType.INT2, -1e5), (DataType.FP16, 7e4), (DataType.NFP8, 449)],
)
def test_what_is_too_large_is_refused_by_name(data_type: DataType, value: float) -> None:
    weight = torch.ones(9, 8)
    weight[4, 5] = value
    with pytest.raises(ValueError, match=r"table 'film', row 4, column 5: .*clip the table"):
        quantize_rows(weight, data_type, "film")


def test_other_types_and_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="got BF16"):
        RowFormat(DataType.BF16, 8)
    with pytest.raises(ValueError, match="no multiple of 4"):
        RowFormat(DataType.INT2, 6)
    with pytest.raises(ValueError, match="cut a byte"):
        cut_columns(quantize_rows(torch.ones(1, 8), DataType.INT4), RowFormat(DataType.INT4, 8), range(3))


def test_a_table_without_rows() -> None:
    assert quantize_rows(torch.empty(0, 8), DataType.INT8).shape == (0, 12)
