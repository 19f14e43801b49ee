"""The public path of the ragged classes; each is written in a file of its own.

    JaggedTensor         jagged.py         one feature:   rows of different lengths
    KeyedJaggedTensor    keyed_jagged.py   many features: the input of embedding modules
    KeyedTensor          keyed.py          many features: dense embeddings side by side

Counterpart: torchrec.sparse.jagged_tensor.
"""

from __future__ import annotations

import torch
from torch import nn

from recsys_edu.sparse.checks import JaggedInputError
from recsys_edu.sparse.jagged import JaggedTensor, jt_is_equal
from recsys_edu.sparse.keyed import KeyedTensor, permute_multi_embedding, regroup_kts
from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor, kjt_is_equal
from recsys_edu.sparse.pytree import flatten_kjt_list, unflatten_kjt_list

__all__ = [
    "JaggedTensor",
    "KeyedJaggedTensor",
    "KeyedTensor",
    "ComputeKJTToJTDict",
    "ComputeJTDictToKJT",
    "JaggedInputError",
    "jt_is_equal",
    "kjt_is_equal",
    "regroup_kts",
    "permute_multi_embedding",
    "flatten_kjt_list",
    "unflatten_kjt_list",
]


class ComputeKJTToJTDict(nn.Module):
    """`kjt.to_dict()` as a module, for torch.fx: it becomes one call in the graph."""

    def forward(self, keyed_jagged_tensor: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return keyed_jagged_tensor.to_dict()


class ComputeJTDictToKJT(nn.Module):
    """`KeyedJaggedTensor.from_jt_dict` as a module, for torch.fx: it becomes one call in the graph."""

    def forward(self, jt_dict: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
        return _from_jt_dict(jt_dict)


def _from_jt_dict(jt_dict: dict[str, JaggedTensor]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_jt_dict(jt_dict)


torch.fx.wrap("_from_jt_dict")
