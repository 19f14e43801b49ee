"""How good a ranking of all items is: the split, the policy for seen items, baselines beside it, and an interval.

    scores [U, I]  ->  (seen="removed": what the user already has cannot be recommended)  ->  top k  ->  metrics

`seen="kept"` is TFRS's tutorial: a model is then punished for every film it remembers, and popularity beats it.
`seen="removed"` is what a service does. The two differ by a factor of two; a number means nothing without it.

Shapes: U users, I items, K ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recsys_edu.datasets.baselines import fit_biases, fit_ease, popularity_scores
from recsys_edu.datasets.movielens_splits import Interactions, Split
from recsys_edu.metrics.ranking import RankingMetrics, full_ranking, hits_from_ids

SeenPolicy = Literal["removed", "kept"]

_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95%, for 1 to 30 degrees of freedom."""


def evaluate_ranking(
    scores_UI: Tensor | np.ndarray,
    split: Split,
    *,
    seen: SeenPolicy,
    ks: Sequence[int] = (10, 100),
    part: str = "test",
) -> dict[str, float]:
    """Rank all items for every user; means over users, and `top@k`, the mean over held-out (user, item) pairs.

    >>> evaluate_ranking(scores, split, seen="removed")["recall@10"]          # doctest: +SKIP
    0.2717

    recall, ndcg, hit, precision: see `metrics.ranking`; users without a held-out item are left out. top@k is TFRS's
    "top-k categorical accuracy". seen="removed" drops what the user has in the training part, and for part="test"
    also the validation part.

    Raises:
        ValueError: scores of another shape than users x items, an unknown policy or part, or NaN among the scores.
    """
    if seen not in ("removed", "kept"):
        raise ValueError(f'seen={seen!r}: expected "removed" or "kept"')
    known = split.before(part)
    scores_UI = scores_UI if isinstance(scores_UI, Tensor) else torch.from_numpy(np.array(scores_UI))
    expected = (split.train.num_users, split.train.num_items)
    if tuple(scores_UI.shape) != expected:
        raise ValueError(f"scores have shape {tuple(scores_UI.shape)}, expected users x items = {expected}")
    if scores_UI.isnan().any():  # host sync: a ranking of NaN means nothing
        raise ValueError("some scores are NaN: did training diverge?")
    exclude_UI = seen_mask(known) if seen == "removed" else None
    top_UK = full_ranking(scores_UI, max(ks), exclude_UI)
    return metrics_of(top_UK, getattr(split, part), ks)


def metrics_of(top_UK: Tensor, held_out: Interactions, ks: Sequence[int]) -> dict[str, float]:
    """The metrics of finished rankings (best first) against held-out interactions."""
    items_N, lengths_U = relevant_items(held_out)
    metrics = RankingMetrics(tuple(ks))
    metrics.update(top_UK, items_N, lengths_U)
    hits_UK = hits_from_ids(top_UK, items_N, lengths_U)
    return metrics.compute() | {f"top@{k}": float(hits_UK[:, :k].sum()) / max(len(items_N), 1) for k in ks}


def seen_mask(parts: Iterable[Interactions]) -> Tensor:
    """bool `[U, I]`: True where the user has the item in one of the parts."""
    parts = list(parts)
    mask_UI = torch.zeros(parts[0].num_users, parts[0].num_items, dtype=torch.bool)
    for part in parts:
        mask_UI[torch.from_numpy(part.users), torch.from_numpy(part.items)] = True
    return mask_UI


def relevant_items(part: Interactions) -> tuple[Tensor, Tensor]:
    """The items of each user, jagged: ids `[N]` user after user, and lengths `[U]`."""
    order = np.argsort(part.users, kind="stable")
    lengths_U = np.bincount(part.users, minlength=part.num_users)
    return torch.from_numpy(part.items[order]), torch.from_numpy(lengths_U)


def baseline_scores(
    split: Split, *, names: Sequence[str] = ("popularity", "biases", "EASE"), ease: float = 300.0
) -> dict[str, np.ndarray]:
    """Scores `[U, I]` of the recommenders that a model has to beat, fitted on the training part.

    "biases" ranks by predicted rating: good for guessing ratings, bad for guessing what is watched.

    Raises:
        ValueError: an unknown name.
    """
    train = split.train
    seen_UI = train.matrix()
    makers: dict[str, Callable[[], np.ndarray]] = {
        "popularity": lambda: popularity_scores(seen_UI),
        "biases": lambda: _bias_scores(train),
        "EASE": lambda: seen_UI @ fit_ease(seen_UI, ease),
    }
    if unknown := [name for name in names if name not in makers]:
        raise ValueError(f"unknown baselines {unknown}; known are {', '.join(makers)}")
    return {name: makers[name]() for name in names}


def rating_rmse(predicted_E: Tensor | np.ndarray, held_out: Interactions) -> float:
    """Root mean squared error of predicted ratings, in stars; predictions are cut to 1 to 5."""
    predicted_E = np.clip(np.asarray(predicted_E, dtype=np.float64), 1.0, 5.0)
    return float(np.sqrt(np.square(predicted_E - held_out.ratings).mean()))


def bias_rmse(split: Split) -> float:
    """The RMSE on the test part of user and item biases: what a rating model has to beat."""
    train, test = split.train, split.test
    fitted = fit_biases(train.users, train.items, train.ratings, train.num_users, train.num_items)
    return rating_rmse(fitted.predict(test.users, test.items), test)


def _bias_scores(train: Interactions) -> np.ndarray:
    fitted = fit_biases(train.users, train.items, train.ratings, train.num_users, train.num_items)
    return fitted.mean + fitted.user[:, None] + fitted.item


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its 95% confidence interval `mean - half_width` to `mean + half_width`."""

    mean: float
    half_width: float
    num_runs: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half_width:.4f} ({self.num_runs} runs)"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95% interval over independent runs; one run has an infinite interval.

    >>> print(estimate([0.55, 0.56, 0.57]))
    0.5600 ± 0.0248 (3 runs)

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no values to average")
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), math.inf, 1)
    quantile = _T_95[n - 2] if n - 2 < len(_T_95) else 1.96
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n), n)


def over_seeds(run: Callable[[int], dict[str, float]], seeds: Iterable[int]) -> dict[str, Estimate]:
    """Call `run(seed)` for each seed; the estimate of every number that it returns.

    A seed should change the split *and* the model: intervals over model seeds alone are too narrow.
    """
    results = [run(seed) for seed in seeds]
    return {name: estimate([result[name] for result in results]) for name in results[0]}
