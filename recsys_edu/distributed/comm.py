"""Where a rank sits: which host, which place in it, and the process groups inside and across hosts.

    8 ranks on 2 hosts of 4      rank        0 1 2 3 | 4 5 6 7
                                 host        0 0 0 0 | 1 1 1 1     get_group_rank
                                 local rank  0 1 2 3 | 0 1 2 3     get_local_rank

`torchrun` says so in LOCAL_WORLD_SIZE and LOCAL_RANK. Without it (a notebook, a test), hosts of 8 ranks are assumed
where the world size is a multiple of 8, else one host.

Counterpart: torchrec.distributed.comm
"""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist

DEFAULT_LOCAL_SIZE = 8


def get_local_size(world_size: int | None = None) -> int:
    """Ranks per host.

    A LOCAL_WORLD_SIZE that does not divide the world size gives one host: hosts of unequal size cannot be told apart
    by rank.

    Raises:
        ValueError: LOCAL_WORLD_SIZE is not a positive number.
    """
    world_size = dist.get_world_size() if world_size is None else world_size
    local_size = _environment_number("LOCAL_WORLD_SIZE", minimum=1)
    if local_size is not None:
        return local_size if world_size % local_size == 0 else world_size
    return DEFAULT_LOCAL_SIZE if world_size % DEFAULT_LOCAL_SIZE == 0 else world_size


def get_local_rank(world_size: int | None = None, rank: int | None = None) -> int:
    """This rank's place in its host; `rank=` asks for another rank's, by the numbering above."""
    if rank is None:
        local_rank = _environment_number("LOCAL_RANK", minimum=0)
        if local_rank is not None and local_rank < get_local_size(world_size):
            return local_rank
        rank = dist.get_rank()
    return rank % get_local_size(world_size)


def get_group_rank(world_size: int | None = None, rank: int | None = None) -> int:
    """The index of the host this rank (or `rank`) is on."""
    rank = dist.get_rank() if rank is None else rank
    return rank // get_local_size(world_size)


def get_num_groups(world_size: int | None = None) -> int:
    """How many hosts there are."""
    world_size = dist.get_world_size() if world_size is None else world_size
    return world_size // get_local_size(world_size)


def intra_and_cross_node_pg(
    device: torch.device | None = None, backend: str | None = None
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """(group of this host's ranks, group of the ranks at this rank's place in every host).

        ranks 0 1 | 2 3 on two hosts, seen from rank 2:      inside (2, 3)      across (0, 2)

    Every rank of the world must call it the first time, for it makes all hosts' groups; later calls return the same
    groups. On one host there is nothing to cross: (None, None), as without a process group. `backend` defaults to
    that of the world's group; `device` is accepted as in TorchRec, which makes no such groups for the CPU.
    """
    if not dist.is_initialized() or get_num_groups() == 1:
        return None, None
    return _host_groups(dist.group.WORLD, get_local_size(), backend)


@functools.lru_cache(maxsize=4)
def _host_groups(
    world: dist.ProcessGroup, local_size: int, backend: str | None
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    # `world` is part of the key, so a world that was destroyed and made anew gets new groups.
    world_size, rank = dist.get_world_size(world), dist.get_rank(world)
    inside = [list(range(first, first + local_size)) for first in range(0, world_size, local_size)]
    across = [list(range(place, world_size, local_size)) for place in range(local_size)]
    mine: list[dist.ProcessGroup | None] = []
    for groups in (inside, across):
        made = [(dist.new_group(ranks, backend=backend), ranks) for ranks in groups]  # new_group is collective
        mine.append(next(group for group, ranks in made if rank in ranks))
    return mine[0], mine[1]


def _environment_number(name: str, minimum: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit() or int(text) < minimum:
        raise ValueError(f"{name}={text!r} in the environment: expected a number >= {minimum}")
    return int(text)
