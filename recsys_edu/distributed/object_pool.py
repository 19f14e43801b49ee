"""Slots over ranks: ask the rank that holds a slot, and get the answers back in the order of the questions.

    rank 0 holds slots 0 to 4, rank 1 slots 5 to 9
    rank 0 asks  7 2 9    ->  rank 0: 2    rank 1: 7 9     ->   answers, put back as  7 2 9

Suffixes: N slots that this rank asks for, M that others ask of it, W ranks.

Counterpart: torchrec.distributed.object_pool and torchrec.distributed.tensor_sharding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.exchange import Exchange, GroupExchange
from recsys_edu.distributed.types import ObjectPoolShardingPlan, ObjectPoolShardingType, ShardingEnv
from recsys_edu.kernels.jagged_ops import permute_1d


@dataclass(frozen=True)
class SlotBlocks:
    """Which slots each rank of a host (or of the world) holds: rank r of `len(starts) - 1` has starts[r]:starts[r + 1].

    `num_copies` hosts have all slots each; 1 for row-wise.
    """

    starts: tuple[int, ...]
    num_copies: int

    @property
    def num_blocks(self) -> int:
        return len(self.starts) - 1

    def of_rank(self, rank: int) -> range:
        block = rank % self.num_blocks
        return range(self.starts[block], self.starts[block + 1])


def slot_blocks(pool_size: int, plan: ObjectPoolShardingPlan, env: ShardingEnv) -> SlotBlocks:
    """The blocks of a plan.

    >>> env = ShardingEnv.from_local(4, 0)
    >>> slot_blocks(10, ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE), env).starts
    (0, 3, 6, 9, 10)

    Raises:
        ValueError: capacities that are not one positive number per rank.
    """
    copies = 1
    if plan.sharding_type is ObjectPoolShardingType.REPLICATED_ROW_WISE:
        copies = env.world_size // get_local_size(env.world_size)
    blocks, shares = env.world_size // copies, plan.memory_capacity_per_rank
    if shares is None:
        size = -(-pool_size // blocks)
        return SlotBlocks(tuple(min(block * size, pool_size) for block in range(blocks + 1)), copies)
    if len(shares) != blocks or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"memory_capacity_per_rank has to have {blocks} numbers, not all of them 0; got {shares}")
    starts = [round(pool_size * sum(shares[:block]) / sum(shares)) for block in range(blocks + 1)]
    return SlotBlocks(tuple(starts), copies)


@dataclass(frozen=True)
class Questions:
    """One round of questions between all ranks, on its way back to the askers.

    slots_M      slots of this rank that were asked for, counted from its first one, grouped by asker
    order_N      where each question stands among the asker's ids, grouped by the rank that was asked
    """

    exchange: Exchange
    order_N: Tensor
    sent_W: list[int]
    received_W: list[int]
    slots_M: Tensor

    def send_along(self, values_N: Tensor, label: str) -> Tensor:
        """Rows `[N, width]` that go with the questions, as they arrive: `[M, width]`."""
        width = values_N.shape[1]
        send = values_N[self.order_N].flatten()
        sizes = ([n * width for n in self.sent_W], [m * width for m in self.received_W])
        return self.exchange.start(send, *sizes, label).wait().view(-1, width)

    def send_bags_along(self, values_V: Tensor, lengths_N: Tensor, lengths_M: Tensor, label: str) -> Tensor:
        """Bags of values that go with the questions; their lengths are known on both sides."""
        send = _bags_in_order(values_V, lengths_N, self.order_N)
        send_W = _totals(lengths_N[self.order_N], self.sent_W)
        return self.exchange.start(send, send_W, _totals(lengths_M, self.received_W), label).wait()

    def answer(self, rows_M: Tensor, label: str) -> Tensor:
        """Rows `[M, width]` back to the askers, in the order of their ids: `[N, width]`."""
        width = rows_M.shape[1]
        sizes = ([m * width for m in self.received_W], [n * width for n in self.sent_W])
        arrived = self.exchange.start(rows_M.flatten(), *sizes, label).wait().view(-1, width)
        rows_N = torch.empty_like(arrived)
        rows_N[self.order_N] = arrived
        return rows_N

    def answer_bags(self, values_V: Tensor, lengths_M: Tensor, lengths_N: Tensor, label: str) -> Tensor:
        """Bags of values back to the askers, in the order of their ids; lengths are known on both sides."""
        arrived_N = lengths_N[self.order_N]
        send_W = _totals(lengths_M, self.received_W)
        arrived = self.exchange.start(values_V, send_W, _totals(arrived_N, self.sent_W), label).wait()
        return _bags_in_order(arrived, arrived_N, self.order_N.argsort())


def ask(exchange: Exchange, ids_N: Tensor, blocks: SlotBlocks, all_copies: bool) -> Questions:
    """Send every id to the rank of this host that holds its slot, or with `all_copies` to that of every host.

    Raises:
        IndexError: on every rank alike, where any rank asks for a slot that is none.
    """
    pool_size, world_size = blocks.starts[-1], exchange.world_size
    bad = (ids_N < 0) | (ids_N >= pool_size)
    problem = ids_N[bad][:1].tolist()  # host sync: ids that are no slots have no rank
    ids_N = ids_N[:0] if problem else ids_N.long()
    ends = torch.tensor(blocks.starts[1:], device=ids_N.device)
    block_N = torch.searchsorted(ends, ids_N, right=True)
    hosts = range(blocks.num_copies) if all_copies else [exchange.rank // blocks.num_blocks]
    rank_N = torch.cat([block_N + host * blocks.num_blocks for host in hosts])
    question_N = torch.arange(len(ids_N), device=ids_N.device).repeat(len(hosts))
    by_rank = rank_N.argsort(stable=True)
    order_N = question_N[by_rank]
    sent_W = rank_N.bincount(minlength=world_size)
    sizes_W3 = torch.zeros(world_size, 3, dtype=torch.int64, device=ids_N.device)
    sizes_W3[:, 0] = sent_W
    if problem:
        sizes_W3[:, 1], sizes_W3[:, 2] = 1, problem[0]
    arrived = exchange.start(sizes_W3.flatten(), [3] * world_size, [3] * world_size, "sizes of questions").wait()
    received_W3 = arrived.view(-1, 3).tolist()  # host sync: sizes of the receive buffers
    for rank, (_, is_bad, slot) in enumerate(received_W3):
        if is_bad:
            raise IndexError(f"rank {rank}: id {slot} is no slot of a pool with slots 0 to {pool_size - 1}")
    send_W, received_W = sent_W.tolist(), [row[0] for row in received_W3]
    slots_M = exchange.start(ids_N[order_N], send_W, received_W, "slots").wait() - blocks.of_rank(exchange.rank).start
    return Questions(exchange, order_N, send_W, received_W, slots_M)


def pool_exchange(env: ShardingEnv) -> Exchange:
    """This rank's end of the exchange between the ranks of a pool."""
    return GroupExchange(env.process_group)


def _totals(lengths: Tensor, counts_W: list[int]) -> list[int]:
    return [int(part.sum()) for part in lengths.split(counts_W)]  # host sync: all-to-all takes its sizes from the host


def _bags_in_order(values_V: Tensor, lengths: Tensor, order: Tensor) -> Tensor:
    """The bags `order[0]`, `order[1]`, ... of values that lie bag after bag."""
    return permute_1d(order, lengths, values_V)[1]
