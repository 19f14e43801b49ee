"""The pool of ranks that other tests stand on."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from recsys_edu.distributed import comm
from recsys_edu.distributed.testing import RankPool

pytestmark = pytest.mark.ranks


def sum_of_ranks(rank: int, world_size: int, group: dist.ProcessGroup, factor: int) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([rank * factor])
    dist.all_reduce(total, group=group)
    return os.getpid(), dist.get_world_size(), total


def place(rank: int, world_size: int, group: dist.ProcessGroup) -> tuple[int, int, int]:
    return comm.get_group_rank(), comm.get_local_rank(), torch.get_num_threads()


def fail_on_one(rank: int, world_size: int, group: dist.ProcessGroup, bad_rank: int) -> None:
    if rank == bad_rank:
        raise KeyError("no such table")
    dist.barrier(group)


def fail_on_all(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    raise NeedsTwoArguments("a", "b")


class NeedsTwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def hang_on_one(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier(group)


def die_on_one(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier(group)


def draw(rank: int, world_size: int, group: dist.ProcessGroup) -> float:
    return torch.rand(1).item()


def test_results_come_in_rank_order_from_processes_that_stay(ranks: RankPool) -> None:
    first = ranks.run(sum_of_ranks, 4, 10)
    assert [(size, total.tolist()) for _, size, total in first] == [(4, [60])] * 4
    smaller = ranks.run(sum_of_ranks, 2, 10)
    assert [(size, total.tolist()) for _, size, total in smaller] == [(2, [10])] * 2, "a world of its own"
    assert [pid for pid, _, _ in smaller] == [pid for pid, _, _ in first[:2]]
    assert len({pid for pid, _, _ in first} - {os.getpid()}) == 4


def test_hosts_are_simulated(ranks: RankPool) -> None:
    assert ranks.run(place, 4, hosts=2) == [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]
    with pytest.raises(ValueError, match="multiple of hosts"):
        ranks.run(place, 3, hosts=2)


def test_every_call_starts_from_the_same_seed(ranks: RankPool) -> None:
    assert ranks.run(draw, 1) == ranks.run(draw, 1)


def test_the_failing_ranks_exception_is_raised_with_its_traceback(ranks: RankPool) -> None:
    with pytest.raises(KeyError, match="no such table") as caught:
        ranks.run(fail_on_one, 2, 1)
    assert "rank 1 of 2: Traceback" in caught.value.__notes__[0]
    assert "in fail_on_one" in caught.value.__notes__[0]
    assert len(ranks.run(draw, 2)) == 2, "the pool goes on"


def test_an_exception_that_cannot_be_pickled_keeps_its_name_and_words(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match="NeedsTwoArguments: ab"):
        ranks.run(fail_on_all, 2)


def test_a_hanging_rank_is_named_with_its_stack_and_replaced(ranks: RankPool) -> None:
    before = [pid for pid, _, _ in ranks.run(sum_of_ranks, 2, 1)]
    with pytest.raises(TimeoutError, match="did not end within 1 s") as caught:
        ranks.run(hang_on_one, 2, timeout=1)
    notes = "\n".join(caught.value.__notes__)
    assert "time.sleep(600)" in notes and "dist.barrier(group)" in notes
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert len(ranks.run(draw, 2)) == 2


def test_a_dead_rank_is_named(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 died with exit code 7|exchange|closed|reset") as caught:
        ranks.run(die_on_one, 2)
    assert any("rank 1 of 2 died with exit code 7" in note for note in caught.value.__notes__)
    assert len(ranks.run(draw, 2)) == 2


def test_close_ends_the_processes() -> None:
    pool = RankPool()
    pids = [pid for pid, _, _ in pool.run(sum_of_ranks, 2, 1)]
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
