from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.retrieval.losses import candidates_in_batch, log_expected_count, sampled_softmax_loss


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.sampled_from([0.3, 1.0, 2.0]), st.booleans())
def test_unique_candidates_equal_the_batch_with_repeats(ids, temperature, corrected):
    torch.manual_seed(len(ids))
    ids_B = torch.tensor(ids)
    query_BD, item_ID = torch.randn(len(ids), 5), torch.randn(7, 5)
    log_q_I = log_expected_count(torch.rand(7), len(ids)) if corrected else torch.zeros(7)
    # the whole [B, B] matrix; a repeated item's several columns share what is right
    logits_BB = query_BD @ item_ID[ids_B].T / temperature - log_q_I[ids_B]
    log_probability_BB = logits_BB.log_softmax(1)
    same_BB = ids_B[:, None] == ids_B
    by_hand = -log_probability_BB.masked_fill(~same_BB, float("-inf")).logsumexp(1).mean()
    sample = candidates_in_batch(ids_B)
    bias_C = sample.count.log() - log_q_I[sample.ids]
    loss = sampled_softmax_loss(
        query_BD, item_ID[sample.ids], sample.target, temperature=temperature, logit_bias_C=bias_C
    )
    assert torch.allclose(loss, by_hand, atol=1e-5)


def test_all_items_without_correction_are_the_full_softmax():
    query_BD, item_ID, target_B = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([5, 0, 2])
    expected = F.cross_entropy(query_BD @ item_ID.T, target_B)
    assert torch.allclose(sampled_softmax_loss(query_BD, item_ID, target_B), expected)


def test_log_q_makes_the_sampled_sum_unbiased():
    torch.manual_seed(0)
    popularity_I = torch.tensor([0.5, 0.3, 0.15, 0.05])
    weight_I = torch.tensor([1.0, 2.0, 3.0, 4.0])  # exp(score): the wanted denominator is their sum, 10
    log_expected_I = log_expected_count(popularity_I, batch_size=50, num_uniform=20)
    total = 0.0
    for _ in range(800):
        drawn = torch.multinomial(popularity_I, 50, replacement=True)
        sample = candidates_in_batch(drawn, torch.randint(4, (20,)))
        total += (weight_I[sample.ids] * (sample.count.log() - log_expected_I[sample.ids]).exp()).sum().item()
    assert total / 800 == pytest.approx(10.0, rel=0.02)


def test_hidden_candidates_are_no_negatives_but_the_own_one_stays():
    query_BD, item_CD = torch.randn(2, 3), torch.randn(3, 3)
    target_B = torch.tensor([0, 2])
    hidden_BC = torch.tensor([[True, True, False], [False, False, False]])
    logits_BC = query_BD @ item_CD.T
    first = -logits_BC[0, [0, 2]].log_softmax(0)[0]
    second = -logits_BC[1].log_softmax(0)[2]
    loss = sampled_softmax_loss(query_BD, item_CD, target_B, hidden_BC=hidden_BC)
    assert torch.allclose(loss, (first + second) / 2)


def test_hard_negatives_are_the_highest_ones():
    query_BD, item_CD = torch.randn(4, 3), torch.randn(9, 3)
    target_B = torch.tensor([0, 8, 3, 3])
    expected = []
    for logits_C, target in zip(query_BD @ item_CD.T, target_B.tolist()):
        others = [value for place, value in enumerate(logits_C.tolist()) if place != target]
        expected.append(-torch.tensor([logits_C[target].item(), *sorted(others)[-2:]]).log_softmax(0)[0])
    loss = sampled_softmax_loss(query_BD, item_CD, target_B, num_hard=2)
    assert torch.allclose(loss, torch.stack(expected).mean())


def test_bad_arguments_are_named():
    query_BD, item_CD, target_B = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        sampled_softmax_loss(query_BD, item_CD, target_B, temperature=0.0)
    with pytest.raises(ValueError, match="num_hard"):
        sampled_softmax_loss(query_BD, item_CD, target_B, num_hard=0)
    with pytest.raises(ValueError, match=r"expected \(2, 4\)"):
        sampled_softmax_loss(query_BD, item_CD, target_B, hidden_BC=torch.zeros(2, 3, dtype=torch.bool))
