"""TiledTensor: a tensor of which this rank holds some rectangles; what a sharded table is in a state dict.

    rank 0   TiledTensor 10 x 8: rows 0:5      rank 1   TiledTensor 10 x 8: rows 5:10

It speaks torch.distributed.checkpoint's chunk protocol, so a checkpoint holds each rectangle once, under the unsharded
parameter's name, and can be loaded under any other plan: DCP reads the rectangles that overlap. Everything else one
does with tensors is refused in words, for no rank has the whole.

Counterpart: torch's ShardedTensor, as TorchRec uses it (`local_shards()` gives the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TorchShard

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True)
class Tile:
    """One rectangle: where it begins in the whole tensor, and its live values."""

    offsets: tuple[int, ...]
    tensor: Tensor


class TiledTensor(Tensor):
    """The whole tensor's size, dtype and device, with this rank's tiles.

    >>> half = TiledTensor((4, 2), [Tile((2, 0), torch.ones(2, 2))])
    >>> half.shape, half.tiles[0].offsets
    (torch.Size([4, 2]), (2, 0))

    Args:
        size: of the whole.
        tiles: this rank's; may be empty.
        dtype, device: needed where there are no tiles.
        column_cuts: for state that has one number per row and column block, where the blocks begin (with the end);
            empty for everything else and where rows are whole. Where the cuts change down the table, those of every
            stretch of rows follow each other, each led by -1 minus its first row.

    Raises:
        NotImplementedError: on any operation other than reading its size or making a detached copy.
    """

    tiles: list[Tile]
    column_cuts: tuple[int, ...]

    @staticmethod
    def __new__(
        cls,
        size: Sequence[int],
        tiles: Sequence[Tile],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        column_cuts: tuple[int, ...] = (),
    ) -> TiledTensor:
        if tiles:
            dtype, device = tiles[0].tensor.dtype, tiles[0].tensor.device
        whole = torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=dtype, device=device or "cpu")
        whole.tiles = list(tiles)
        whole.column_cuts = column_cuts
        return whole

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        held = ", ".join(f"{list(tile.offsets)}+{list(tile.tensor.shape)}" for tile in self.tiles) or "nothing"
        return f"TiledTensor({list(self.shape)}, {self.dtype}, this rank holds {held})"

    def local_shards(self) -> list[TorchShard]:
        """This rank's tiles in the form of torch's ShardedTensor."""
        return [
            TorchShard(tile.tensor, ShardMetadata(list(tile.offsets), list(tile.tensor.shape), str(tile.tensor.device)))
            for tile in self.tiles
        ]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            source = args[0]
            tiles = [Tile(tile.offsets, function(tile.tensor)) for tile in source.tiles]
            return TiledTensor(source.shape, tiles, source.dtype, source.device, source.column_cuts)
        raise NotImplementedError(
            f"{function} on a TiledTensor: no rank holds all of it. Use .tiles (its rectangles here), or save it with "
            "recsys_edu.distributed.checkpoint and load it into an unsharded model"
        )

    # torch.distributed.checkpoint's protocol (torch.distributed._checkpointable._Checkpointable). That package takes as
    # long to import as all of recsys_edu; whoever calls these methods has paid for it.

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(tile.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(tile), properties=TensorProperties.create_from_tensor(tile.tensor), size=self.shape
                ),
            )
            for tile in self.tiles
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(tile) for tile in self.tiles]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for tile in self.tiles:
            if torch.Size(tile.offsets) == index.offset:
                return tile.tensor
        raise KeyError(f"{index.fqn}: this rank has no tile at {index.offset}, only {[t.offsets for t in self.tiles]}")


def _chunk(tile: Tile) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(tile.offsets), sizes=tile.tensor.shape)
