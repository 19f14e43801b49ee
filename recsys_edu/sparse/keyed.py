"""KeyedTensor: several features' dense embeddings side by side in one tensor.

    keys     "genre"  "cast"
    values   g g g    c c        one row per example; widths 3 and 2

Counterpart: torchrec.sparse.jagged_tensor.KeyedTensor.
Shapes: B rows of the batch, D summed widths.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.sparse import printing
from recsys_edu.sparse.checks import JaggedInputError, TraceableMeta, checks_apply
from recsys_edu.streamable import Pipelineable


class KeyedTensor(Pipelineable, metaclass=TraceableMeta):
    """Named slices of one dense tensor: what an EmbeddingBagCollection returns.

    >>> embeddings = KeyedTensor(["genre", "cast"], [2, 1], torch.tensor([[1., 2., 3.], [4., 5., 6.]]))
    >>> embeddings["cast"]
    tensor([[3.],
            [6.]])

    Args:
        keys: names, in the order of the data.
        length_per_key: width of each key along `key_dim`.
        values: [B, D], the widths side by side along `key_dim`.
        offset_per_key, index_per_key: what is already known of the bookkeeping computed on first use.

    Raises:
        AssertionError (also a ValueError): widths that do not add up to the tensor's, or not one per key.
    """

    def __init__(
        self,
        keys: list[str],
        length_per_key: list[int],
        values: Tensor,
        key_dim: int = 1,
        offset_per_key: list[int] | None = None,
        index_per_key: dict[str, int] | None = None,
    ) -> None:
        if checks_apply("KeyedTensor", values):
            if len(keys) != len(length_per_key):
                raise JaggedInputError(f"KeyedTensor has {len(keys)} keys {keys} but {len(length_per_key)} widths.")
            if keys and sum(length_per_key) != values.size(key_dim):
                raise JaggedInputError(
                    f"KeyedTensor: the widths {dict(zip(keys, length_per_key))} add up to {sum(length_per_key)}, "
                    f"but values has {values.size(key_dim)} in dim {key_dim} (shape {list(values.shape)})."
                )
        self._keys = keys
        self._length_per_key = length_per_key
        self._values = values
        self._key_dim = key_dim
        self._offset_per_key = offset_per_key
        self._index_per_key = index_per_key

    @staticmethod
    def from_tensor_list(keys: list[str], tensors: list[Tensor], key_dim: int = 1, cat_dim: int = 1) -> KeyedTensor:
        """Join named tensors along `cat_dim`; the widths are their sizes in `key_dim`."""
        return KeyedTensor(keys, [tensor.shape[key_dim] for tensor in tensors], torch.cat(tensors, cat_dim), key_dim)

    @staticmethod
    def regroup(keyed_tensors: list[KeyedTensor], groups: list[list[str]]) -> list[Tensor]:
        """One tensor per group of keys, gathered from several KeyedTensors; a key may serve in several groups.

        Of two KeyedTensors with the same key the later one counts. Differentiable.

        >>> left = KeyedTensor(["a", "b"], [1, 1], torch.tensor([[1., 2.]]))
        >>> right = KeyedTensor(["c"], [1], torch.tensor([[3.]]))
        >>> KeyedTensor.regroup([left, right], [["c", "a"], ["b"]])
        [tensor([[3., 1.]]), tensor([[2.]])]

        Raises:
            KeyError: a group names a key that no KeyedTensor has.
        """
        return regroup_kts(keyed_tensors, groups)

    @staticmethod
    def regroup_as_dict(
        keyed_tensors: list[KeyedTensor], groups: list[list[str]], keys: list[str]
    ) -> dict[str, Tensor]:
        """`regroup` under names: `keys[i]` for group i; AssertionError unless as many names as groups."""
        if len(groups) != len(keys):
            raise JaggedInputError(
                f"regroup_as_dict needs a name per group, got {len(keys)} names, {len(groups)} groups."
            )
        return _name_groups(keys, regroup_kts(keyed_tensors, groups))

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return self._values

    def key_dim(self) -> int:
        return self._key_dim

    def length_per_key(self) -> list[int]:
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Where each key begins along `key_dim`, and the end."""
        if self._offset_per_key is None:
            self._offset_per_key = list(accumulate(self._length_per_key, initial=0))
        return self._offset_per_key

    def index_per_key(self) -> dict[str, int]:
        """Position of each key."""
        if self._index_per_key is None:
            self._index_per_key = {key: index for index, key in enumerate(self._keys)}
        return self._index_per_key

    def __getitem__(self, key: str) -> Tensor:
        """One key's slice (a view); KeyError names the keys there are."""
        index = self.index_per_key().get(key)
        if index is None:
            raise KeyError(f"No key {key!r} in this KeyedTensor; its keys are {self._keys}.")
        return self.values().narrow(self._key_dim, self.offset_per_key()[index], self._length_per_key[index])

    def to_dict(self) -> dict[str, Tensor]:
        """Every key's slice (views)."""
        return dict(zip(self._keys, self._slices()))

    def device(self) -> torch.device:
        return self.values().device

    def size_in_bytes(self) -> int:
        values = self.values()
        return values.element_size() * values.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> KeyedTensor:
        return KeyedTensor(
            self._keys,
            self._length_per_key,
            self.values().to(device, non_blocking=non_blocking),
            self._key_dim,
            self._offset_per_key,
            self._index_per_key,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        self.values().record_stream(stream)

    def __str__(self) -> str:
        return repr(self) if self.values().is_meta else printing.keyed_string(self)

    def __repr__(self) -> str:
        widths = dict(zip(self._keys[:6], self._length_per_key))
        shown = f"{widths}"[:-1] + (f", ... {len(self._keys)} in all}}" if len(self._keys) > 6 else "}")
        return f"KeyedTensor({shown}, values={printing.tensor_summary(self.values())})"

    def _repr_html_(self) -> str:
        from recsys_edu.viz.jagged import keyed_html  # a tensor is drawn only where someone looks at it

        return keyed_html(self)

    def _slices(self) -> list[Tensor]:
        # One split, not many narrows: its backward is one concatenation instead of a zero-filled tensor per key.
        return list(torch.split(self.values(), self._length_per_key, self._key_dim)) if self._keys else []


def regroup_kts(keyed_tensors: list[KeyedTensor], groups: list[list[str]]) -> list[Tensor]:
    """`KeyedTensor.regroup` as a function."""
    slices: dict[str, Tensor] = {}
    for keyed in keyed_tensors:
        slices.update(keyed.to_dict())
    dim = keyed_tensors[0].key_dim() if keyed_tensors else 1
    try:
        return [torch.cat([slices[key] for key in group], dim) for group in groups]
    except KeyError as error:
        raise KeyError(f"regroup: no KeyedTensor has key {error.args[0]!r}; there are {list(slices)}.") from None


def permute_multi_embedding(keyed_tensors: list[KeyedTensor], groups: list[list[str]]) -> list[Tensor]:
    """Regroup in one kernel where FBGEMM runs on CUDA; the result is that of `regroup_kts`."""
    values = [keyed.values() for keyed in keyed_tensors]
    fits = all(keyed.key_dim() == 1 for keyed in keyed_tensors) and bool(values) and values[0].is_cuda
    if not fits or not use_fbgemm(values[0].device):
        return regroup_kts(keyed_tensors, groups)
    return torch.ops.fbgemm.regroup_keyed_tensor(
        values, [keyed.keys() for keyed in keyed_tensors], [keyed.length_per_key() for keyed in keyed_tensors], groups
    )


def _name_groups(names: list[str], tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, tensors))


# torch.fx meets these calls with Proxies in the lists and records them as one node each.
torch.fx.wrap("regroup_kts")
torch.fx.wrap("permute_multi_embedding")
torch.fx.wrap("_name_groups")
