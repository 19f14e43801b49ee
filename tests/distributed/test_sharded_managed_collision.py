"""Sharded managed collision: every stretch of rows is an unsharded module of its own, training is unsharded training.

The oracle of the sorted kind is one unsharded module per stretch of rows, fed by hand with the ids that live there; of
the hashed kind, whose buckets never move, it is the one unsharded module on the joined batch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from engine_cases import join, plan_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recsys_edu.distributed.checkpoint import load_checkpoint, save_checkpoint
from recsys_edu.distributed.exchange import SimulatedWorld
from recsys_edu.distributed.mc_embedding import ShardedManagedCollisionEmbeddingCollection
from recsys_edu.distributed.mc_embeddingbag import ShardedManagedCollisionEmbeddingBagCollection
from recsys_edu.distributed.mc_modules import ShardedManagedCollisionCollection
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.sharding.tiling import Shard, parameter_sharding_from
from recsys_edu.distributed.testing import RankPool
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.distributed.types import ShardingEnv, ShardingPlan
from recsys_edu.modules import hash_mc_evictions
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.hash_mc_evictions import HashZchEvictionPolicyName
from recsys_edu.modules.hash_mc_modules import HashZchManagedCollisionModule
from recsys_edu.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from recsys_edu.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

CPU = torch.device("cpu")
ROWS = {"film": 16, "user": 12}
FEATURES = {"film": ["seen", "liked"], "user": ["user"]}
POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance": DistanceLFU_EvictionPolicy}
LARGEST = 1000


def tables(pooled: bool = True, first_value: float | None = None) -> list:
    config = EmbeddingBagConfig if pooled else EmbeddingConfig
    limits = {} if first_value is None else {"weight_init_min": first_value, "weight_init_max": first_value}
    return [
        config(name=name, num_embeddings=rows, embedding_dim=8, feature_names=FEATURES[name], **limits)
        for name, rows in ROWS.items()
    ]


def managed(kind: str) -> dict[str, nn.Module]:
    if kind == "hash":
        return {
            name: HashZchManagedCollisionModule(
                rows, CPU, 4, max_probe=3, eviction_policy_name=HashZchEvictionPolicyName.LRU_EVICTION
            )
            for name, rows in ROWS.items()
        }
    return {
        "film": MCHManagedCollisionModule(ROWS["film"], CPU, POLICIES[kind](), 2, input_hash_size=LARGEST),
        "user": MCHManagedCollisionModule(ROWS["user"], CPU, POLICIES[kind](), 1, input_hash_size=LARGEST),
    }


def batch_of(generator: torch.Generator, batch_size: int) -> KeyedJaggedTensor:
    """Forty ids, from all stretches of the ids below LARGEST."""
    lengths = torch.randint(0, 4, (3 * batch_size,), generator=generator)
    values = torch.randint(0, 40, (int(lengths.sum()),), generator=generator) * 25
    return KeyedJaggedTensor.from_lengths_sync(["user", "liked", "seen"], values, lengths)


def simulated(module: ManagedCollisionCollection, plan, world_size: int) -> list[ShardedManagedCollisionCollection]:
    world = SimulatedWorld(world_size)
    return [
        ShardedManagedCollisionCollection(
            module, plan, ShardingEnv.from_local(world_size, rank), CPU, None, exchange=world.exchange(rank)
        )
        for rank in range(world_size)
    ]


def remap_all(ranks: list[ShardedManagedCollisionCollection], batches: list[KeyedJaggedTensor]) -> list:
    flights = [rank.start_input(batch) for rank, batch in zip(ranks, batches)]
    for phase in ("exchange_input", "remap"):
        for rank, flight in zip(ranks, flights):
            getattr(rank, phase)(flight)
    return [rank.finish(flight) for rank, flight in zip(ranks, flights)]


def stretches_by_hand(module: MCHManagedCollisionModule, world_size: int) -> list[MCHManagedCollisionModule]:
    size = module.output_size() // world_size
    return [
        MCHManagedCollisionModule(
            size,
            CPU,
            type(module._policy)(),
            module._eviction_interval,
            output_global_offset=rank * size,
            input_hash_size=LARGEST,
        )
        for rank in range(world_size)
    ]


def owner_by_hand(table: str, ids: torch.Tensor, world_size: int) -> torch.Tensor:
    """Each row is home to as many of the ids below LARGEST, and each rank has as many rows."""
    ids_per_row = math.ceil(LARGEST / ROWS[table])
    return ids // ids_per_row // (ROWS[table] // world_size)


def jagged(ids: torch.Tensor) -> JaggedTensor:
    return JaggedTensor(ids, lengths=torch.tensor([len(ids)]))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from(list(POLICIES)), st.integers(0, 10**6))
def test_every_stretch_of_rows_is_a_module_of_its_own(world_size, policy, seed):
    whole_modules, configs = managed(policy), tables()
    plan = plan_of(EmbeddingBagCollection(configs), "row_wise", world_size, world_size)
    ranks = simulated(ManagedCollisionCollection(whole_modules, configs), plan, world_size)
    by_hand = {name: stretches_by_hand(module, world_size) for name, module in whole_modules.items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        batches = [batch_of(generator, 2) for _ in range(world_size)]
        answers = remap_all(ranks, batches)
        evicted = [rank.evict() for rank in ranks]
        for table, features in FEATURES.items():
            ids = {name: torch.cat([batch[name].values() for batch in batches]) for name in features}
            rows = {name: torch.cat([answer[name].values() for answer in answers]) for name in features}
            owner = {name: owner_by_hand(table, values, world_size) for name, values in ids.items()}
            for rank, stretch in enumerate(by_hand[table]):
                mine = {name: jagged(values[owner[name] == rank]) for name, values in ids.items()}
                for name, jt in stretch(mine).items():
                    assert torch.equal(rows[name][owner[name] == rank], jt.values())
                expected, given_away = stretch.evict(), evicted[rank][table]
                assert (given_away is None) == (expected is None)
                assert expected is None or torch.equal(given_away, expected)
                assert torch.equal(ranks[rank].open_slots()[table], stretch.open_slots())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["row_wise", "table_wise", "uneven"]), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_hashed_ids_have_the_rows_of_one_module_on_the_joined_batch(kind, world_size, seed):
    configs = tables()
    alone = ManagedCollisionCollection(managed("hash"), configs)
    generator = torch.Generator().manual_seed(seed)
    hours = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_mc_evictions, "hours_now", lambda: hours)
        alone(batch_of(generator, 4))  # ids that are there already are taken over
        plan = plan_of(EmbeddingBagCollection(configs), "row_wise", world_size, world_size)
        if kind == "table_wise":
            plan = plan_of(EmbeddingBagCollection(configs), "table_wise", world_size, world_size)
        if kind == "uneven":
            plan = {name: uneven(name, world_size) for name in ROWS}
        ranks = simulated(copy.deepcopy(alone), plan, world_size)
        for _ in range(4):
            hours += 1
            batches = [batch_of(generator, 2) for _ in range(world_size)]
            answers, expected = remap_all(ranks, batches), alone(join(batches))
            for name in expected.keys():
                assert torch.equal(torch.cat([a[name].values() for a in answers]), expected[name].values())
                assert torch.equal(torch.cat([a[name].lengths() for a in answers]), expected[name].lengths())
            evicted, by_rank = alone.evict(), [rank.evict() for rank in ranks]
            for table in ROWS:
                rows = [part[table] for part in by_rank if part[table] is not None]
                everyone = torch.cat(rows).sort().values.tolist() if rows else []
                assert everyone == ([] if evicted[table] is None else evicted[table].tolist())


def test_any_64_bit_ids_are_spread_over_the_ranks():
    config = [EmbeddingBagConfig(name="t", num_embeddings=400, embedding_dim=8, feature_names=["f"])]
    modules = {"t": MCHManagedCollisionModule(400, CPU, LFU_EvictionPolicy(), 1)}
    plan = plan_of(EmbeddingBagCollection(config), "row_wise", 4, 4)
    ranks = simulated(ManagedCollisionCollection(modules, config), plan, 4)
    kjt = KeyedJaggedTensor.from_lengths_sync(["f"], torch.arange(300), torch.tensor([300]))
    remap_all(ranks, [kjt] * 4)
    owned = [99 - rank.open_slots()["t"].item() for rank in ranks]
    assert sum(owned) == 300 and min(owned) > 50


def uneven(table: str, world_size: int):
    """One bucket on the last rank, the other three on the first."""
    cut = ROWS[table] // 4
    shards = [
        Shard(table, range(cut), range(8), world_size - 1),
        Shard(table, range(cut, ROWS[table]), range(8), 0),
    ]
    return parameter_sharding_from(shards, "custom", "fused")


# ---------------------------------------------------------------- training on real ranks

STEPS, BATCH, RATE = 4, 3, 0.3


class Model(nn.Module):
    def __init__(self, pooled: bool, kind: str) -> None:
        super().__init__()
        configs = tables(pooled, first_value=0.25)
        collection = ManagedCollisionCollection(managed(kind), configs)
        torch.manual_seed(1)
        if pooled:
            self.mc = ManagedCollisionEmbeddingBagCollection(EmbeddingBagCollection(configs), collection, True)
        else:
            self.mc = ManagedCollisionEmbeddingCollection(EmbeddingCollection(configs), collection, True)
        self.pooled, self.over = pooled, nn.Linear(8, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        answer, remapped = self.mc(features)
        assert remapped.keys() == ["seen", "liked", "user"]
        rows = [answer[name] if self.pooled else answer[name].values() for name in remapped.keys()]
        if self.pooled:
            return self.over(torch.stack(rows)).square().mean()
        return self.over(torch.cat(rows)).square().sum() / features.stride()


def batches_of_step(world_size: int, step: int) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(step)
    return [batch_of(generator, BATCH) for _ in range(world_size)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, batches_of) -> list[torch.Tensor]:
    losses, hours_now = [], hash_mc_evictions.hours_now
    for step in range(STEPS):
        hash_mc_evictions.hours_now = lambda step=step: 1000 + step
        if optimizer is not None:
            optimizer.zero_grad()
        loss = model(batches_of(step))
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.detach())
    hash_mc_evictions.hours_now = hours_now
    return losses


def sharded_model(pooled: bool, kind: str, plan_kind: str | None, world_size: int) -> DistributedModelParallel:
    model = Model(pooled, kind)
    apply_optimizer_in_backward(torch.optim.SGD, model.mc._embedding_module.parameters(), {"lr": RATE})
    plan = None
    if plan_kind is not None:
        plan = ShardingPlan({"mc": plan_of(model.mc._embedding_module, plan_kind, world_size, max(world_size // 2, 1))})
    return DistributedModelParallel(model, plan=plan)


def train_sharded(rank: int, world_size: int, group, pooled: bool, kind: str, plan_kind: str | None, folder=None):
    dmp = sharded_model(pooled, kind, plan_kind, world_size)
    expected_type = (
        ShardedManagedCollisionEmbeddingBagCollection if pooled else ShardedManagedCollisionEmbeddingCollection
    )
    assert isinstance(dmp.module.mc, expected_type)
    dense = torch.optim.SGD(dmp.module.over.parameters(), lr=RATE)
    losses = train(dmp, dense, lambda step: batches_of_step(world_size, step)[rank])
    if folder is not None:
        save_checkpoint(folder, dmp)
    return losses, {name: value.detach() for name, value in dmp.state_dict().items()}


def together(parts: list[torch.Tensor]) -> torch.Tensor:
    """Every rank's view of one tensor as a whole; what several ranks hold has to be equal."""
    if not isinstance(parts[0], TiledTensor):
        return whole(parts)
    tiles = {tile.offsets: tile.tensor for part in parts for tile in part.tiles}
    assert all(torch.equal(tile.tensor, tiles[tile.offsets]) for part in parts for tile in part.tiles)
    assert sum(tensor.numel() for tensor in tiles.values()) == parts[0].numel()
    return torch.cat([tiles[offsets] for offsets in sorted(tiles)])


def train_alone(pooled: bool, kind: str, world_size: int):
    model = Model(pooled, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return train(model, optimizer, lambda step: join(batches_of_step(world_size, step))), model.state_dict()


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
@pytest.mark.parametrize("plan_kind", ["row_wise", "table_wise", "table_row_wise", None])
def test_hashed_ids_train_as_in_one_process(ranks: RankPool, plan_kind: str | None, pooled: bool):
    results = ranks.run(train_sharded, 4, pooled, "hash", plan_kind, hosts=2)
    losses, states = zip(*results)
    expected_losses, expected = train_alone(pooled, "hash", 4)
    for step, loss in enumerate(expected_losses):
        torch.testing.assert_close(torch.stack([rank[step] for rank in losses]).mean(), loss)
    assert set(states[0]) == set(expected)
    identities = [name for name in expected if name.endswith("identities")]
    assert len(identities) == 2 and all((expected[name] >= 0).sum() > 6 for name in identities)
    for name, value in expected.items():
        torch.testing.assert_close(together([state[name] for state in states]), value, rtol=1e-4, atol=1e-5)


def load_elsewhere(rank: int, world_size: int, group, kind: str, plan_kind: str, folder: Path):
    dmp = sharded_model(True, kind, plan_kind, world_size)
    load_checkpoint(folder, dmp)
    dmp.eval()
    return dmp.module.mc(batches_of_step(4, 99)[rank])[0].values().detach()


def test_a_checkpoint_of_hashed_ids_loads_on_any_number_of_ranks(ranks: RankPool, tmp_path: Path):
    states = [state for _, state in ranks.run(train_sharded, 4, True, "hash", "row_wise", tmp_path / "saved")]
    alone = Model(True, "hash")
    load_checkpoint(tmp_path / "saved", alone)
    alone.eval()
    for world_size, plan_kind in ((1, "row_wise"), (2, "row_wise"), (4, "table_wise")):
        answers = ranks.run(load_elsewhere, world_size, "hash", plan_kind, tmp_path / "saved")
        for rank, answer in enumerate(answers):
            torch.testing.assert_close(answer, alone.mc(batches_of_step(4, 99)[rank])[0].values())
    name = "mc._managed_collision_collection._managed_collision_modules.film._hash_zch_identities"
    assert torch.equal(alone.state_dict()[name], together([state[name] for state in states]))


def test_a_checkpoint_of_sorted_ids_needs_the_same_cuts(ranks: RankPool, tmp_path: Path):
    ranks.run(train_sharded, 2, True, "lfu", "row_wise", tmp_path / "saved")
    ranks.run(load_elsewhere, 2, "lfu", "row_wise", tmp_path / "saved")
    with pytest.raises(ValueError, match="cut at rows"):
        ranks.run(load_elsewhere, 4, "lfu", "row_wise", tmp_path / "saved")


def optimizer_state_of_new_owners(rank: int, world_size: int, group):
    model = Model(True, "lru")
    apply_optimizer_in_backward(torch.optim.Adagrad, model.mc._embedding_module.parameters(), {"lr": RATE})
    dmp = DistributedModelParallel(
        model,
        plan=ShardingPlan({"mc": plan_of(model.mc._embedding_module, "row_wise", world_size, world_size)}),
    )
    collection = dmp.module.mc._managed_collision_collection
    given: dict[str, torch.Tensor | None] = {}
    evict = collection.evict
    collection.evict = lambda: given.update(evict()) or given
    for step in range(STEPS):
        dmp(batches_of_step(world_size, step)[rank]).backward()
    dmp(batches_of_step(world_size, STEPS)[rank])
    checked = kept = 0
    for table, shards in dmp.module.mc._embedding_module.embedding_bags.items():
        for local in shards.local:
            new = torch.zeros(local.shard.num_rows, dtype=torch.bool)
            if given[table] is not None:
                new[given[table] - local.shard.rows.start] = True
            assert (local.weight[new] == 0.25).all() and not local.state["momentum1"][new].any()
            kept += int(local.state["momentum1"].any())
            checked += int(new.sum())
    return checked, kept


def test_new_owners_begin_with_new_rows_and_without_optimizer_state(ranks: RankPool):
    renewed, kept = zip(*ranks.run(optimizer_state_of_new_owners, 2))
    assert sum(renewed) > 0 and sum(kept) > 0


def bad_id_on_rank_1(rank: int, world_size: int, group):
    modules = {
        name: HashZchManagedCollisionModule(rows, CPU, 4, input_hash_size=LARGEST) for name, rows in ROWS.items()
    }
    configs = tables()
    plan = plan_of(EmbeddingBagCollection(configs), "row_wise", world_size, world_size)
    env = ShardingEnv.from_process_group(group)
    collection = ShardedManagedCollisionCollection(ManagedCollisionCollection(modules, configs), plan, env, CPU, None)
    batch = batches_of_step(world_size, 0)[rank]
    if rank == 1:
        batch.values()[-1] = LARGEST
    message = "no error"
    try:
        collection(batch)
    except ValueError as error:
        message = str(error)
    return message, sum(collection.open_slots().values()).item()


def test_a_bad_id_stops_all_ranks_before_any_id_is_seen(ranks: RankPool):
    (first, open_first), (second, open_second) = ranks.run(bad_id_on_rank_1, 2)
    assert "ranks [1] have ids" in first and "id 1000 has no place" in second
    assert open_first + open_second == sum(ROWS.values())


def test_plans_that_cannot_be_followed():
    configs = tables()
    for kind, modules, message in [
        ("column_wise", managed("lfu"), "every row has to be whole"),
        ("data_parallel", managed("lfu"), "every row has to be whole"),
        ("uneven_row_wise", managed("hash"), "cut a bucket"),
    ]:
        plan = plan_of(EmbeddingBagCollection(configs), kind, 2, 2)
        with pytest.raises(ValueError, match=message):
            simulated(ManagedCollisionCollection(modules, configs), plan, 2)
    used = managed("lfu")
    collection = ManagedCollisionCollection(used, configs)
    collection(batches_of_step(1, 0)[0])
    with pytest.raises(ValueError, match="manages ids already"):
        simulated(collection, plan_of(EmbeddingBagCollection(configs), "row_wise", 2, 2), 2)
    with pytest.raises(KeyError, match="no features"):
        kjt = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([1]), torch.tensor([1]))
        simulated(collection, plan_of(EmbeddingBagCollection(configs), "table_wise", 1, 1), 1)[0](kjt)
