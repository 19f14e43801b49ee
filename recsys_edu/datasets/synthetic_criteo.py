"""Criteo-like click logs with a planted model: the real schema, any size, and a known best AUC.

Real logs never tell how good a model could be. Here every click is a coin with a known probability

    logit = bias + sum_f effect_f(id_f) + sum_(f,g) factor_f(id_f) * factor_g(id_g) + dense part

so the AUC of the true probabilities is the best that any model can reach, and what a model falls short of it is its own
doing. The 26 categories have the cardinalities of Criteo 1TB (as capped by MLPerf) times `scale`, ids follow a power
law, 13 integers are heavy-tailed counts, some fields are missing, 25.6% of the rows are clicks.

Effects are pseudo-random functions of (column, id), not tables, so there is nothing to store at any scale. Rows come in
blocks that depend on (seed, block number) alone: any range can be made again, in any order, by any rank.

Shapes: E rows of a chunk, F = 26 categories.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from recsys_edu.datasets.criteo import to_batch
from recsys_edu.datasets.criteo_format import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES, INT_FEATURE_COUNT, log_dense
from recsys_edu.datasets.npy_files import replace_when_done
from recsys_edu.datasets.utils import Batch

# Rows of the 26 tables in MLPerf's DLRM benchmark on Criteo 1TB
CRITEO_1TB_ROWS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip
POSITIVE_SHARE = 0.256
BLOCK_ROWS = 1 << 16
_SMALLEST_TABLE = 100
_CALIBRATION_BLOCKS = 4
_INT_MEDIANS = (3, 10, 8, 5, 2_000, 40, 6, 12, 50, 1, 3, 1, 6)
_INT_SPREADS = (1.2, 1.6, 1.3, 1.0, 1.8, 1.5, 1.4, 1.0, 1.4, 0.6, 1.0, 0.7, 1.0)
_INT_MISSING = (0.45, 0.0, 0.21, 0.21, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.76, 0.21)
_CAT_MISSING = tuple({2: 0.03, 3: 0.03, 11: 0.03, 18: 0.44, 21: 0.3, 24: 0.44}.get(f, 0.0) for f in range(26))
_PAIRS = ((1, 2), (3, 6), (13, 14), (7, 15), (17, 24), (4, 8))


def expected_auc(probabilities: np.ndarray, scores: np.ndarray | None = None) -> float:
    """The AUC of `scores` (default: the probabilities themselves) in expectation over the labels' coins.

    AUC = P(score of a click > score of a non-click), ties counting half; row i is a click with weight p_i and a
    non-click with weight 1 - p_i.
    """
    scores = probabilities if scores is None else scores
    _, group = np.unique(scores, return_inverse=True)
    clicks = np.bincount(group, weights=probabilities)
    others = np.bincount(group, weights=1 - probabilities)
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))


@dataclass(frozen=True)
class SyntheticChunk:
    """Consecutive rows.

    integers int64 `[E, 13]` (0 where missing). int_missing, cat_missing: bool `[E, 13]`, `[E, 26]`.
    ids int64 `[E, 26]`: 0 is "missing", 1 the most frequent id. labels int32 `[E]`. probabilities float64 `[E]`.
    """

    integers: np.ndarray
    int_missing: np.ndarray
    ids: np.ndarray
    cat_missing: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """float32 `[E, 13]` on the same log scale as the Criteo readers use."""
        return log_dense(self.integers, "criteo_1tb")


def _mix(keys: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: neighbouring keys get unrelated 64-bit numbers."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _pseudo_normal(ids: np.ndarray, salt: int) -> np.ndarray:
    """A number per id with mean 0 and variance 1, near normal: four 16-bit pieces of its hash, added up."""
    bits = _mix(ids.astype(np.uint64) + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64))
    total = np.zeros(ids.shape, dtype=np.float64)
    for shift in (0, 16, 32, 48):
        total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float64)
    return (total / 65535 - 2.0) * np.sqrt(3.0)  # four uniforms: mean 2, variance 4 / 12


def _effect(ids: np.ndarray, num_rows: int, salt: int) -> np.ndarray:
    """The pseudo-normal number of each id of a table with `num_rows` rows."""
    if num_rows > len(ids):
        return _pseudo_normal(ids, salt)
    return _pseudo_normal(np.arange(num_rows), salt)[ids]  # the same numbers, each computed once


@dataclass(frozen=True)
class SyntheticCriteo:
    """An endless, reproducible Criteo-like data set.

    >>> data = SyntheticCriteo(scale=5e-5, seed=0)
    >>> batch = next(data.batches(1024, num_rows=10_000))           # doctest: +SKIP
    >>> round(data.best_auc, 2)                                     # doctest: +SKIP
    0.78

    scale: tables have `scale` times Criteo 1TB's rows, but no fewer than 100 (or the real number where that is less);
    1.0 is the real size. exponent: of the ids' power law; the larger, the fewer ids carry most rows. category_std,
    pair_std, dense_std: the standard deviation that each part gives the logit.

    Raises:
        ValueError: scale not in (0, 1], or exponent not above 1.
    """

    scale: float = 5e-5
    seed: int = 0
    exponent: float = 1.4
    category_std: float = 1.0
    pair_std: float = 0.4
    dense_std: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must lie in (0, 1], got {self.scale}")
        if self.exponent <= 1:
            raise ValueError(f"exponent must exceed 1, got {self.exponent}")

    @property
    def num_embeddings(self) -> list[int]:
        """Rows of the 26 tables, in order."""
        return [max(min(rows, _SMALLEST_TABLE), round(rows * self.scale)) for rows in CRITEO_1TB_ROWS]

    @property
    def num_embeddings_per_feature(self) -> dict[str, int]:
        """The same by feature name (`cat_0` ...)."""
        return dict(zip(DEFAULT_CAT_NAMES, self.num_embeddings))

    # --- rows ---

    def _draw_ids(self, random: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids by inverting a power law's distribution function, which needs no table of probabilities."""
        uniform = random.random((CAT_FEATURE_COUNT, num_rows))
        missing = np.zeros(uniform.shape, dtype=bool)
        for f, share in enumerate(_CAT_MISSING):
            if share:
                missing[f] = random.random(num_rows) < share
        power = 1.0 - self.exponent
        tail = np.array([float(rows) ** power for rows in self.num_embeddings])[:, None]
        ids = np.floor((1.0 - uniform * (1.0 - tail)) ** (1.0 / power)).astype(np.int64)
        ids = np.minimum(ids, np.array(self.num_embeddings)[:, None] - 1)  # rounding must not leave the table
        ids[missing] = 0
        return ids, missing

    def _draw_integers(self, random: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        normal = random.standard_normal((num_rows, INT_FEATURE_COUNT))
        missing = random.random((num_rows, INT_FEATURE_COUNT)) < np.array(_INT_MISSING)
        integers = np.floor(np.exp(np.log(_INT_MEDIANS) + np.array(_INT_SPREADS) * normal)).astype(np.int64)
        integers[:, 1] -= 1  # as in the real data, one column starts at -1
        integers[missing] = 0
        return integers, missing

    def _parts(self, integers: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The unscaled category, pair and dense parts of the logit; ids are `[26, E]`."""
        salt = (self.seed + 1) * 1_000
        rows = self.num_embeddings
        category = sum(_effect(ids[f], rows[f], salt + f) for f in range(CAT_FEATURE_COUNT))
        factors = {f: _effect(ids[f], rows[f], salt + 100 + f) for pair in _PAIRS for f in pair}
        pair = sum(factors[f] * factors[g] for f, g in _PAIRS)
        logs = log_dense(integers, "criteo_1tb")
        weights = np.random.default_rng([self.seed, 1]).standard_normal(INT_FEATURE_COUNT)
        dense = logs @ weights.astype(np.float32) - 0.5 * (logs[:, 1] - 2.5) ** 2 + logs[:, 3] * logs[:, 6]
        return category, pair, dense

    def _draw_features(self, block: int) -> tuple[np.random.Generator, tuple[np.ndarray, ...]]:
        random = np.random.default_rng([self.seed, 2, block])
        integers, int_missing = self._draw_integers(random, BLOCK_ROWS)
        ids, cat_missing = self._draw_ids(random, BLOCK_ROWS)
        return random, (integers, int_missing, ids, cat_missing)

    @functools.cached_property
    def _calibration(self) -> tuple[np.ndarray, float]:
        """Weights of (category, pair, dense) and the bias that give the wanted spreads and share of clicks."""
        parts = []
        for block in range(_CALIBRATION_BLOCKS):
            _, (integers, _, ids, _) = self._draw_features(2**31 + block)
            parts.append(np.stack(self._parts(integers, ids)))
        stacked = np.concatenate(parts, axis=1)
        weights = np.array([self.category_std, self.pair_std, self.dense_std]) / stacked.std(axis=1)
        logits = weights @ stacked
        low, high = -50.0 - logits.max(), 50.0 - logits.min()
        for _ in range(60):  # bisection: the share of clicks grows with the bias
            bias = (low + high) / 2
            low, high = (bias, high) if _sigmoid(logits + bias).mean() < POSITIVE_SHARE else (low, bias)
        return weights, bias

    def _block(self, block: int) -> SyntheticChunk:
        random, (integers, int_missing, ids, cat_missing) = self._draw_features(block)
        weights, bias = self._calibration
        probabilities = _sigmoid(weights @ np.stack(self._parts(integers, ids)) + bias)
        labels = (random.random(BLOCK_ROWS) < probabilities).astype(np.int32)
        return SyntheticChunk(integers, int_missing, ids.T, cat_missing.T, labels, probabilities)

    def chunks(self, num_rows: int, start_row: int = 0, chunk_rows: int = BLOCK_ROWS) -> Iterator[SyntheticChunk]:
        """The rows `[start_row, start_row + num_rows)` in chunks of `chunk_rows` (the last one may be smaller)."""
        held: list[SyntheticChunk] = []
        held_rows, row, end = 0, start_row, start_row + num_rows
        while row < end:
            block, offset = divmod(row, BLOCK_ROWS)
            piece = _slice(self._block(block), offset, min(BLOCK_ROWS, offset + end - row))
            held.append(piece)
            held_rows += len(piece.labels)
            row += len(piece.labels)
            if held_rows >= chunk_rows or row == end:
                together = _join(held)
                full = held_rows if row == end else held_rows // chunk_rows * chunk_rows
                for start in range(0, full, chunk_rows):
                    yield _slice(together, start, min(start + chunk_rows, full))
                held, held_rows = [_slice(together, full, held_rows)], held_rows - full

    def batches(
        self, batch_size: int, num_rows: int, start_row: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Batches of the rows `[start_row, start_row + num_rows)`; rank r gets every world_size-th one.

        Rows are made as they are needed. Take test rows from far behind the training rows, for example
        `start_row=10**9`: they are independent draws of the same population.
        """
        for number, chunk in enumerate(self.chunks(num_rows, start_row, batch_size)):
            if number % world_size == rank:
                yield to_batch(chunk.dense, chunk.ids, chunk.labels)

    # --- what is known about the data ---

    @functools.cached_property
    def best_auc(self) -> float:
        """The AUC of the true probabilities: no model can do better (262,144 rows; standard error about .001)."""
        chunks = self.chunks(_CALIBRATION_BLOCKS * BLOCK_ROWS, start_row=2**40)
        return expected_auc(np.concatenate([chunk.probabilities for chunk in chunks]))

    def probabilities(self, num_rows: int, start_row: int = 0) -> np.ndarray:
        """The true click probabilities of some rows, to hold against a model's predictions on the same rows."""
        return np.concatenate([chunk.probabilities for chunk in self.chunks(num_rows, start_row)])

    # --- files ---

    def write_tsv(self, path: str | Path, num_rows: int, start_row: int = 0) -> None:
        """Write rows as a Criteo text file: label, 13 integers, 26 categories of 8 hex digits, tabs between."""
        with (
            replace_when_done(path) as aside,
            open(aside, "w", encoding="utf-8", newline="\n") as stream,
            tqdm(total=num_rows, unit="row", unit_scale=True, desc=f"writing {Path(path).name}", leave=False) as bar,
        ):
            for chunk in self.chunks(num_rows, start_row):
                stream.writelines(_text_lines(chunk))
                bar.update(len(chunk.labels))


def category_text(ids: np.ndarray, column: int) -> np.ndarray:
    """The 8 hex digits that stand for ids of a category column: distinct ids always get distinct texts."""
    # multiplying by an odd number is one-to-one modulo 2**32
    hashed = (ids.astype(np.uint64) * np.uint64(2_654_435_761) + np.uint64(column * 0x01000193)) % np.uint64(2**32)
    return np.array([f"{value:08x}" for value in hashed.tolist()])


def _text_lines(chunk: SyntheticChunk) -> list[str]:
    columns = [chunk.labels.astype(str)]
    for j in range(INT_FEATURE_COUNT):
        columns.append(np.where(chunk.int_missing[:, j], "", chunk.integers[:, j].astype(str)))
    for f in range(CAT_FEATURE_COUNT):
        columns.append(np.where(chunk.cat_missing[:, f], "", category_text(chunk.ids[:, f], f)))
    return ["\t".join(fields) + "\n" for fields in zip(*(column.tolist() for column in columns))]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits))


def _fields(chunk: SyntheticChunk) -> tuple[np.ndarray, ...]:
    return chunk.integers, chunk.int_missing, chunk.ids, chunk.cat_missing, chunk.labels, chunk.probabilities


def _slice(chunk: SyntheticChunk, start: int, end: int) -> SyntheticChunk:
    return SyntheticChunk(*(array[start:end] for array in _fields(chunk)))


def _join(chunks: list[SyntheticChunk]) -> SyntheticChunk:
    if len(chunks) == 1:
        return chunks[0]
    return SyntheticChunk(*(np.concatenate(arrays) for arrays in zip(*(_fields(chunk) for chunk in chunks))))
