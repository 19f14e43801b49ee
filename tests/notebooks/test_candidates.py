"""Recommendation candidates: each row is what training would have seen, had the person rated that film just now."""

import pytest
import torch

from recsys_edu.datasets.download import is_movielens_100k_cached
from recsys_edu.datasets.movielens_candidates import (
    candidates_for_likes,
    candidates_for_user,
    film_titles,
    films_with_training_data,
)
from recsys_edu.datasets.movielens_ctr import movielens_ctr

pytestmark = pytest.mark.skipif(not is_movielens_100k_cached(), reason="MovieLens-100K is not in the cache")


@pytest.fixture(scope="module")
def task():
    return movielens_ctr(seed=0)


def test_a_users_candidates_are_every_film_with_the_users_past(task):
    table = candidates_for_user(task, 42)
    films = films_with_training_data(task)
    assert torch.equal(table.sparse["item"].values, films)
    assert (table.sparse["user"].values == 42).all()
    rows = torch.nonzero(task.train.sparse["user"].values == 42).flatten()
    rated_by_42 = set(task.train.sparse["item"].values[rows].tolist())
    liked, lengths = table.sparse["liked"].take(torch.tensor([0, len(films) - 1]))
    assert lengths.tolist() == [20, 20] and set(liked.tolist()) <= rated_by_42
    age = task.dense_names.index("age")
    assert torch.allclose(table.dense[:, age], task.train.dense[rows[0], age].expand(len(films)), atol=1e-5)


def test_a_candidate_that_was_rated_looks_like_its_row(task):
    """The film's genres and year equal those of the training row of the same film."""
    table = candidates_for_user(task, 7)
    films = table.sparse["item"].values
    row = int(torch.nonzero(task.train.sparse["item"].values == films[100])[0])
    genres, _ = table.sparse["genres"].take(torch.tensor([100]))
    expected, _ = task.train.sparse["genres"].take(torch.tensor([row]))
    year = task.dense_names.index("year")
    assert torch.equal(genres, expected)
    assert table.dense[100, year] == pytest.approx(task.train.dense[row, year].item(), abs=1e-5)


def test_a_stranger_is_empty_bags_and_their_likes(task):
    table = candidates_for_likes(task, [50, 181])
    batch = table.batch(torch.arange(3))
    assert batch.sparse_features["liked"].values().tolist() == [50, 181] * 3
    for name in ("user", "gender", "occupation", "zip_prefix", "disliked"):
        assert batch.sparse_features[name].lengths().tolist() == [0, 0, 0]
    assert batch.sparse_features["item"].lengths().tolist() == [1, 1, 1]
    assert torch.isfinite(table.dense).all() and table.dense.abs().max() < 20


def test_unknown_people_and_films_are_named(task):
    with pytest.raises(KeyError, match="user 5000"):
        candidates_for_user(task, 5000)
    with pytest.raises(KeyError, match="99999"):
        candidates_for_likes(task, [50, 99999])


def test_titles_come_in_the_order_asked(task):
    table = film_titles(task, torch.tensor([50, 1]), torch.tensor([0.9, 0.8]))
    assert table["title"].to_list() == ["Star Wars", "Toy Story"]
    assert table["score"].to_list() == pytest.approx([0.9, 0.8])
