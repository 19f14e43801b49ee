"""What a line of Criteo's click logs looks like, and a fast reader of typed chunks.

Shapes: E examples of a chunk.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from recsys_edu.datasets.text_tables import DEFAULT_CHUNK_BYTES, Column, MalformedLineError, OnError, read_table_chunks

INT_FEATURE_COUNT = 13
CAT_FEATURE_COUNT = 26
DAYS = 24
FREQUENCY_THRESHOLD = 3
DEFAULT_LABEL_NAME = "label"
DEFAULT_INT_NAMES: list[str] = [f"int_{i}" for i in range(INT_FEATURE_COUNT)]
DEFAULT_CAT_NAMES: list[str] = [f"cat_{i}" for i in range(CAT_FEATURE_COUNT)]
DEFAULT_COLUMN_NAMES: list[str] = [DEFAULT_LABEL_NAME, *DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]

# The integers' smallest value in each data set. The dense transform log(value - smallest + 2) is fixed by it, so
# that a value means the same in every file.
SMALLEST_INT = {"criteo_1tb": -1, "criteo_kaggle": -3}

_COLUMNS = [
    Column(DEFAULT_LABEL_NAME, "int"),
    *(Column(name, "int", optional=True) for name in DEFAULT_INT_NAMES),
    *(Column(name, "hex", optional=True) for name in DEFAULT_CAT_NAMES),
]


def open_text(path: str | Path, **open_kw: Any) -> IO[str]:
    """A Criteo file opened as text, decompressed on the way where its name ends in .gz."""
    if str(path).endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, **{"mode": "r", "encoding": "utf-8", **open_kw})


def log_dense(integers: np.ndarray, dataset_name: str) -> np.ndarray:
    """log(value - smallest + 2) as float32, where `smallest` is the data set's (-1 for 1TB, -3 for Kaggle)."""
    return np.log(integers.astype(np.float32) + np.float32(2 - SMALLEST_INT[dataset_name]))


@dataclass(frozen=True)
class CriteoChunk:
    """Some consecutive lines: dense float32 `[E, 13]` on the log scale, sparse int64 `[E, 26]`, labels int32 `[E, 1]`.

    Missing integers are 0 before the logarithm, missing categories are 0. num_skipped: malformed lines left out.
    """

    dense: np.ndarray
    sparse: np.ndarray
    labels: np.ndarray
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, start: int, end: int) -> CriteoChunk:
        """The rows `[start, end)`, as views."""
        return CriteoChunk(self.dense[start:end], self.sparse[start:end], self.labels[start:end])

    def followed_by(self, other: CriteoChunk) -> CriteoChunk:
        """Both, one after the other."""
        return CriteoChunk(
            np.concatenate([self.dense, other.dense]),
            np.concatenate([self.sparse, other.sparse]),
            np.concatenate([self.labels, other.labels]),
            self.num_skipped + other.num_skipped,
        )


def read_criteo_chunks(
    path: str | Path,
    *,
    dataset_name: str = "criteo_1tb",
    on_error: OnError = "raise",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Iterator[CriteoChunk]:
    """Typed chunks of one labelled Criteo text file; memory is bounded by about ten times `chunk_bytes`.

    Raises:
        ValueError: an unknown data set.
        MalformedLineError: a line has not 40 columns, a label that is not 0 or 1, a field that is no number, or an
            integer below the data set's smallest.
    """
    if dataset_name not in SMALLEST_INT:
        raise ValueError(f"dataset_name={dataset_name!r}: expected one of {', '.join(SMALLEST_INT)}")
    smallest = SMALLEST_INT[dataset_name]
    options = {"on_error": on_error, "chunk_bytes": chunk_bytes}
    first_line = 1
    for table in read_table_chunks(path, _COLUMNS, "\t", **options):
        labels = table.frame[DEFAULT_LABEL_NAME].to_numpy().reshape(-1, 1)
        integers = table.frame.select(DEFAULT_INT_NAMES).fill_null(0).to_numpy()
        sparse = table.frame.select(DEFAULT_CAT_NAMES).fill_null(0).to_numpy()
        fits = ((labels == 0) | (labels == 1))[:, 0] & (integers >= smallest).all(axis=1)
        num_bad = int((~fits).sum())
        if num_bad and on_error == "raise":
            row = int(np.argmin(fits))
            shown = "\t".join(str(value) for value in (labels[row, 0], *integers[row]))
            problem = f"expected a label of 0 or 1 and integers of at least {smallest} ({dataset_name})"
            raise MalformedLineError(path, first_line + row, problem, shown)
        if num_bad:
            labels, integers, sparse = labels[fits], integers[fits], sparse[fits]
        yield CriteoChunk(
            log_dense(integers, dataset_name), sparse, labels.astype(np.int32), table.num_skipped + num_bad
        )
        first_line += len(table.frame) + table.num_skipped
