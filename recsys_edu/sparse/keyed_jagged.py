"""KeyedJaggedTensor: several features' ragged batches in one flat, feature-major layout.

    keys   "genre"                    "cast"
    rows   [[a, b], [], [c]]          [[d], [e, f], []]
    values  a b c d e f
    lengths 2 0 1 1 2 0               stride (rows per key) = 3

With a variable batch per feature (VBE) each key has its own number of rows, given per rank it came from.

Counterpart: torchrec.sparse.jagged_tensor.KeyedJaggedTensor.
Shapes: K keys, B stride, W ranks, N values in all.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from recsys_edu.kernels.jagged_ops import complete_cumsum
from recsys_edu.sparse import copying, dist_parts, printing, rearrange
from recsys_edu.sparse.checks import (
    JaggedInputError,
    TraceableMeta,
    check_keyed_structure,
    check_keys,
    check_structure,
    check_weights,
    checks_apply,
)
from recsys_edu.sparse.jagged import JaggedTensor, lengths_from, trusted_jagged
from recsys_edu.streamable import Pipelineable

InverseIndices = tuple[list[str], Tensor]
Strides = list[list[int]] | Tensor


class KeyedJaggedTensor(Pipelineable, metaclass=TraceableMeta):
    """Several features' ragged batches, flat and feature-major: the input of every embedding module.

    >>> features = KeyedJaggedTensor.from_lengths_sync(
    ...     keys=["genre", "cast"], values=torch.tensor([7, 8, 9, 5]), lengths=torch.tensor([2, 0, 1, 1]))
    >>> features.stride()
    2
    >>> features["cast"].to_dense()
    [tensor([9]), tensor([5])]

    Args:
        keys: the K features' names, in the order of the data.
        values: [N, ...] ids, all rows of the first key, then all of the second, ...
        weights: [N], one per value.
        lengths: [K * B] int32 or int64, or
        offsets: [K * B + 1]. The one not given is computed when asked for.
        stride: B, the rows per key; derived from the number of lengths if not given.
        stride_per_key_per_rank: [K, W] rows of each key from each rank: makes the batch variable (VBE).
        stride_per_key: [K] rows of each key, when they came from one rank.
        length_per_key, lengths_offset_per_key, offset_per_key, index_per_key, jt_dict: what is already known of
            the bookkeeping that is otherwise computed on first use.
        inverse_indices: (keys, [K, full batch]): for VBE, which row of its key each example of the full batch uses.

    Raises:
        AssertionError (also a ValueError): the parts do not fit together; the message says what was expected.
    """

    def __init__(
        self,
        keys: list[str],
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: Strides | None = None,
        stride_per_key: list[int] | None = None,
        length_per_key: list[int] | None = None,
        lengths_offset_per_key: list[int] | None = None,
        offset_per_key: list[int] | None = None,
        index_per_key: dict[str, int] | None = None,
        jt_dict: dict[str, JaggedTensor] | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> None:
        if stride_per_key is not None and stride_per_key_per_rank is None and len(set(stride_per_key)) > 1:
            stride_per_key_per_rank = [[rows] for rows in stride_per_key]
        if stride_per_key_per_rank is not None and len(stride_per_key_per_rank) == 0:
            stride_per_key_per_rank = None  # what stride_per_key_per_rank() answers for a batch of one stride
        if checks_apply("KeyedJaggedTensor", values):
            check_keys(keys)
            check_structure("KeyedJaggedTensor", lengths, offsets)
            check_weights("KeyedJaggedTensor", values, weights)
            num_lengths = lengths.numel() if lengths is not None else max(offsets.numel() - 1, 0)
            check_keyed_structure(keys, num_lengths, stride, stride_per_key_per_rank)
        _fill(self, keys, values, weights, lengths, offsets, stride, stride_per_key_per_rank, inverse_indices)
        self._stride_per_key = stride_per_key
        self._length_per_key = length_per_key
        self._lengths_offset_per_key = lengths_offset_per_key
        self._offset_per_key = offset_per_key
        self._index_per_key = index_per_key
        self._jt_dict = jt_dict

    # ---- other ways to make one -------------------------------------------------------------------------------

    @staticmethod
    def from_offsets_sync(
        keys: list[str],
        values: Tensor,
        offsets: Tensor,
        weights: Tensor | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: list[list[int]] | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> KeyedJaggedTensor:
        """From offsets, with `length_per_key` computed at once (waits for the device once)."""
        return KeyedJaggedTensor(
            keys, values, weights, None, offsets, stride, stride_per_key_per_rank, inverse_indices=inverse_indices
        ).sync()

    @staticmethod
    def from_lengths_sync(
        keys: list[str],
        values: Tensor,
        lengths: Tensor,
        weights: Tensor | None = None,
        stride: int | None = None,
        stride_per_key_per_rank: list[list[int]] | None = None,
        inverse_indices: InverseIndices | None = None,
    ) -> KeyedJaggedTensor:
        """From lengths, with `length_per_key` computed at once (waits for the device once)."""
        return KeyedJaggedTensor(
            keys, values, weights, lengths, None, stride, stride_per_key_per_rank, inverse_indices=inverse_indices
        ).sync()

    @staticmethod
    def from_jt_dict(jt_dict: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
        """Join features in dict order; features of different batch sizes give a variable-stride result.

        >>> a, b = (JaggedTensor(torch.arange(n), lengths=torch.tensor([n])) for n in (2, 1))
        >>> KeyedJaggedTensor.from_jt_dict({"a": a, "b": b}).lengths()
        tensor([2, 1])
        """
        return rearrange.from_jt_dict(jt_dict)

    @staticmethod
    def concat(kjt_list: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
        """Join along keys: all keys of the first part, then all of the second, ...

        Raises:
            ValueError: no parts, or some with and some without weights.
            AssertionError: parts of different stride, or fixed and variable stride together.
        """
        return rearrange.concat(kjt_list)

    @staticmethod
    def empty(
        is_weighted: bool = False,
        device: torch.device | None = None,
        values_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        lengths_dtype: torch.dtype = torch.int32,
    ) -> KeyedJaggedTensor:
        """No keys and no values."""
        weights = torch.empty(0, dtype=weights_dtype, device=device) if is_weighted else None
        values = torch.empty(0, dtype=values_dtype, device=device)
        return KeyedJaggedTensor([], values, weights, torch.empty(0, dtype=lengths_dtype, device=device), stride=0)

    @staticmethod
    def empty_like(kjt: KeyedJaggedTensor, device: torch.device | None = None) -> KeyedJaggedTensor:
        """Room for another batch of the same keys and shapes; values uninitialised and lengths 0 until `copy_`."""
        return copying.empty_like_keyed(kjt, device)

    @staticmethod
    def dist_init(
        keys: list[str],
        tensors: list[Tensor],
        variable_stride_per_key: bool,
        num_workers: int,
        recat: Tensor | None,
        stride_per_rank: list[int] | None,
        stagger: int = 1,
    ) -> KeyedJaggedTensor:
        """The batch of `keys` put together from what `num_workers` ranks sent (`dist_tensors`, rank after rank).

        Args:
            tensors: received lengths, values, then strides (variable batch) and weights, each rank-major.
            recat: the permutation from rank-major (rank, key) blocks to key-major (key, rank); one entry per block,
                or, where ranks have different batch sizes, one per length. None: already key-major.
            stride_per_rank: batch size of each rank (fixed stride).
            stagger: hosts over which ranks were interleaved in `recat`.
        """
        return dist_parts.dist_init(
            keys, tensors, variable_stride_per_key, num_workers, recat, stride_per_rank, stagger
        )

    # ---- data -------------------------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return self._values

    def weights(self) -> Tensor:
        """The weights; AssertionError when there are none."""
        if self._weights is None:
            raise JaggedInputError("This KeyedJaggedTensor has no weights; weights_or_none() returns None then.")
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def lengths(self) -> Tensor:
        """[K * B], computed from the offsets once if it was not given."""
        if self._lengths is None:
            self._lengths = lengths_from(self._offsets)
        return self._lengths

    def flat_lengths(self) -> Tensor:
        """The lengths as one dimension, whatever shape they were given in."""
        lengths = self.lengths()
        return lengths if lengths.dim() == 1 else lengths.reshape(-1)

    def lengths_or_none(self) -> Tensor | None:
        return self._lengths

    def offsets(self) -> Tensor:
        """[K * B + 1], computed from the lengths once if it was not given."""
        if self._offsets is None:
            self._offsets = complete_cumsum(self._lengths.reshape(-1))
        return self._offsets

    def offsets_or_none(self) -> Tensor | None:
        return self._offsets

    def device(self) -> torch.device:
        return self._values.device

    def size_in_bytes(self) -> int:
        """Bytes of the tensors held now (offsets or lengths not yet computed do not count)."""
        return sum(tensor.element_size() * tensor.numel() for tensor in self._tensors())

    # ---- bookkeeping, computed on first use -------------------------------------------------------------------

    def stride(self) -> int:
        """Rows per key; with a variable batch the full batch of the inverse indices, or else the largest key's."""
        if self._stride is None:
            if self._inverse_indices is not None:
                self._stride = self._inverse_indices[1].shape[-1]
            elif self._strides is not None:
                self._stride = max(self.stride_per_key(), default=0)
            else:
                self._stride = self._num_lengths() // len(self._keys) if self._keys else 0
        return self._stride

    def stride_per_key(self) -> list[int]:
        """Rows of each key, over all ranks."""
        if self._stride_per_key is None:
            if self._strides is None:
                self._stride_per_key = [self.stride()] * len(self._keys)
            else:
                self._stride_per_key = [sum(row) for row in self.stride_per_key_per_rank()]
        return self._stride_per_key

    def stride_per_key_per_rank(self) -> list[list[int]]:
        """[K][W] rows of each key from each rank; [] when all keys share one stride."""
        if self._strides is None:
            return []
        if isinstance(self._strides, Tensor):
            # host sync: batch sizes that came as a tensor
            self._strides = self._strides.tolist()
        return self._strides

    def variable_stride_per_key(self) -> bool:
        return self._strides is not None

    def inverse_indices(self) -> InverseIndices:
        """(keys, [K, full batch]); AssertionError when there are none."""
        if self._inverse_indices is None:
            raise JaggedInputError("This KeyedJaggedTensor has no inverse indices; it was built without them.")
        return self._inverse_indices

    def inverse_indices_or_none(self) -> InverseIndices | None:
        return self._inverse_indices

    def length_per_key(self) -> list[int]:
        """Number of values of each key (waits for the device on first use)."""
        if self._length_per_key is None:
            if self._offset_per_key is not None:
                self._length_per_key = [b - a for a, b in zip(self._offset_per_key, self._offset_per_key[1:])]
            else:
                self._length_per_key = rearrange.count_values_per_key(self)
        return self._length_per_key

    def length_per_key_or_none(self) -> list[int] | None:
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """[K + 1]: where each key's values begin (waits for the device on first use)."""
        if self._offset_per_key is None:
            self._offset_per_key = list(accumulate(self.length_per_key(), initial=0))
        return self._offset_per_key

    def offset_per_key_or_none(self) -> list[int] | None:
        return self._offset_per_key

    def lengths_offset_per_key(self) -> list[int]:
        """[K + 1]: where each key's lengths begin."""
        if self._lengths_offset_per_key is None:
            self._lengths_offset_per_key = list(accumulate(self.stride_per_key(), initial=0))
        return self._lengths_offset_per_key

    def index_per_key(self) -> dict[str, int]:
        """Position of each key."""
        if self._index_per_key is None:
            self._index_per_key = {key: index for index, key in enumerate(self._keys)}
        return self._index_per_key

    def sync(self) -> KeyedJaggedTensor:
        """Compute `length_per_key` and `offset_per_key` now, in one wait for the device; nothing for meta tensors."""
        if not (self._values.is_meta or torch.compiler.is_compiling()):
            self.offset_per_key()
        return self

    def unsync(self) -> KeyedJaggedTensor:
        """Forget `length_per_key` and `offset_per_key`."""
        self._length_per_key = None
        self._offset_per_key = None
        return self

    # ---- taking apart and rearranging -------------------------------------------------------------------------

    def split(self, segments: list[int]) -> list[KeyedJaggedTensor]:
        """Cut into parts of so many consecutive keys each; the parts are views.

        >>> [part.keys() for part in KeyedJaggedTensor(
        ...     ["a", "b", "c"], torch.arange(3), lengths=torch.ones(3, dtype=torch.long)).split([2, 0, 1])]
        [['a', 'b'], [], ['c']]

        Raises:
            IndexError: more keys asked for than there are.
        """
        return rearrange.split(self, segments)

    def permute(self, indices: list[int], indices_tensor: Tensor | None = None) -> KeyedJaggedTensor:
        """Pick keys by position, in any order, repeats allowed; weights and strides follow.

        Args:
            indices: positions of the keys to take.
            indices_tensor: the same as a tensor on the device, if at hand.

        Raises:
            IndexError: a position that no key has.
        """
        return rearrange.permute(self, indices, indices_tensor)

    def flatten_lengths(self) -> KeyedJaggedTensor:
        """The same batch with lengths as one dimension, whatever shape they were given in."""
        return self._with(self._values, self._weights, self.flat_lengths(), self._offsets)

    def __getitem__(self, key: str) -> JaggedTensor:
        """One key's rows, with offsets beginning at 0; KeyError names the keys there are."""
        index = self.index_per_key().get(key)
        if index is None:
            raise KeyError(f"No key {key!r} in this KeyedJaggedTensor; its keys are {self._keys}.")
        start, end = self.offset_per_key()[index : index + 2]
        first_row, last_row = self.lengths_offset_per_key()[index : index + 2]
        return trusted_jagged(
            self._values[start:end],
            None if self._weights is None else self._weights[start:end],
            self.flat_lengths()[first_row:last_row],
        )

    def to_dict(self, compute_offsets: bool = True) -> dict[str, JaggedTensor]:
        """One JaggedTensor per key, kept for the next call; `compute_offsets=False` leaves offsets for later."""
        if self._jt_dict is None:
            self._jt_dict = rearrange.to_dict(self, compute_offsets)
        return self._jt_dict

    # ---- moving between devices, streams and ranks ------------------------------------------------------------

    def to(
        self, device: torch.device, non_blocking: bool = False, dtype: torch.dtype | None = None
    ) -> KeyedJaggedTensor:
        """The same batch on another device; `dtype` converts the weights only."""
        return copying.move_keyed(self, device, non_blocking, dtype)

    def pin_memory(self) -> KeyedJaggedTensor:
        """A copy in page-locked memory, from which copies to a CUDA device can run beside other work."""
        return copying.pin_keyed(self)

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in self._tensors():
            tensor.record_stream(stream)

    def copy_(self, kjt: KeyedJaggedTensor, non_blocking: bool = False) -> KeyedJaggedTensor:
        """Take over the numbers of a batch of the same keys and shapes, in place.

        Raises:
            ValueError: keys or shapes differ; nothing is changed then.
        """
        return copying.copy_keyed(self, kjt, non_blocking)

    def clear_storage(self) -> int:
        """Free the memory of every tensor held, at once; returns the bytes freed. The batch is unusable after."""
        freed = 0
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            freed += storage.nbytes()
            storage.resize_(0)
        self._jt_dict = None
        return freed

    def dist_labels(self) -> list[str]:
        """Which tensors travel when keys are dealt out to ranks."""
        return dist_parts.dist_labels(self)

    def dist_splits(self, key_splits: list[int]) -> list[list[int]]:
        """For each label, how many elements go to each rank when rank r gets `key_splits[r]` consecutive keys."""
        return dist_parts.dist_splits(self, key_splits)

    def dist_tensors(self) -> list[Tensor]:
        """The tensors that travel, in label order."""
        return dist_parts.dist_tensors(self)

    # ---- looking at it ----------------------------------------------------------------------------------------

    def __str__(self) -> str:
        if self._values.is_meta:
            return repr(self)
        # host sync: printing needs the numbers
        offsets = self.offsets().tolist()
        return printing.keyed_jagged_string(
            self._keys, self._values, self._weights, offsets, self.lengths_offset_per_key()
        )

    def __repr__(self) -> str:
        keys = f"{self._keys[:6]}"[:-1] + (f", ... {len(self._keys)} in all]" if len(self._keys) > 6 else "]")
        stride = "variable" if self._strides is not None else self.stride()
        weighted = ", weighted" if self._weights is not None else ""
        return (
            f"KeyedJaggedTensor(keys={keys}, stride={stride}, values={printing.tensor_summary(self._values)}{weighted})"
        )

    def _repr_html_(self) -> str:
        from recsys_edu.viz.jagged import keyed_jagged_html  # a batch is drawn only where someone looks at it

        return keyed_jagged_html(self)

    # ---- internals --------------------------------------------------------------------------------------------

    def _num_lengths(self) -> int:
        return self._lengths.numel() if self._lengths is not None else max(self._offsets.numel() - 1, 0)

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self._values, self._weights, self._lengths, self._offsets

    def _tensors(self) -> list[Tensor]:
        return [part for part in self._parts() if part is not None]

    def _with(
        self, values: Tensor, weights: Tensor | None, lengths: Tensor | None, offsets: Tensor | None
    ) -> KeyedJaggedTensor:
        """The same keys, strides and bookkeeping around other tensors of the same shapes."""
        other = trusted_keyed(
            self._keys, values, weights, lengths, offsets, self._stride, self._strides, self._inverse_indices
        )
        other._stride_per_key = self._stride_per_key
        other._length_per_key = self._length_per_key
        other._offset_per_key = self._offset_per_key
        other._lengths_offset_per_key = self._lengths_offset_per_key
        other._index_per_key = self._index_per_key
        return other


def _fill(
    kjt: KeyedJaggedTensor,
    keys: list[str],
    values: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    stride: int | None,
    strides: Strides | None,
    inverse_indices: InverseIndices | None,
) -> None:
    kjt._keys = keys
    kjt._values = values
    kjt._weights = weights
    kjt._lengths = lengths
    kjt._offsets = offsets
    kjt._stride = stride
    kjt._strides = strides
    kjt._inverse_indices = inverse_indices


def trusted_keyed(
    keys: list[str],
    values: Tensor,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    stride: int | None = None,
    strides: Strides | None = None,
    inverse_indices: InverseIndices | None = None,
    length_per_key: list[int] | None = None,
) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor of parts already known to fit: no checks, and no look for fx proxies."""
    kjt = KeyedJaggedTensor.__new__(KeyedJaggedTensor)
    _fill(kjt, keys, values, weights, lengths, offsets, stride, strides, inverse_indices)
    kjt._stride_per_key = None
    kjt._length_per_key = length_per_key
    kjt._lengths_offset_per_key = None
    kjt._offset_per_key = None
    kjt._index_per_key = None
    kjt._jt_dict = None
    return kjt


def kjt_is_equal(kjt_1: KeyedJaggedTensor, kjt_2: KeyedJaggedTensor) -> bool:
    """Whether two batches hold the same keys, rows and strides; never raises on a mismatch."""
    if not isinstance(kjt_1, KeyedJaggedTensor) or not isinstance(kjt_2, KeyedJaggedTensor):
        return False
    if kjt_1.keys() != kjt_2.keys() or kjt_1.stride_per_key() != kjt_2.stride_per_key():
        return False
    if kjt_1.stride_per_key_per_rank() != kjt_2.stride_per_key_per_rank() or not copying.parts_are_equal(kjt_1, kjt_2):
        return False
    first, second = kjt_1.inverse_indices_or_none(), kjt_2.inverse_indices_or_none()
    if first is None or second is None:
        return first is second
    return first[0] == second[0] and torch.equal(first[1], second[1])
