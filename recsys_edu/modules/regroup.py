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


class PermuteMultiEmbedding(nn.Module):
    """The regrouping step by itself, on tensors: blocks of columns out of several inputs into one output per group.

    >>> regroup = PermuteMultiEmbedding(groups=[["film"], ["film", "user"]])
    >>> regroup.set_columns([[("user", 1), ("film", 2)]])
    >>> regroup([torch.tensor([[1.0, 2.0, 3.0]])])
    [tensor([[2., 3.]]), tensor([[2., 3., 1.]])]

    Which columns go where is set once, before the first forward: by `set_columns` in words, or by `init_tensors` as
    FBGEMM's operator has it. There each row of `permute` is (input, output, first input column, first output column,
    width, ...); further numbers in a row are ignored.

    Raises:
        RuntimeError: (forward) nothing was set.
        KeyError: (set_columns) a group names a key that no input has.

    Counterpart: torchrec.modules.regroup.PermuteMultiEmbedding.
    """

    def __init__(self, groups: list[list[str]], multi_device: bool = False) -> None:
        super().__init__()
        self._groups = groups
        self.register_buffer("_permute", None)
        self.register_buffer("_in_shapes", None)
        self.register_buffer("_out_shapes", None)
        self._out_lengths: list[int] | None = None
        self._blocks: list[list[tuple[int, int, int]]] = []  # per output: (input, first column, width)

    def init_tensors(
        self, permute: torch.Tensor, in_shapes: torch.Tensor, out_shapes: torch.Tensor, out_lengths: list[int]
    ) -> None:
        """Set which blocks go where; `out_lengths` are the outputs' widths."""
        self._permute, self._in_shapes, self._out_shapes = permute, in_shapes, out_shapes
        self._out_lengths = list(out_lengths)
        placed: list[list[tuple[int, int, int, int]]] = [[] for _ in out_lengths]
        for source, target, first_in, first_out, width, *_ in permute.tolist():  # host sync: once, when set up
            placed[target].append((first_out, source, first_in, width))
        self._blocks = [[block[1:] for block in sorted(blocks)] for blocks in placed]

    def set_columns(self, inputs: list[list[tuple[str, int]]]) -> None:
        """Say which (key, width) blocks each input has, in order; the first input that has a key gives it."""
        where: dict[str, tuple[int, int, int]] = {}
        for source, blocks in enumerate(inputs):
            first = 0
            for key, width in blocks:
                where.setdefault(key, (source, first, width))
                first += width
        rows, out_lengths = [], []
        for target, group in enumerate(self._groups):
            first_out = 0
            for key in group:
                if key not in where:
                    raise KeyError(f"group {target} names {key!r}; the inputs have {sorted(where)}")
                source, first_in, width = where[key]
                rows.append([source, target, first_in, first_out, width, -1])
                first_out += width
            out_lengths.append(first_out)
        in_widths = torch.tensor([sum(width for _, width in blocks) for blocks in inputs], dtype=torch.int32)
        permute = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 6)
        self.init_tensors(permute, in_widths, torch.tensor(out_lengths, dtype=torch.int32), out_lengths)

    def set_device(self, device: str) -> None:
        """Move the description; the data may be anywhere."""
        self.to(torch.device(device))

    def forward(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._out_lengths is None:
            raise RuntimeError("PermuteMultiEmbedding does not know the inputs' columns: call set_columns first")
        return [
            torch.cat([values[source].narrow(1, first, width) for source, first, width in blocks], dim=1)
            for blocks in self._blocks
        ]
