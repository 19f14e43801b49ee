"""KeyedTensor.regroup as a module, so that a model can own and trace it."""

from __future__ import annotations

import torch
from torch import nn

from recsys_edu.modules.embedding_configs import data_type_to_dtype
from recsys_edu.sparse.jagged_tensor import KeyedTensor, permute_multi_embedding
from recsys_edu.types import CacheMixin, DataType


class KTRegroupAsDict(nn.Module, CacheMixin):
    """Takes blocks out of several KeyedTensors and puts them together again in named groups.

    >>> pooled = KeyedTensor(["user", "film"], [1, 2], torch.tensor([[1.0, 2.0, 3.0]]))
    >>> regroup = KTRegroupAsDict(groups=[["film"], ["film", "user"]], keys=["right", "both"])
    >>> regroup([pooled])["both"]
    tensor([[2., 3., 1.]])

    `emb_dtype` casts the results. `multi_device` is accepted for TorchRec's callers: nothing here is bound
    to a device. Nothing is cached either, so `clear_cache` has nothing to do.

    Raises:
        AssertionError: not as many names as groups.
        KeyError: (forward) a group names a key that no input has.

    Counterpart: torchrec.modules.regroup.KTRegroupAsDict.
    """

    def __init__(
        self,
        groups: list[list[str]],
        keys: list[str],
        emb_dtype: DataType | None = None,
        multi_device: bool = False,
    ) -> None:
        super().__init__()
        assert len(groups) == len(keys), f"as many names as groups are needed, got {len(keys)} and {len(groups)}"
        self._groups = groups
        self._keys = keys
        self._emb_dtype = emb_dtype

    def embedding_cast(self, embs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors in `emb_dtype`, or as they are."""
        if self._emb_dtype is None:
            return embs
        dtype = data_type_to_dtype(self._emb_dtype)
        return [emb.to(dtype) for emb in embs]

    def forward(self, keyed_tensors: list[KeyedTensor]) -> dict[str, torch.Tensor]:
        regrouped = permute_multi_embedding(keyed_tensors, self._groups)
        pieces = [regrouped[index] for index in range(len(self._groups))]  # a traced list has no length
        return dict(zip(self._keys, self.embedding_cast(pieces)))

    def clear_cache(self) -> None:
        """Nothing is cached."""


torch.fx.wrap("permute_multi_embedding")  # wrapping works per importing file
