"""Sharded feature processors and towers on real ranks, step by step beside one process with the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_cases import bag_tables, collection, features_of, join, make_batch, plan_of, whole
from torch import nn

from recsys_edu.distributed.embedding_tower_sharding import EmbeddingTowerCollectionSharder, ShardedEmbeddingTower
from recsys_edu.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.testing import RankPool
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from recsys_edu.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from recsys_edu.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

BATCH, LONGEST, STEPS, RATE = 4, 4, 3, 0.3
FEATURES = ("f0", "f1", "f3", "f2")


class Ranker(nn.Module):
    """Position weights, tables, and a layer: all three kinds of parameters train."""

    def __init__(self, per_feature: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        lengths = dict.fromkeys(FEATURES, LONGEST)
        processors = (
            {name: PositionWeightedModule(LONGEST) for name in FEATURES}
            if per_feature
            else PositionWeightedModuleCollection(lengths)
        )
        self.fp = FeatureProcessedEmbeddingBagCollection(collection(bag_tables(), weighted=True), processors)
        self.over = nn.Linear(sum(t.embedding_dim * len(t.feature_names) for t in bag_tables()), 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.over(self.fp(features).values()).square().mean()


def batches_of_step(world_size: int, step: int, weighted: bool = False) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(step)
    return [make_batch(features_of(bag_tables()), BATCH, weighted, generator, LONGEST) for _ in range(world_size)]


def dense_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "position" in n or "over" in n or "interaction" in n}


def train_sharded(rank: int, world_size: int, group, per_feature: bool, kind: str | None, local_size: int):
    model = Ranker(per_feature)
    apply_optimizer_in_backward(torch.optim.SGD, model.fp.split()[1].parameters(), {"lr": RATE})
    plan = None
    if kind is not None:
        plan = ShardingPlan({"fp": plan_of(model.fp.split()[1], kind, world_size, local_size)})
    dmp = DistributedModelParallel(model, plan=plan)
    assert isinstance(dmp.module.fp, ShardedFeatureProcessedEmbeddingBagCollection)
    dense = torch.optim.SGD(dense_of(dmp.module).values(), lr=RATE)
    losses = []
    for step in range(STEPS):
        dense.zero_grad()
        loss = dmp(batches_of_step(world_size, step)[rank])
        loss.backward()
        dense.step()
        losses.append(loss.detach())
    return losses, {name: value.detach() for name, value in dmp.state_dict().items()}


def train_alone(model: nn.Module, world_size: int, inputs=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = join(batches_of_step(world_size, step))
        loss = model(*(inputs(batch) if inputs else (batch,)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, model.state_dict()


def compare(results, alone) -> None:
    losses, states = zip(*results)
    for step, loss in enumerate(alone[0]):
        torch.testing.assert_close(torch.stack([rank[step] for rank in losses]).mean(), loss)
    assert set(states[0]) == set(alone[1])
    for name, expected in alone[1].items():
        torch.testing.assert_close(whole([state[name] for state in states]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_feature", [True, False], ids=["dict", "collection"])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "grid", "mixed", None])
def test_position_weights_and_tables_train_as_in_one_process(ranks: RankPool, kind: str | None, per_feature: bool):
    results = ranks.run(train_sharded, 4, per_feature, kind, 2, hosts=2)
    compare(results, train_alone(Ranker(per_feature), 4))


class Interaction(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, pooled) -> torch.Tensor:
        return self.layer(pooled.values())


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        towers = []
        for number, table in enumerate(bag_tables()):
            width = table.embedding_dim * len(table.feature_names)
            towers.append(EmbeddingTower(collection([copy.deepcopy(table)], seed=number), Interaction(width)))
        self.towers = EmbeddingTowerCollection(towers)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.towers(features).square().mean()


def train_towers(rank: int, world_size: int, group):
    model = Towers()
    plan = {}
    for tower, kind in zip(model.towers.towers, ("row_wise", "table_wise", "column_wise")):
        apply_optimizer_in_backward(torch.optim.SGD, tower.embedding.parameters(), {"lr": RATE})
        plan |= plan_of(tower.embedding, kind, world_size, world_size)
    dmp = DistributedModelParallel(
        model, plan=ShardingPlan({"towers": plan}), sharders=[EmbeddingTowerCollectionSharder()]
    )
    assert all(isinstance(tower, ShardedEmbeddingTower) for tower in dmp.module.towers.towers)
    dense = torch.optim.SGD(dense_of(dmp.module).values(), lr=RATE)
    losses = []
    for step in range(STEPS):
        dense.zero_grad()
        loss = dmp(batches_of_step(world_size, step)[rank])
        loss.backward()
        dense.step()
        losses.append(loss.detach())
    return losses, {name: value.detach() for name, value in dmp.state_dict().items()}


def test_towers_train_as_in_one_process(ranks: RankPool):
    compare(ranks.run(train_towers, 2), train_alone(Towers(), 2))


def test_two_towers_may_not_share_a_table_name():
    table = bag_tables()[0]
    towers = EmbeddingTowerCollection(
        [EmbeddingTower(collection([copy.deepcopy(table)]), Interaction(32)) for _ in range(2)]
    )
    with pytest.raises(ValueError, match="tower 1 has a second table 't0'"):
        EmbeddingTowerCollectionSharder().shardable_parameters(towers)
