"""KeyedJaggedTensorPool: a bag of ids per feature in every slot: the films that each user has seen, say.

    slot    values            key_lengths (a, b)
    0       5 6 4 . .         2 1                 a: 5 6      b: 4
    1       . . . . .         0 0                 both empty
    2       1 2 3 . .         0 3                 a: empty    b: 1 2 3

Suffixes: N slots asked for, F features, V values, P slots of the pool, M the longest slot.

Counterpart: torchrec.modules.keyed_jagged_tensor_pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.kernels.jagged_ops import permute_2d
from recsys_edu.modules.object_pool import ObjectPool, check_slots, last_of_each
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class KeyedJaggedTensorPool(ObjectPool[KeyedJaggedTensor]):
    """`pool_size` slots, each with a bag of at most `feature_max_lengths[f]` values for every feature f.

    Buffers: `values [pool_size, sum of the lengths]`, the bags of a slot one after the other; `key_lengths
    [pool_size, features]`; `weights` where weighted.

    >>> pool = KeyedJaggedTensorPool(pool_size=10, feature_max_lengths={"seen": 3})
    >>> seen = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([7, 9]), torch.tensor([2]))
    >>> pool.update(torch.tensor([4]), seen)
    >>> pool.lookup(torch.tensor([4, 0]))["seen"].to_dense()
    [tensor([7, 9]), tensor([], dtype=torch.int64)]

    Raises:
        IndexError: an id that is no slot.
        KeyError: (update) a feature of the pool that the values do not have.
        ValueError: (update) another batch size than ids, a bag longer than its feature's limit, missing weights,
            another dtype; nothing is written.

    Counterpart: torchrec.modules.keyed_jagged_tensor_pool.KeyedJaggedTensorPool.
    """

    def __init__(
        self,
        pool_size: int,
        feature_max_lengths: dict[str, int],
        values_dtype: torch.dtype = torch.int64,
        is_weighted: bool = False,
        device: torch.device | None = None,
        enable_uvm: bool = False,
    ) -> None:
        super().__init__()
        self._feature_max_lengths, self._is_weighted = dict(feature_max_lengths), is_weighted
        widest = sum(feature_max_lengths.values())
        self.register_buffer("values", torch.zeros(pool_size, widest, dtype=values_dtype, device=device))
        lengths = torch.zeros(pool_size, len(feature_max_lengths), dtype=torch.int32, device=device)
        self.register_buffer("key_lengths", lengths)
        if is_weighted:
            self.register_buffer("weights", torch.zeros(pool_size, widest, device=device))

    @property
    def pool_size(self) -> int:
        return self.values.shape[0]

    @property
    def feature_max_lengths(self) -> dict[str, int]:
        return self._feature_max_lengths

    @property
    def values_dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def is_weighted(self) -> bool:
        return self._is_weighted

    def lookup(self, ids: Tensor) -> KeyedJaggedTensor:
        check_slots(ids, self.pool_size)
        ids = ids.long()
        lengths_NF = self.key_lengths[ids]
        stays_NM = torch.arange(self.values.shape[1], device=ids.device) < lengths_NF.sum(1, keepdim=True)
        weights_V = self.weights[ids][stays_NM] if self._is_weighted else None
        return by_feature(list(self._feature_max_lengths), lengths_NF, self.values[ids][stays_NM], weights_V)

    @torch.no_grad()
    def update(self, ids: Tensor, values: KeyedJaggedTensor) -> None:
        check_slots(ids, self.pool_size)
        values = fitting(values, len(ids), self._feature_max_lengths, self._is_weighted, self.values_dtype)
        lengths_NF, values_V, weights_V = by_slot(values)
        last = last_of_each(ids)
        slots = ids[last].long()
        self.key_lengths[slots] = lengths_NF[last].to(self.key_lengths.dtype)
        self.values[slots] = padded(lengths_NF, values_V, self.values.shape[1])[last]
        if self._is_weighted:
            self.weights[slots] = padded(lengths_NF, weights_V.to(self.weights.dtype), self.values.shape[1])[last]


def fitting(
    values: KeyedJaggedTensor, batch_size: int, max_lengths: dict[str, int], is_weighted: bool, dtype: torch.dtype
) -> KeyedJaggedTensor:
    """The pool's features of `values`, in its order, or the error that says why they cannot be stored."""
    missing = [name for name in max_lengths if name not in values.keys()]
    if missing:
        raise KeyError(f"the values have no features {missing}; they have {values.keys()}")
    if values.stride() != batch_size or values.variable_stride_per_key():
        raise ValueError(f"{batch_size} ids, but the values have a batch size of {values.stride()}")
    if values.values().dtype is not dtype:
        raise ValueError(f"the pool holds {dtype}, the values are {values.values().dtype}")
    if is_weighted and values.weights_or_none() is None:
        raise ValueError("the pool is_weighted, but the values have no weights")
    values = values.permute([values.keys().index(name) for name in max_lengths])
    lengths_FB = values.lengths().view(len(max_lengths), batch_size)
    for (name, limit), lengths_B in zip(max_lengths.items(), lengths_FB):
        if batch_size and int(lengths_B.max()) > limit:  # host sync: a bag that is too long would run into the next one
            raise ValueError(f"feature {name!r}: a bag of {int(lengths_B.max())} values, the pool keeps {limit}")
    return values


def by_slot(kjt: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(lengths [N, F], values, weights), slot after slot instead of feature after feature."""
    return _transposed(kjt.lengths().view(len(kjt.keys()), -1), kjt.values(), kjt.weights_or_none())


def by_feature(keys: list[str], lengths_NF: Tensor, values_V: Tensor, weights_V: Tensor | None) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor from what lies slot after slot."""
    lengths_FN, values_V, weights_V = _transposed(lengths_NF, values_V, weights_V)
    return KeyedJaggedTensor(keys, values_V, weights_V, lengths=lengths_FN.flatten(), stride=len(lengths_NF))


def _transposed(lengths_AB: Tensor, values_V: Tensor, weights_V: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    num_a, num_b = lengths_AB.shape
    order = torch.arange(num_a * num_b, device=values_V.device).view(num_a, num_b).t().flatten()
    lengths, values_V, weights_V = permute_2d(order, lengths_AB.reshape(-1, 1), values_V, weights_V)
    return lengths.view(num_b, num_a), values_V, weights_V


def padded(lengths_NF: Tensor, values_V: Tensor, width: int) -> Tensor:
    """One row per slot, its values from the left, zeros behind them."""
    totals_N = lengths_NF.sum(1)
    stays_NM = torch.arange(width, device=values_V.device) < totals_N[:, None]
    rows = torch.zeros(len(totals_N), width, dtype=values_V.dtype, device=values_V.device)
    rows[stays_NM] = values_V
    return rows
