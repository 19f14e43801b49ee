"""The PyTorch operations against plain Python, and FBGEMM's against the PyTorch ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels import jagged_ops
from recsys_edu.kernels.backend import use_fbgemm

needs_fbgemm = pytest.mark.skipif(not use_fbgemm(), reason="FBGEMM is not in use here")
DTYPES = [
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.bool,
]


@st.composite
def permutation_of_segments(draw):
    segments = draw(st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=6))
    permute = draw(st.lists(st.integers(0, len(segments) - 1), max_size=8))
    return segments, permute


@given(permutation_of_segments())
@settings(max_examples=50, deadline=None)
def test_permute_1d_is_indexing_a_list_of_lists(case):
    segments, permute = case
    lengths = torch.tensor([len(segment) for segment in segments])
    values = torch.tensor([value for segment in segments for value in segment], dtype=torch.int64)
    expected = [value for index in permute for value in segments[index]]
    for operation in (jagged_ops.permute_1d, jagged_ops.permute_1d_pytorch):
        for known in (None, len(expected)):
            new_lengths, new_values, new_weights = operation(
                torch.tensor(permute, dtype=torch.int32), lengths, values, values.float() / 4, known
            )
            assert new_lengths.tolist() == [len(segments[index]) for index in permute]
            assert new_values.tolist() == expected
            assert torch.equal(new_weights, new_values.float() / 4)


def test_permute_2d_by_hand():
    lengths = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
    values = torch.tensor([10, 20, 30, 40])
    for operation in (jagged_ops.permute_2d, jagged_ops.permute_2d_pytorch):
        new_lengths, new_values, weights = operation(torch.tensor([1, 0, 1]), lengths, values)
        assert new_lengths.tolist() == [[2, 1], [1, 0], [2, 1]]
        assert new_lengths.dtype == torch.int32
        assert new_values.tolist() == [20, 30, 40, 10, 20, 30, 40]
        assert weights is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_values_and_weights_can_be_permuted(dtype):
    lengths = torch.tensor([[1, 0], [2, 1]])
    numbers = torch.tensor([0, 1, 2, 3]).to(dtype)
    expected = numbers[[1, 2, 3, 0]]
    for values, weights in ((numbers, None), (torch.arange(4), numbers), (numbers, numbers)):
        _, new_values, new_weights = jagged_ops.permute_2d(torch.tensor([1, 0]), lengths, values, weights)
        assert torch.equal(new_values, values[[1, 2, 3, 0]])
        assert weights is None or (torch.equal(new_weights, expected) and new_weights.dtype == dtype)
        _, new_values, _ = jagged_ops.permute_1d(torch.tensor([1, 0]), lengths.sum(1), values, weights)
        assert torch.equal(new_values, values[[1, 2, 3, 0]])


def test_gradients_add_up_where_a_segment_is_taken_twice():
    weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    _, _, permuted = jagged_ops.permute_2d(
        torch.tensor([1, 0, 1]), torch.tensor([[1], [2]]), torch.tensor([7, 8, 9]), weights
    )
    permuted.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert weights.grad.tolist() == [100.0, 1001.0, 10010.0]


def test_values_of_rows_can_be_permuted():
    values = torch.arange(6).view(3, 2)
    _, permuted, _ = jagged_ops.permute_1d(torch.tensor([1, 0]), torch.tensor([1, 2]), values)
    assert permuted.tolist() == [[2, 3], [4, 5], [0, 1]]


@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_complete_cumsum(lengths, dtype):
    expected = [sum(lengths[:end]) for end in range(len(lengths) + 1)]
    for operation in (jagged_ops.complete_cumsum, jagged_ops.complete_cumsum_pytorch):
        offsets = operation(torch.tensor(lengths, dtype=dtype))
        assert offsets.tolist() == expected
        assert offsets.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_length", [0, 1, 2, 4])
def test_padding_cuts_and_fills(dtype, max_length):
    rows = [[1], [], [0, 1, 1]]
    values = torch.tensor([1, 0, 1, 1]).to(dtype)
    expected = torch.tensor([(row + [1] * 4)[:max_length] for row in rows]).to(dtype).view(3, max_length)
    for operation in (jagged_ops.jagged_to_padded_dense, jagged_ops.jagged_to_padded_dense_pytorch):
        padded = operation(values, torch.tensor([0, 1, 1, 4]), max_length, 1.0)
        assert torch.equal(padded, expected)
        assert padded.dtype == dtype


def test_padding_rows_and_no_values():
    padded = jagged_ops.jagged_to_padded_dense_pytorch(torch.ones(3, 2), torch.tensor([0, 1, 3]), 2, 0.0)
    assert padded.tolist() == [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    for operation in (jagged_ops.jagged_to_padded_dense, jagged_ops.jagged_to_padded_dense_pytorch):
        assert operation(torch.empty(0), torch.tensor([0, 0, 0]), 2, 5.0).tolist() == [[5, 5], [5, 5]]


def test_padding_is_differentiable():
    for operation in (jagged_ops.jagged_to_padded_dense, jagged_ops.jagged_to_padded_dense_pytorch):
        values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        operation(values, torch.tensor([0, 1, 3]), 1, 9.0).sum().backward()
        assert values.grad.tolist() == [1.0, 1.0, 0.0]


@needs_fbgemm
@pytest.mark.fbgemm
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_both_backends_give_the_same(num_segments, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (num_segments, batch_size), generator=generator)
    values = torch.randint(0, 99, (int(lengths.sum()),), generator=generator)
    permute = torch.randint(0, max(num_segments, 1), (4 if num_segments else 0,), generator=generator)
    fast = jagged_ops.permute_2d(permute, lengths, values, values.float())
    spec = jagged_ops.permute_2d_pytorch(permute, lengths, values, values.float())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fast, spec))
    offsets = jagged_ops.complete_cumsum(lengths.view(-1))
    assert torch.equal(offsets, jagged_ops.complete_cumsum_pytorch(lengths.view(-1)))
    for width in (1, 3):
        fast_padded = jagged_ops.jagged_to_padded_dense(values, offsets, width, -1)
        assert torch.equal(fast_padded, jagged_ops.jagged_to_padded_dense_pytorch(values, offsets, width, -1))
