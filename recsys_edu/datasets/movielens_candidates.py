"""What a trained CTR model is asked for a recommendation: one person, every film, at one moment.

The rows are made by the same functions as the rows of `movielens_ctr`, as ratings that nobody has made yet, so
each feature means here what it meant in training.

Shapes: E films.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from recsys_edu.datasets.movielens_ctr import (
    LIKE_THRESHOLD,
    MovieLensCTR,
    _dense_features,
    _examples,
    _sparse_features,
)
from recsys_edu.datasets.tabular import JaggedColumn, TabularData

STRANGER = 0  # no user has this id
FILM_SPARSE = ("item", "decade", "genres")


def films_with_training_data(task: MovieLensCTR) -> torch.Tensor:
    """The ids of all films that the training part rates, ascending: what can be recommended."""
    return task.train.sparse["item"].values.unique()


def candidates_for_user(task: MovieLensCTR, user_id: int, history: int = 20) -> TabularData:
    """One row per film with training data, as this user would meet it just after their latest rating.

    `history` is that of `movielens_ctr`. Labels are all 0 and mean nothing.

    Raises:
        KeyError: the training part has no rating of this user.
    """
    if not (task.train.sparse["user"].values == user_id).any():
        raise KeyError(f"user {user_id} has no training rating; users are 1 to {task.num_embeddings['user'] - 1}")
    return _candidates(task, user_id, history)


def candidates_for_likes(task: MovieLensCTR, liked: Sequence[int]) -> TabularData:
    """One row per film for a stranger of whom only some liked films are known.

    The other features of the person are empty bags, which pool to zeros, and the numbers of somebody who has
    rated nothing yet.

    Raises:
        KeyError: a liked film that the release does not have.
    """
    known = set(task.source.items["item_id"].to_list())
    if missing := [item for item in liked if item not in known]:
        raise KeyError(f"films {missing} are not among the {len(known)} films of this release")
    table = _candidates(task, STRANGER, history=1)
    count = len(table)
    of_person = {name: [] for name in table.sparse if name not in FILM_SPARSE} | {"liked": list(liked)}
    bags = {
        name: JaggedColumn.of_lengths(
            torch.tensor(ids, dtype=torch.int64).repeat(count), torch.full((count,), len(ids))
        )
        for name, ids in of_person.items()
        if name in table.sparse
    }
    return TabularData(
        table.dense, {name: bags.get(name, column) for name, column in table.sparse.items()}, table.labels
    )


def film_titles(task: MovieLensCTR, item_ids: torch.Tensor, scores: torch.Tensor | None = None) -> pl.DataFrame:
    """A table of films in the given order: title, year, genres, and their scores where given."""
    wanted = pl.DataFrame({"item_id": item_ids.to(torch.int32).numpy()})
    items = task.source.items.with_columns(pl.col("genres").list.join(", "))
    table = wanted.join(items, on="item_id", how="left", maintain_order="left").select("title", "year", "genres")
    if scores is None:
        return table
    return table.with_columns(pl.Series("score", scores.detach().double().flatten().numpy()).round(3))


def _candidates(task: MovieLensCTR, user_id: int, history: int) -> TabularData:
    """Append one example per film, which is no part of the training data, and keep those examples' features."""
    known = _examples(task.source)
    films = films_with_training_data(task).numpy()
    num_known, count = len(known["user_id"]), len(films)
    own = known["user_id"] == user_id
    moment = int(known["timestamp"][own].max() if own.any() else known["timestamp"].max()) + 1
    first_of_film = np.zeros(known["item_id"].max() + 1, dtype=np.int64)
    first_of_film[known["item_id"]] = np.arange(num_known)
    new = {
        "user_id": np.full(count, user_id),
        "item_id": films,
        "rating": np.zeros(count),
        "timestamp": np.full(count, moment),
        "year": known["year"][first_of_film[films]],
        "age": np.full(count, known["age"][own][0] if own.any() else np.median(known["age"])),
    }
    examples = {name: np.concatenate([column, new[name].astype(column.dtype)]) for name, column in known.items()}
    is_train = np.zeros(num_known + count, dtype=bool)
    is_train[task.rows["train"].numpy()] = True
    labels = (examples["rating"] >= LIKE_THRESHOLD).astype(np.float32)
    sparse, _ = _sparse_features(task.source, examples, labels, is_train, history)
    dense = _dense_features(examples, sparse["genres"], is_train)
    chosen = {name: sparse[name] for name in task.train.sparse}
    everything = TabularData(torch.from_numpy(dense), chosen, torch.zeros(len(is_train)))
    return everything.select(torch.arange(num_known, num_known + count))
