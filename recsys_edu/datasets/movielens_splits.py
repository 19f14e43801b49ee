"""Ratings numbered from 0, and the ways to cut them into training, validation and test.

| split | cut | answers |
|---|---|---|
| `split_random` | all ratings shuffled | TFRS's and most tutorials' protocol; a model may learn from the future |
| `split_per_user` | every user's ratings shuffled | RecBole's general protocol; every user is in every part |
| `split_temporal` | at moments, the same for everybody | what a service would have predicted on that day |
| `split_leave_one_out` | each user's last rating (and last but one) | what this user takes next |

A number without its split, its ranking (all items, or some) and its policy for seen items cannot be compared.

Shapes: E ratings, U users, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from recsys_edu.datasets.baselines import interaction_matrix
from recsys_edu.datasets.movielens_ctr import random_split
from recsys_edu.datasets.movielens_formats import MovieLens

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Interactions:
    """E ratings of U users and I items, numbered from 0.

    users, items int64 `[E]`; ratings float32 `[E]`; times int64 `[E]`, seconds. user_ids `[U]` and item_ids `[I]` are
    the numbers of the release: `item_ids[items]`.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray
    user_ids: np.ndarray = field(repr=False)
    item_ids: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def select(self, rows: np.ndarray) -> Interactions:
        """The ratings at `rows` (numbers or a mask); users and items keep their numbers."""
        parts = (column[rows] for column in (self.users, self.items, self.ratings, self.times))
        return Interactions(*parts, self.user_ids, self.item_ids)

    def matrix(self) -> np.ndarray:
        """float64 `[U, I]`, 1 where the user has the item."""
        return interaction_matrix(self.users, self.items, self.num_users, self.num_items)


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of the same ratings; `protocol` says in words how they were cut."""

    train: Interactions
    valid: Interactions
    test: Interactions
    protocol: str

    def before(self, part: str) -> list[Interactions]:
        """What is known when `part` is predicted: the training part, and for the test the validation part as well.

        Raises:
            ValueError: `part` is neither "valid" nor "test".
        """
        if part not in ("valid", "test"):
            raise ValueError(f'part={part!r}: expected "valid" or "test"')
        return [self.train] if part == "valid" else [self.train, self.valid]


def interactions(data: MovieLens) -> Interactions:
    """The ratings of a release; every item of its item file gets a number, also one that nobody has rated."""
    ratings = data.ratings
    item_ids = np.union1d(data.items["item_id"].to_numpy(), ratings["item_id"].to_numpy())
    user_ids, users = np.unique(ratings["user_id"].to_numpy(), return_inverse=True)
    items = np.searchsorted(item_ids, ratings["item_id"].to_numpy())
    times = ratings["timestamp"].to_numpy()
    return Interactions(users.astype(np.int64), items.astype(np.int64), ratings["rating"].to_numpy(), times, user_ids,
                        item_ids)  # fmt: skip


def split_random(data: Interactions, shares: Sequence[float] = (0.8, 0.2), seed: int = 0) -> Split:
    """All ratings shuffled and cut into two (training, test) or three shares.

    Raises:
        ValueError: shares that are not two or three positive numbers with sum 1.
    """
    rows = [part.numpy() for part in random_split(len(data), _two_or_three(shares), seed)]
    return _split(data, rows, f"random {_named(shares)}, seed {seed}")


def split_per_user(data: Interactions, shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Each user's ratings shuffled and cut; each part but the training gets at least one rating of a user with two.

    Of n ratings the parts after the first get `floor(share * n)`, or 1 where that is 0 and the training keeps one;
    the training part gets the rest (RecBole's ratio split grouped by user).

    Raises:
        ValueError: shares that are not two or three positive numbers with sum 1.
    """
    shares = _two_or_three(shares)
    random_split(len(data), shares, 0)  # checks the shares
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(len(data)), data.users))
    counts_U = np.bincount(data.users, minlength=data.num_users)
    rank_E = np.arange(len(data)) - np.repeat(np.cumsum(counts_U) - counts_U, counts_U)
    sizes = []
    left_U = counts_U.copy()
    for share in shares[:0:-1]:
        size_U = np.floor(share * counts_U + 1e-9).astype(np.int64)
        size_U = np.where((size_U == 0) & (left_U > 1), 1, size_U)
        sizes.insert(0, size_U)
        left_U = left_U - size_U
    part_E = np.zeros(len(data), dtype=np.int64)
    cut_U = left_U
    for size_U in sizes:
        part_E += rank_E >= np.repeat(cut_U, counts_U)
        cut_U = cut_U + size_U
    rows = [np.sort(order[part_E == part]) for part in range(len(shares))]
    return _split(data, rows, f"per user {_named(shares)}, seed {seed}")


def split_temporal(data: Interactions, shares: Sequence[float] = (0.8, 0.1, 0.1)) -> Split:
    """Cut at moments: ratings of one second stay together, so the shares are met only about.

    Raises:
        ValueError: shares that are not two or three positive numbers with sum 1.
    """
    shares = _two_or_three(shares)
    random_split(len(data), shares, 0)  # checks the shares
    sorted_times = np.sort(data.times)
    places = np.minimum((np.cumsum(shares)[:-1] * len(data)).round().astype(int), len(data) - 1)
    part_E = np.searchsorted(sorted_times[places], data.times, side="right")
    rows = [np.flatnonzero(part_E == part) for part in range(len(shares))]
    return _split(data, rows, f"temporal {_named(shares)}")


def split_leave_one_out(data: Interactions) -> Split:
    """Each user's last rating is the test, the one before it the validation; users with fewer than three only train.

    Ratings of one second are ordered as in the file.
    """
    order = np.lexsort((np.arange(len(data)), data.times, data.users))
    counts_U = np.bincount(data.users, minlength=data.num_users)
    from_end_E = np.repeat(np.cumsum(counts_U), counts_U) - 1 - np.arange(len(data))
    enough_E = np.repeat(counts_U, counts_U) >= 3
    part_E = np.where(enough_E & (from_end_E == 0), 2, np.where(enough_E & (from_end_E == 1), 1, 0))
    rows = [np.sort(order[part_E == part]) for part in range(3)]
    return _split(data, rows, "leave one out by time")


def _two_or_three(shares: Sequence[float]) -> list[float]:
    if len(shares) not in (2, 3):
        raise ValueError(f"shares {list(shares)}: expected two (training, test) or three (training, validation, test)")
    return list(shares)


def _named(shares: Sequence[float]) -> str:
    return ":".join(f"{100 * share:g}" for share in shares)


def _split(data: Interactions, rows: Sequence[np.ndarray], protocol: str) -> Split:
    if len(rows) == 2:
        rows = [rows[0], np.zeros(0, dtype=np.int64), rows[1]]
    return Split(*(data.select(part) for part in rows), protocol)
