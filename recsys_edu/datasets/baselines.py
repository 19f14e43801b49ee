"""The trivial recommenders that every learned model has to beat: popularity, biases, EASE.

Plain numpy on arrays of user numbers, item numbers and ratings; users and items are numbered from 0.
Shapes: E ratings, U users, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Biases:
    """rating = mean + user bias + item bias. mean: float; user float64 `[U]`; item float64 `[I]`."""

    mean: float
    user: np.ndarray
    item: np.ndarray

    def predict(self, users_E: np.ndarray, items_E: np.ndarray) -> np.ndarray:
        """Predicted ratings, float64 `[E]`."""
        return self.mean + self.user[users_E] + self.item[items_E]


def fit_biases(
    users_E: np.ndarray,
    items_E: np.ndarray,
    ratings_E: np.ndarray,
    num_users: int,
    num_items: int,
    num_passes: int = 15,
    shrinkage: float = 5.0,
) -> Biases:
    """Fit user and item biases by alternating `b_i = sum(r - mean - b_u) / (n_i + shrinkage)` and the same for users.

    >>> fit_biases(np.array([0, 0]), np.array([0, 1]), np.array([5.0, 1.0]), 1, 2).item.round(2).tolist()
    [0.33, -0.33]

    Works for 0/1 labels as well. Ids that never occur keep bias 0.
    """
    mean = float(ratings_E.mean())
    user, item = np.zeros(num_users), np.zeros(num_items)
    user_count, item_count = np.bincount(users_E, minlength=num_users), np.bincount(items_E, minlength=num_items)
    for _ in range(num_passes):
        residual_E = ratings_E - mean - user[users_E]
        item = np.bincount(items_E, weights=residual_E, minlength=num_items) / (item_count + shrinkage)
        residual_E = ratings_E - mean - item[items_E]
        user = np.bincount(users_E, weights=residual_E, minlength=num_users) / (user_count + shrinkage)
    return Biases(mean, user, item)


def interaction_matrix(users_E: np.ndarray, items_E: np.ndarray, num_users: int, num_items: int) -> np.ndarray:
    """float64 `[U, I]` with 1 where the user has the item."""
    matrix = np.zeros((num_users, num_items))
    matrix[users_E, items_E] = 1.0
    return matrix


def popularity_scores(seen_UI: np.ndarray) -> np.ndarray:
    """float64 `[U, I]`: every user gets each item's number of users as its score."""
    return np.broadcast_to(seen_UI.sum(axis=0), seen_UI.shape)


def fit_ease(seen_UI: np.ndarray, regularisation: float = 300.0) -> np.ndarray:
    """EASE's item-to-item weights, float64 `[I, I]` with a zero diagonal; scores are `seen_UI @ weights`.

    The closed form of the linear model that predicts each item of a user from the user's other items:
    `P = inv(X'X + lambda I)`, `B = -P / diag(P)` column by column, `diag(B) = 0`. Takes O(I**3) time and O(I**2)
    memory: 1,682 items need a second and 23 MB.

    Source: Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.
    """
    gram_II = seen_UI.T @ seen_UI
    gram_II[np.diag_indices_from(gram_II)] += regularisation
    inverse_II = np.linalg.inv(gram_II)
    weights_II = -inverse_II / np.diag(inverse_II)
    np.fill_diagonal(weights_II, 0.0)
    return weights_II


def top_k(scores_UI: np.ndarray, k: int, seen_UI: np.ndarray | None = None) -> np.ndarray:
    """The k best items per user, best first, int64 `[U, k]`; items the user has in `seen_UI` are left out."""
    if seen_UI is not None:
        scores_UI = np.where(seen_UI > 0, -np.inf, scores_UI)
    best_Uk = np.argpartition(-scores_UI, k - 1, axis=1)[:, :k]
    order_Uk = np.argsort(-np.take_along_axis(scores_UI, best_Uk, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best_Uk, order_Uk, axis=1)


def hit_rate(top_Uk: np.ndarray, users_E: np.ndarray, items_E: np.ndarray) -> float:
    """The share of held-out (user, item) pairs whose item is among the user's k: TFRS's top-k accuracy."""
    return float((top_Uk[users_E] == items_E[:, None]).any(axis=1).mean())


def auc(scores_E: np.ndarray, labels_E: np.ndarray) -> float:
    """Area under the ROC curve from ranks; ties count half. Labels are 0 and 1, both present.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75

    Raises:
        ValueError: only one of the two classes is present.
    """
    labels_E = np.asarray(labels_E, dtype=np.float64)
    num_positive = labels_E.sum()
    if not 0 < num_positive < len(labels_E):
        raise ValueError(f"AUC needs both classes, got {num_positive:g} positives of {len(labels_E)}")
    _, group_E, count = np.unique(scores_E, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # 1-based, ties share the middle of their ranks
    rank_sum = (mean_rank[group_E] * labels_E).sum()
    num_negative = len(labels_E) - num_positive
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))
