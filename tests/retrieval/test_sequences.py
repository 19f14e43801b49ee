"""Sequences, batches, training: what is asked is what came next, and a model that trains learns it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_edu.datasets.movielens_splits import Interactions
from recsys_edu.retrieval.sequence_training import (
    SequenceSettings,
    make_model,
    rate_of_epoch,
    sequence_scores,
    train_sequences,
    what_next,
)
from recsys_edu.retrieval.sequences import cloze_batch, next_item_batch, query_batch, user_sequences
from recsys_edu.sparse.jagged_tensor import JaggedTensor


def jagged(rows):
    lengths = torch.tensor([len(row) for row in rows])
    return JaggedTensor(torch.tensor([item for row in rows for item in row], dtype=torch.int64), lengths=lengths)


def part(users, items, times):
    users, items, times = (np.array(values, dtype=np.int64) for values in (users, items, times))
    return Interactions(users, items, np.ones(len(users), dtype=np.float32), times, np.arange(3), np.arange(9))


def test_sequences_are_in_order_of_time_then_of_the_file():
    train = part([1, 0, 1, 0], [4, 3, 2, 1], [20, 30, 10, 30])
    later = part([1], [8], [20])
    assert [row.tolist() for row in user_sequences([train]).to_dense()] == [[3, 1], [2, 4], []]
    assert [row.tolist() for row in user_sequences([train, later]).to_dense()] == [[3, 1], [2, 4, 8], []]


ROWS = st.lists(st.lists(st.integers(0, 19), max_size=12), min_size=1, max_size=6)


@given(ROWS, st.integers(1, 5), st.integers(0, 1000))
def test_next_item_batches_ask_for_what_came_next(rows, max_length, seed):
    users = torch.arange(len(rows))
    batch = next_item_batch(jagged(rows), users, 20, max_length, torch.Generator().manual_seed(seed))
    history = batch.sparse_features["history"]
    assert batch.sparse_features["candidate"].values().tolist() == list(range(20))
    labels = batch.labels.split(history.lengths().tolist())
    for row, read, asked in zip(rows, history.to_dense(), labels):
        assert len(read) == min(max(len(row) - 1, 0), max_length)
        stretch = [*read.tolist()[:1], *asked.tolist()]
        assert read.tolist() == stretch[:-1] if len(read) else True
        assert any(stretch == row[start : start + len(stretch)] for start in range(len(row) + 1))


@given(ROWS, st.integers(1, 5), st.integers(0, 1000))
def test_cloze_batches_mask_what_they_ask_for(rows, max_length, seed):
    users = torch.arange(len(rows))
    batch = cloze_batch(jagged(rows), users, 20, max_length, 0.5, torch.Generator().manual_seed(seed))
    history = batch.sparse_features["history"]
    masked = history.values() == 20
    assert torch.equal(masked, batch.labels != -100)
    filled = jagged([[]]).values().new_tensor(torch.where(masked, batch.labels, history.values()).tolist())
    for row, whole in zip(rows, filled.split(history.lengths().tolist())):
        assert len(whole) == min(len(row), max_length)
        assert any(whole.tolist() == row[start : start + len(whole)] for start in range(len(row) + 1))


@given(ROWS, st.integers(2, 5))
def test_queries_are_the_latest_items(rows, max_length):
    users = torch.arange(len(rows)).flip(0)
    plain = query_batch(jagged(rows), users, 20, max_length)["history"].to_dense()
    masked = query_batch(jagged(rows), users, 20, max_length, mask_id=20)["history"].to_dense()
    for row, latest, with_mask in zip(rows[::-1], plain, masked):
        assert latest.tolist() == row[-max_length:]
        assert with_mask.tolist() == [*row[-(max_length - 1) :], 20]


def test_stretches_move():
    sequences = jagged([list(range(20))])
    generator = torch.Generator().manual_seed(0)
    firsts = {
        int(next_item_batch(sequences, torch.tensor([0]), 20, 3, generator).sparse_features["history"].values()[0])
        for _ in range(300)
    }
    assert firsts == set(range(17))


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_a_rule_is_learned(kind):
    """Item i is always followed by i + 1, round and round: popularity knows nothing, an order model everything."""
    torch.manual_seed(0)
    starts = torch.randint(0, 10, (60,)).tolist()
    sequences = jagged([[(start + step) % 10 for step in range(6)] for start in starts])
    settings = SequenceSettings(
        kind, dim=16, num_blocks=1, max_length=6, batch_size=20, epochs=70, dropout=0.1, learning_rate=0.005
    )
    losses = []
    model = train_sequences(sequences, 10, settings, each_epoch=lambda epoch, loss, _: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    guesses = sequence_scores(model, sequences, 10).argmax(1)
    wanted = torch.tensor([(start + 6) % 10 for start in starts])
    assert (guesses == wanted).float().mean() > 0.95
    assert what_next(model, [1, 2, 3, 4, 5], 10, k=1)[0][0] == 6


def test_equal_seeds_give_equal_models():
    sequences = jagged([[1, 2, 3, 4], [4, 3, 2, 1]])
    settings = SequenceSettings(dim=8, epochs=2, max_length=4)
    first, second = (sequence_scores(train_sequences(sequences, 5, settings), sequences, 5) for _ in range(2))
    assert torch.equal(first, second)


def test_scores_leave_the_model_as_it_was_and_are_zero_without_items():
    settings = SequenceSettings(dim=8, max_length=3)
    model = make_model(5, settings).train()
    scores = sequence_scores(model, jagged([[1, 2], [], [1, 2, 3, 4]]), 5)
    assert model.training and scores[1].abs().sum() == 0 and scores[0].abs().sum() > 0
    shorter = sequence_scores(model, jagged([[2, 3, 4]]), 5)
    torch.testing.assert_close(scores[2], shorter[0])


def test_what_next_leaves_out_the_history_and_refuses_strange_items():
    model = make_model(5, SequenceSettings(dim=8, max_length=3)).eval()
    found = what_next(model, [1, 2], 5, k=10)
    assert {item for item, _ in found} == {0, 3, 4}
    assert sum(share for _, share in found) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"from 0 to 4, got \[9\]"):
        what_next(model, [1, 9], 5)
    with pytest.raises(ValueError, match="'gru': expected"):
        make_model(5, SequenceSettings(model="gru"))


def test_the_rate_rises_and_stays():
    rates = [rate_of_epoch(epoch, SequenceSettings(warmup_epochs=4)) for epoch in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rate_of_epoch(0, SequenceSettings(warmup_epochs=0)) == 1.0


def test_the_command_line_reports_the_model_beside_its_rivals(capsys, monkeypatch):
    """On an order that repeats: everybody goes round in circles, so the model must beat popularity."""
    train_sequence = pytest.importorskip("recsys_edu.examples.train_sequence")
    users = np.repeat(np.arange(40), 8)
    items = (users + np.tile(np.arange(8), 40)) % 20
    rated = Interactions(
        users, items, np.ones(320, np.float32), np.tile(np.arange(8), 40), np.arange(40), np.arange(20)
    )
    monkeypatch.setattr(train_sequence, "load_movielens_100k", lambda root: None)
    monkeypatch.setattr(train_sequence, "interactions", lambda data: rated)
    arguments = ["--dim", "16", "--epochs", "15", "--num-blocks", "1", "--max-length", "8", "--batch-size", "8"]
    found = train_sequence.main([*arguments, "--seeds", "2", "--check"])
    printed = capsys.readouterr().out
    for expected in ("popularity", "EASE, all before the test", "sasrec, seed 1", "met  Hit@10", "(40 users)"):
        assert expected in printed
    assert found["hit@10"].mean > 0.9 and found["hit@10"].num_runs == 2
