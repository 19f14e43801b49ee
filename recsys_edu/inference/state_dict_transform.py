"""From the state dict of a sharded model to that of a plain one: after training, before an index is built or served.

    plain = model_without_sharding.state_dict()
    state_dict_gather(sharded.state_dict(), plain)          # by all ranks; rank 0's `plain` is filled

Counterpart: torchrec.inference.state_dict_transform.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_edu.distributed.exchange import GroupExchange, gather_objects
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor


@torch.no_grad()
def state_dict_gather(src: Mapping[str, Tensor], dst: Mapping[str, Tensor]) -> None:
    """Fill `dst` in place from `src`, whose TiledTensors are put together on rank 0; called by all ranks.

    On other ranks a sharded table of `dst` keeps what it was.

    Raises:
        KeyError: `dst` has names that `src` does not have.
        ValueError: the sizes of an entry differ.
    """
    missing = [name for name in dst if name not in src]
    if missing:
        raise KeyError(f"the source has no {missing}; it has {sorted(src)[:9]} ...")
    for name, target in dst.items():
        source = src[name]
        if source.shape != target.shape:
            raise ValueError(f"{name}: expected {tuple(target.shape)}, got {tuple(source.shape)}")
        if isinstance(source, TiledTensor):
            _gather_tiles(source, target)
        else:
            target.copy_(source)


def _gather_tiles(source: TiledTensor, target: Tensor) -> None:
    exchange = GroupExchange(dist.group.WORLD if dist.is_initialized() else None)
    held_W = gather_objects([(tile.offsets, tuple(tile.tensor.shape)) for tile in source.tiles], exchange.group)
    flat = [tile.tensor.detach().flatten() for tile in source.tiles]
    send = torch.cat(flat) if flat else torch.empty(0, dtype=source.dtype, device=source.device)
    others = [0] * (exchange.world_size - 1)
    sizes_W = [sum(torch.Size(shape).numel() for _, shape in held) for held in held_W]
    receive_W = sizes_W if exchange.rank == 0 else [0] * exchange.world_size
    received = exchange.start(send, [send.numel(), *others], receive_W, "tiles for rank 0").wait()
    if exchange.rank:
        return
    places = [place for held in held_W for place in held]
    for (offsets, shape), values in zip(places, received.split([torch.Size(shape).numel() for _, shape in places])):
        window = tuple(slice(first, first + size) for first, size in zip(offsets, shape))
        target[window] = values.view(shape).to(target.device, target.dtype)


def state_dict_all_gather_keys(state_dict: Mapping[str, Tensor], pg: dist.ProcessGroup) -> list[str]:
    """The names that any rank has, each once, in rank order; called by all ranks."""
    return list(dict.fromkeys(name for names in gather_objects(list(state_dict), pg) for name in names))


def state_dict_to_device(
    state_dict: Mapping[str, Tensor], pg: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """The same entries with their memory on `device`; what is there already is shared. `pg` is not needed."""
    moved: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, TiledTensor):
            tiles = [Tile(tile.offsets, tile.tensor.to(device)) for tile in value.tiles]
            moved[name] = TiledTensor(value.shape, tiles, value.dtype, device, value.column_cuts)
        else:
            moved[name] = value.to(device)
    return moved
