"""The quantised lookup: PyTorch's and FBGEMM's agree, and both are the lookup in the widened tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels import reference
from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.quantized import HUGE_PAGE, QuantizedKernel, QuantizedSpec, zero_rows
from recsys_edu.kernels.quantized_remap import ArrayRemap, HashRemap, Remapping, keep_largest_rows, remapping_from_array
from recsys_edu.kernels.quantized_rows import QUANTIZED_TYPES, quantize_rows
from recsys_edu.kernels.spec import TableSpec
from recsys_edu.types import DataType

needs_fbgemm = pytest.mark.skipif(not fbgemm_status().available, reason=fbgemm_status().reason)
BACKENDS = [pytest.param("fbgemm", marks=needs_fbgemm), "pytorch"]


def kernel_of(
    dims: list[int], kinds: list[DataType], lanes: tuple[int, ...], pooled: bool, backend: str | None, **spec
) -> QuantizedKernel:
    """A kernel over tables of 10 + i rows, filled with the same numbers at every call."""
    tables = tuple(TableSpec(f"t{i}", 10 + i, dim) for i, dim in enumerate(dims))
    kernel = QuantizedKernel(QuantizedSpec(tables, tuple(kinds), lanes, pooled, **spec), backend=backend)
    generator = torch.Generator().manual_seed(1)
    for index, (table, kind) in enumerate(zip(tables, kinds)):
        weight = torch.randn(table.num_rows, table.dim, generator=generator)
        kernel.assign(index, quantize_rows(weight, kind, table.name))
    return kernel


@st.composite
def lookups(draw):
    """Kinds and dims of tables, lanes over them, a ragged batch with empty bags and ids of -1."""
    kinds = draw(st.lists(st.sampled_from(QUANTIZED_TYPES), min_size=1, max_size=4))
    dims = [draw(st.sampled_from([4, 8, 20])) for _ in kinds]
    lanes = tuple(draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=5)))
    batch_size = draw(st.integers(0, 4))
    lengths = torch.tensor([draw(st.integers(0, 3)) for _ in range(len(lanes) * batch_size)], dtype=torch.int64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.tensor([draw(st.integers(-1, 9)) for _ in range(int(offsets[-1]))], dtype=torch.int64)
    integers = draw(st.sampled_from([torch.int32, torch.int64]))
    weights = torch.rand(values.numel()) if draw(st.booleans()) else None
    return kinds, dims, lanes, values.to(integers), offsets, weights


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=lookups(), pooled=st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_the_lookup_in_widened_tables(backend: str, case, pooled: bool) -> None:
    kinds, dims, lanes, values, offsets, weights = case
    dims = dims if pooled else dims[:1] * len(dims)
    kernel = kernel_of(dims, kinds, lanes, pooled, backend, validate_ids=False)
    assert kernel.backend == backend
    answer = kernel(values, offsets, weights if pooled else None)
    # Row 0 of the oracle's tables is the zeros that an id of -1 finds.
    wide = [torch.cat([table.new_zeros(1, table.shape[1]), table]) for table in kernel.table_weights()]
    if pooled:
        expected = reference.pooled_lookup(wide, lanes, values.long() + 1, offsets, weights)
    elif offsets.numel() == 1:
        expected = torch.zeros(0, dims[0])
    else:
        expected = reference.sequence_lookup(wide, lanes, values.long() + 1, offsets)
    torch.testing.assert_close(answer, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_answers_are_rounded_once(backend: str) -> None:
    kinds = [DataType.INT8, DataType.FP16]
    values, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 2, 3, 4])
    exact = kernel_of([8, 8], kinds, (0, 1), True, backend)(values, offsets)
    half = kernel_of([8, 8], kinds, (0, 1), True, backend, output_dtype=torch.float16)(values, offsets)
    assert half.dtype == torch.float16 and torch.equal(half, exact.half())
    brain = kernel_of([8, 8], kinds, (0, 1), True, None, output_dtype=torch.bfloat16)(values, offsets)
    assert torch.equal(brain, exact.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_ids_are_refused_by_name(backend: str) -> None:
    kernel = kernel_of([8], [DataType.INT8], (0,), True, backend, lane_features=("item",))
    for bad in (-1, 10):
        with pytest.raises(IndexError, match=f"feature 'item': id {bad} at position 1 .* table 't0'"):
            kernel(torch.tensor([0, bad]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="negative length"):
        kernel(torch.tensor([0, 1]), torch.tensor([0, 3, 2]))


def test_bytes_held_are_those_of_the_rows() -> None:
    for kind, row_bytes in ((DataType.FP32, 256), (DataType.FP16, 128), (DataType.INT8, 68), (DataType.INT4, 36)):
        kernel = kernel_of([64], [kind], (0,), True, None)
        assert kernel.memory_bytes() == {"weights": 10 * row_bytes, "optimizer_state": 0}


def test_large_tables_begin_as_zeros_in_pages_of_any_size() -> None:
    for num_bytes in (0, 5, HUGE_PAGE, 5 * HUGE_PAGE + 3):
        rows = zero_rows(num_bytes, torch.device("cpu"))
        assert rows.numel() == num_bytes and not rows.any()


def test_half_leaves_the_codes_alone() -> None:
    kernel = kernel_of([8], [DataType.INT8], (0,), True, None)
    before = kernel.rows.clone()
    assert torch.equal(kernel.half().rows, before)


def test_assign_says_what_does_not_fit() -> None:
    kernel = kernel_of([8], [DataType.INT8], (0,), True, None)
    with pytest.raises(ValueError, match="table 't0' has 10 rows, got 9"):
        kernel.assign(0, torch.zeros(9, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="table 't0': a row of 8 numbers as INT8 has 12 bytes, got 8"):
        kernel.assign(0, torch.zeros(10, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="table 't0': INT2 packs 4"):
        kernel_of([6], [DataType.INT2], (0,), True, None)


def test_dims_that_fbgemm_refuses_are_served_by_pytorch() -> None:
    kernel = kernel_of([6], [DataType.INT4], (0,), True, None)
    assert kernel.backend == "pytorch"
    wide = kernel.table_weights()[0]
    torch.testing.assert_close(kernel(torch.tensor([3, 4]), torch.tensor([0, 2])), (wide[3] + wide[4]).unsqueeze(0))


@pytest.mark.parametrize("remap", [ArrayRemap, HashRemap])
@given(seed=st.integers(0, 10**6), plain_lane=st.booleans())
@settings(max_examples=30, deadline=None)
def test_remapping_finds_kept_rows_and_marks_dropped_ones(remap: type, seed: int, plain_lane: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (keep_largest_rows(torch.randn(30, 4, generator=generator), kept) for kept in (7, 29))
    lanes = [first, None if plain_lane else second]
    if remap is ArrayRemap:
        lanes = [lane.array() if lane is not None else None for lane in lanes]
    remapping = remap(lanes, torch.device("cpu"))
    values = torch.randint(0, 30, (11,), generator=generator)
    found = remapping(values, torch.tensor([0, 2, 6, 6, 11]))
    expected = torch.cat([first.array()[values[:6]], values[6:] if plain_lane else second.array()[values[6:]]])
    assert found.tolist() == expected.tolist()
    assert torch.equal(found, remapping.reference(values, torch.tensor([0, 2, 6, 6, 11])))


def test_a_remapping_is_the_array_it_came_from() -> None:
    array = torch.tensor([-1, 0, -1, 1, 2])
    assert remapping_from_array(array).array().tolist() == array.tolist()
    assert Remapping(5, torch.tensor([1, 3, 4])).array().tolist() == array.tolist()
    with pytest.raises(ValueError, match="table 'film': an index remapping"):
        remapping_from_array(torch.tensor([0, 2]), "film")
    with pytest.raises(ValueError, match="keep 1 to 3 rows, got 4"):
        keep_largest_rows(torch.randn(3, 2), 4)
