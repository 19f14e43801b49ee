"""A sharded model's tables, put together on rank 0."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, grid_shard, row_wise
from recsys_edu.distributed.testing import RankPool
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.inference.state_dict_transform import (
    state_dict_all_gather_keys,
    state_dict_gather,
    state_dict_to_device,
)
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection


def model() -> torch.nn.Sequential:
    torch.manual_seed(4)
    tables = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=9 + i, embedding_dim=16, feature_names=[f"f{i}"])
        for i in range(2)
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables), torch.nn.Linear(32, 1))


def gather(rank: int, world_size: int, group):
    plain, original = model(), model()
    plan = construct_module_sharding_plan(
        original[0], {"t0": row_wise(), "t1": grid_shard(host_indexes=[0])}, world_size=world_size, device_type="cpu"
    )
    sharded = DistributedModelParallel(original, plan=ShardingPlan({"0": plan}))
    target = {name: torch.zeros_like(value) for name, value in plain.state_dict().items()}
    state = state_dict_to_device(sharded.state_dict(), group, torch.device("cpu"))
    state_dict_gather(state, target)
    keys = state_dict_all_gather_keys({**target, f"only{rank}": target["1.bias"]}, group)
    return target, keys


def test_rank_0_has_every_table(ranks: RankPool):
    (first, keys), (second, _) = ranks.run(gather, 2)
    for name, value in model().state_dict().items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value) or "embedding_bags" in name
    assert keys == [*model().state_dict(), "only0", "only1"]


def test_one_process_and_errors():
    source, target = model().state_dict(), {name: torch.zeros_like(v) for name, v in model().state_dict().items()}
    state_dict_gather(source, target)
    assert all(torch.equal(source[name], target[name]) for name in source)
    with pytest.raises(KeyError, match="no \\['x'\\]"):
        state_dict_gather(source, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1.bias: expected \(2,\), got \(1,\)"):
        state_dict_gather(source, {"1.bias": torch.zeros(2)})
