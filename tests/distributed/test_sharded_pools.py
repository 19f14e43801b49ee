"""Sharded pools answer as one unsharded pool to which the ranks wrote one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recsys_edu.distributed.checkpoint import load_checkpoint, save_checkpoint
from recsys_edu.distributed.keyed_jagged_tensor_pool import KeyedJaggedTensorPoolSharder
from recsys_edu.distributed.tensor_pool import TensorPoolSharder
from recsys_edu.distributed.testing import RankPool
from recsys_edu.distributed.types import ObjectPoolShardingPlan, ObjectPoolShardingType, ShardingEnv
from recsys_edu.modules.keyed_jagged_tensor_pool import KeyedJaggedTensorPool
from recsys_edu.modules.tensor_pool import TensorPool
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

SLOTS, STEPS, LIMITS = 11, 3, {"a": 2, "b": 3}
PLANS = {
    "row_wise": ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE),
    "replicated": ObjectPoolShardingPlan(ObjectPoolShardingType.REPLICATED_ROW_WISE),
}


def rows_pool() -> TensorPool:
    return TensorPool(SLOTS, 3, torch.float32, loaded_values=torch.arange(3.0 * SLOTS).view(SLOTS, 3))


def bags_pool() -> KeyedJaggedTensorPool:
    pool = KeyedJaggedTensorPool(SLOTS, LIMITS, is_weighted=True)
    pool.update(torch.arange(SLOTS), bags(SLOTS, torch.Generator().manual_seed(77)))
    return pool


def bags(count: int, generator: torch.Generator) -> KeyedJaggedTensor:
    lengths = torch.cat([torch.randint(0, limit + 1, (count,), generator=generator) for limit in LIMITS.values()])
    values = torch.randint(1000, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(list(LIMITS), values, values.float() / 4, lengths=lengths)


def step_of(rank: int, step: int):
    generator = torch.Generator().manual_seed(100 * rank + step)
    count = rank + step  # rank 0 has nothing in step 0
    ids, asked = (torch.randint(SLOTS, (n,), generator=generator) for n in (count, count + 1))
    return ids, asked, torch.rand(count, 3, generator=generator), bags(count, generator)


def work(rank: int, world_size: int, group, plan: ObjectPoolShardingPlan, folder: Path | None):
    env = ShardingEnv.from_process_group(group)
    rows = TensorPoolSharder().shard(rows_pool(), plan, env)
    stored = KeyedJaggedTensorPoolSharder().shard(bags_pool(), plan, env)
    answers = []
    for step in range(STEPS):
        ids, asked, values, new_bags = step_of(rank, step)
        rows.update(ids, values)
        stored.update(ids, new_bags)
        found = stored(asked).wait()
        answers.append((rows(asked) * 1, found.lengths(), found.values(), found.weights()))
    if folder is not None:
        save_checkpoint(folder, torch.nn.ModuleDict({"rows": rows, "bags": stored}))
    return answers, rows.tiled().tiles[0].tensor.shape[0]


def check(results) -> tuple[TensorPool, KeyedJaggedTensorPool]:
    rows, stored = rows_pool(), bags_pool()
    for step in range(STEPS):
        for rank in range(len(results)):
            ids, _, values, new_bags = step_of(rank, step)
            rows.update(ids, values)
            stored.update(ids, new_bags)
        for rank, (answers, _) in enumerate(results):
            asked = step_of(rank, step)[1]
            found = stored(asked)
            expected = (rows(asked), found.lengths(), found.values(), found.weights())
            for got, want in zip(answers[step], expected):
                assert torch.equal(got, want)
    return rows, stored


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_row_wise_pools_answer_as_one(ranks: RankPool, world_size: int, tmp_path: Path):
    results = ranks.run(work, world_size, PLANS["row_wise"], tmp_path / "saved")
    rows, stored = check(results)
    assert sum(held for _, held in results) == SLOTS
    loaded = torch.nn.ModuleDict({"rows": rows_pool(), "bags": bags_pool()})
    load_checkpoint(tmp_path / "saved", loaded)
    assert torch.equal(loaded["rows"].pool, rows.pool)
    assert torch.equal(loaded["bags"](torch.arange(SLOTS)).values(), stored(torch.arange(SLOTS)).values())


def test_every_host_has_a_copy(ranks: RankPool):
    results = ranks.run(work, 4, PLANS["replicated"], None, hosts=2)
    check(results)
    assert sum(held for _, held in results) == 2 * SLOTS


def test_slots_in_proportion_to_memory(ranks: RankPool):
    plan = ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE, memory_capacity_per_rank=[8, 3])
    results = ranks.run(work, 2, plan, None)
    check(results)
    assert [held for _, held in results] == [8, 3]


def ask_for_no_slot(rank: int, world_size: int, group) -> str:
    pool = TensorPoolSharder().shard(rows_pool(), PLANS["row_wise"], ShardingEnv.from_process_group(group))
    try:
        pool.update(torch.tensor([SLOTS if rank == 1 else 0]), torch.zeros(1, 3))
    except IndexError as error:
        return f"{error}; {pool.lookup(torch.tensor([0])).wait().tolist()}"
    return "no error"


def test_a_slot_that_is_none_stops_all_ranks(ranks: RankPool):
    for message in ranks.run(ask_for_no_slot, 2):
        assert "rank 1: id 11 is no slot" in message and "[[0.0, 1.0, 2.0]]" in message
    with pytest.raises(ValueError, match="memory_capacity_per_rank has to have 2"):
        plan = ObjectPoolShardingPlan(ObjectPoolShardingType.ROW_WISE, memory_capacity_per_rank=[8])
        TensorPoolSharder().shard(rows_pool(), plan, ShardingEnv.from_local(2, 0))
