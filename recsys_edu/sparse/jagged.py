"""JaggedTensor: one feature of a batch, where every row has its own number of values.

    rows      [[a, b], [], [c]]
    values     a b c                 lengths   2 0 1                 offsets   0 2 2 3

Counterpart: torchrec.sparse.jagged_tensor.JaggedTensor.
Shapes: B rows of the batch, N values in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils._pytree import GetAttrKey, register_pytree_node

from recsys_edu.kernels.jagged_ops import complete_cumsum, jagged_to_padded_dense
from recsys_edu.sparse import printing
from recsys_edu.sparse.checks import JaggedInputError, TraceableMeta, check_structure, check_weights, checks_apply
from recsys_edu.sparse.copying import PARTS, copy_parts, parts_are_equal, room_for
from recsys_edu.streamable import Pipelineable


class JaggedTensor(Pipelineable, metaclass=TraceableMeta):
    """One feature's ragged batch: all values one after the other, and how many belong to each row.

    >>> jagged = JaggedTensor(torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 0, 1]))
    >>> jagged.to_dense()
    [tensor([1, 2]), tensor([], dtype=torch.int64), tensor([3])]
    >>> jagged.offsets()
    tensor([0, 2, 2, 3])

    Args:
        values: [N, ...], the first dim is the ragged one; any dtype.
        weights: [N], one per value.
        lengths: [B] int32 or int64, or
        offsets: [B + 1] of the same kind, beginning with 0. The one not given is computed when asked for.

    Raises:
        AssertionError (also a ValueError): neither lengths nor offsets, not integers, or weights unlike values.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        if checks_apply("JaggedTensor", values):
            check_structure("JaggedTensor", lengths, offsets)
            check_weights("JaggedTensor", values, weights)
        self._values = values
        self._weights = weights
        self._lengths = lengths
        self._offsets = offsets

    @staticmethod
    def empty(
        is_weighted: bool = False,
        device: torch.device | None = None,
        values_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        lengths_dtype: torch.dtype = torch.int32,
    ) -> JaggedTensor:
        """No rows and no values."""
        weights = torch.empty(0, dtype=weights_dtype, device=device) if is_weighted else None
        structure = torch.empty(0, dtype=lengths_dtype, device=device)
        return JaggedTensor(torch.empty(0, dtype=values_dtype, device=device), weights, structure, structure.clone())

    @staticmethod
    def empty_like(jt: JaggedTensor, device: torch.device | None = None) -> JaggedTensor:
        """Room for another batch of the same shapes; values are uninitialised and lengths 0 until `copy_`."""
        return trusted_jagged(*(room_for(getattr(jt, part), part, device) for part in PARTS))

    @staticmethod
    def from_dense_lengths(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> JaggedTensor:
        """The first `lengths[b]` entries of each row of a padded [B, width] matrix.

        >>> JaggedTensor.from_dense_lengths(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1])).values()
        tensor([1, 2, 3])
        """
        kept = torch.arange(values.size(1), device=lengths.device) < lengths[:, None]
        # host sync: a mask selects a number of values that only the device knows
        return JaggedTensor(values[kept], None if weights is None else weights[kept], lengths)

    @staticmethod
    def from_dense(values: list[Tensor], weights: list[Tensor] | None = None) -> JaggedTensor:
        """One 1-D tensor per row.

        >>> JaggedTensor.from_dense([torch.tensor([1, 2]), torch.tensor([3])]).lengths()
        tensor([2, 1], dtype=torch.int32)
        """
        if not values:
            return JaggedTensor.empty(is_weighted=weights is not None)
        lengths = torch.tensor([row.size(0) for row in values], dtype=torch.int32, device=values[0].device)
        return JaggedTensor(torch.cat(values), None if weights is None else torch.cat(weights), lengths)

    def values(self) -> Tensor:
        return self._values

    def weights(self) -> Tensor:
        """The weights; AssertionError when there are none."""
        if self._weights is None:
            raise JaggedInputError("This JaggedTensor has no weights; weights_or_none() returns None then.")
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def lengths(self) -> Tensor:
        """[B], computed from the offsets once if it was not given."""
        if self._lengths is None:
            self._lengths = lengths_from(self._offsets)
        return self._lengths

    def lengths_or_none(self) -> Tensor | None:
        return self._lengths

    def offsets(self) -> Tensor:
        """[B + 1], computed from the lengths once if it was not given."""
        if self._offsets is None:
            self._offsets = complete_cumsum(self._lengths)
        return self._offsets

    def offsets_or_none(self) -> Tensor | None:
        return self._offsets

    def to_dense(self) -> list[Tensor]:
        """One tensor per row: views of `values`."""
        return self._rows_of(self._values)

    def to_dense_weights(self) -> list[Tensor] | None:
        """The weights, one tensor per row; None when there are none."""
        return None if self._weights is None else self._rows_of(self._weights)

    def to_padded_dense(self, desired_length: int | None = None, padding_value: float = 0.0) -> Tensor:
        """[B, desired_length]: rows cut, or filled with `padding_value`; by default as wide as the longest row."""
        return self._padded(self._values, desired_length, padding_value)

    def to_padded_dense_weights(self, desired_length: int | None = None, padding_value: float = 0.0) -> Tensor | None:
        """The same for the weights; None when there are none."""
        return None if self._weights is None else self._padded(self._weights, desired_length, padding_value)

    def device(self) -> torch.device:
        return self._values.device

    def size_in_bytes(self) -> int:
        """Bytes of the tensors held now (offsets or lengths not yet computed do not count)."""
        return sum(tensor.element_size() * tensor.numel() for tensor in self._tensors())

    def copy_(self, jt: JaggedTensor, non_blocking: bool = False) -> JaggedTensor:
        """Take over the numbers of a batch of the same shapes, in place.

        Raises:
            ValueError: the shapes differ, or one has weights and the other not; nothing is changed then.
        """
        copy_parts(self, jt, non_blocking)
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> JaggedTensor:
        return trusted_jagged(
            *(None if part is None else part.to(device, non_blocking=non_blocking) for part in self._parts())
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in self._tensors():
            tensor.record_stream(stream)

    def __str__(self) -> str:
        if self._values.is_meta:
            return repr(self)
        # host sync: printing needs the numbers
        offsets = self.offsets().tolist()
        return printing.jagged_string(self._values, self._weights, offsets)

    def __repr__(self) -> str:
        weighted = ", weighted" if self._weights is not None else ""
        return f"JaggedTensor(rows={num_rows(self)}, values={printing.tensor_summary(self._values)}{weighted})"

    def _repr_html_(self) -> str:
        from recsys_edu.viz.jagged import jagged_html  # a batch is drawn only where someone looks at it

        return jagged_html(self)

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self._values, self._weights, self._lengths, self._offsets

    def _tensors(self) -> list[Tensor]:
        return [part for part in self._parts() if part is not None]

    def _rows_of(self, tensor: Tensor) -> list[Tensor]:
        # host sync: a list of views needs every row's length
        lengths = self.lengths().tolist()
        return list(torch.split(tensor, lengths)) if lengths else []

    def _padded(self, tensor: Tensor, desired_length: int | None, padding_value: float) -> Tensor:
        if desired_length is None:
            lengths = self.lengths()
            # host sync: the matrix is as wide as the longest row
            desired_length = int(lengths.max()) if lengths.numel() else 0
        offsets = self.offsets()
        if offsets.numel() == 0:
            return tensor.new_empty(0, desired_length)
        return jagged_to_padded_dense(tensor, offsets, desired_length, padding_value)


def trusted_jagged(
    values: Tensor, weights: Tensor | None = None, lengths: Tensor | None = None, offsets: Tensor | None = None
) -> JaggedTensor:
    """A JaggedTensor of parts already known to fit: no checks, and no look for fx proxies."""
    jagged = JaggedTensor.__new__(JaggedTensor)
    jagged._values = values
    jagged._weights = weights
    jagged._lengths = lengths
    jagged._offsets = offsets
    return jagged


def lengths_from(offsets: Tensor) -> Tensor:
    return offsets[1:] - offsets[:-1]


def num_rows(jt: JaggedTensor) -> int:
    """Rows of the batch, without computing lengths or offsets."""
    return jt._lengths.numel() if jt._lengths is not None else max(jt._offsets.numel() - 1, 0)


def jt_is_equal(jt_1: JaggedTensor, jt_2: JaggedTensor) -> bool:
    """Whether two batches hold the same rows: values, weights, lengths and offsets; never raises on a mismatch."""
    if not isinstance(jt_1, JaggedTensor) or not isinstance(jt_2, JaggedTensor):
        return False
    return parts_are_equal(jt_1, jt_2)


def _unflatten(leaves: object, _context: None) -> JaggedTensor:
    return trusted_jagged(*_expect_leaves("JaggedTensor", leaves, len(PARTS)))


def _expect_leaves(name: str, leaves: object, expected: int) -> list:
    leaves = list(leaves)
    if len(leaves) != expected:
        raise ValueError(f"A {name} is made of {expected} leaves, got {len(leaves)}.")
    return leaves


def flat_parts(jagged: object) -> list[Tensor | None]:
    """What a (Keyed)JaggedTensor is as a tree: values, weights, lengths and an empty place for the offsets.

    Lengths stay cached in the batch, so that flattening twice gives the same tensors. A tree may hold stand-ins
    without any structure; they stay as they are.
    """
    has_structure = jagged._lengths is not None or jagged._offsets is not None
    return [jagged._values, jagged._weights, jagged.lengths() if has_structure else None, None]


register_pytree_node(
    JaggedTensor,
    lambda jt: (flat_parts(jt), None),
    _unflatten,
    serialized_type_name="recsys_edu.sparse.jagged_tensor.JaggedTensor",
    flatten_with_keys_fn=lambda jt: (
        [(GetAttrKey(part), leaf) for part, leaf in zip(PARTS, flat_parts(jt))],
        None,
    ),
)
register_pytree_flatten_spec(JaggedTensor, lambda jt, spec: flat_parts(jt))
