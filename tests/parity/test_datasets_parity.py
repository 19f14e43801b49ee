"""The dataset tools give what TorchRec's give, where TorchRec is installed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torchrec")
pytest.importorskip("iopath")
pytest.importorskip("polars")
theirs = pytest.importorskip("torchrec.datasets.criteo")

from torchrec.datasets.random import RandomRecDataset as TheirRandom  # noqa: E402

from recsys_edu.datasets import criteo as ours  # noqa: E402
from recsys_edu.datasets.random import RandomRecDataset  # noqa: E402
from recsys_edu.datasets.synthetic_criteo import SyntheticCriteo  # noqa: E402

NAMES = ("dense", "sparse", "labels")


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    path = tmp_path_factory.mktemp("criteo") / "day_0"
    SyntheticCriteo(seed=5).write_tsv(path, 300)
    return str(path)


def test_constants():
    for name in ("INT_FEATURE_COUNT", "CAT_FEATURE_COUNT", "DAYS", "DEFAULT_LABEL_NAME", "DEFAULT_INT_NAMES",
                 "DEFAULT_CAT_NAMES", "DEFAULT_COLUMN_NAMES", "FREQUENCY_THRESHOLD"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)


def test_rows(day):
    assert list(ours.criteo_kaggle(day)) == list(theirs.criteo_kaggle(day))
    assert list(ours.criteo_terabyte([day, day])) == list(theirs.criteo_terabyte([day, day]))


def test_npys_and_contiguous_ids(day, tmp_path):
    files = {}
    for side, module in (("ours", ours), ("theirs", theirs)):
        (tmp_path / side).mkdir()
        files[side] = [str(tmp_path / side / f"day_0_{name}.npy") for name in NAMES]
        module.BinaryCriteoUtils.tsv_to_npys(day, *files[side])
        module.BinaryCriteoUtils.sparse_to_contiguous([files[side][1]], str(tmp_path / side), frequency_threshold=3)
        files[side].append(str(tmp_path / side / "day_0_sparse_contig_freq.npy"))
    for mine, their in zip(files["ours"], files["theirs"]):
        one, other = np.load(mine), np.load(their)
        assert one.dtype == other.dtype and np.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_row_ranges(world_size):
    for rank in range(world_size):
        for rows in ((), (3, 17)):
            arguments = ([10, 5, 8], rank, world_size, *rows)
            mine = ours.BinaryCriteoUtils.get_file_row_ranges_and_remainder(*arguments)
            assert mine == theirs.BinaryCriteoUtils.get_file_row_ranges_and_remainder(*arguments)


@pytest.mark.parametrize("stage", ["train", "val", "test"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_npy_batches(day, tmp_path, stage, drop_last):
    files = [str(tmp_path / f"{name}.npy") for name in NAMES]
    ours.BinaryCriteoUtils.tsv_to_npys(day, *files)
    paths = [[file] for file in files]
    for rank in range(2):
        arguments = {"batch_size": 32, "rank": rank, "world_size": 2, "drop_last": drop_last, "hashes": [50] * 26}
        mine = list(ours.InMemoryBinaryCriteoIterDataPipe(stage, *paths, **arguments))
        their = list(theirs.InMemoryBinaryCriteoIterDataPipe(stage, *paths, **arguments))
        assert len(mine) == len(their)
        for one, other in zip(mine, their):
            assert one.labels.tolist() == other.labels.tolist()
            assert one.dense_features.tolist() == other.dense_features.tolist()
            assert one.sparse_features.values().tolist() == other.sparse_features.values().tolist()


@pytest.mark.parametrize(
    "bags",
    [{}, {"ids_per_feature": 3}, {"ids_per_features": [3, 1]}, {"ids_per_feature": 4, "min_ids_per_feature": 1}],
)
def test_random_batches_have_the_same_form(bags):
    mine, their = (
        next(iter(kind(["a", "b"], 256, hash_size=7, num_dense=3, manual_seed=0, **bags)))
        for kind in (RandomRecDataset, TheirRandom)
    )
    for part in ("dense_features", "labels"):
        one, other = getattr(mine, part), getattr(their, part)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    one, other = mine.sparse_features, their.sparse_features
    assert one.keys() == other.keys()
    assert (one.values().dtype, one.lengths().dtype) == (other.values().dtype, other.lengths().dtype)
    for key in one.keys():
        assert set(one[key].lengths().tolist()) == set(other[key].lengths().tolist())
