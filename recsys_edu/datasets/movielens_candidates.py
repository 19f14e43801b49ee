"""What a trained CTR model is asked for a recommendation: one person, every film.

A row of `movielens_ctr` holds what was known about a user and about a film when the rating was made. To
recommend, the user's side of their latest row is joined with the film's side of *its* latest row.

    user's side   dense: age, hour_sin, hour_cos, user_days, user_count, user_past_mean
                  sparse: user, gender, occupation, zip_prefix, liked, disliked
    film's side   dense: year, item_days, item_count, item_past_mean         sparse: item, decade, genres

Shapes: E films.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch

from recsys_edu.datasets.movielens_ctr import MovieLensCTR
from recsys_edu.datasets.tabular import JaggedColumn, TabularData

ITEM_DENSE = ("year", "item_days", "item_count", "item_past_mean")
ITEM_SPARSE = ("item", "decade", "genres")


def films_with_training_data(task: MovieLensCTR) -> torch.Tensor:
    """The ids of all films that the training part rates, ascending: what can be recommended."""
    return task.train.sparse["item"].values.unique()


def candidates_for_user(task: MovieLensCTR, user_id: int) -> TabularData:
    """One row per film with training data, as this user would meet it after their latest training rating.

    Labels are all 0 and mean nothing.

    Raises:
        KeyError: the training part has no rating of this user.
    """
    rows = torch.nonzero(task.train.sparse["user"].values == user_id).flatten()
    if not len(rows):
        raise KeyError(f"user {user_id} has no training rating; users are 1 to {task.num_embeddings['user'] - 1}")
    latest_row = rows[_times(task)[rows].argmax()]
    films = _latest_row_of_each_film(task)
    sparse = {
        name: JaggedColumn.of_lengths(*column.take(films if name in ITEM_SPARSE else latest_row.expand(len(films))))
        for name, column in task.train.sparse.items()
    }
    dense = task.train.dense[latest_row].repeat(len(films), 1)
    return TabularData(_with_film_side(task, dense, films), sparse, torch.zeros(len(films)))


def candidates_for_likes(task: MovieLensCTR, liked: Sequence[int]) -> TabularData:
    """One row per film for a stranger of whom only some liked films are known.

    What is not known is an empty bag, which pools to zeros, and the average of each dense feature, which is 0.

    Raises:
        KeyError: a liked film that the release does not have.
    """
    known = set(task.source.items["item_id"].to_list())
    if missing := [item for item in liked if item not in known]:
        raise KeyError(f"films {missing} are not among the {len(known)} films of this release")
    films = _latest_row_of_each_film(task)
    sparse = {}
    for name, column in task.train.sparse.items():
        if name in ITEM_SPARSE:
            sparse[name] = JaggedColumn.of_lengths(*column.take(films))
        else:
            bag = torch.tensor(list(liked) if name == "liked" else [], dtype=torch.int64)
            sparse[name] = JaggedColumn.of_lengths(bag.repeat(len(films)), torch.full((len(films),), len(bag)))
    dense = torch.zeros(len(films), len(task.dense_names))
    return TabularData(_with_film_side(task, dense, films), sparse, torch.zeros(len(films)))


def film_titles(task: MovieLensCTR, item_ids: torch.Tensor, scores: torch.Tensor | None = None) -> pl.DataFrame:
    """A table of films in the given order: title, year, genres, and their scores where given."""
    wanted = pl.DataFrame({"item_id": item_ids.to(torch.int32).numpy()})
    items = task.source.items.with_columns(pl.col("genres").list.join(", "))
    table = wanted.join(items, on="item_id", how="left", maintain_order="left").select("title", "year", "genres")
    if scores is None:
        return table
    return table.with_columns(pl.Series("score", scores.detach().float().flatten().numpy()).round(3))


def _with_film_side(task: MovieLensCTR, dense: torch.Tensor, films: torch.Tensor) -> torch.Tensor:
    columns = [task.dense_names.index(name) for name in ITEM_DENSE]
    dense[:, columns] = task.train.dense[films][:, columns]
    return dense


def _times(task: MovieLensCTR) -> torch.Tensor:
    return torch.from_numpy(task.source.ratings["timestamp"].to_numpy().copy())[task.rows["train"]]


def _latest_row_of_each_film(task: MovieLensCTR) -> torch.Tensor:
    """For every film with training data, in ascending order of its id, the row of its latest training rating."""
    by_time = _times(task).argsort(stable=True)
    latest = torch.full((task.num_embeddings["item"],), -1)
    items = task.train.sparse["item"].values[by_time]
    latest.scatter_reduce_(0, items, torch.arange(len(items)), "amax")
    return by_time[latest[latest >= 0]]
