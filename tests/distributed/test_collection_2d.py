"""2D parallelism on four real ranks: two groups of two, equal to two separate runs averaged at every sync."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from recsys_edu.distributed.model_parallel import DistributedModelParallel, DMPCollection
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from recsys_edu.distributed.types import ShardingEnv, ShardingPlan
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ROWS, DIM, BATCH = 12, 8, 5


def collection(optimizer=torch.optim.Adagrad):
    torch.manual_seed(0)
    configs = [EmbeddingBagConfig(ROWS, DIM, name, feature_names=[f"f_{name}"]) for name in ("a", "b")]
    ebc = EmbeddingBagCollection(configs)
    apply_optimizer_in_backward(optimizer, ebc.parameters(), {"lr": 0.1})
    return ebc


def plan_for(ebc, world_size):
    cuts = {"a": row_wise(), "b": table_wise(rank=world_size - 1)}
    plan = construct_module_sharding_plan(ebc, cuts, world_size=world_size, local_size=world_size, device_type="cpu")
    return ShardingPlan({"": plan})


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(0, ROWS, (2 * BATCH,), generator=generator)
    return KeyedJaggedTensor(["f_a", "f_b"], ids, lengths=torch.ones(2 * BATCH, dtype=torch.int64))


def tiles(module):
    return {
        (name, tile.offsets): tile.tensor.clone()
        for name, tensor in module.state_dict().items()
        for tile in tensor.tiles
    }


def two_groups(rank, world_size, group, sync_every, num_steps):
    ebc = collection()
    cpu = torch.device("cpu")
    model = DMPCollection(ebc, cpu, plan_for(ebc, 2), world_size, 2, group)
    for step in range(num_steps):
        model(batch(rank, step)).values().pow(2).mean().backward()
        if step % sync_every == sync_every - 1:
            model.sync()
    return tiles(model), model.device_mesh.mesh.tolist()


def groups_by_hand(rank, world_size, group, sync_every, num_steps):
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    env, pair = ShardingEnv.from_process_group(groups[rank % 2]), groups[2 + rank // 2]
    ebc = collection()
    model = DistributedModelParallel(ebc, env, plan=plan_for(ebc, 2))
    for step in range(num_steps):
        model(batch(rank, step)).values().pow(2).mean().backward()
        if step % sync_every == sync_every - 1:
            for table in model.module.embedding_bags.values():
                for shard in table.local:
                    for tensor in (shard.weight.detach(), *shard.state.values()):
                        both = [torch.empty_like(tensor) for _ in range(2)]
                        dist.all_gather(both, tensor.contiguous(), group=pair)
                        tensor.copy_((both[0] + both[1]) / 2)
    return tiles(model)


def test_equals_two_groups_averaged_by_hand(ranks):
    results = ranks.run(two_groups, 4, 2, 4)
    by_hand = ranks.run(groups_by_hand, 4, 2, 4)
    for rank, ((mine, mesh), expected) in enumerate(zip(results, by_hand)):
        assert mesh == [[0, 2], [1, 3]]
        assert mine.keys() == expected.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(
                tensor, expected[key], msg=lambda text, rank=rank, key=key: f"{rank} {key}: {text}"
            )


def test_replicas_drift_between_syncs_and_agree_after(ranks):
    drifted = ranks.run(two_groups, 4, 3, 4)
    synced = ranks.run(two_groups, 4, 2, 4)
    for left, right in ((0, 1), (2, 3)):
        assert all(torch.equal(tensor, synced[right][0][key]) for key, tensor in synced[left][0].items())
        assert not all(torch.equal(tensor, drifted[right][0][key]) for key, tensor in drifted[left][0].items())


def wrong_sizes(rank, world_size, group):
    ebc = collection()
    DMPCollection(ebc, torch.device("cpu"), plan_for(ebc, 2), world_size, 3, group)


def test_group_size_must_divide_the_world(ranks):
    with pytest.raises(ValueError, match="sharding_group_size=3"):
        ranks.run(wrong_sizes, 4)
