"""KeyedJaggedTensor and KeyedTensor as trees of tensors: what torch.export, torch.compile and vmap see.

A KeyedJaggedTensor is always six leaves (values, weights, lengths, offsets, strides, inverse indices), absent
ones None; its keys are the tree's context. So one exported graph serves every batch of the same keys. The place of
the offsets is TorchRec's, and always empty: the structure travels as lengths, whatever the batch was made from and
whatever it has computed since.
(JaggedTensor registers itself in `jagged.py`.)
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils._pytree import GetAttrKey, register_pytree_node

from recsys_edu.sparse.jagged import JaggedTensor, _expect_leaves, flat_parts
from recsys_edu.sparse.keyed import KeyedTensor
from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor, trusted_keyed
from recsys_edu.sparse.rearrange import select_inverse

LEAVES = ("values", "weights", "lengths", "offsets", "stride_per_key_per_rank", "inverse_indices")


def _flatten_kjt(kjt: KeyedJaggedTensor) -> tuple[list[Tensor | None], list[str]]:
    strides = kjt._strides
    if strides is not None and not isinstance(strides, Tensor):
        strides = torch.tensor(strides, dtype=torch.int32)
    inverse = select_inverse(kjt, kjt.keys())  # its own keys travel as the batch's keys
    return [*flat_parts(kjt), strides, None if inverse is None else inverse[1]], kjt.keys()


def _unflatten_kjt(leaves: object, keys: list[str]) -> KeyedJaggedTensor:
    *parts, strides, inverse = _expect_leaves("KeyedJaggedTensor", leaves, len(LEAVES))
    return trusted_keyed(keys, *parts, strides=strides, inverse_indices=None if inverse is None else (keys, inverse))


def _flatten_kt(keyed: KeyedTensor) -> tuple[list[Tensor], tuple[list[str], list[int], int]]:
    return [keyed.values()], (keyed.keys(), keyed.length_per_key(), keyed.key_dim())


def _unflatten_kt(leaves: object, context: tuple[list[str], list[int], int]) -> KeyedTensor:
    (values,) = _expect_leaves("KeyedTensor", leaves, 1)
    keys, length_per_key, key_dim = context
    keyed = KeyedTensor.__new__(KeyedTensor)  # leaves may be stand-ins without a shape
    keyed._keys, keyed._length_per_key, keyed._values, keyed._key_dim = keys, length_per_key, values, key_dim
    keyed._offset_per_key = keyed._index_per_key = None
    return keyed


def flatten_kjt_list(kjt_arr: list[KeyedJaggedTensor]) -> tuple[list[Tensor | None], list[list[str]]]:
    """Several batches as one list of tensors, six for each, and each one's keys."""
    flat = [_flatten_kjt(kjt) for kjt in kjt_arr]
    return [leaf for leaves, _ in flat for leaf in leaves], [keys for _, keys in flat]


def unflatten_kjt_list(values: list[Tensor | None], contexts: list[list[str]]) -> list[KeyedJaggedTensor]:
    """The inverse of `flatten_kjt_list`; ValueError unless there are six tensors per batch."""
    if len(values) != len(LEAVES) * len(contexts):
        raise ValueError(f"{len(contexts)} batches are {len(LEAVES) * len(contexts)} leaves, got {len(values)}.")
    width = len(LEAVES)
    return [_unflatten_kjt(values[i * width : (i + 1) * width], keys) for i, keys in enumerate(contexts)]


# An exported program saved to disk holds its example input; torch.load(weights_only=True) may rebuild these classes.
torch.serialization.add_safe_globals([JaggedTensor, KeyedJaggedTensor, KeyedTensor])

register_pytree_node(
    KeyedJaggedTensor,
    _flatten_kjt,
    _unflatten_kjt,
    serialized_type_name="recsys_edu.sparse.jagged_tensor.KeyedJaggedTensor",
    flatten_with_keys_fn=lambda kjt: (
        [(GetAttrKey(name), leaf) for name, leaf in zip(LEAVES, _flatten_kjt(kjt)[0])],
        kjt.keys(),
    ),
)
register_pytree_flatten_spec(KeyedJaggedTensor, lambda kjt, spec: _flatten_kjt(kjt)[0])
register_pytree_node(
    KeyedTensor,
    _flatten_kt,
    _unflatten_kt,
    serialized_type_name="recsys_edu.sparse.jagged_tensor.KeyedTensor",
    to_dumpable_context=json.dumps,
    from_dumpable_context=lambda text: tuple(json.loads(text)),
    flatten_with_keys_fn=lambda keyed: ([(GetAttrKey("values"), keyed.values())], _flatten_kt(keyed)[1]),
)
register_pytree_flatten_spec(KeyedTensor, lambda keyed, spec: [keyed.values()])
