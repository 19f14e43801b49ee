"""MovieLens as a click-through task: does this user like this film (rating 4 or 5)?

Protocol (RecBole's CTR setting): label 1 where the rating is at least 4; all ratings split 8 : 1 : 1 at random.
Nothing leaks: every statistic comes from the training part alone. For a training example the means leave out the
whole fold (a tenth of the training part) that it is in, so that no feature contains its own label; and what is called
"past" or "recent" uses only training ratings strictly older than the example.

    dense   age, year, hour_sin, hour_cos, user_days, item_days
            user_count, item_count             log(1 + number of other training ratings)
            user_mean, item_mean               mean training rating, shrunk towards the overall mean
            user_genre_mean                    how far the user rates films of these genres above the films' means
            user_recent_mean                   mean of the user's latest 10 past ratings
            (all z-scored with the training part's moments)
    sparse  user, item, gender, occupation, zip_prefix, decade       one id each
            genres                                                   a bag
            liked, disliked                                          bags: the user's latest past ratings, as items

Shapes: E examples, N values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch

from recsys_edu.datasets.movielens_formats import MovieLens, load_movielens_100k
from recsys_edu.datasets.tabular import JaggedColumn, TabularBatches, TabularData

LIKE_THRESHOLD = 4.0
DENSE_NAMES = (
    "age", "year", "hour_sin", "hour_cos", "user_days", "item_days", "user_count", "item_count", "user_mean",
    "item_mean", "user_genre_mean", "user_recent_mean",
)  # fmt: skip
_PRIOR_STRENGTH = 5.0
_NUM_FOLDS = 10
_NUM_RECENT = 10
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class MovieLensCTR:
    """The three parts of the task, and what a model must know to be built for it.

    train, valid, test: TabularData. num_embeddings: sparse feature -> rows its table needs (row 0 is "unknown").
    rows: part name -> row numbers in `source.ratings`.
    """

    train: TabularData
    valid: TabularData
    test: TabularData
    dense_names: list[str]
    num_embeddings: dict[str, int]
    rows: dict[str, torch.Tensor]
    source: MovieLens = field(repr=False)

    @property
    def sparse_names(self) -> list[str]:
        """The KJT's keys, in order."""
        return list(self.num_embeddings)

    def batches(
        self,
        part: str = "train",
        batch_size: int = 1024,
        *,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> TabularBatches:
        """Batches of one part ("train", "valid", "test"); only the training part is shuffled unless you say so.

        Raises:
            ValueError: there is no such part.
        """
        if part not in ("train", "valid", "test"):
            raise ValueError(f'part={part!r}: expected "train", "valid" or "test"')
        if shuffle is None:
            shuffle = part == "train"
        table = getattr(self, part)
        options = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last, "rank": rank, "world_size": world_size}
        return TabularBatches(table, batch_size, **options)


def random_split(num_rows: int, shares: Iterable[float], seed: int) -> list[torch.Tensor]:
    """Row numbers of a random partition in the given shares (summing to 1), each part in ascending order.

    Raises:
        ValueError: the shares are not positive or do not sum to 1.
    """
    shares = list(shares)
    if min(shares) <= 0 or not math.isclose(sum(shares), 1.0):
        raise ValueError(f"shares {shares} must be positive and sum to 1")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    cuts = [0, *(round(num_rows * share) for share in np.cumsum(shares))]
    return [order[low:high].sort().values for low, high in itertools.pairwise(cuts)]


def movielens_ctr(
    data: MovieLens | None = None,
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    history: int = 20,
    features: Iterable[str] | None = None,
) -> MovieLensCTR:
    """MovieLens (default: 100K, fetched on first use) as training, validation and test tables for a CTR model.

    >>> task = movielens_ctr(seed=0)                                # doctest: +SKIP
    >>> batch = next(iter(task.batches("train", 1024)))             # doctest: +SKIP
    >>> batch.dense_features.shape, batch.sparse_features.keys()    # doctest: +SKIP

    seed: of the split. history: at most so many ids in `liked` and `disliked`. features: the sparse features to
    keep (default: all; a release without a user file has no gender, occupation, zip_prefix, and age is 0).

    Raises:
        ValueError: an unknown feature name, or shares that do not sum to 1.
        DataUnavailableError: 100K is neither cached nor obtainable.
    """
    data = load_movielens_100k() if data is None else data
    parts = dict(zip(("train", "valid", "test"), random_split(data.ratings.height, shares, seed)))
    is_train = np.zeros(data.ratings.height, dtype=bool)
    is_train[parts["train"].numpy()] = True

    examples = _examples(data)
    labels = (examples["rating"] >= LIKE_THRESHOLD).astype(np.float32)
    sparse, num_embeddings = _sparse_features(data, examples, labels, is_train, history)
    dense = _dense_features(examples, sparse["genres"], is_train)
    if features is not None:
        chosen = list(features)
        if unknown := [name for name in chosen if name not in sparse]:
            raise ValueError(f"unknown sparse features {unknown}; this data has {list(sparse)}")
        sparse = {name: sparse[name] for name in chosen}
    everything = TabularData(torch.from_numpy(dense), sparse, torch.from_numpy(labels))
    return MovieLensCTR(
        **{name: everything.select(rows) for name, rows in parts.items()},
        dense_names=list(DENSE_NAMES),
        num_embeddings={name: num_embeddings[name] for name in sparse},
        rows=parts,
        source=data,
    )


def _examples(data: MovieLens) -> dict[str, np.ndarray]:
    """One array per column over all ratings, in file order, joined with the items' and users' columns."""
    joined = data.ratings.join(data.items.select("item_id", "year"), on="item_id", how="left", maintain_order="left")
    if data.users is not None:
        joined = joined.join(data.users.select("user_id", "age"), on="user_id", how="left", maintain_order="left")
    else:
        joined = joined.with_columns(pl.lit(0).alias("age"))
    median_year = joined["year"].median() or 0
    joined = joined.with_columns(pl.col("year").fill_null(median_year), pl.col("age").fill_null(0))
    return {name: joined[name].to_numpy() for name in ("user_id", "item_id", "rating", "timestamp", "year", "age")}


@dataclass(frozen=True)
class _Timeline:
    """Training ratings sorted by (owner, time), to ask what an owner's past was at some time.

    keys: owner and time packed in one sortable int64. rows: the rating each stands for.
    """

    keys: np.ndarray
    rows: np.ndarray

    @staticmethod
    def pack(owner: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
        return (owner.astype(np.int64) << 34) | timestamp.astype(np.int64)  # 2**34 s: times up to the year 2514

    @classmethod
    def of(cls, owner: np.ndarray, timestamp: np.ndarray, chosen: np.ndarray) -> _Timeline:
        rows = np.flatnonzero(chosen)
        keys = cls.pack(owner[rows], timestamp[rows])
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], rows[order])

    def past(self, owner: np.ndarray, timestamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per example the range [start, end) in `rows` of its owner's strictly earlier ratings."""
        start = np.searchsorted(self.keys, self.pack(owner, np.zeros_like(timestamp)), side="left")
        return start, np.searchsorted(self.keys, self.pack(owner, timestamp), side="left")


def _recent_mean(
    owner: np.ndarray, timestamp: np.ndarray, ratings: np.ndarray, is_train: np.ndarray, prior: np.ndarray
) -> np.ndarray:
    """Mean of the owner's latest past ratings, shrunk towards `prior` where they are few."""
    timeline = _Timeline.of(owner, timestamp, is_train)
    start, end = timeline.past(owner, timestamp)
    start = np.maximum(start, end - _NUM_RECENT)
    total_before = np.concatenate([[0.0], np.cumsum(ratings[timeline.rows], dtype=np.float64)])
    return (total_before[end] - total_before[start] + _PRIOR_STRENGTH * prior) / (end - start + _PRIOR_STRENGTH)


def _out_of_fold_mean(
    owner: np.ndarray, ratings: np.ndarray, is_train: np.ndarray, fold: np.ndarray, prior: float
) -> np.ndarray:
    """Mean of the owner's training ratings outside the example's fold, shrunk towards `prior`.

    Without folds a model that also knows the owner's id could work out the example's own label from the mean.
    """
    key = owner.astype(np.int64) * _NUM_FOLDS + fold
    num_keys = (int(owner.max()) + 1) * _NUM_FOLDS
    count = np.bincount(key[is_train], minlength=num_keys).reshape(-1, _NUM_FOLDS)
    total = np.bincount(key[is_train], weights=ratings[is_train], minlength=num_keys).reshape(-1, _NUM_FOLDS)
    others_count = count.sum(axis=1)[owner] - np.where(is_train, count[owner, fold], 0)
    others_total = total.sum(axis=1)[owner] - np.where(is_train, total[owner, fold], 0)
    return (others_total + _PRIOR_STRENGTH * prior) / (others_count + _PRIOR_STRENGTH)


def _genre_mean(
    user: np.ndarray, residual: np.ndarray, is_train: np.ndarray, fold: np.ndarray, genres: JaggedColumn
) -> np.ndarray:
    """Over an example's genres, the average of the user's out-of-fold mean residual on films of that genre."""
    lengths = genres.offsets.diff().numpy()
    example = np.repeat(np.arange(len(lengths)), lengths)  # one entry per (example, genre)
    owner = user[example].astype(np.int64) * (int(genres.values.max()) + 1) + genres.values.numpy()
    means = _out_of_fold_mean(owner, residual[example], is_train[example], fold[example], 0.0)
    return np.bincount(example, weights=means, minlength=len(lengths)) / np.maximum(lengths, 1)


def _days_since_first(owner: np.ndarray, timestamp: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Log-scaled days between the owner's first training rating and the example (0 when there is none)."""
    first = np.full(owner.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, owner[is_train], timestamp[is_train])
    return np.log1p(np.maximum(timestamp - np.minimum(first[owner], timestamp), 0) / _SECONDS_PER_DAY)


def _log_count_of_others(owner: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    counts = np.bincount(owner[is_train], minlength=owner.max() + 1)
    return np.log1p(counts[owner] - is_train)  # a training example does not count itself


def _dense_features(examples: dict[str, np.ndarray], genres: JaggedColumn, is_train: np.ndarray) -> np.ndarray:
    user, item, time, ratings = (examples[name] for name in ("user_id", "item_id", "timestamp", "rating"))
    overall_mean = float(ratings[is_train].mean())
    fold = np.random.default_rng(0).integers(_NUM_FOLDS, size=len(user))
    user_mean = _out_of_fold_mean(user, ratings, is_train, fold, overall_mean)
    item_mean = _out_of_fold_mean(item, ratings, is_train, fold, overall_mean)
    angle = 2 * np.pi * (time % _SECONDS_PER_DAY) / _SECONDS_PER_DAY
    columns = {
        "age": examples["age"],
        "year": examples["year"],
        "hour_sin": np.sin(angle),
        "hour_cos": np.cos(angle),
        "user_days": _days_since_first(user, time, is_train),
        "item_days": _days_since_first(item, time, is_train),
        "user_count": _log_count_of_others(user, is_train),
        "item_count": _log_count_of_others(item, is_train),
        "user_mean": user_mean,
        "item_mean": item_mean,
        "user_genre_mean": _genre_mean(user, ratings - item_mean, is_train, fold, genres),
        "user_recent_mean": _recent_mean(user, time, ratings, is_train, user_mean),
    }
    matrix = np.stack([columns[name].astype(np.float64) for name in DENSE_NAMES], axis=1)
    mean, deviation = matrix[is_train].mean(axis=0), matrix[is_train].std(axis=0)
    return ((matrix - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)


def _history(examples: dict[str, np.ndarray], chosen: np.ndarray, history: int) -> JaggedColumn:
    """Items of the user's latest `history` past ratings among the chosen training ratings."""
    timeline = _Timeline.of(examples["user_id"], examples["timestamp"], chosen)
    start, end = timeline.past(examples["user_id"], examples["timestamp"])
    lengths = np.minimum(end - start, history)
    ends = np.cumsum(lengths)
    positions = np.arange(lengths.sum()) + np.repeat(end - ends, lengths)
    items = examples["item_id"][timeline.rows[positions]]
    return JaggedColumn.of_lengths(torch.from_numpy(items.copy()), torch.from_numpy(lengths))


def _codes(texts: pl.Series) -> tuple[torch.Tensor, int]:
    """1, 2, ... for the distinct texts in sorted order (0 for a missing one), and the rows a table needs."""
    names = sorted(texts.drop_nulls().unique())
    number = {name: code for code, name in enumerate(names, start=1)}
    return torch.tensor([number.get(text, 0) for text in texts]), len(names) + 1


def _per_owner(owner_ids: pl.Series, codes: torch.Tensor, owner_of_example: np.ndarray) -> JaggedColumn:
    """One code per example, looked up by its owner; owners without a row get 0."""
    table = torch.zeros(int(max(owner_ids.max(), owner_of_example.max())) + 1, dtype=torch.int64)
    table[torch.from_numpy(owner_ids.to_numpy().astype(np.int64))] = codes
    return JaggedColumn.of_single_ids(table[torch.from_numpy(owner_of_example.astype(np.int64))])


def _sparse_features(
    data: MovieLens, examples: dict[str, np.ndarray], labels: np.ndarray, is_train: np.ndarray, history: int
) -> tuple[dict[str, JaggedColumn], dict[str, int]]:
    user, item = examples["user_id"], examples["item_id"]
    num_items = int(max(item.max(), data.items["item_id"].max())) + 1
    sparse = {
        "user": JaggedColumn.of_single_ids(torch.from_numpy(user.copy())),
        "item": JaggedColumn.of_single_ids(torch.from_numpy(item.copy())),
    }
    num_embeddings = {"user": int(user.max()) + 1, "item": num_items}

    def add(name: str, owner_ids: pl.Series, texts: pl.Series, owner_of_example: np.ndarray) -> None:
        codes, num_embeddings[name] = _codes(texts)
        sparse[name] = _per_owner(owner_ids, codes, owner_of_example)

    if data.users is not None:
        user_ids = data.users["user_id"]
        add("gender", user_ids, data.users["gender"], user)
        add("occupation", user_ids, data.users["occupation"], user)
        add("zip_prefix", user_ids, data.users["zip_code"].str.slice(0, 2), user)
    add("decade", data.items["item_id"], (data.items["year"] // 10 * 10).cast(pl.String), item)
    sparse["genres"], num_embeddings["genres"] = _genres(data, item)
    sparse["liked"] = _history(examples, is_train & (labels == 1), history)
    sparse["disliked"] = _history(examples, is_train & (labels == 0), history)
    num_embeddings["liked"] = num_embeddings["disliked"] = num_items
    return sparse, num_embeddings


def _genres(data: MovieLens, item_of_example: np.ndarray) -> tuple[JaggedColumn, int]:
    codes, num_rows = _codes(data.items["genres"].explode().drop_nulls())
    lengths = torch.from_numpy(data.items["genres"].list.len().to_numpy().astype(np.int64))
    per_row = JaggedColumn.of_lengths(codes, lengths)
    # a last, empty bag stands for items that the item file lacks
    per_row = JaggedColumn(per_row.values, torch.cat([per_row.offsets, per_row.offsets[-1:]]))
    row_of_item = np.full(int(max(data.items["item_id"].max(), item_of_example.max())) + 1, data.items.height)
    row_of_item[data.items["item_id"].to_numpy()] = np.arange(data.items.height)
    return JaggedColumn.of_lengths(*per_row.take(torch.from_numpy(row_of_item[item_of_example]))), num_rows
