"""ObjectPool: `pool_size` slots, each with an object; looked up and overwritten by slot number.

Counterpart: torchrec.modules.object_pool.
"""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class ObjectPool(abc.ABC, nn.Module, Generic[T]):
    """Base of TensorPool and KeyedJaggedTensorPool; `forward` is `lookup`."""

    @property
    @abc.abstractmethod
    def pool_size(self) -> int:
        """Number of slots."""

    @abc.abstractmethod
    def lookup(self, ids: Tensor) -> T:
        """The objects in these slots, in the order of `ids`."""

    @abc.abstractmethod
    def update(self, ids: Tensor, values: T) -> None:
        """Put new objects into these slots; of a slot that is named twice the last one stays."""

    def forward(self, ids: Tensor) -> T:
        return self.lookup(ids)


def check_slots(ids: Tensor, pool_size: int) -> None:
    """IndexError that names the first id that is no slot; ValueError for ids that are not a list of integers."""
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"ids have to be one-dimensional integers, got {ids.dtype} of shape {tuple(ids.shape)}")
    wrong = (ids < 0) | (ids >= pool_size)
    if bool(wrong.any()):  # host sync: a wrong slot must not be read or written
        raise IndexError(f"id {int(ids[wrong][0])} is no slot of a pool with slots 0 to {pool_size - 1}")


def last_of_each(ids: Tensor) -> Tensor:
    """Positions of the last occurrence of every id.

    >>> last_of_each(torch.tensor([7, 3, 7])).tolist()
    [1, 2]
    """
    slots, inverse = ids.unique(return_inverse=True)
    positions = torch.arange(len(ids), device=ids.device)
    return torch.full_like(slots, -1).scatter_reduce_(0, inverse, positions, "amax").sort().values
