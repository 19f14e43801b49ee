"""Ids out of range: a message that names everything, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import BACKENDS, make_spec, random_batch, snapshot, with_random_weights

from recsys_edu.kernels import OPTIMIZER_KINDS, check_ids, make_kernel

FEATURES, TABLES, ROWS = ["user", "item"], ["t_user", "t_item"], [4, 6]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 3, 6, 1], ["'item'", "id 6", "position 0", "'t_item'", "6 rows", "0 ... 5"]),
        ([0, 3, 1, 99], ["'item'", "id 99", "position 1"]),
        ([0, 4, 1, 1], ["'user'", "id 4", "'t_user'", "4 rows"]),
        ([-1, 0, 1, 1], ["'user'", "id -1", "position 0"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_message_names_feature_id_table_and_rows(ids, words, dtype):
    with pytest.raises(IndexError) as caught:
        check_ids(torch.tensor(ids, dtype=dtype), torch.tensor([0, 2, 4]), FEATURES, TABLES, ROWS)
    assert all(word in str(caught.value) for word in words)


def test_good_ids_and_empty_lanes_pass():
    check_ids(torch.tensor([0, 3, 5, 0]), [0, 2, 4], FEATURES, TABLES, ROWS)
    check_ids(torch.tensor([5]), [0, 0, 1], FEATURES, TABLES, ROWS)
    check_ids(torch.empty(0, dtype=torch.int64), [0, 0, 0], FEATURES, TABLES, [0, 0])
    with pytest.raises(IndexError, match="has no rows"):
        check_ids(torch.tensor([0]), [0, 0, 1], FEATURES, TABLES, [4, 0])


@pytest.mark.parametrize("lane_offsets", [[0, 2], [0, 2, 3], [1, 2, 4]])
def test_offsets_that_do_not_cover_the_values(lane_offsets):
    with pytest.raises(ValueError, match="lane offsets"):
        check_ids(torch.zeros(4, dtype=torch.int64), lane_offsets, FEATURES, TABLES, ROWS)


@given(ids=st.lists(st.integers(-3, 30), max_size=8), cut=st.integers(0, 8), rows=st.sampled_from([(4, 6), (4, 25)]))
def test_accepts_exactly_the_ids_in_range(ids, cut, rows):
    cut = min(cut, len(ids))
    good = all(0 <= i < rows[0] for i in ids[:cut]) and all(0 <= i < rows[1] for i in ids[cut:])
    values = torch.tensor(ids, dtype=torch.int64)
    if good:
        check_ids(values, [0, cut, len(ids)], FEATURES, TABLES, rows)
    else:
        with pytest.raises(IndexError):
            check_ids(values, [0, cut, len(ids)], FEATURES, TABLES, rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [(50_000, 50_000), (30_000, 70_000)])
def test_one_bad_id_in_a_long_batch_is_found_on_any_number_of_cores(threads, lengths):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in ([100, 100], [100, 100_000]):
            values = torch.cat([torch.randint(0, most, (length,)) for most, length in zip(rows, lengths)])
            bounds = [0, lengths[0], 100_000]
            check_ids(values, bounds, FEATURES, TABLES, rows)
            values[lengths[0] - 1] = 100
            with pytest.raises(IndexError, match=f"'user': id 100 at position {lengths[0] - 1} .* 't_user'"):
                check_ids(values, bounds, FEATURES, TABLES, rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, *OPTIMIZER_KINDS])
@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_a_bad_batch_changes_nothing(backend, kind, bad):
    spec = make_spec((0, 1), optimizer=kind, lane_features=("user", "item"))
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    ids, offsets = random_batch(spec, 4)
    kernel(ids, offsets).sum().backward()
    before = snapshot(kernel)
    with pytest.raises(IndexError, match=f"'user': id {bad} .*'t0', whose 10 rows"):
        kernel(torch.tensor([1, bad, 2]), torch.tensor([0, 2, 3])).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(kernel)))
