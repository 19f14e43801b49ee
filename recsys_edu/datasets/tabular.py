"""A table of examples in memory (dense columns, jagged id columns, labels) and the batches made from it.

Shapes: E examples of the whole table, B of one batch, F sparse features, N values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recsys_edu.datasets.utils import Batch
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class JaggedColumn:
    """One sparse feature of E examples: example e has the ids `values[offsets[e] : offsets[e + 1]]`.

    values: int64 `[N]`. offsets: int64 `[E + 1]`.
    """

    values: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of_single_ids(cls, ids_E: torch.Tensor) -> JaggedColumn:
        """Exactly one id per example."""
        return cls(ids_E.long(), torch.arange(ids_E.numel() + 1))

    @classmethod
    def of_lengths(cls, values: torch.Tensor, lengths_E: torch.Tensor) -> JaggedColumn:
        """Bags given by their sizes."""
        return cls(values.long(), torch.cat([torch.zeros(1, dtype=torch.int64), lengths_E.long().cumsum(0)]))

    def take(self, rows_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(values `[N]`, lengths int32 `[B]`) of the chosen examples, in the order of `rows_B`."""
        starts_B = self.offsets[rows_B]
        lengths_B = self.offsets[rows_B + 1] - starts_B
        ends_B = lengths_B.cumsum(0)
        # position n of the result lies in the bag of example b at (n - start of b's bag in the result)
        shift_B = starts_B - (ends_B - lengths_B)
        positions_N = torch.arange(int(lengths_B.sum())) + shift_B.repeat_interleave(lengths_B)
        return self.values[positions_N], lengths_B.int()


@dataclass(frozen=True)
class TabularData:
    """E examples: dense float32 `[E, num_dense]`, sparse name -> JaggedColumn, labels float32 `[E]`."""

    dense: torch.Tensor
    sparse: dict[str, JaggedColumn]
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def batch(self, rows_B: torch.Tensor) -> Batch:
        """The chosen examples as one Batch whose KJT has the sparse features in this table's order."""
        taken = [column.take(rows_B) for column in self.sparse.values()]
        return Batch(
            dense_features=self.dense[rows_B],
            sparse_features=KeyedJaggedTensor(
                keys=list(self.sparse),
                values=torch.cat([values for values, _ in taken]),
                lengths=torch.cat([lengths_B for _, lengths_B in taken]),
                stride=rows_B.numel(),
            ),
            labels=self.labels[rows_B],
        )

    def select(self, rows: torch.Tensor) -> TabularData:
        """A table of the chosen examples only."""
        sparse = {name: JaggedColumn.of_lengths(*column.take(rows)) for name, column in self.sparse.items()}
        return TabularData(self.dense[rows], sparse, self.labels[rows])


class TabularBatches:
    """The batches of one epoch after another: every `iter()` is the next epoch, with its own shuffle.

    >>> batches = TabularBatches(table, batch_size=1024, shuffle=True, seed=0)     # doctest: +SKIP
    >>> for epoch in range(2):                                                     # doctest: +SKIP
    ...     for batch in batches: train(batch)

    The order depends on (seed, epoch) alone; `set_epoch` repeats or resumes one. The last batch holds what
    remains, unless `drop_last`. `rank`/`world_size` deal whole batches out to ranks in turn, the same number to
    each: what cannot be dealt evenly is left out of that epoch.
    """

    def __init__(
        self,
        table: TabularData,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in [0, world_size={world_size})")
        self.table = table
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.table), self.batch_size)
        num_batches = full if self.drop_last or not rest else full + 1
        return num_batches // self.world_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._epoch_batches(epoch)

    def _epoch_batches(self, epoch: int) -> Iterator[Batch]:
        if self.shuffle:
            # one number out of two: seeds far apart so that (seed, epoch) pairs do not meet
            order = torch.randperm(
                len(self.table), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            )
        else:
            order = torch.arange(len(self.table))
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield self.table.batch(order[start : start + self.batch_size])
