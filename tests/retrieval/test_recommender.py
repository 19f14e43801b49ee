from __future__ import annotations

import pytest
import torch
from test_features_and_rating import two_tastes

from recsys_edu.datasets.movielens_splits import interactions, split_random
from recsys_edu.retrieval.rating import RatingSettings, train_rating_model
from recsys_edu.retrieval.recommender import TwoStageRecommender
from recsys_edu.retrieval.training import TowerSettings, train_towers


@pytest.fixture(scope="module")
def recommender() -> TwoStageRecommender:
    data = two_tastes(others=0.3)
    split = split_random(interactions(data))
    settings = TowerSettings(("user", "history", "item"), dim=8, batch_size=128, epochs=12, num_uniform=8, l2=0.01)
    tower, features = train_towers(data, split, settings)
    rating_model = train_rating_model(split.train, RatingSettings(dim=8, epochs=60, batch_size=64, l2=0.01))
    return TwoStageRecommender(data, split.train, tower, features, rating_model)


def test_known_users_get_unseen_films_of_their_taste(recommender):
    right = 0
    for user in range(40):
        found = recommender.for_user(user, k=3, num_candidates=12)
        seen = recommender.ratings_of(user)
        assert len(found) == 3 and not {each.item for each in found} & set(seen)
        assert all(1 <= each.stars <= 5 and 1 <= each.retrieval_rank <= 12 for each in found)
        right += sum(each.item % 2 == user % 2 for each in found)
    assert right / 120 > 0.7


def test_strangers_are_told_by_what_they_rated_and_get_a_reason(recommender):
    found = recommender.for_ratings({0: 5.0, 2: 5.0, 4: 4.0, 1: 1.0}, k=5, num_candidates=10)
    assert sum(each.item % 2 == 0 for each in found) >= 4
    assert {each.because for each in found} <= {0, 2, 4}
    assert not {each.item for each in found} & {0, 1, 2, 4}
    nobody = recommender.for_ratings({}, k=4)
    assert len(nobody) == 4 and all(each.because is None for each in nobody)


def test_lists_have_titles(recommender):
    table = recommender.table(recommender.for_ratings({0: 5.0}, k=2))
    assert table.columns == ["film", "predicted stars", "candidate", "because you liked"]
    assert table["because you liked"].to_list() == ["The Even Film 0 (1950)"] * 2
    assert recommender.find("FILM 29") == {"The Odd Film 29": 29}


def test_order_is_by_stars_alone_with_no_retrieval_weight(recommender):
    recommender.retrieval_weight, before = 0.0, recommender.retrieval_weight
    stars = [each.stars for each in recommender.for_user(3, k=8)]
    recommender.retrieval_weight = before
    assert stars == sorted(stars, reverse=True)
    assert torch.tensor(stars).std() > 0


def test_unknown_people_and_films_are_named(recommender):
    with pytest.raises(KeyError, match="no user number 40"):
        recommender.for_user(40)
    with pytest.raises(ValueError, match=r"item numbers \[30\]"):
        recommender.for_ratings({30: 5.0})
