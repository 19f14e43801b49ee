"""What the towers read: ids, and what is known about a user and a film besides.

    query      user, age, gender, occupation, history (films the user has), month (time of the query)
    candidate  item, title (words), genres, decade

Side features let the towers say something about a film nobody has rated and a user nobody has met: an unknown id is
an *empty bag*, which pools to zero, and the other features carry the vector.

Shapes: E examples, U users, I items, N values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recsys_edu.datasets.movielens_formats import MovieLens
from recsys_edu.datasets.movielens_splits import Interactions
from recsys_edu.datasets.tabular import JaggedColumn
from recsys_edu.datasets.utils import Batch
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

QUERY_FEATURES = ("user", "age", "gender", "occupation", "history", "month")
CANDIDATE_FEATURES = ("item", "title", "genres", "decade")
_NUM_AGES, _SECONDS_PER_MONTH, _MIN_WORD_FILMS = 10, 30 * 86_400, 3


@dataclass(frozen=True)
class TowerFeatures:
    """One jagged column per feature over all users (query side) or all items (candidate side).

    query: name -> column of U bags. candidate: name -> column of I bags. rows: feature -> rows its table needs.
    `history` is not a column: `batch` makes it from the training interactions, without the row's own item.
    """

    query: dict[str, JaggedColumn]
    candidate: dict[str, JaggedColumn]
    rows: dict[str, int]
    train: Interactions = field(repr=False)
    history: JaggedColumn | None = None
    with_month: bool = False
    max_history: int = 50

    @property
    def query_names(self) -> list[str]:
        """Query features in the KJT's order."""
        more = [name for name, there in (("history", self.history), ("month", self.with_month)) if there]
        return [*self.query, *more]

    @property
    def candidate_names(self) -> list[str]:
        """Candidate features in the KJT's order."""
        return list(self.candidate)

    def tables(self, dim: int, *, init: float = 0.05) -> list[EmbeddingBagConfig]:
        """One table per feature, bags averaged."""
        return [
            EmbeddingBagConfig(
                name=f"t_{name}", num_embeddings=self.rows[name], embedding_dim=dim, feature_names=[name],
                pooling=PoolingType.MEAN, weight_init_min=-init, weight_init_max=init,
            )
            for name in [*self.query_names, *self.candidate_names]
        ]  # fmt: skip

    def batch(
        self,
        users_B: Tensor,
        items_B: Tensor,
        times_B: Tensor | None = None,
        *,
        negatives_M: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """B (user, item) pairs as a Batch, with M more rows that only have an item.

        A row's own item is left out of its history; of long histories `max_history` are drawn anew every time.
        """
        num_more = 0 if negatives_M is None else len(negatives_M)
        parts = [column.take(users_B) for column in self.query.values()]
        if self.history is not None:
            parts.append(_drawn_history(self.history, users_B, items_B, self.max_history, generator))
        if self.with_month:
            parts.append((self._months(users_B, times_B), torch.ones(len(users_B), dtype=torch.int32)))
        parts = [(values, torch.cat([lengths, lengths.new_zeros(num_more)])) for values, lengths in parts]
        items = items_B if negatives_M is None else torch.cat([items_B, negatives_M])
        parts += [column.take(items) for column in self.candidate.values()]
        return Batch(
            torch.zeros(len(users_B), 0),
            _kjt([*self.query_names, *self.candidate_names], parts, len(items)),
            torch.ones(len(users_B)),
        )

    def batches(
        self, batch_size: int, *, seed: int = 0, num_uniform: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """One epoch of the training pairs, shuffled; each batch with `num_uniform` items drawn uniformly.

        `rank` gets its slice of every batch. The order depends on the seed alone.
        """
        generator = torch.Generator().manual_seed(seed)
        users, items, times = (
            torch.from_numpy(part.copy()) for part in (self.train.users, self.train.items, self.train.times)
        )
        for rows_B in torch.randperm(len(users), generator=generator).split(batch_size):
            rows_B = rows_B.tensor_split(world_size)[rank]
            drawn = torch.randint(self.train.num_items, (num_uniform,), generator=generator) if num_uniform else None
            yield self.batch(users[rows_B], items[rows_B], times[rows_B], negatives_M=drawn, generator=generator)

    def all_users(self) -> Batch:
        """Every user as a query at the moment of their last training rating; the item features are empty."""
        users = torch.arange(self.train.num_users)
        last = np.zeros(self.train.num_users, dtype=np.int64)
        np.maximum.at(last, self.train.users, self.train.times)
        times = torch.from_numpy(last)
        return self.queries(users, times)

    def queries(self, users_B: Tensor, times_B: Tensor | None = None) -> Batch:
        """Known users as queries, with their whole history (at most `max_history`)."""
        parts = [column.take(users_B) for column in self.query.values()]
        if self.history is not None:
            everything = torch.full_like(users_B, -1)
            parts.append(_drawn_history(self.history, users_B, everything, self.max_history, None))
        if self.with_month:
            parts.append((self._months(users_B, times_B), torch.ones(len(users_B), dtype=torch.int32)))
        return self._one_sided(parts, query=True)

    def stranger(self, liked: Sequence[int]) -> Batch:
        """A query by somebody of whom only films (item numbers) are known: every other bag is empty.

        Raises:
            ValueError: these towers have no history, or an item number is out of range.
        """
        if self.history is None:
            raise ValueError("a stranger can only be told by the films they like; name 'history' among the features")
        if wrong := [item for item in liked if not 0 <= item < self.train.num_items]:
            raise ValueError(f"item numbers {wrong} do not lie in [0, {self.train.num_items})")
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
        mine = (torch.tensor(list(liked), dtype=torch.int64), torch.tensor([len(liked)], dtype=torch.int32))
        return self._one_sided([mine if name == "history" else empty for name in self.query_names], query=True)

    def all_items(self, *, without_ids: Iterable[int] = ()) -> Batch:
        """Every item as a candidate; those in `without_ids` as if nobody had met them: features, but no id."""
        items = torch.arange(self.train.num_items)
        known = torch.ones(len(items), dtype=torch.bool)
        known[torch.tensor(sorted(without_ids), dtype=torch.int64)] = False
        parts = [
            (items[known], known.int()) if name == "item" else column.take(items)
            for name, column in self.candidate.items()
        ]
        return self._one_sided(parts, query=False)

    def _one_sided(self, parts: list[tuple[Tensor, Tensor]], *, query: bool) -> Batch:
        count = len(parts[0][1])
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(count, dtype=torch.int32))
        left = parts if query else [empty] * len(self.query_names)
        right = [empty] * len(self.candidate_names) if query else parts
        names = [*self.query_names, *self.candidate_names]
        return Batch(torch.zeros(count, 0), _kjt(names, [*left, *right], count), torch.ones(count))

    def _months(self, users_B: Tensor, times_B: Tensor | None) -> Tensor:
        if times_B is None:
            times_B = torch.full((len(users_B),), int(self.train.times.max()))
        month_B = (times_B - int(self.train.times.min())).div(_SECONDS_PER_MONTH, rounding_mode="floor")
        return month_B.clamp(0, self.rows["month"] - 1)


def tower_features(
    data: MovieLens,
    train: Interactions,
    names: Iterable[str] = ("user", "item"),
    *,
    max_history: int = 50,
) -> TowerFeatures:
    """The columns of the named features (see the top of this file), for every user and every item.

    >>> features = tower_features(data, split.train, ("user", "history", "item", "title", "genres"))   # doctest: +SKIP

    Title words that fewer than 3 films have are left out, so the vocabulary is small and no word names one film.

    Raises:
        ValueError: an unknown feature, no `item` or no query feature; age, gender or
            occupation of a release without users.
    """
    names = list(names)
    if unknown := [name for name in names if name not in QUERY_FEATURES + CANDIDATE_FEATURES]:
        known = ", ".join(QUERY_FEATURES + CANDIDATE_FEATURES)
        raise ValueError(f"unknown tower features {unknown}; known are {known}")
    of_person = {"age", "gender", "occupation"} & set(names)
    if of_person and data.users is None:
        raise ValueError(f"this release has no user file, so no {', '.join(sorted(of_person))}")
    columns: dict[str, JaggedColumn] = {}
    rows: dict[str, int] = {"user": train.num_users, "item": train.num_items, "history": train.num_items}
    for name, (column, size) in (_user_columns(data, train) | _item_columns(data, train)).items():
        columns[name], rows[name] = column, size
    rows["month"] = int((train.times.max() - train.times.min()) // _SECONDS_PER_MONTH) + 1
    query = {name: columns[name] for name in QUERY_FEATURES if name in names and name in columns}
    candidate = {name: columns[name] for name in CANDIDATE_FEATURES if name in names}
    history = _history(train) if "history" in names else None
    if "item" not in candidate or not (query or history or "month" in names):
        raise ValueError(f"expected 'item' (it tells candidates apart) and a query feature, got {names}")
    return TowerFeatures(query, candidate, rows, train, history, "month" in names, max_history)


def words(title: str) -> list[str]:
    """The words of a title in lower case, without articles.

    >>> words("Good, The Bad and The Ugly, The")
    ['good', 'bad', 'ugly']
    """
    return [word for word in re.findall(r"[a-z0-9']+", title.lower()) if word not in {"the", "a", "an", "and", "of"}]


def _user_columns(data: MovieLens, train: Interactions) -> dict[str, tuple[JaggedColumn, int]]:
    ids = torch.arange(train.num_users)
    columns = {"user": (JaggedColumn.of_single_ids(ids), train.num_users)}
    if data.users is None:
        return columns
    place = {int(user): row for row, user in enumerate(data.users["user_id"].to_list())}
    chosen = data.users[[place[int(user)] for user in train.user_ids]]
    ages = torch.tensor(chosen["age"].to_list()).div(10, rounding_mode="floor").clamp(0, _NUM_AGES - 1)
    columns["age"] = (JaggedColumn.of_single_ids(ages), _NUM_AGES)
    for name in ("gender", "occupation"):
        columns[name] = _bags([[value] for value in chosen[name].to_list()])
    return columns


def _item_columns(data: MovieLens, train: Interactions) -> dict[str, tuple[JaggedColumn, int]]:
    place = {int(item): row for row, item in enumerate(data.items["item_id"].to_list())}
    titles, genres, years = (data.items[name].to_list() for name in ("title", "genres", "year"))
    films = [place.get(int(item)) for item in train.item_ids]
    decades = [[] if film is None or years[film] is None else [years[film] // 10] for film in films]
    return {
        "item": (JaggedColumn.of_single_ids(torch.arange(train.num_items)), train.num_items),
        "title": _bags([[] if film is None else words(titles[film]) for film in films], _MIN_WORD_FILMS),
        "genres": _bags([[] if film is None else list(genres[film]) for film in films]),
        "decade": _bags(decades),
    }


def _bags(bags: list[list], at_least: int = 1) -> tuple[JaggedColumn, int]:
    """Values numbered in sorted order; those in fewer than `at_least` bags are dropped."""
    count: dict = {}
    for bag in bags:
        for value in set(bag):
            count[value] = count.get(value, 0) + 1
    number = {value: row for row, value in enumerate(sorted(v for v, n in count.items() if n >= at_least))}
    kept = [[number[value] for value in bag if value in number] for bag in bags]
    values = torch.tensor([value for bag in kept for value in bag], dtype=torch.int64)
    return JaggedColumn.of_lengths(values, torch.tensor([len(bag) for bag in kept])), max(len(number), 1)


def _history(train: Interactions) -> JaggedColumn:
    order = np.argsort(train.users, kind="stable")
    lengths_U = np.bincount(train.users, minlength=train.num_users)
    return JaggedColumn.of_lengths(torch.from_numpy(train.items[order]), torch.from_numpy(lengths_U))


def _drawn_history(
    history: JaggedColumn, users_B: Tensor, own_B: Tensor, at_most: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Up to `at_most` films of each row's user without the row's own; without a generator evenly spread ones."""
    lengths_B = history.offsets[users_B + 1] - history.offsets[users_B]
    steps_H = torch.arange(at_most)
    if generator is None:
        places_BH = steps_H * lengths_B[:, None] // torch.maximum(lengths_B, torch.tensor(at_most))[:, None]
        places_BH = torch.where(lengths_B[:, None] > at_most, places_BH, steps_H)
    else:
        start_B = (torch.rand(len(users_B), generator=generator) * lengths_B).long()
        places_BH = (start_B[:, None] + steps_H) % lengths_B.clamp(min=1)[:, None]
    there_BH = steps_H < lengths_B[:, None]
    position_BH = (history.offsets[users_B][:, None] + places_BH).clamp(max=max(len(history.values) - 1, 0))
    films_BH = history.values[position_BH]
    there_BH &= films_BH != own_B[:, None]
    return films_BH[there_BH], there_BH.sum(1).int()


def _kjt(names: list[str], parts: list[tuple[Tensor, Tensor]], stride: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=names,
        values=torch.cat([values for values, _ in parts]),
        lengths=torch.cat([lengths for _, lengths in parts]),
        stride=stride,
    )
