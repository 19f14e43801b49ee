from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys_edu.datasets.movielens_splits import Interactions, Split
from recsys_edu.retrieval.evaluation import (
    baseline_scores,
    bias_rmse,
    estimate,
    evaluate_ranking,
    over_seeds,
    rating_rmse,
)


def part(pairs: list[tuple[int, int]], num_users: int = 2, num_items: int = 4) -> Interactions:
    users, items = (np.array(column, dtype=np.int64) for column in zip(*pairs))
    ratings = np.full(len(users), 4, dtype=np.float32)
    return Interactions(users, items, ratings, np.zeros_like(users), np.arange(num_users), np.arange(num_items))


SPLIT = Split(part([(0, 0), (1, 3)]), part([(0, 1)]), part([(0, 2), (1, 0), (1, 1)]), "by hand")
SCORES = torch.tensor([[9.0, 8.0, 7.0, 1.0], [5.0, 1.0, 6.0, 9.0]])


def test_seen_items_are_removed_or_kept_as_asked():
    kept = evaluate_ranking(SCORES, SPLIT, seen="kept", ks=(1, 2))
    assert kept["top@1"] == 0.0 and kept["recall@2"] == 0.0
    removed = evaluate_ranking(SCORES, SPLIT, seen="removed", ks=(1, 2))
    # user 0: items 0 (training) and 1 (validation) go, 2 is first; user 1: 3 goes, then 2, 0
    assert removed["hit@1"] == 0.5
    assert removed["top@2"] == pytest.approx(2 / 3)
    assert removed["recall@2"] == pytest.approx((1 + 1 / 2) / 2)


def test_validation_items_count_as_unseen_when_they_are_predicted():
    assert evaluate_ranking(SCORES, SPLIT, seen="removed", ks=(1,), part="valid")["hit@1"] == 1.0


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\), expected users x items = \(2, 4\)"):
        evaluate_ranking(SCORES[:, :3], SPLIT, seen="kept")
    with pytest.raises(ValueError, match="NaN"):
        evaluate_ranking(SCORES * float("nan"), SPLIT, seen="kept")
    with pytest.raises(ValueError, match="seen="):
        evaluate_ranking(SCORES, SPLIT, seen="hidden")
    with pytest.raises(ValueError, match="unknown baselines"):
        baseline_scores(SPLIT, names=("random",))


def test_baselines_learn_from_the_training_part_alone():
    scores = baseline_scores(SPLIT)
    assert scores["popularity"].tolist() == [[1, 0, 0, 1]] * 2
    assert set(scores) == {"popularity", "biases", "EASE"}
    assert bias_rmse(SPLIT) == pytest.approx(0.0)
    assert rating_rmse(np.array([9.0, 4.0, 3.0]), SPLIT.test) == pytest.approx(np.sqrt((1 + 0 + 1) / 3))


def test_intervals():
    three = estimate([1.0, 2.0, 3.0])
    assert three.mean == 2.0
    assert three.half_width == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert estimate([1.0]).half_width == float("inf")
    assert over_seeds(lambda seed: {"x": float(seed)}, [1, 2, 3])["x"] == three
    with pytest.raises(ValueError, match="no values"):
        estimate([])
