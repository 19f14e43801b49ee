"""TensorPool: a table of rows that are written, not trained: features of items, say, kept where they are looked up.

Counterpart: torchrec.modules.tensor_pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.modules.object_pool import ObjectPool, check_slots, last_of_each


class TensorPool(ObjectPool[Tensor]):
    """`pool_size` rows of `dim` numbers, zero at first. Buffer: `_pool`.

    >>> pool = TensorPool(pool_size=4, dim=2, dtype=torch.float32)
    >>> pool.update(torch.tensor([1, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> pool.lookup(torch.tensor([3, 0, 3])).tolist()
    [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]]

    Args:
        loaded_values: the rows to begin with, `[pool_size, dim]`.
        enable_uvm: accepted for TorchRec's callers; the rows are on `device` (default: cpu).

    Raises:
        IndexError: an id that is no slot.
        ValueError: values of another shape or dtype; nothing is written.

    Counterpart: torchrec.modules.tensor_pool.TensorPool.
    """

    def __init__(
        self,
        pool_size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        loaded_values: Tensor | None = None,
        enable_uvm: bool = False,
    ) -> None:
        super().__init__()
        pool = torch.zeros(pool_size, dim, dtype=dtype, device=device)
        if loaded_values is not None:
            check_rows(loaded_values, pool_size, dim, dtype)
            pool.copy_(loaded_values)
        self.register_buffer("_pool", pool)

    @property
    def pool_size(self) -> int:
        return self._pool.shape[0]

    @property
    def dim(self) -> int:
        return self._pool.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._pool.dtype

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def pool(self) -> Tensor:
        """All rows."""
        return self._pool

    def lookup(self, ids: Tensor) -> Tensor:
        check_slots(ids, self.pool_size)
        return self._pool[ids.long()]

    @torch.no_grad()
    def update(self, ids: Tensor, values: Tensor) -> None:
        check_slots(ids, self.pool_size)
        check_rows(values, len(ids), self.dim, self.dtype)
        last = last_of_each(ids)
        self._pool[ids[last].long()] = values[last]


def check_rows(values: Tensor, num_rows: int, dim: int, dtype: torch.dtype) -> None:
    """ValueError unless `values` are `num_rows` rows of `dim` numbers of this dtype."""
    if values.shape != (num_rows, dim) or values.dtype is not dtype:
        raise ValueError(
            f"expected {num_rows} rows of {dim} numbers, {dtype}; got {values.dtype} of shape {tuple(values.shape)}"
        )
