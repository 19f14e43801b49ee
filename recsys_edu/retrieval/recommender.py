"""Two stages: towers fetch candidates from all films, a rating model puts them in order.

    who asks -> query tower -> index: 100 of 1,682 -> minus what they have seen -> predicted stars -> list, with reasons

The towers answer "what would this person watch?", the rating model "how would they like it?". Either alone disappoints:
towers put what everybody watches first, ratings alone put the film with one enthusiastic viewer first.

Shapes: I items, D width, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from recsys_edu.datasets.movielens_formats import MovieLens
from recsys_edu.datasets.movielens_splits import Interactions
from recsys_edu.models.two_tower import TwoTower
from recsys_edu.retrieval.features import TowerFeatures
from recsys_edu.retrieval.index import ItemIndex
from recsys_edu.retrieval.rating import RatingModel
from recsys_edu.retrieval.training import item_vectors

LIKED_STARS = 4.0


@dataclass(frozen=True)
class Recommendation:
    """One film of a finished list.

    item: its number. retrieval_rank: its place among the candidates, from 1. retrieval_score: the towers' dot product.
    stars: predicted. because: the liked film (its number) whose vector is most like this one's, None without any.
    """

    item: int
    retrieval_rank: int
    retrieval_score: float
    stars: float
    because: int | None


class TwoStageRecommender:
    """Retrieve with towers and an index, rank with a rating model.

        recommender = TwoStageRecommender(data, split.train, tower, features, rating_model)
        recommender.table(recommender.for_user(41))
        recommender.table(recommender.for_ratings({49: 5.0, 171: 5.0}))     # a stranger who rated two films

    Users and items are numbers of `train`. `index` defaults to exact search over all items that someone has rated.
    `retrieval_weight` is how many stars one standard deviation of the retrieval score is worth in the final order;
    0 ranks by predicted stars alone.
    """

    def __init__(
        self,
        data: MovieLens,
        train: Interactions,
        tower: TwoTower,
        features: TowerFeatures,
        rating_model: RatingModel,
        index: ItemIndex | None = None,
        retrieval_weight: float = 0.2,
    ) -> None:
        self.data, self.train = data, train
        self.tower, self.features, self.rating_model = tower, features, rating_model
        self.retrieval_weight = retrieval_weight
        self.vectors_ID = item_vectors(tower, features)
        met = torch.from_numpy(train.items).unique()
        self.index = ItemIndex(self.vectors_ID[met], met) if index is None else index
        self._titles = _titles(data, train)

    def for_user(self, user: int, k: int = 10, num_candidates: int = 100) -> list[Recommendation]:
        """The list for a known user, without what they have rated.

        Raises:
            KeyError: there is no such user number.
        """
        ratings = self.ratings_of(user)
        query = self._query(self.features.queries(torch.tensor([user])))
        return self._ranked(query, self.rating_model.user_rows()[user], ratings, k, num_candidates)

    def for_ratings(self, ratings: Mapping[int, float], k: int = 10, num_candidates: int = 100) -> list[Recommendation]:
        """The list for a stranger who gave these ratings (item number -> stars); {} is somebody nobody knows at all.

        Films with 4 stars or more go into the query tower as history; all ratings into the rating model.

        Raises:
            ValueError: an item number out of range, or towers without the feature "history".
        """
        liked = [item for item, stars in ratings.items() if stars >= LIKED_STARS]
        query = self._query(self.features.stranger(liked))
        row = self.rating_model.fold_in(list(ratings), list(ratings.values()))
        return self._ranked(query, row, dict(ratings), k, num_candidates)

    def ratings_of(self, user: int) -> dict[int, float]:
        """What a user rated in the training part: item number -> stars.

        Raises:
            KeyError: there is no such user number.
        """
        if not 0 <= user < self.train.num_users:
            raise KeyError(f"no user number {user}; they are 0 to {self.train.num_users - 1}")
        mine = self.train.users == user
        return dict(zip(self.train.items[mine].tolist(), self.train.ratings[mine].tolist()))

    def title(self, item: int) -> str:
        """Title and year of an item number."""
        return self._titles[item]

    def find(self, text: str, limit: int = 10) -> dict[str, int]:
        """Films whose title contains `text`: title -> item number."""
        found = [(title, item) for item, title in enumerate(self._titles) if text.lower() in title.lower()]
        return dict(found[:limit])

    def table(self, recommendations: list[Recommendation]) -> pl.DataFrame:
        """A finished list for reading: title, predicted stars, place among the candidates, and why."""
        return pl.DataFrame(
            {
                "film": [self.title(each.item) for each in recommendations],
                "predicted stars": [round(each.stars, 2) for each in recommendations],
                "candidate": [each.retrieval_rank for each in recommendations],
                "because you liked": [
                    "" if each.because is None else self.title(each.because) for each in recommendations
                ],
            }
        )

    @torch.no_grad()
    def _query(self, batch) -> Tensor:
        return self.tower.query_vectors(self.tower.ebc(batch.sparse_features))

    def _ranked(
        self, query_1D: Tensor, user_row_D: Tensor, ratings: dict[int, float], k: int, num_candidates: int
    ) -> list[Recommendation]:
        seen = torch.tensor(sorted(ratings), dtype=torch.int64)
        scores, ids = self.index.search(query_1D, num_candidates, exclude=[seen])
        found_C = ids[0] >= 0
        scores_C, items_C = scores[0][found_C], ids[0][found_C]
        stars_C = self.rating_model.stars(user_row_D, self.rating_model.item_rows()[items_C]).clamp(1, 5)
        spread = scores_C.std() if len(scores_C) > 1 else torch.tensor(1.0)
        order = (stars_C + self.retrieval_weight * scores_C / spread.clamp(min=1e-6)).argsort(descending=True)[:k]
        liked = [item for item, stars in ratings.items() if stars >= LIKED_STARS]
        return [
            Recommendation(
                int(items_C[place]), int(place) + 1, float(scores_C[place]), float(stars_C[place]),
                self._nearest(int(items_C[place]), liked),
            )
            for place in order.tolist()
        ]  # fmt: skip

    def _nearest(self, item: int, liked: list[int]) -> int | None:
        if not liked:
            return None
        similarity = torch.cosine_similarity(self.vectors_ID[item][None], self.vectors_ID[torch.tensor(liked)])
        return liked[int(similarity.argmax())]


def _titles(data: MovieLens, train: Interactions) -> list[str]:
    rows = data.items.select("item_id", "title", "year").iter_rows()
    named = {item: f"{title} ({year})" if year is not None else title for item, title, year in rows}
    return [named.get(int(item), f"item {item}") for item in train.item_ids]
