"""Top-k metrics for retrieval: recall@k, NDCG@k, hit rate@k and precision@k when *all* items are ranked.

    top_ids  [U, K]   the ranking of each user, best first                  7  2  9
    relevant          the items each user really took                      {2, 5}
    hits     [U, K]   is the k-th recommendation relevant?                  0  1  0      recall@3 = 1/2, hit@3 = 1

Rank all items: scores against a handful of sampled negatives may order two models differently (Krichene and Rendle,
On Sampled Metrics for Item Recommendation, KDD 2020). Mask out what the user took before, or the model is paid for
repeating it.

Shapes: U users, K ranks, I items, N relevant (user, item) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_ranking(scores_UI: Tensor, k: int, exclude_UI: Tensor | None = None) -> Tensor:
    """The k best items of each user ``[U, K]``; items where ``exclude_UI`` is True come last."""
    if exclude_UI is not None:
        scores_UI = scores_UI.masked_fill(exclude_UI, float("-inf"))
    return scores_UI.topk(min(k, scores_UI.shape[1]), dim=1).indices


def hits_from_ids(top_ids_UK: Tensor, relevant_ids_N: Tensor, relevant_lengths_U: Tensor) -> Tensor:
    """Which recommendations are relevant, ``[U, K]`` bool; user u's relevant items lie jagged in ``relevant_ids_N``.

    >>> hits_from_ids(torch.tensor([[7, 2, 9]]), torch.tensor([2, 5]), torch.tensor([2]))
    tensor([[False,  True, False]])

    Raises ValueError when the lengths do not add up to the number of ids or are not one per user.
    """
    num_users = len(top_ids_UK)
    if len(relevant_lengths_U) != num_users or int(relevant_lengths_U.sum()) != len(relevant_ids_N):
        raise ValueError(
            f"{num_users} users need {num_users} lengths that add up to {len(relevant_ids_N)} relevant ids;"
            f" got {len(relevant_lengths_U)} lengths with sum {int(relevant_lengths_U.sum())}"
        )
    # One number per (user, item) pair turns the question into a set lookup.
    highest = max([int(ids.max()) for ids in (top_ids_UK, relevant_ids_N) if ids.numel()], default=0)
    user_U = torch.arange(num_users, device=top_ids_UK.device) * (highest + 1)
    relevant_pairs_N = torch.repeat_interleave(user_U, relevant_lengths_U) + relevant_ids_N
    return torch.isin(user_U[:, None] + top_ids_UK, relevant_pairs_N)


def recall_at_k(hits_UK: Tensor, num_relevant_U: Tensor, k: int) -> Tensor:
    """Per user: relevant items among the first k, over all relevant items; 0 for a user without any."""
    return hits_UK[:, :k].sum(dim=1) / num_relevant_U.clamp(min=1).double()


def precision_at_k(hits_UK: Tensor, k: int) -> Tensor:
    """Per user: relevant items among the first k, over k."""
    return hits_UK[:, :k].sum(dim=1).double() / k


def hit_rate_at_k(hits_UK: Tensor, k: int) -> Tensor:
    """Per user: 1 if any of the first k is relevant, else 0."""
    return hits_UK[:, :k].any(dim=1).double()


def ndcg_at_k(hits_UK: Tensor, num_relevant_U: Tensor, k: int) -> Tensor:
    """Per user: DCG over that of the best possible first k ranks, with gains 0 and 1; 0 for a user without any.

    >>> ndcg_at_k(torch.tensor([[False, True, False]]), torch.tensor([1]), k=3)  # 1 / log2(3)
    tensor([0.6309], dtype=torch.float64)
    """
    ranks_K = torch.arange(k, device=hits_UK.device, dtype=torch.float64)
    discounts_K = 1.0 / (ranks_K + 2).log2()
    hits_UK = hits_UK[:, :k]
    dcg_U = (hits_UK * discounts_K[: hits_UK.shape[1]]).sum(dim=1)
    best_U = ((ranks_K < num_relevant_U[:, None]) * discounts_K).sum(dim=1)
    return torch.where(best_U > 0, dcg_U / best_U.clamp(min=1e-12), torch.zeros_like(dcg_U))


class RankingMetrics:
    """Means over users, gathered batch by batch; users without a relevant item are left out.

    >>> metrics = RankingMetrics(ks=(1, 2))
    >>> metrics.update(torch.tensor([[7, 2, 9]]), torch.tensor([2, 5]), torch.tensor([2]))
    >>> metrics.compute()["recall@2"]
    0.5

    `merge` adds another accumulator, for example one of another process.
    """

    def __init__(self, ks: tuple[int, ...] = (10,)) -> None:
        self.ks = tuple(ks)
        self.num_users = 0
        self._sums = {f"{name}@{k}": 0.0 for k in self.ks for name in ("recall", "ndcg", "hit", "precision")}

    def update(self, top_ids_UK: Tensor, relevant_ids_N: Tensor, relevant_lengths_U: Tensor) -> None:
        """Add users; every row of ``top_ids_UK`` is a ranking, best first, of at least max(ks) items if there are."""
        hits_UK = hits_from_ids(top_ids_UK, relevant_ids_N, relevant_lengths_U)
        counted = relevant_lengths_U > 0
        hits_UK, num_relevant_U = hits_UK[counted], relevant_lengths_U[counted]
        self.num_users += len(hits_UK)
        for k in self.ks:
            for name, value_U in (
                ("recall", recall_at_k(hits_UK, num_relevant_U, k)),
                ("ndcg", ndcg_at_k(hits_UK, num_relevant_U, k)),
                ("hit", hit_rate_at_k(hits_UK, k)),
                ("precision", precision_at_k(hits_UK, k)),
            ):
                self._sums[f"{name}@{k}"] += float(value_U.sum())  # host sync: the sums are Python floats

    def merge(self, other: RankingMetrics) -> None:
        """Add the users of ``other``; raises ValueError when it was made for other ks."""
        if self.ks != other.ks:
            raise ValueError(f"cannot merge metrics at {other.ks} into metrics at {self.ks}")
        self.num_users += other.num_users
        for key, value in other._sums.items():
            self._sums[key] += value

    def compute(self) -> dict[str, float]:
        """The mean over users by name, nan without users."""
        return {key: value / self.num_users if self.num_users else float("nan") for key, value in self._sums.items()}
