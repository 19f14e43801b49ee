from __future__ import annotations

import numpy as np
import pytest

from recsys_edu.datasets.movielens_splits import (
    Interactions,
    Split,
    split_leave_one_out,
    split_per_user,
    split_random,
    split_temporal,
)


def made(num: int = 400, users: int = 11, items: int = 30, seed: int = 0) -> Interactions:
    random = np.random.default_rng(seed)
    cells = random.choice(users * items, num if num < users * items else users * items, replace=False)
    return Interactions(
        cells // items,
        cells % items,
        random.integers(1, 6, len(cells)).astype(np.float32),
        random.integers(0, 50, len(cells)),
        np.arange(users) + 100,
        np.arange(items) + 500,
    )


def keys(part: Interactions) -> set[tuple[int, int]]:
    return set(zip(part.users.tolist(), part.items.tolist()))


def assert_partition(split: Split, whole: Interactions) -> None:
    parts = [keys(split.train), keys(split.valid), keys(split.test)]
    assert sum(map(len, parts)) == len(whole)
    assert set.union(*parts) == keys(whole)


@pytest.mark.parametrize(
    "cut",
    [
        lambda data: split_random(data, (0.8, 0.2)),
        lambda data: split_random(data, (0.7, 0.1, 0.2), seed=3),
        lambda data: split_per_user(data),
        lambda data: split_per_user(data, (0.75, 0.25)),
        lambda data: split_temporal(data),
        split_leave_one_out,
    ],
)
def test_every_rating_is_in_exactly_one_part(cut):
    data = made(200)
    assert_partition(cut(data), data)


def test_per_user_shares_and_seeds():
    data = made(200)
    split = split_per_user(data, (0.8, 0.1, 0.1), seed=1)
    for user in range(data.num_users):
        n = int((data.users == user).sum())
        held = max(int(0.1 * n), 1)
        assert (split.test.users == user).sum() == held
        assert (split.valid.users == user).sum() == held
    assert keys(split.test) != keys(split_per_user(data, seed=2).test)
    assert keys(split.test) == keys(split_per_user(data, seed=1).test)


def test_a_user_with_one_rating_only_trains():
    data = made(5, users=5)
    single = data.select(np.unique(data.users, return_index=True)[1])
    assert len(split_per_user(single).test) == 0


def test_temporal_split_never_trains_on_the_future():
    split = split_temporal(made(300), (0.6, 0.2, 0.2))
    assert split.train.times.max() < split.valid.times.min()
    assert split.valid.times.max() < split.test.times.min()
    assert 150 < len(split.train) < 210


def test_leave_one_out_takes_each_users_last_two():
    data = made(200)
    split = split_leave_one_out(data)
    for user in range(data.num_users):
        mine = np.flatnonzero(data.users == user)
        in_order = mine[np.argsort(data.times[mine], kind="stable")]
        assert split.test.items[split.test.users == user].tolist() == [data.items[in_order[-1]]]
        assert split.valid.items[split.valid.users == user].tolist() == [data.items[in_order[-2]]]


def test_wrong_shares_and_parts_are_named():
    data = made(50)
    with pytest.raises(ValueError, match="expected two"):
        split_random(data, (1.0,))
    with pytest.raises(ValueError, match="sum to 1"):
        split_temporal(data, (0.5, 0.4))
    with pytest.raises(ValueError, match=r'part=.*expected "valid" or "test"'):
        split_random(data).before("train")
