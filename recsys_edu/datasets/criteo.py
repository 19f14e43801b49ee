"""Criteo's click logs: 13 integer features, 26 hashed categories, one label; streamed, or batched from .npy files.

    train.txt, day_0 ... day_23       label <tab> 13 integers <tab> 26 categories of 8 hex digits; any but the
    (Kaggle)   (1TB, may be .gz)      label may be empty. Kaggle's test.txt has no label column.

    CriteoIterDataPipe                one Python object per line (readable, about 0.1 million rows/s)
    criteo_batches                    Batches straight from the text (vectorised, hashed ids)
    BinaryCriteoUtils                 text -> .npy, vocabularies, shuffling: `criteo_preprocess`
    InMemoryBinaryCriteoIterDataPipe  Batches of a rank's share of .npy files

Shapes: B batch, F = 26 categories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, IterDataPipe, get_worker_info

from recsys_edu.datasets.criteo_format import (
    CAT_FEATURE_COUNT,
    DAYS,
    DEFAULT_CAT_NAMES,
    DEFAULT_COLUMN_NAMES,
    DEFAULT_INT_NAMES,
    DEFAULT_LABEL_NAME,
    FREQUENCY_THRESHOLD,
    INT_FEATURE_COUNT,
    CriteoChunk,
    open_text,
    read_criteo_chunks,
)
from recsys_edu.datasets.criteo_preprocess import BinaryCriteoUtils
from recsys_edu.datasets.npy_files import read_npy_header
from recsys_edu.datasets.text_tables import MalformedLineError, OnError, check_on_error
from recsys_edu.datasets.utils import Batch
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

__all__ = [
    "CAT_FEATURE_COUNT", "DAYS", "DEFAULT_CAT_NAMES", "DEFAULT_COLUMN_NAMES", "DEFAULT_INT_NAMES",
    "DEFAULT_LABEL_NAME", "FREQUENCY_THRESHOLD", "INT_FEATURE_COUNT", "BinaryCriteoUtils", "CriteoIterDataPipe",
    "InMemoryBinaryCriteoIterDataPipe", "criteo_batches", "criteo_kaggle", "criteo_terabyte", "to_batch",
]  # fmt: skip


def _default_row_mapper(row: list[str]) -> dict[str, int | str]:
    """Label and integers as int (0 where empty), categories as they are; a test row has no label."""
    names = DEFAULT_COLUMN_NAMES[len(DEFAULT_COLUMN_NAMES) - len(row) :]
    num_ints = len(row) - CAT_FEATURE_COUNT
    mapped: dict[str, int | str] = {}
    for name, text in zip(names[:num_ints], row):
        try:
            mapped[name] = int(text) if text else 0
        except ValueError:
            raise ValueError(f"{name} should be an integer, got {text!r}") from None
    for name, text in zip(names[num_ints:], row[num_ints:]):
        if text:
            try:
                int(text, 16)
            except ValueError:
                raise ValueError(f"{name} should be a hexadecimal number, got {text!r}") from None
        mapped[name] = text
    return mapped


class CriteoIterDataPipe(IterDataPipe):
    """One item per line of Criteo text files, each made by `row_mapper` from the line's strings.

    >>> next(iter(CriteoIterDataPipe(["train.txt"])))["cat_0"]      # doctest: +SKIP
    '68fd1e64'

    The default mapper gives a dict by column name (`label`, `int_0` ... `cat_25`) with 0 and "" for what is
    missing; None gives lists of strings. Inside a DataLoader worker only every num_workers-th file is read.
    `on_error="skip"` leaves malformed lines out and counts them in `num_skipped`. `open_kw` goes to `open`.

    Raises (while iterating):
        MalformedLineError: not 40 columns (39 without a label), or the mapper raised ValueError.
    Counterpart: torchrec.datasets.criteo.CriteoIterDataPipe.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        row_mapper: Callable[[list[str]], Any] | None = _default_row_mapper,
        on_error: OnError = "raise",
        **open_kw: Any,
    ) -> None:
        check_on_error(on_error)
        self.paths = list(paths)
        self.row_mapper = row_mapper
        self.on_error = on_error
        self.open_kw = open_kw
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        paths = self.paths if worker is None else self.paths[worker.id :: worker.num_workers]
        for path in paths:
            with open_text(path, **self.open_kw) as stream:
                for number, line in enumerate(stream, start=1):
                    text = line.rstrip("\r\n")
                    try:
                        item = self._item(text.split("\t"))
                    except ValueError as error:
                        if self.on_error == "raise":
                            raise MalformedLineError(path, number, str(error), text) from error
                        self.num_skipped += 1
                        continue
                    yield item

    def _item(self, row: list[str]) -> Any:
        num_columns = len(DEFAULT_COLUMN_NAMES)
        if len(row) not in (num_columns, num_columns - 1):
            raise ValueError(f"expected {num_columns} columns ({num_columns - 1} without a label), got {len(row)}")
        return row if self.row_mapper is None else self.row_mapper(row)


def criteo_terabyte(
    paths: Iterable[str], *, row_mapper: Callable[[list[str]], Any] | None = _default_row_mapper, **open_kw: Any
) -> IterDataPipe:
    """The rows of Criteo 1TB's day files, one after another.

    >>> datapipe = criteo_terabyte(["day_0", "day_1.gz"])           # doctest: +SKIP

    Arguments and errors: see `CriteoIterDataPipe`. Counterpart: torchrec.datasets.criteo.criteo_terabyte.
    """
    return CriteoIterDataPipe(paths, row_mapper=row_mapper, **open_kw)


def criteo_kaggle(
    path: str, *, row_mapper: Callable[[list[str]], Any] | None = _default_row_mapper, **open_kw: Any
) -> IterDataPipe:
    """The rows of one file of the Kaggle challenge, `train.txt` or the unlabelled `test.txt`.

    Arguments and errors: see `CriteoIterDataPipe`. Counterpart: torchrec.datasets.criteo.criteo_kaggle.
    """
    return CriteoIterDataPipe([path], row_mapper=row_mapper, **open_kw)


def to_batch(dense: np.ndarray, sparse_BF: np.ndarray, labels: np.ndarray) -> Batch:
    """A Batch with one id per category from row-major arrays: dense `[B, 13]`, sparse `[B, 26]`, labels `[B]`."""
    batch_size, num_features = sparse_BF.shape
    keys = DEFAULT_CAT_NAMES if num_features == CAT_FEATURE_COUNT else [f"cat_{i}" for i in range(num_features)]
    return Batch(
        dense_features=torch.from_numpy(np.ascontiguousarray(dense)),
        sparse_features=KeyedJaggedTensor(
            keys=list(keys),
            values=torch.from_numpy(np.ascontiguousarray(sparse_BF.T).reshape(-1)),  # feature by feature
            lengths=torch.ones(batch_size * num_features, dtype=torch.int32),
            stride=batch_size,
        ),
        labels=torch.from_numpy(np.ascontiguousarray(labels).reshape(-1)),
    )


def criteo_batches(
    paths: Iterable[str],
    batch_size: int,
    hashes: list[int],
    *,
    dataset_name: str = "criteo_1tb",
    on_error: OnError = "raise",
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Batches straight from Criteo text files: dense features on a log scale, ids modulo `hashes`, labels int32.

    >>> batches = criteo_batches(["train.txt"], 2048, [100_000] * 26, dataset_name="criteo_kaggle")  # doctest: +SKIP

    Batches run across file borders; memory is bounded by one chunk of text, whatever the size of the files.

    Raises:
        MalformedLineError: a line does not fit (`on_error="skip"` leaves it out).
        ValueError: not 26 hash sizes, or an unknown data set.
    """
    if len(hashes) != CAT_FEATURE_COUNT:
        raise ValueError(f"hashes has {len(hashes)} sizes, expected {CAT_FEATURE_COUNT}")
    modulus = np.asarray(hashes, dtype=np.int64)
    rest: CriteoChunk | None = None
    for path in paths:
        for chunk in read_criteo_chunks(path, dataset_name=dataset_name, on_error=on_error):
            rows = chunk if rest is None else rest.followed_by(chunk)
            num_full = len(rows) // batch_size
            for start in range(0, num_full * batch_size, batch_size):
                part = rows.rows(start, start + batch_size)
                yield to_batch(part.dense, part.sparse % modulus, part.labels)
            rest = rows.rows(num_full * batch_size, len(rows))
    if rest is not None and len(rest) and not drop_last:
        yield to_batch(rest.dense, rest.sparse % modulus, rest.labels)


class InMemoryBinaryCriteoIterDataPipe(IterableDataset[Batch]):
    """Batches of one rank's share of Criteo in .npy form.

    Every `world_size * batch_size` consecutive rows are one global batch, of which rank r gets the r-th part:

        rows      0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14          batch_size 3, world_size 2
        rank 0    0 1 2         6 7 8           12 13             the rest is shared out evenly,
        rank 1    3 4 5         9 10 11         14                the first ranks getting one more

    stage: "train" uses all rows, "val" the first and "test" the second half of them (give those the last day).
    drop_last: leave out the incomplete global batch. A rest with fewer rows than ranks is always left out, so all
    ranks make the same number of steps. shuffle_batches: shuffle the rows inside each batch.
    shuffle_training_set: permute all training rows first, the same way on every rank.
    mmap_mode: read rows from disk as they are needed instead of holding the rank's share in memory.
    hashes: take the ids of category f modulo `hashes[f]`. path_manager_key: accepted for compatibility.

    Raises:
        ValueError: an unknown stage, unequal numbers of files or rows, a rank outside the world.
    Counterpart: torchrec.datasets.criteo.InMemoryBinaryCriteoIterDataPipe.
    """

    def __init__(
        self,
        stage: str,
        dense_paths: list[str],
        sparse_paths: list[str],
        labels_paths: list[str],
        batch_size: int,
        rank: int,
        world_size: int,
        drop_last: bool | None = False,
        shuffle_batches: bool = False,
        shuffle_training_set: bool = False,
        shuffle_training_set_random_seed: int = 0,
        mmap_mode: bool = False,
        hashes: list[int] | None = None,
        path_manager_key: str = "torchrec",
    ) -> None:
        super().__init__()
        if stage not in ("train", "val", "test"):
            raise ValueError(f'stage={stage!r}: expected "train", "val" or "test"')
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in [0, world_size={world_size})")
        self.stage = stage
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = bool(drop_last)
        self.shuffle_batches = shuffle_batches
        self.seed = shuffle_training_set_random_seed
        self.hashes = None if hashes is None else np.asarray(hashes)
        self.path_manager_key = path_manager_key

        num_rows = _rows_per_file(dense_paths, sparse_paths, labels_paths)
        total = sum(num_rows)
        half = (total + 1) // 2
        first, last = {"train": (0, total), "val": (0, half), "test": (half, total)}[stage]
        self._first_row, self._num_rows = first, last - first
        self._order = None
        if stage == "train" and shuffle_training_set:
            self._order = np.random.default_rng(self.seed).permutation(self._num_rows)
        self._arrays = [_StackedRows(paths, num_rows) for paths in (dense_paths, sparse_paths, labels_paths)]
        self._own_rows: list[np.ndarray] | None = None
        if not mmap_mode:
            own = np.concatenate([self._global_rows(step) for step in range(len(self))] or [np.zeros(0, np.int64)])
            self._own_rows = [array.take(own) for array in self._arrays]

    def __len__(self) -> int:
        full, rest = divmod(self._num_rows, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def _share(self, step: int) -> tuple[int, int]:
        """[start, end) of this rank's part of global batch `step`, counted in the stage's rows."""
        start = step * self.batch_size * self.world_size
        size = min(self.batch_size * self.world_size, self._num_rows - start)
        each, more = divmod(size, self.world_size)
        low = start + self.rank * each + min(self.rank, more)
        return low, low + each + (self.rank < more)

    def _global_rows(self, step: int) -> np.ndarray:
        low, high = self._share(step)
        rows = np.arange(low, high) if self._order is None else self._order[low:high]
        return rows + self._first_row

    def __iter__(self) -> Iterator[Batch]:
        random = np.random.default_rng(self.seed)
        done = 0
        for step in range(len(self)):
            rows = self._global_rows(step)
            if self._own_rows is None:
                dense, sparse_BF, labels = (array.take(rows) for array in self._arrays)
            else:
                dense, sparse_BF, labels = (array[done : done + len(rows)] for array in self._own_rows)
                done += len(rows)
            if self.hashes is not None:
                sparse_BF = sparse_BF % self.hashes.astype(sparse_BF.dtype)
            if self.shuffle_batches:
                order = random.permutation(len(rows))
                dense, sparse_BF, labels = dense[order], sparse_BF[order], labels[order]
            yield to_batch(dense, sparse_BF, labels)


def _rows_per_file(*path_lists: list[str]) -> list[int]:
    if len({len(paths) for paths in path_lists}) != 1:
        raise ValueError(f"dense, sparse and labels name {[len(paths) for paths in path_lists]} files: expected equal")
    num_rows = []
    for paths in zip(*path_lists):
        counts = {path: read_npy_header(path)[0][0] for path in paths}
        if len(set(counts.values())) != 1:
            raise ValueError(f"files of one day have different numbers of rows: {counts}")
        num_rows.append(counts[paths[0]])
    return num_rows


class _StackedRows:
    """The rows of several memory-mapped .npy files as if they were one array."""

    def __init__(self, paths: list[str], num_rows: list[int]) -> None:
        self.ends = np.cumsum(num_rows)
        # numpy cannot map a file without data
        self.arrays = [np.load(path, mmap_mode="r" if rows else None) for path, rows in zip(paths, num_rows)]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their global numbers, in the order given."""
        taken = np.empty((len(rows), *self.arrays[0].shape[1:]), dtype=self.arrays[0].dtype)
        file_of_row = np.searchsorted(self.ends, rows, side="right")
        for file in np.unique(file_of_row):
            here = np.flatnonzero(file_of_row == file)
            start = self.ends[file] - len(self.arrays[file])
            taken[here] = self.arrays[file][rows[here] - start]
        return taken
