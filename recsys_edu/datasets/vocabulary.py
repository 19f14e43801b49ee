"""Give the ids of a categorical column contiguous numbers: by frequency threshold, or by hashing.

A frequency-thresholded vocabulary (two passes over the data, exact) makes one row per common id and one for all
rare ones; hashing (no pass, no state) makes ids share rows by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RARE_ID = 1
FIRST_ID = 2  # 0 is left for "missing", as TorchRec does


def hash_ids(ids: np.ndarray, num_rows: int, salt: int = 0) -> np.ndarray:
    """Rows in [0, num_rows) that look random for any ids: a 64-bit mix (splitmix64's finaliser), then modulo.

    Plain `ids % num_rows` would map ids with a common stride onto few rows. `salt` gives columns different maps.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    mixed = ids.astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(num_rows)).astype(np.int64)


@dataclass(frozen=True)
class Vocabulary:
    """The common ids of a column. sorted_ids int64 `[V]` ascending; numbers int64 `[V]`: what each is mapped to."""

    sorted_ids: np.ndarray
    numbers: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows an embedding table for this column needs."""
        return FIRST_ID + len(self.sorted_ids)

    def encode(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of `ids`; an id that is not in the vocabulary is rare."""
        if not len(self.sorted_ids):
            return np.full(ids.shape, RARE_ID)
        place = np.minimum(np.searchsorted(self.sorted_ids, ids), len(self.sorted_ids) - 1)
        return np.where(self.sorted_ids[place] == ids, self.numbers[place], RARE_ID)


class VocabularyBuilder:
    """Counts the ids of a column chunk by chunk, in memory proportional to the distinct ids.

    >>> builder = VocabularyBuilder()
    >>> builder.add(np.array([7, 5, 7]))
    >>> builder.finish(frequency_threshold=2).encode(np.array([5, 7])).tolist()
    [1, 2]
    """

    def __init__(self) -> None:
        self._ids = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)
        self._first_seen = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self._num_rows = 0

    def add(self, ids: np.ndarray) -> None:
        """Count one more chunk of ids."""
        distinct, first, counts = np.unique(ids.astype(np.int64), return_index=True, return_counts=True)
        self._pending.append((distinct, counts, first + self._num_rows))
        self._num_pending += len(distinct)
        self._num_rows += len(ids)
        # merging costs the size of both sides, so wait until the new side is as large as the old one
        if self._num_pending >= max(len(self._ids), 1):
            self._merge()

    def _merge(self) -> None:
        parts = [(self._ids, self._counts, self._first_seen), *self._pending]
        ids, counts, first_seen = (np.concatenate(arrays) for arrays in zip(*parts))
        self._ids, group = np.unique(ids, return_inverse=True)
        self._counts = np.bincount(group, weights=counts, minlength=len(self._ids)).astype(np.int64)
        self._first_seen = np.full(len(self._ids), np.iinfo(np.int64).max)
        np.minimum.at(self._first_seen, group, first_seen)
        self._pending, self._num_pending = [], 0

    def finish(self, frequency_threshold: int) -> Vocabulary:
        """Ids seen at least `frequency_threshold` times, numbered from 2 in order of first appearance."""
        self._merge()
        common = self._counts >= frequency_threshold
        order = np.argsort(self._first_seen[common])
        numbers = np.empty(len(order), dtype=np.int64)
        numbers[order] = np.arange(FIRST_ID, FIRST_ID + len(order))
        return Vocabulary(self._ids[common], numbers)
