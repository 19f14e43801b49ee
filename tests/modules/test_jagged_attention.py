"""Jagged attention equals padded attention, row by row, forward and backward, in every implementation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.modules.jagged_attention import (
    JaggedSelfAttention,
    JaggedTransformerBlock,
    attend_grouped,
    attend_pairs,
    attention_pairs,
    jagged_attention,
    positions_in_rows,
    row_groups,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor

BACKENDS = [
    "pytorch",
    "pairs",
    pytest.param("fbgemm", marks=pytest.mark.skipif(not use_fbgemm(), reason="FBGEMM is not in use here")),
]


def padded_attention(query, key, value, lengths, causal):
    """The textbook's way: pad to the longest row, mask, softmax, multiply, cut the padding off."""
    longest, num_rows = max(lengths), len(lengths)
    padded = []
    for part in (query, key, value):
        dense = part.new_zeros(num_rows, longest, *part.shape[1:])
        for row, values in enumerate(part.split(lengths)):
            dense[row, : len(values)] = values
        padded.append(dense)
    logits = torch.einsum("bqhd,bkhd->bhqk", padded[0], padded[1]) / query.size(-1) ** 0.5
    sees = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None, :].expand_as(logits)
    if causal:
        sees = sees & torch.ones(longest, longest, dtype=torch.bool).tril()
    weights = logits.masked_fill(~sees, -1e30).softmax(-1)
    answer = torch.einsum("bhqk,bkhd->bqhd", weights, padded[2])
    return torch.cat([answer[row, :length] for row, length in enumerate(lengths)])


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=7),
    heads=st.sampled_from([1, 2, 3]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_equals_padded_attention(backend, lengths, heads, causal, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(sum(lengths), heads, 4, generator=generator).requires_grad_() for _ in range(3)]
    answer = jagged_attention(*parts, offsets_of(lengths, dtype), causal=causal, backend=backend)
    expected = padded_attention(*parts, lengths, causal)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(answer.shape, generator=generator)
    got = torch.autograd.grad((answer * direction).sum(), parts)
    wanted = torch.autograd.grad((expected * direction).sum(), parts)
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_do_not_see_each_other(backend, causal):
    parts = [torch.randn(9, 2, 4) for _ in range(3)]
    offsets = offsets_of([3, 0, 6])
    before = jagged_attention(*parts, offsets, causal=causal, backend=backend)
    changed = [torch.cat([part[:3], torch.randn(6, 2, 4)]) for part in parts]
    after = jagged_attention(*changed, offsets, causal=causal, backend=backend)
    assert torch.equal(before[:3], after[:3]) and not torch.allclose(before[3:], after[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_positions_do_not_see_later_ones(backend):
    parts = [torch.randn(6, 1, 4) for _ in range(3)]
    before = jagged_attention(*parts, offsets_of([6]), causal=True, backend=backend)
    changed = [torch.cat([part[:4], torch.randn(2, 1, 4)]) for part in parts]
    after = jagged_attention(*changed, offsets_of([6]), causal=True, backend=backend)
    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean(backend):
    torch.manual_seed(0)
    part = torch.zeros(400, 8, 1)
    answer = jagged_attention(part, part, part + 1, offsets_of([20] * 20), causal=False, dropout=0.5, backend=backend)
    assert answer.std() > 0.1 and abs(answer.mean() - 1) < 0.03


def test_gradients_against_finite_differences():
    parts = [torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for attend in (attend_pairs, attend_grouped):
        assert torch.autograd.gradcheck(partial(attend, offsets=offsets_of([2, 0, 3]), causal=True), parts)


def test_pairs_and_positions_by_hand():
    assert [part.tolist() for part in attention_pairs(offsets_of([1, 0, 2]), causal=False)] == [
        [0, 1, 1, 2, 2],
        [0, 1, 2, 1, 2],
    ]
    assert positions_in_rows(offsets_of([1, 0, 2])).tolist() == [0, 0, 1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_groups_hold_every_position_once_and_little_padding(lengths):
    groups = row_groups(offsets_of(lengths))
    real = [place for source, filled in groups for place in source[filled].tolist()]
    assert sorted(real) == list(range(sum(lengths)))
    assert all((~filled).sum(1).max() < 8 for _, filled in groups)


def test_block_equals_torch_layer():
    torch.manual_seed(0)
    mine = JaggedTransformerBlock(8, 2, causal=True)
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": mine.attention.in_proj.weight,
        "self_attn.in_proj_bias": mine.attention.in_proj.bias,
        "self_attn.out_proj.weight": mine.attention.out_proj.weight,
        "self_attn.out_proj.bias": mine.attention.out_proj.bias,
        "linear1.weight": mine.network[0].weight, "linear1.bias": mine.network[0].bias,
        "linear2.weight": mine.network[3].weight, "linear2.bias": mine.network[3].bias,
        "norm1.weight": mine.attention_norm.weight, "norm1.bias": mine.attention_norm.bias,
        "norm2.weight": mine.network_norm.weight, "norm2.bias": mine.network_norm.bias,
    })  # fmt: skip
    rows = JaggedTensor(torch.randn(9, 8), lengths=torch.tensor([4, 0, 5]))
    answer = mine(rows)
    assert answer.lengths().tolist() == [4, 0, 5]
    for got, row in zip(answer.to_dense(), rows.to_dense()):
        if len(row):
            mask = torch.nn.Transformer.generate_square_subsequent_mask(len(row))
            torch.testing.assert_close(got, theirs(row[None], src_mask=mask, is_causal=True)[0], rtol=1e-4, atol=1e-5)


def test_weights_for_pictures_sum_to_one():
    attention = JaggedSelfAttention(8, 2, causal=True)
    rows = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([2, 3]))
    query_P, _, weights_PH = attention.attention_weights(rows)
    torch.testing.assert_close(torch.zeros(5, 2).index_add(0, query_P, weights_PH), torch.ones(5, 2))


def test_errors_say_what_was_got():
    part = torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match="offsets end at 2, but there are 3"):
        jagged_attention(part, part, part, torch.tensor([0, 2]), causal=True)
    with pytest.raises(ValueError, match="one shape"):
        jagged_attention(part, part[:2], part, torch.tensor([0, 3]), causal=True)
    with pytest.raises(ValueError, match="'cuda'"):
        jagged_attention(part, part, part, torch.tensor([0, 3]), causal=True, backend="cuda")
    with pytest.raises(ValueError, match="not a multiple"):
        JaggedSelfAttention(7, 2, causal=True)


def test_an_empty_batch_trains():
    block = JaggedTransformerBlock(8, 2, causal=False)
    values = torch.zeros(0, 8, requires_grad=True)
    block(JaggedTensor(values, lengths=torch.tensor([0, 0]))).values().sum().backward()
    assert values.grad.shape == (0, 8) and block.attention.in_proj.weight.grad.abs().sum() == 0
