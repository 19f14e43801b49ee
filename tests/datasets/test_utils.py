from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterDataPipe

from recsys_edu.datasets import utils
from recsys_edu.datasets.random import RandomRecDataset
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class Range(IterDataPipe):
    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self):
        yield from range(self.start, self.end)


def make_batch() -> utils.Batch:
    kjt = KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 0, 2, 0]))
    return utils.Batch(torch.zeros(2, 3), kjt, torch.tensor([0, 1]))


def test_batch_moves_all_three_parts():
    moved = make_batch().to(torch.device("meta"), non_blocking=True)
    assert {moved.dense_features.device.type, moved.labels.device.type} == {"meta"}
    assert moved.sparse_features.values().device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_batch_pins_all_three_parts():
    pinned = make_batch().pin_memory()
    assert pinned.dense_features.is_pinned() and pinned.labels.is_pinned()
    assert pinned.sparse_features.values().is_pinned()


@pytest.mark.parametrize("split", [utils.idx_split_train_val, utils.rand_split_train_val])
def test_splits_partition_and_repeat(split):
    train, val = split(Range(0, 1000), 0.7)
    assert list(train) == list(train)
    assert sorted([*train, *val]) == list(range(1000))
    assert 650 <= len(list(train)) <= 750
    for wrong in (0.0, 1.0, -1, 2):
        with pytest.raises(ValueError, match="train_perc"):
            split(Range(0, 10), wrong)


def test_idx_split_is_periodic():
    train, _ = utils.idx_split_train_val(Range(0, 30), 0.6, decimal_places=1)
    assert list(train) == [i for i in range(30) if i % 10 < 6]
    train, _ = utils.idx_split_train_val(Range(0, 10), 0.6, decimal_places=1, key_fn=lambda i: 9 - i)
    assert list(train) == [4, 5, 6, 7, 8, 9]


def test_limit_reads_no_further_than_needed():
    class Counting(Range):
        read = 0

        def __iter__(self):
            for item in range(self.start, self.end):
                self.read += 1
                yield item

    source = Counting(0, 10)
    assert list(utils.Limit(source, 3)) == [0, 1, 2]
    assert source.read == 3
    assert list(utils.Limit(Range(0, 2), 3)) == [0, 1]


def test_load_and_read_csv(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n1,"a,b"\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text("x,y\n2,é\n", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    for mode in ("b", "t"):
        kw = {"encoding": "utf-8"} if mode == "t" else {}
        rows = utils.ReadLinesFromCSV(utils.LoadFiles(paths, mode=mode, length=2, **kw), skip_first_line=True)
        assert list(rows) == [["1", "a,b"], ["2", "é"]]
    assert len(utils.LoadFiles(paths, length=2)) == 2
    with pytest.raises(TypeError):
        len(utils.LoadFiles(paths))


def test_safe_cast():
    assert utils.safe_cast("3", int, 0) == 3
    assert utils.safe_cast("x", int, 7) == 7


def test_parallel_read_concat_shares_pipes_among_workers(monkeypatch):
    pipes = utils.ParallelReadConcat(Range(0, 3), Range(3, 5), Range(5, 9))
    assert list(pipes) == list(range(9))

    class Worker:
        def __init__(self, id, num_workers):
            self.id, self.num_workers = id, num_workers

    seen = []
    for worker in range(2):
        monkeypatch.setattr(utils, "get_worker_info", lambda worker=worker: Worker(worker, 2))
        seen.append(list(pipes))
    assert seen == [[0, 1, 2, 5, 6, 7, 8], [3, 4]]
    monkeypatch.setattr(utils, "get_worker_info", lambda: Worker(0, 4))
    with pytest.raises(ValueError, match="num_workers <= 3"):
        list(pipes)


def test_importing_the_datasets_warns_of_nothing():
    code = "import recsys_edu.datasets.criteo, recsys_edu.datasets.movielens"
    environment = os.environ | {"RECSYS_EDU_BACKEND": "pytorch"}  # asked for, so no warning that FBGEMM is missing
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# --- RandomRecDataset ---


def same(one: utils.Batch, other: utils.Batch) -> bool:
    return (
        torch.equal(one.dense_features, other.dense_features)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.sparse_features.values(), other.sparse_features.values())
        and torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
    )


def test_random_batches_have_the_stated_form():
    dataset = RandomRecDataset(
        ["a", "b"],
        64,
        hash_sizes=[5, 50],
        ids_per_features=[3, 4],
        min_ids_per_features=[3, 0],
        num_dense=7,
        manual_seed=1,
    )
    batch = next(iter(dataset))
    assert batch.dense_features.shape == (64, 7)
    assert batch.labels.shape == (64,) and set(batch.labels.tolist()) == {0, 1}
    kjt = batch.sparse_features
    assert kjt.keys() == ["a", "b"] and kjt.lengths().dtype == torch.int32
    lengths_FB = kjt.lengths().view(2, 64)
    assert set(lengths_FB[0].tolist()) == {3}
    assert set(lengths_FB[1].tolist()) == {0, 1, 2, 3, 4}
    assert kjt["a"].values().max() == 4 and 5 < kjt["b"].values().max() < 50
    assert kjt.values().min() == 0


def test_random_dataset_repeats_and_cycles():
    make = lambda **kw: RandomRecDataset(["a"], 4, hash_size=9, manual_seed=3, num_batches=5, **kw)  # noqa: E731
    dataset = make(num_generated_batches=2)
    batches = list(dataset)
    assert len(dataset) == len(batches) == 5
    assert same(batches[0], batches[2]) and not same(batches[0], batches[1])
    assert all(same(x, y) for x, y in zip(batches, dataset))
    anew = list(make(num_generated_batches=-1))
    assert not same(anew[0], anew[2])
    assert all(same(x, y) for x, y in zip(anew, make(num_generated_batches=-1)))
    with pytest.raises(TypeError):
        len(RandomRecDataset(["a"], 4, hash_size=9))


def test_random_dataset_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"hash_sizes has 1 numbers for 2 keys"):
        RandomRecDataset(["a", "b"], 4, hash_sizes=[1])
    with pytest.raises(ValueError, match="'a'"):
        RandomRecDataset(["a"], 4, hash_size=9, ids_per_feature=1, min_ids_per_feature=2)


def test_random_dataset_leaves_the_global_generator_alone_when_seeded():
    state = torch.get_rng_state()
    list(RandomRecDataset(["a"], 4, hash_size=9, manual_seed=3, num_batches=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_dataset_through_a_data_loader():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DataLoader(RandomRecDataset(["a"], 4, hash_size=9, num_batches=3), batch_size=None)
        assert [batch.labels.numel() for batch in loader] == [4, 4, 4]
