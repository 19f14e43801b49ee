from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from recsys_edu.datasets.baselines import fit_biases
from recsys_edu.datasets.movielens_formats import MovieLens
from recsys_edu.datasets.movielens_splits import interactions, split_random
from recsys_edu.retrieval.evaluation import evaluate_ranking, rating_rmse
from recsys_edu.retrieval.features import tower_features, words
from recsys_edu.retrieval.rating import RatingSettings, predicted_ratings, train_rating_model
from recsys_edu.retrieval.training import TowerSettings, tower_scores, train_towers

EVERYTHING = ("user", "age", "gender", "occupation", "history", "month", "item", "title", "genres", "decade")


def two_tastes(num_users: int = 40, num_items: int = 30, seed: int = 0, others: float = 0.05) -> MovieLens:
    """Even users take (and love) even films, odd users odd ones; both see a few of the others."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for item in range(num_items):
            same = user % 2 == item % 2
            if random.random() < (0.6 if same else others):
                rows.append((user + 1, item + 1, 5.0 if same else 1.0, int(random.integers(0, 10_000_000))))
    ratings = pl.DataFrame(
        rows,
        schema={"user_id": pl.Int32, "item_id": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64},
        orient="row",
    )
    items = pl.DataFrame(
        {
            "item_id": range(1, num_items + 1),
            "title": [f"The {'Even' if item % 2 == 0 else 'Odd'} Film {item}" for item in range(num_items)],
            "year": [1950 + item for item in range(num_items - 1)] + [None],
            "genres": [["Drama"] if item % 2 == 0 else ["Comedy", "Sci-Fi"] for item in range(num_items)],
        }
    )
    users = pl.DataFrame(
        {
            "user_id": range(1, num_users + 1),
            "age": [20 + user for user in range(num_users)],
            "gender": ["F", "M"] * (num_users // 2),
            "occupation": ["writer"] * num_users,
            "zip_code": ["00000"] * num_users,
        }
    )
    return MovieLens(ratings, items, users)


DATA = two_tastes()
SPLIT = split_random(interactions(DATA))


def test_columns_hold_what_is_known():
    features = tower_features(DATA, SPLIT.train, EVERYTHING)
    batch = features.batch(torch.tensor([3]), torch.tensor([2]), torch.tensor([0]))
    kjt = batch.sparse_features
    assert kjt.keys() == [*features.query_names, *features.candidate_names] == list(EVERYTHING)
    assert kjt["age"].values().tolist() == [2]
    assert kjt["title"].lengths().tolist() == [2]  # "even", "film"; the number stands in one title only
    assert len(kjt["genres"].values()) == 1
    last = features.batch(torch.tensor([0]), torch.tensor([29])).sparse_features
    assert last["decade"].lengths().tolist() == [0]
    assert words("Good, The Bad and The Ugly, The") == ["good", "bad", "ugly"]


@pytest.mark.parametrize("max_history", [3, 100])
def test_no_row_has_its_own_item_in_its_history(max_history):
    features = tower_features(DATA, SPLIT.train, ("history", "item"), max_history=max_history)
    taken = {user: set(SPLIT.train.items[SPLIT.train.users == user].tolist()) for user in range(40)}
    count = 0
    for batch in features.batches(64, num_uniform=5):
        history, items = batch.sparse_features["history"], batch.sparse_features["item"].values()
        assert history.lengths()[-5:].tolist() == [0] * 5
        for row, films in enumerate(history.values().split(history.lengths().tolist())[:-5]):
            assert items[row] not in films
            assert len(films) <= max_history
            assert len(set(films.tolist())) == len(films)
            assert any(set(films.tolist()) | {int(items[row])} <= mine for mine in taken.values())
            count += 1
    assert count == len(SPLIT.train)


def test_every_rank_gets_its_slice_of_the_same_batches():
    features = tower_features(DATA, SPLIT.train, ("user", "item"))
    whole = [batch.sparse_features["user"].values() for batch in features.batches(64, seed=2)]
    halves = [
        [batch.sparse_features["user"].values() for batch in features.batches(64, seed=2, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert all(torch.equal(a, torch.cat(pair)) for a, *pair in zip(whole, *halves))


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"unknown tower features \['zip'\]"):
        tower_features(DATA, SPLIT.train, ("user", "zip"))
    with pytest.raises(ValueError, match="and a query feature"):
        tower_features(DATA, SPLIT.train, ("user",))
    with pytest.raises(ValueError, match="no user file"):
        tower_features(MovieLens(DATA.ratings, DATA.items), SPLIT.train, ("age", "item"))
    with pytest.raises(ValueError, match="name 'history' among"):
        tower_features(DATA, SPLIT.train).stranger([1])


@pytest.mark.parametrize("features", [("user", "item"), ("history", "item"), EVERYTHING, ("user", "item", "title")])
def test_towers_learn_two_tastes(features):
    settings = TowerSettings(features, dim=8, batch_size=128, epochs=12, num_uniform=8, l2=0.01)
    tower, made = train_towers(DATA, SPLIT, settings)
    scores_UI = tower_scores(tower, made)
    same_UI = torch.arange(40)[:, None] % 2 == torch.arange(30) % 2
    assert scores_UI[same_UI].mean() > scores_UI[~same_UI].mean() + 0.5
    random = evaluate_ranking(torch.rand(40, 30), SPLIT, seen="removed", ks=(5,))["recall@5"]
    assert evaluate_ranking(scores_UI, SPLIT, seen="removed", ks=(5,))["recall@5"] > random + 0.1


def test_unmet_films_and_people_get_vectors_from_their_features():
    settings = TowerSettings(("history", "item", "title", "genres"), dim=8, batch_size=128, epochs=12, num_uniform=8)
    tower, features = train_towers(DATA, SPLIT, settings)
    with torch.no_grad():
        met = tower.ebc(features.all_items().sparse_features)
        unmet = tower.ebc(features.all_items(without_ids=[4, 5]).sparse_features)
        vectors_ID = tower.candidate_vectors(unmet)
        query_1D = tower.query_vectors(tower.ebc(features.stranger([0, 2, 6]).sparse_features))
    assert torch.equal(unmet["item"][[4, 5]], torch.zeros(2, 8))
    assert torch.equal(unmet["item"][:4], met["item"][:4])
    assert query_1D @ vectors_ID[4] > query_1D @ vectors_ID[5]  # both without an id: 4 is a drama like 0, 2 and 6


def test_rating_model_beats_biases_and_folds_strangers_in():
    split = split_random(interactions(two_tastes(others=0.4)))
    model = train_rating_model(split.train, RatingSettings(dim=8, epochs=60, batch_size=64, l2=0.01))
    train, test = split.train, split.test
    biases = fit_biases(train.users, train.items, train.ratings, 40, 30)
    rmse = rating_rmse(predicted_ratings(model, test).numpy(), test)
    assert rmse < 0.8 * rating_rmse(biases.predict(test.users, test.items), test)
    assert torch.equal(model.fold_in([], []), torch.zeros(8))
    stars_I = model.stars(model.fold_in([0, 2, 1], [5, 5, 1]), model.item_rows())
    assert stars_I[4::2].mean() > stars_I[3::2].mean() + 1.0
    with pytest.raises(ValueError, match="1 items but 2 ratings"):
        model.fold_in([1], [5, 4])
