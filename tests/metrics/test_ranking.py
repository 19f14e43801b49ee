"""Top-k metrics against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.metrics.ranking import RankingMetrics, full_ranking, hits_from_ids


def by_hand(rankings: list[list[int]], relevant: list[set[int]], k: int) -> dict[str, float]:
    totals = {"recall": 0.0, "ndcg": 0.0, "hit": 0.0, "precision": 0.0}
    users = [(ranking[:k], items) for ranking, items in zip(rankings, relevant) if items]
    for ranking, items in users:
        found = [rank for rank, item in enumerate(ranking) if item in items]
        best = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(items))))
        totals["recall"] += len(found) / len(items)
        totals["precision"] += len(found) / k
        totals["hit"] += bool(found)
        totals["ndcg"] += sum(1 / math.log2(rank + 2) for rank in found) / best
    return {f"{name}@{k}": total / len(users) if users else math.nan for name, total in totals.items()}


def as_tensors(rankings, relevant):
    ids = torch.tensor([item for items in relevant for item in sorted(items)], dtype=torch.int64)
    return torch.tensor(rankings), ids, torch.tensor([len(items) for items in relevant])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.permutations(range(7)), st.sets(st.integers(0, 9), max_size=5)), min_size=1, max_size=5))
def test_equals_counting_and_merging_equals_one_pass(users):
    rankings, relevant = [list(ranking) for ranking, _ in users], [items for _, items in users]
    whole, parts = RankingMetrics(ks=(1, 3, 10)), RankingMetrics(ks=(1, 3, 10))
    whole.update(*as_tensors(rankings, relevant))
    for ranking, items in zip(rankings, relevant):
        part = RankingMetrics(ks=(1, 3, 10))
        part.update(*as_tensors([ranking], [items]))
        parts.merge(part)
    expected = {key: value for k in (1, 3, 10) for key, value in by_hand(rankings, relevant, k).items()}
    assert whole.compute() == pytest.approx(expected, nan_ok=True)
    assert parts.compute() == pytest.approx(expected, nan_ok=True)


def test_full_ranking_puts_excluded_items_last():
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    assert full_ranking(scores, 2).tolist() == [[1, 2]]
    assert full_ranking(scores, 5, exclude_UI=torch.tensor([[False, True, False]])).tolist() == [[2, 0, 1]]
    assert scores.tolist() == torch.tensor([[0.1, 0.9, 0.5]]).tolist()


def test_bad_input():
    with pytest.raises(ValueError, match="add up to 2"):
        hits_from_ids(torch.tensor([[7]]), torch.tensor([2, 5]), torch.tensor([1]))
    with pytest.raises(ValueError, match="merge"):
        RankingMetrics(ks=(1,)).merge(RankingMetrics(ks=(2,)))
