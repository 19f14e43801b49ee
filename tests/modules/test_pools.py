"""Pools against a dictionary of slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.modules.keyed_jagged_tensor_pool import KeyedJaggedTensorPool
from recsys_edu.modules.tensor_pool import TensorPool
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

SLOTS, LIMITS = 6, {"a": 2, "b": 3}
slots = st.lists(st.integers(0, SLOTS - 1), max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(slots, max_size=5), slots)
def test_rows_are_those_written_last(updates, asked):
    pool, by_hand = TensorPool(SLOTS, 3, torch.int64), {slot: [0, 0, 0] for slot in range(SLOTS)}
    for number, ids in enumerate(updates):
        rows = [[number, place, slot] for place, slot in enumerate(ids)]
        pool.update(torch.tensor(ids, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64).view(-1, 3))
        by_hand.update(zip(ids, rows))
    assert pool(torch.tensor(asked, dtype=torch.int64)).tolist() == [by_hand[slot] for slot in asked]
    again = TensorPool(SLOTS, 3, torch.int64, loaded_values=pool.pool)
    again.load_state_dict(pool.state_dict())
    assert torch.equal(again.pool, pool.pool)


def bags_of(draw_lengths: list[tuple[int, int]], number: int) -> dict[str, list[list[int]]]:
    return {
        "a": [[100 * number + place] * lengths[0] for place, lengths in enumerate(draw_lengths)],
        "b": [[-100 * number - place] * lengths[1] for place, lengths in enumerate(draw_lengths)],
    }


def kjt_of(bags: dict[str, list[list[int]]], keys: list[str], weighted: bool) -> KeyedJaggedTensor:
    flat = [value for key in keys for bag in bags[key] for value in bag]
    values = torch.tensor(flat, dtype=torch.int32)
    lengths = torch.tensor([len(bag) for key in keys for bag in bags[key]], dtype=torch.int32)
    return KeyedJaggedTensor(keys, values, values.float() / 2 if weighted else None, lengths=lengths)


updates_of_bags = st.lists(
    st.lists(st.tuples(st.integers(0, SLOTS - 1), st.tuples(st.integers(0, 2), st.integers(0, 3))), max_size=5),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(updates_of_bags, slots, st.booleans())
def test_bags_are_those_written_last(updates, asked, weighted):
    pool = KeyedJaggedTensorPool(SLOTS, LIMITS, torch.int32, weighted)
    by_hand = {slot: {"a": [], "b": []} for slot in range(SLOTS)}
    for number, update in enumerate(updates):
        bags = bags_of([lengths for _, lengths in update], number + 1)
        ids = [slot for slot, _ in update]
        pool.update(torch.tensor(ids, dtype=torch.int64), kjt_of(bags | {"c": bags["a"]}, ["b", "c", "a"], weighted))
        by_hand.update({slot: {key: bags[key][place] for key in LIMITS} for place, slot in enumerate(ids)})
    found = pool.lookup(torch.tensor(asked, dtype=torch.int64))
    assert found.keys() == ["a", "b"] and found.stride() == len(asked)
    for key in LIMITS:
        assert [bag.tolist() for bag in found[key].to_dense()] == [by_hand[slot][key] for slot in asked]
        if weighted:
            assert torch.equal(found[key].weights(), found[key].values().float() / 2)
    again = KeyedJaggedTensorPool(SLOTS, LIMITS, torch.int32, weighted)
    again.load_state_dict(pool.state_dict())
    assert torch.equal(again(torch.arange(SLOTS)).values(), pool(torch.arange(SLOTS)).values())


def test_bad_input_writes_nothing():
    rows = TensorPool(SLOTS, 3, torch.float32)
    for ids, values, error in [
        ([SLOTS], torch.ones(1, 3), IndexError),
        ([-1], torch.ones(1, 3), IndexError),
        ([0], torch.ones(1, 2), ValueError),
        ([0], torch.ones(2, 3), ValueError),
        ([0], torch.ones(1, 3).double(), ValueError),
        ([[0]], torch.ones(1, 3), ValueError),
    ]:
        with pytest.raises(error, match=r"slot|expected|one-dimensional"):
            rows.update(torch.tensor(ids), values)
    assert not rows.pool.any()
    bags = KeyedJaggedTensorPool(SLOTS, LIMITS, torch.int32, is_weighted=True)
    good = {"a": [[1, 2]], "b": [[3]]}
    for ids, values, error, message in [
        ([SLOTS], kjt_of(good, ["a", "b"], True), IndexError, "no slot"),
        ([0, 1], kjt_of(good, ["a", "b"], True), ValueError, "batch size of 1"),
        ([0], kjt_of({"a": [[1]]}, ["a"], True), KeyError, "no features"),
        (
            [0],
            kjt_of({"a": [[1, 2, 3]], "b": [[]]}, ["a", "b"], True),
            ValueError,
            "a bag of 3 values, the pool keeps 2",
        ),
        ([0], kjt_of(good, ["a", "b"], False), ValueError, "no weights"),
        ([0], kjt_of(good, ["a", "b"], True).to(torch.device("cpu")), None, ""),
    ]:
        if error is None:
            continue
        with pytest.raises(error, match=message):
            bags.update(torch.tensor(ids), values)
    with pytest.raises(ValueError, match="the pool holds"):
        long = kjt_of(good, ["a", "b"], True)
        bags.update(torch.tensor([0]), KeyedJaggedTensor(["a", "b"], long.values().long(), lengths=long.lengths()))
    assert not bags.key_lengths.any() and not bags.values.any()
