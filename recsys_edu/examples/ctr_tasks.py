"""What DLRM trains on: tables, and every rank's part of every step's batch, from any step on.

A step's batch belongs to all ranks together; each takes an equal slice of it, in rank order. So what a model learns
does not depend on the number of ranks, and a run can go on from any step on another number of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from recsys_edu.datasets.criteo import (
    DEFAULT_CAT_NAMES,
    DEFAULT_INT_NAMES,
    InMemoryBinaryCriteoIterDataPipe,
    to_batch,
)
from recsys_edu.datasets.movielens import movielens_ctr, read_movielens
from recsys_edu.datasets.synthetic_criteo import SyntheticCriteo
from recsys_edu.datasets.utils import Batch
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType

DATASETS = ("movielens", "synthetic-criteo", "criteo")
SHARED_TABLES = {"film": ("item", "liked", "disliked")}
SYNTHETIC_EPOCH_ROWS, SYNTHETIC_TEST_ROWS, FAR_AWAY = 1_000_000, 65_536, 10**9


@dataclass(frozen=True)
class CTRTask:
    """A click-through task as one rank sees it.

    tables: configs. num_dense: dense inputs. steps_per_epoch: full batches in one pass. train: step -> this rank's
    slices of that step's batch and the following ones, epoch after epoch. test: this rank's slices of the test batches.
    """

    tables: list[EmbeddingBagConfig]
    num_dense: int
    steps_per_epoch: int
    train: Callable[[int], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]


def movielens_task(
    batch_size: int, dim: int, seed: int, rank: int, world_size: int, folder: Path | None = None
) -> CTRTask:
    """MovieLens, shuffled anew in every epoch; the three features that hold films share a table.

    folder: of an unpacked release; None: 100K, fetched on first use.
    """
    data = movielens_ctr(read_movielens(folder) if folder is not None else None, seed=seed)
    table_of = {feature: table for table, features in SHARED_TABLES.items() for feature in features}
    features_of: dict[str, list[str]] = {}
    for feature in data.sparse_names:
        features_of.setdefault(table_of.get(feature, feature), []).append(feature)
    rows_of = {name: data.num_embeddings[features[0]] for name, features in features_of.items()}
    options = {"seed": seed, "drop_last": True, "rank": rank, "world_size": world_size}
    batches = data.batches("train", batch_size // world_size, **options)

    def train(first_step: int) -> Iterator[Batch]:
        epoch, skipped = divmod(first_step, len(batches))
        batches.set_epoch(epoch)
        while True:
            yield from itertools.islice(iter(batches), skipped, None)
            skipped = 0

    def test() -> Iterator[Batch]:
        for rows_B in torch.arange(len(data.test)).split(batch_size):
            yield data.test.batch(rows_B.tensor_split(world_size)[rank])

    tables = [_table(name, rows_of[name], dim, features) for name, features in features_of.items()]
    return CTRTask(tables, len(data.dense_names), len(batches), train, test)


def synthetic_criteo_task(batch_size: int, dim: int, seed: int, rank: int, world_size: int) -> CTRTask:
    """Criteo-like rows, made as they are needed; each is seen once."""
    data = SyntheticCriteo(seed=seed)

    def train(first_step: int) -> Iterator[Batch]:
        return data.batches(batch_size // world_size, 2**40, first_step * batch_size, rank, world_size)

    def test() -> Iterator[Batch]:
        for chunk in data.chunks(SYNTHETIC_TEST_ROWS, FAR_AWAY, batch_size):
            rows_B = torch.arange(len(chunk.labels)).tensor_split(world_size)[rank].numpy()
            yield to_batch(chunk.dense[rows_B], chunk.ids[rows_B], chunk.labels[rows_B])

    tables = [_table(f"t_{name}", rows, dim, [name]) for name, rows in data.num_embeddings_per_feature.items()]
    return CTRTask(tables, len(DEFAULT_INT_NAMES), SYNTHETIC_EPOCH_ROWS // batch_size, train, test)


def criteo_task(folder: Path, rows: int, batch_size: int, dim: int, rank: int, world_size: int) -> CTRTask:
    """Criteo as `BinaryCriteoUtils` writes it, `<day>_{dense,sparse,labels}.npy`; half of the last day is the test.

    Categories are taken modulo `rows`.

    Raises:
        FileNotFoundError: fewer than two days in the folder.
    """
    days = sorted((path.name.removesuffix("_dense.npy") for path in folder.glob("*_dense.npy")), key=_day_number)
    if len(days) < 2:
        raise FileNotFoundError(f"{folder}: expected <day>_dense.npy (and sparse, labels) of two days, found {days}")

    def pipe(stage: str, chosen: list[str]) -> InMemoryBinaryCriteoIterDataPipe:
        paths = [[str(folder / f"{day}_{part}.npy") for day in chosen] for part in ("dense", "sparse", "labels")]
        options = {"drop_last": stage == "train", "mmap_mode": True, "hashes": [rows] * len(DEFAULT_CAT_NAMES)}
        return InMemoryBinaryCriteoIterDataPipe(stage, *paths, batch_size // world_size, rank, world_size, **options)

    training = pipe("train", days[:-1])

    def train(first_step: int) -> Iterator[Batch]:
        skipped = first_step % len(training)
        while True:
            yield from itertools.islice(iter(training), skipped, None)
            skipped = 0

    tables = [_table(f"t_{name}", rows, dim, [name]) for name in DEFAULT_CAT_NAMES]
    return CTRTask(tables, len(DEFAULT_INT_NAMES), len(training), train, lambda: iter(pipe("test", days[-1:])))


def _table(name: str, rows: int, dim: int, features: list[str]) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features), pooling=PoolingType.MEAN,
        weight_init_min=-0.05, weight_init_max=0.05,
    )  # fmt: skip


def _day_number(day: str) -> tuple[int, str]:
    digits = "".join(letter for letter in day if letter.isdigit())
    return (int(digits) if digits else 0, day)
