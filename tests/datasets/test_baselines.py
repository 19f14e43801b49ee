from __future__ import annotations

import numpy as np
import pytest

from recsys_edu.datasets import baselines
from recsys_edu.datasets.synthetic_criteo import expected_auc


def test_auc_equals_pair_counting():
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 6, 60) / 5, random.integers(0, 2, 60)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert baselines.auc(scores, labels) == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="both classes"):
        baselines.auc(scores, np.ones(60))


def test_expected_auc_is_the_mean_over_labels():
    probabilities = np.array([0.1, 0.4, 0.4, 0.9, 0.2])
    clicks = np.outer(probabilities, 1 - probabilities)  # weight of the pair (click i, non-click j)
    wins = (probabilities[:, None] > probabilities) + 0.5 * (probabilities[:, None] == probabilities)
    assert expected_auc(probabilities) == pytest.approx((clicks * wins).sum() / clicks.sum())


def test_ease_solves_each_columns_ridge_regression():
    random = np.random.default_rng(1)
    seen = (random.random((30, 6)) < 0.4).astype(float)
    weights = baselines.fit_ease(seen, regularisation=2.0)
    assert np.allclose(np.diag(weights), 0)
    for column in range(6):
        others = [item for item in range(6) if item != column]
        x = seen[:, others]
        by_hand = np.linalg.solve(x.T @ x + 2.0 * np.eye(5), x.T @ seen[:, column])
        assert np.allclose(weights[others, column], by_hand)


def test_biases_reach_their_fixed_point():
    random = np.random.default_rng(2)
    users, items = random.integers(0, 5, 80), random.integers(0, 7, 80)
    ratings = random.integers(1, 6, 80).astype(float)
    fitted = baselines.fit_biases(users, items, ratings, 6, 7, num_passes=200)
    assert fitted.user[5] == 0.0
    for item in range(7):
        chosen = items == item
        residual = ratings[chosen] - fitted.mean - fitted.user[users[chosen]]
        assert fitted.item[item] == pytest.approx(residual.sum() / (chosen.sum() + 5))
    errors = ratings - fitted.predict(users, items)
    assert np.square(errors).mean() < np.square(ratings - ratings.mean()).mean()


def test_top_k_leaves_out_what_was_seen():
    seen = np.array([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])
    scores = np.array([[9.0, 1, 3, 2], [4.0, 1, 3, 9]])
    top = baselines.top_k(scores, 2, seen)
    assert top.tolist() == [[2, 3], [0, 2]]
    assert baselines.hit_rate(top, np.array([0, 0, 1]), np.array([2, 1, 0])) == pytest.approx(2 / 3)
    assert baselines.popularity_scores(seen).tolist() == [[1, 0, 0, 1]] * 2
