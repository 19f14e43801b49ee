"""Random batches of any shape, for smoke tests and speed measurements: there is nothing in them to learn.

Shapes: B batch, F features, N values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset

from recsys_edu.datasets.utils import Batch
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

_DEFAULT_HASH_SIZE = 100
_DEFAULT_IDS_PER_FEATURE = 2


@dataclass(frozen=True)
class _Recipe:
    """What a random batch looks like: per feature the id range [0, hash_size) and the range of bag sizes."""

    keys: list[str]
    batch_size: int
    hash_sizes: list[int]
    min_ids: list[int]
    max_ids: list[int]
    num_dense: int

    def make(self, generator: torch.Generator) -> Batch:
        lengths_FB, values = [], []
        for hash_size, low, high in zip(self.hash_sizes, self.min_ids, self.max_ids):
            lengths_B = torch.randint(low, high + 1, (self.batch_size,), dtype=torch.int32, generator=generator)
            num_values = int(lengths_B.sum())  # host sync: none on CPU, where batches are made
            lengths_FB.append(lengths_B)
            values.append(torch.randint(0, hash_size, (num_values,), generator=generator))
        return Batch(
            dense_features=torch.randn(self.batch_size, self.num_dense, generator=generator),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=self.keys, values=torch.cat(values), lengths=torch.cat(lengths_FB)
            ),
            labels=torch.randint(0, 2, (self.batch_size,), generator=generator),
        )


class RandomRecDataset(IterableDataset[Batch]):
    """Endless (or `num_batches`) random Batches with ids below `hash_size` and bags of the sizes you name.

    >>> dataset = RandomRecDataset(["user", "item"], batch_size=4, hash_size=10, ids_per_feature=1, num_batches=3)
    >>> [batch.labels.shape[0] for batch in dataset]                # doctest: +SKIP
    [4, 4, 4]

    The plural arguments give one number per key and win over the singular ones. Bag sizes: with
    `ids_per_feature=n` every bag has n ids; with `min_ids_per_feature=m` too, m to n; with `ids_per_features`
    alone, 0 to the feature's number; with nothing at all, 0 to 2. The first `num_generated_batches` batches are
    made once and then cycled (making them can cost more than training on them); a negative number makes every
    batch anew. Each `iter()` starts again from the first batch.

    Batches: dense float32 normal `[B, num_dense]`, ids int64, lengths int32, labels int64 0/1 `[B]`.

    Raises:
        ValueError: a plural argument has not one number per key, or a bag's minimum exceeds its maximum.
        TypeError: `len()` of an endless dataset.
    Counterpart: torchrec.datasets.random.RandomRecDataset.
    """

    def __init__(
        self,
        keys: list[str],
        batch_size: int,
        hash_size: int | None = None,
        hash_sizes: list[int] | None = None,
        ids_per_feature: int | None = None,
        ids_per_features: list[int] | None = None,
        num_dense: int = 50,
        manual_seed: int | None = None,
        num_batches: int | None = None,
        num_generated_batches: int = 10,
        min_ids_per_feature: int | None = None,
        min_ids_per_features: list[int] | None = None,
    ) -> None:
        super().__init__()
        if not keys:
            raise ValueError("keys is empty: name at least one sparse feature")
        max_ids = _per_key("ids_per_features", ids_per_features, ids_per_feature, _DEFAULT_IDS_PER_FEATURE, keys)
        default_min = ids_per_feature if ids_per_features is None and ids_per_feature is not None else 0
        min_ids = _per_key("min_ids_per_features", min_ids_per_features, min_ids_per_feature, default_min, keys)
        for key, low, high in zip(keys, min_ids, max_ids):
            if not 0 <= low <= high:
                raise ValueError(f"feature {key!r}: bag sizes from {low} to {high}; expected 0 <= minimum <= maximum")
        self._recipe = _Recipe(
            keys=list(keys),
            batch_size=batch_size,
            hash_sizes=_per_key("hash_sizes", hash_sizes, hash_size, _DEFAULT_HASH_SIZE, keys),
            min_ids=min_ids,
            max_ids=max_ids,
            num_dense=num_dense,
        )
        self._num_batches = num_batches
        self._seed = manual_seed if manual_seed is not None else int(torch.randint(2**63 - 1, ()))
        limit = num_generated_batches if num_batches is None else min(num_generated_batches, num_batches)
        self._make_each_anew = num_generated_batches < 0
        generator = torch.Generator().manual_seed(self._seed)
        self._made = [self._recipe.make(generator) for _ in range(max(limit, 0))]
        if not self._made and not self._make_each_anew and num_batches != 0:
            raise ValueError("num_generated_batches=0 leaves nothing to yield: use a positive number, or -1")

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        number = 0
        while self._num_batches is None or number < self._num_batches:
            yield self._recipe.make(generator) if self._make_each_anew else self._made[number % len(self._made)]
            number += 1

    def __len__(self) -> int:
        if self._num_batches is None:
            raise TypeError("this RandomRecDataset is endless: give num_batches to bound it")
        return self._num_batches


def _per_key(name: str, many: list[int] | None, one: int | None, default: int, keys: list[str]) -> list[int]:
    if many is None:
        return [default if one is None else one] * len(keys)
    if len(many) != len(keys):
        raise ValueError(f"{name} has {len(many)} numbers for {len(keys)} keys {keys}")
    return list(many)
