from __future__ import annotations

import numpy as np
import pytest

from recsys_edu.datasets.baselines import auc
from recsys_edu.datasets.criteo import criteo_terabyte
from recsys_edu.datasets.criteo_format import log_dense, read_criteo_chunks
from recsys_edu.datasets.synthetic_criteo import (
    BLOCK_ROWS,
    CRITEO_1TB_ROWS,
    POSITIVE_SHARE,
    SyntheticCriteo,
    category_text,
)


@pytest.fixture(scope="module")
def data() -> SyntheticCriteo:
    return SyntheticCriteo(seed=3)


@pytest.fixture(scope="module")
def block(data):
    return next(data.chunks(BLOCK_ROWS))


def test_schema_and_shares(data, block):
    assert block.dense.shape == (BLOCK_ROWS, 13) and block.ids.shape == (BLOCK_ROWS, 26)
    assert (block.ids.min(axis=0) >= 0).all() and (block.ids.max(axis=0) < data.num_embeddings).all()
    assert ((block.ids == 0) == block.cat_missing).all()
    assert block.labels.mean() == pytest.approx(POSITIVE_SHARE, abs=0.01)
    counts = np.bincount(block.ids[:, 0])
    assert counts[1] > 5 * counts[10] > 0  # a power law
    assert tuple(SyntheticCriteo(scale=1.0).num_embeddings) == CRITEO_1TB_ROWS


def test_true_probabilities_are_the_best_scores(data, block):
    from_labels = auc(block.probabilities, block.labels)
    assert from_labels == pytest.approx(data.best_auc, abs=0.012)
    noisy = block.probabilities + np.random.default_rng(0).normal(0, 0.1, BLOCK_ROWS)
    assert auc(noisy, block.labels) < from_labels
    # the coins are fair: within each tenth of the probabilities, as many clicks as they say
    for part in np.array_split(np.argsort(block.probabilities), 10):
        assert block.labels[part].mean() == pytest.approx(block.probabilities[part].mean(), abs=0.03)


def test_any_range_can_be_made_again(data, block):
    start, rows = BLOCK_ROWS - 700, 1_500
    across = list(data.chunks(rows, start, chunk_rows=400))
    assert [len(chunk.labels) for chunk in across] == [400, 400, 400, 300]
    ids = np.concatenate([chunk.ids for chunk in across])
    assert np.array_equal(ids[:700], block.ids[-700:])
    assert np.array_equal(
        data.probabilities(300, start + 100), np.concatenate([c.probabilities for c in across])[100:400]
    )
    assert not np.array_equal(next(SyntheticCriteo(seed=4).chunks(700)).ids, block.ids[:700])


def test_batches_and_ranks(data, block):
    batches = list(data.batches(400, 1_000))
    assert [b.labels.numel() for b in batches] == [400, 400, 200]
    assert np.array_equal(batches[1].sparse_features["cat_9"].values().numpy(), block.ids[400:800, 9])
    second = list(data.batches(400, 1_000, rank=1, world_size=2))
    assert len(second) == 1 and np.array_equal(second[0].labels.numpy(), block.labels[400:800])


def test_text_goes_through_the_criteo_readers(data, block, tmp_path):
    path = str(tmp_path / "day_0")
    data.write_tsv(path, 2_000)
    chunk = next(iter(read_criteo_chunks(path)))
    assert np.array_equal(chunk.labels[:, 0], block.labels[:2_000])
    assert np.array_equal(chunk.dense, log_dense(block.integers[:2_000], "criteo_1tb"))
    rows = list(criteo_terabyte([path]))
    assert all((row["cat_18"] == "") == missing for row, missing in zip(rows, block.cat_missing[:, 18]))
    for column in (0, 19):  # distinct ids stay distinct
        assert len(np.unique(chunk.sparse[:, column])) == len(np.unique(block.ids[:2_000, column]))
    assert len(set(category_text(np.arange(10_000), 5))) == 10_000


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="scale"):
        SyntheticCriteo(scale=2.0)
    with pytest.raises(ValueError, match="exponent"):
        SyntheticCriteo(exponent=1.0)
