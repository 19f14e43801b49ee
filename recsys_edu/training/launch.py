"""The ranks of a training program: none, those of torchrun (which may start them again), or those of a notebook."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from recsys_edu.distributed.comm import get_local_rank


@contextmanager
def process_group(timeout: float) -> Iterator[torch.device]:
    """This rank's device; inside, a process group if torchrun started several ranks (or one).

    Where there is a process group already, as on the ranks of a notebook's `Cluster`, that one is used and left alone.

    Args:
        timeout: seconds to wait for a silent rank.

    Raises:
        ValueError: torchrun may restart ranks on several hosts in a way in which they would not find each other.
    """
    device = torch.device("cuda", get_local_rank(1, 0)) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if dist.is_initialized() or "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if life := os.environ.get("TORCHELASTIC_RESTART_COUNT"):
        # torchrun's own store outlives a restart; ranks must not meet the addresses of those that have died.
        _check_restarts()
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"life {life}", store) if os.environ.get("GROUP_WORLD_SIZE") == "1" else store
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)
    yield device
    _leave()


def _leave() -> None:
    """End the process group, and give gloo's threads time to let go of the tensors that they sent last.

    They do so after we have been told that all has arrived. A thread that frees a tensor while Python is shutting down
    aborts the process (seen in 3 of 125 runs on a busy machine, torch 2.13). Without references to the group its end
    waits for its threads; models may lie in reference cycles until a collection.
    """
    gc.collect()
    dist.destroy_process_group()
    time.sleep(0.1)


def _check_restarts() -> None:
    """On several hosts each torchrun counts restarts for itself, so only a store of the ranks' own is safe."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
    if restarts and not own_store and os.environ.get("GROUP_WORLD_SIZE") != "1":
        raise ValueError(
            "torchrun --max-restarts on several hosts: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, or a restarted rank may look for one that has died (pytorch issue 135712)"
        )
