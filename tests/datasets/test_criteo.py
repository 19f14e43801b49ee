from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from recsys_edu.datasets import criteo
from recsys_edu.datasets.criteo import BinaryCriteoUtils, InMemoryBinaryCriteoIterDataPipe
from recsys_edu.datasets.criteo_format import read_criteo_chunks
from recsys_edu.datasets.npy_files import NpyAppender, read_npy_header
from recsys_edu.datasets.text_tables import MalformedLineError
from recsys_edu.datasets.vocabulary import VocabularyBuilder, hash_ids

FULL = ["1", *[str(i) for i in range(13)], *[f"{7 * i + 255:08x}" for i in range(26)]]
EMPTY = ["0", *[""] * 39]
LOW = ["1", "-1", *["5"] * 12, "ffffffff", *["80000000"] * 25]


def write(path, *rows: list[str]) -> str:
    text = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_rows_by_column_name(tmp_path):
    path = write(tmp_path / "train.txt", FULL, EMPTY)
    full, empty = list(criteo.criteo_kaggle(path))
    assert list(full) == criteo.DEFAULT_COLUMN_NAMES
    assert (full["label"], full["int_12"], full["cat_0"]) == (1, 12, "000000ff")
    assert (empty["int_3"], empty["cat_3"]) == (0, "")
    assert list(criteo.criteo_kaggle(path, row_mapper=None)) == [FULL, EMPTY]
    unlabelled = write(tmp_path / "test.txt", FULL[1:])
    assert list(next(iter(criteo.criteo_kaggle(unlabelled)))) == criteo.DEFAULT_COLUMN_NAMES[1:]
    zipped = write(tmp_path / "day_0.gz", EMPTY)
    assert [row["label"] for row in criteo.criteo_terabyte([path, zipped])] == [1, 0, 0]


BAD = [
    (FULL[:-3], "columns"),
    ([*FULL, "0"], "columns"),
    (["1", "x", *FULL[2:]], "int_0.*'x'"),
    ([*FULL[:-1], "zz"], "cat_25.*'zz'"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_malformed_lines_are_named_or_counted(tmp_path, row, problem):
    path = write(tmp_path / "day_0", FULL, row, EMPTY)
    outputs = [str(tmp_path / f"{kind}.npy") for kind in ("dense", "sparse", "labels")]
    for read in (
        lambda: list(criteo.criteo_terabyte([path])),
        lambda: list(read_criteo_chunks(path)),
        lambda: BinaryCriteoUtils.tsv_to_npys(path, *outputs),
    ):
        with pytest.raises(MalformedLineError, match=problem) as caught:
            read()
        assert f"{path}, line 2" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["day_0"]  # nothing half-written
    pipe = criteo.CriteoIterDataPipe([path], on_error="skip")
    assert len(list(pipe)) == 2 and pipe.num_skipped == 1
    assert BinaryCriteoUtils.tsv_to_npys(path, *outputs, on_error="skip") == 1
    assert np.load(outputs[2]).tolist() == [[1], [0]]


def test_labels_and_smallest_integers_are_checked(tmp_path):
    path = write(tmp_path / "day_0", FULL, ["1", "-2", *FULL[2:]])
    with pytest.raises(MalformedLineError, match=r"line 2.*at least -1"):
        list(read_criteo_chunks(path))
    assert len(next(iter(read_criteo_chunks(path, dataset_name="criteo_kaggle")))) == 2
    with pytest.raises(MalformedLineError, match="label of 0 or 1"):
        list(read_criteo_chunks(write(tmp_path / "day_1", ["2", *FULL[1:]])))
    with pytest.raises(ValueError, match="criteo_1tb, criteo_kaggle"):
        list(read_criteo_chunks(path, dataset_name="other"))


def test_npys_hold_logs_hex_and_labels(tmp_path):
    path = write(tmp_path / "day_0", FULL, EMPTY, LOW)
    outputs = [str(tmp_path / f"{kind}.npy") for kind in ("dense", "sparse", "labels")]
    assert BinaryCriteoUtils.tsv_to_npys(path, *outputs) == 0
    dense, sparse, labels = (np.load(output) for output in outputs)
    assert (dense.dtype, sparse.dtype, labels.dtype) == (np.float32, np.int64, np.int32)
    assert np.allclose(np.exp(dense[:, 0]), [3, 3, 2]) and np.allclose(np.exp(dense[0]), np.arange(13) + 3, rtol=1e-5)
    assert sparse[0].tolist() == [7 * i + 255 for i in range(26)]
    assert sparse[2, 0] == 0xFFFFFFFF and not sparse[1].any()
    assert labels.tolist() == [[1], [0], [1]]
    assert BinaryCriteoUtils.get_shape_from_npy(outputs[1]) == (3, 26)


def test_chunks_do_not_change_the_result(tmp_path):
    path = write(tmp_path / "day_0", *[FULL, EMPTY, LOW] * 20)
    whole = next(iter(read_criteo_chunks(path)))
    pieces = list(read_criteo_chunks(path, chunk_bytes=700))
    assert len(pieces) > 5
    assert np.array_equal(np.concatenate([p.sparse for p in pieces]), whole.sparse)
    assert np.array_equal(np.concatenate([p.dense for p in pieces]), whole.dense)


def test_text_batches(tmp_path):
    paths = [write(tmp_path / f"day_{d}", *[FULL, EMPTY, LOW][: d + 2]) for d in range(2)]
    batches = list(criteo.criteo_batches(paths, 2, [100] * 26))
    assert [b.labels.tolist() for b in batches] == [[1, 0], [1, 0], [1]]
    kjt = batches[0].sparse_features
    assert kjt.keys() == criteo.DEFAULT_CAT_NAMES
    assert kjt["cat_1"].values().tolist() == [262 % 100, 0]
    assert batches[2].dense_features.shape == (1, 13)
    assert len(list(criteo.criteo_batches(paths, 2, [100] * 26, drop_last=True))) == 2


@pytest.mark.parametrize("start_row", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 40])
def test_row_ranges_tile_the_files(world_size, start_row):
    lengths = [10, 5, 0, 8]
    where = [(file, row) for file, length in enumerate(lengths) for row in range(length)]
    given, sizes = [], []
    for rank in range(world_size):
        ranges, remainder = BinaryCriteoUtils.get_file_row_ranges_and_remainder(
            lengths, rank, world_size, start_row, 19
        )
        rows = [(file, row) for file, (first, last) in ranges.items() for row in range(first, last + 1)]
        assert remainder == (20 - start_row) % world_size
        given += rows
        sizes.append(len(rows))
    assert given == where[start_row:20] and max(sizes) - min(sizes) <= 1


def test_npy_ranges(tmp_path):
    path = str(tmp_path / "x.npy")
    rows = np.arange(20, dtype=np.int32).reshape(10, 2)
    np.save(path, rows)
    for mmap_mode in (False, True):
        assert np.array_equal(BinaryCriteoUtils.load_npy_range(path, 3, 4, mmap_mode=mmap_mode), rows[3:7])
    with pytest.raises(ValueError, match="10 rows"):
        BinaryCriteoUtils.load_npy_range(path, 8, 3)
    np.save(path, rows.ravel())
    with pytest.raises(ValueError, match="two dimensions"):
        BinaryCriteoUtils.load_npy_range(path, 0, 1)


def test_appended_rows_are_all_or_nothing(tmp_path):
    path = tmp_path / "x.npy"
    with NpyAppender(path, (3,), np.int64) as out:
        for size in (2, 0, 5):
            out.append(np.full((size, 3), size))
        assert not path.exists()
    assert np.load(path).tolist() == [[2] * 3] * 2 + [[5] * 3] * 5
    with pytest.raises(ValueError, match="rows of shape"), NpyAppender(path, (3,), np.int64) as out:
        out.append(np.zeros((1, 2)))
    assert read_npy_header(path)[0] == (7, 3) and [p.name for p in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("columns_per_pass", [1, 2])
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_contiguous_ids_by_hand(tmp_path, threshold, columns_per_pass):
    days = [np.array([[5, 1], [5, 2], [7, 2], [9, 2]]), np.array([[5, 3], [7, 2], [7, 1], [8, 2]])]
    paths = [str(tmp_path / f"day_{d}_sparse.npy") for d in range(2)]
    for path, rows in zip(paths, days):
        np.save(path, rows)
    num_rows = BinaryCriteoUtils.sparse_to_contiguous(
        paths, str(tmp_path), frequency_threshold=threshold, columns=2, columns_per_pass=columns_per_pass
    )
    every = np.concatenate(days)
    out = np.concatenate([np.load(tmp_path / f"day_{d}_sparse_contig_freq.npy") for d in range(2)])
    for column in range(2):
        ids = every[:, column].tolist()
        common = [i for i in dict.fromkeys(ids) if ids.count(i) >= threshold]
        assert out[:, column].tolist() == [common.index(i) + 2 if i in common else 1 for i in ids]
        assert num_rows[column] == len(common) + 2


def test_vocabulary_merges_chunks():
    random = np.random.default_rng(0)
    ids = random.zipf(1.5, 5_000) % 300
    whole, pieces = VocabularyBuilder(), VocabularyBuilder()
    whole.add(ids)
    for piece in np.array_split(ids, 37):
        pieces.add(piece)
    one, other = whole.finish(3), pieces.finish(3)
    assert np.array_equal(one.encode(ids), other.encode(ids))
    assert VocabularyBuilder().finish(3).encode(np.array([4])).tolist() == [1]


def test_hashing_spreads_strided_ids():
    ids = np.arange(10_000) * 1_000
    rows = hash_ids(ids, 100)
    assert np.bincount(rows, minlength=100).min() > 50 and len(np.unique(ids % 100)) == 1
    assert not np.array_equal(rows, hash_ids(ids, 100, salt=1))


def test_shuffle_keeps_rows_together_and_days_apart(tmp_path):
    rows_per_day = {0: 50, 1: 30, 2: 10}
    start = 0
    for day, rows in rows_per_day.items():
        numbers = np.arange(start, start + rows)
        np.save(tmp_path / f"day_{day}_dense.npy", np.repeat(numbers[:, None], 13, 1).astype(np.float32))
        np.save(tmp_path / f"day_{day}_sparse.npy", np.repeat(numbers[:, None], 26, 1) + 2**31)
        np.save(tmp_path / f"day_{day}_labels.npy", numbers[:, None].astype(np.int32))
        start += rows
    for bucket_rows in (1000, 17):
        out = tmp_path / f"out_{bucket_rows}"
        BinaryCriteoUtils.shuffle(
            str(tmp_path), str(tmp_path), str(out), rows_per_day, str(out), days=3, bucket_rows=bucket_rows
        )
        labels = [np.load(out / f"day_{day}_labels.npy")[:, 0] for day in range(3)]
        assert [len(day) for day in labels] == [50, 30, 10]
        assert labels[2].tolist() == list(range(80, 90))
        shuffled = np.concatenate(labels[:2])
        assert sorted(shuffled) == list(range(80)) and (shuffled != np.arange(80)).sum() > 60
        for day in range(3):
            assert np.array_equal(np.load(out / f"day_{day}_dense.npy")[:, 5], labels[day])
            assert np.array_equal(np.load(out / f"day_{day}_sparse.npy")[:, 9] - 2**31, labels[day])
        assert np.array_equal(np.load(out / "full_labels.npy")[:, 0], shuffled)
    with pytest.raises(ValueError, match=r"day_0_dense.npy has shape \(50, 13\), expected \(51, 13\)"):
        BinaryCriteoUtils.shuffle(str(tmp_path), str(tmp_path), str(tmp_path / "o"), {0: 51, 1: 30}, days=3)


# --- batches from npy files ---


@pytest.fixture
def days(tmp_path):
    paths: dict[str, list[str]] = {"dense": [], "sparse": [], "labels": []}
    for day, rows in enumerate((7, 10)):
        numbers = np.arange(rows) + 100 * day
        arrays = {
            "dense": np.repeat(numbers[:, None], 13, 1).astype(np.float32),
            "sparse": (numbers[:, None] * 26 + np.arange(26)).astype(np.int32),
            "labels": numbers[:, None].astype(np.int32),
        }
        for kind, array in arrays.items():
            paths[kind].append(str(tmp_path / f"day_{day}_{kind}.npy"))
            np.save(paths[kind][-1], array)
    return [paths["dense"], paths["sparse"], paths["labels"]]


ROWS = [*range(7), *range(100, 110)]


@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("stage", ["train", "val", "test"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_global_batch(days, stage, world_size, mmap_mode):
    rows = {"train": ROWS, "val": ROWS[:9], "test": ROWS[9:]}[stage]
    pipes = [
        InMemoryBinaryCriteoIterDataPipe(stage, *days, batch_size=2, rank=r, world_size=world_size, mmap_mode=mmap_mode)
        for r in range(world_size)
    ]
    per_rank = [[batch.labels.tolist() for batch in pipe] for pipe in pipes]
    assert {len(batches) for batches in per_rank} == {len(pipes[0])}
    together = [row for step in zip(*per_rank) for part in step for row in part]
    assert together == rows[: len(together)] and len(rows) - len(together) < world_size
    assert per_rank[0] == [batch.labels.tolist() for batch in pipes[0]]  # a second pass is the same


def test_npy_batches_have_one_id_per_feature(days):
    pipe = InMemoryBinaryCriteoIterDataPipe("train", *days, batch_size=3, rank=0, world_size=1, hashes=[11] * 26)
    batch = next(iter(pipe))
    kjt = batch.sparse_features
    assert kjt.keys() == criteo.DEFAULT_CAT_NAMES and kjt.stride() == 3
    assert kjt["cat_4"].values().tolist() == [(26 * row + 4) % 11 for row in range(3)]
    assert torch.equal(kjt.lengths(), torch.ones(78, dtype=torch.int32))
    assert batch.dense_features[2].tolist() == [2.0] * 13 and batch.labels.dtype == torch.int32


def test_npy_shuffling(days):
    make = lambda **kw: InMemoryBinaryCriteoIterDataPipe("train", *days, batch_size=5, world_size=2, **kw)  # noqa: E731
    orders = [[r for rank in range(2) for b in make(rank=rank, shuffle_training_set=True,
              shuffle_training_set_random_seed=seed) for r in b.labels.tolist()] for seed in (0, 0, 1)]  # fmt: skip
    assert sorted(orders[0]) == ROWS and orders[0] == orders[1] != orders[2]
    plain, shuffled = list(make(rank=0)), list(make(rank=0, shuffle_batches=True))
    assert [sorted(b.labels.tolist()) for b in shuffled] == [b.labels.tolist() for b in plain]
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(plain, shuffled))
    assert all(torch.equal(b.dense_features[:, 0].int(), b.labels) for b in shuffled)
    assert len(make(rank=0, drop_last=True)) == 1


def test_npy_mistakes_are_named(days):
    with pytest.raises(ValueError, match="stage"):
        InMemoryBinaryCriteoIterDataPipe("dev", *days, batch_size=2, rank=0, world_size=1)
    with pytest.raises(ValueError, match="rank 2"):
        InMemoryBinaryCriteoIterDataPipe("val", *days, batch_size=2, rank=2, world_size=2)
    swapped = [days[0], days[1][::-1], days[2]]
    with pytest.raises(ValueError, match="different numbers of rows"):
        InMemoryBinaryCriteoIterDataPipe("val", *swapped, batch_size=2, rank=0, world_size=2)
