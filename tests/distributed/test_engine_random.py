"""Any valid plan and any jagged batch: random tilings, uneven batches, empty everything, variable batch per feature."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from engine_cases import (
    OPTIMIZERS,
    World,
    collection,
    loss_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

FEATURES = ("f0", "f1", "f2", "f3")
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)


@dataclass(frozen=True)
class Setting:
    """A random module, its tilings (None: data-parallel), its world."""

    tables: list
    tilings: dict[str, list[Shard] | None]
    world_size: int
    local_size: int
    optimizer: str
    weighted: bool

    def plan(self, module):
        generators = {
            name: plans.data_parallel() if shards is None else plans.custom(shards)
            for name, shards in self.tilings.items()
        }
        return plans.construct_module_sharding_plan(
            module, generators, local_size=self.local_size, world_size=self.world_size, device_type="cpu"
        )

    def rows_of_feature(self) -> dict[str, int]:
        rows = {}
        for table in self.tables:
            for feature in table.feature_names:
                rows[feature] = min(rows.get(feature, 10**9), table.num_embeddings)
        return rows


@st.composite
def tilings(draw: st.DrawFn, table: str, num_rows: int, num_columns: int, world_size: int) -> list[Shard]:
    """Rows cut anywhere, the columns of every row block cut anywhere at multiples of 4, any rank for any rectangle."""
    row_cuts = sorted({0, num_rows, *draw(st.sets(st.integers(0, num_rows), max_size=4))})
    cuts_of_columns = st.sets(st.sampled_from(range(0, num_columns, 4)), max_size=2)
    shared = draw(cuts_of_columns)
    shards = []
    for top, bottom in pairwise(row_cuts):
        own = shared if draw(st.booleans()) else draw(cuts_of_columns)
        columns = sorted({0, num_columns, *own})
        for left, right in pairwise(columns):
            rank = draw(st.integers(0, world_size - 1))
            shards.append(Shard(table, range(top, bottom), range(left, right), rank))
    return draw(st.permutations(shards))


@st.composite
def a_setting(draw: st.DrawFn, pooled: bool) -> Setting:
    world_size = draw(st.integers(1, 4))
    local_size = draw(st.sampled_from([size for size in (1, 2, 4) if world_size % size == 0]))
    common_width = draw(st.sampled_from([4, 8, 12]))
    tables, cut = [], {}
    for index in range(draw(st.integers(1, 3))):
        name, rows = f"t{index}", draw(st.integers(1, 9))
        width = draw(st.sampled_from([4, 8, 12])) if pooled else common_width
        features = draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3, unique=True))
        facts = {"name": name, "num_embeddings": rows, "embedding_dim": width, "feature_names": features}
        if pooled:
            pooling = draw(st.sampled_from([PoolingType.SUM, PoolingType.MEAN]))
            tables.append(EmbeddingBagConfig(pooling=pooling, **facts))
        else:
            tables.append(EmbeddingConfig(**facts))
        is_replicated = draw(st.integers(0, 5)) == 0
        cut[name] = None if is_replicated else draw(tilings(name, rows, width, world_size))
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    return Setting(tables, cut, world_size, local_size, optimizer, pooled and draw(st.booleans()))


@st.composite
def a_batch(draw: st.DrawFn, setting: Setting, batch_size: int) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids; some features have none at all."""
    lengths, values = [], []
    for rows in setting.rows_of_feature().values():
        longest = draw(st.sampled_from([0, 1, 3]))
        of_feature = draw(st.lists(st.integers(0, longest), min_size=batch_size, max_size=batch_size))
        lengths += of_feature
        values += draw(st.lists(st.integers(0, rows - 1), min_size=sum(of_feature), max_size=sum(of_feature)))
    weights = None
    if setting.weighted:
        weights = torch.tensor(
            draw(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=len(values), max_size=len(values)))
        )
    return KeyedJaggedTensor(
        list(setting.rows_of_feature()),
        torch.tensor(values, dtype=torch.int64),
        weights,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        stride=batch_size,
    )


def check_two_steps(data: st.DataObject, pooled: bool) -> None:
    setting = data.draw(a_setting(pooled))
    module = collection(setting.tables, setting.weighted)
    world = World(module, setting.plan, setting.world_size, setting.optimizer, setting.local_size)
    for _ in range(2):
        sizes = [data.draw(st.integers(0, 4)) for _ in range(setting.world_size)]
        world.step([data.draw(a_batch(setting, size)) for size in sizes])
    world.compare_weights()


@given(st.data())
@SETTINGS
def test_any_plan_and_batch_pooled(data: st.DataObject) -> None:
    check_two_steps(data, pooled=True)


@given(st.data())
@SETTINGS
def test_any_plan_and_batch_sequence(data: st.DataObject) -> None:
    check_two_steps(data, pooled=False)


# ---------------------------------------------------------------- variable batch per feature


@st.composite
def a_variable_batch(draw: st.DrawFn, setting: Setting, full_size: int) -> KeyedJaggedTensor:
    """Every feature has its own number of distinct bags, and says for every example of the batch which it means."""
    lengths, values, strides, inverse = [], [], [], []
    for rows in setting.rows_of_feature().values():
        distinct = draw(st.integers(1, full_size))
        of_feature = draw(st.lists(st.integers(0, 3), min_size=distinct, max_size=distinct))
        lengths += of_feature
        values += draw(st.lists(st.integers(0, rows - 1), min_size=sum(of_feature), max_size=sum(of_feature)))
        strides.append([distinct])
        inverse.append(draw(st.lists(st.integers(0, distinct - 1), min_size=full_size, max_size=full_size)))
    keys = list(setting.rows_of_feature())
    return KeyedJaggedTensor(
        keys,
        torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        stride_per_key_per_rank=strides,
        inverse_indices=(keys, torch.tensor(inverse).view(len(keys), full_size)),
    )


@given(st.data())
@SETTINGS
def test_variable_batch_pooled(data: st.DataObject) -> None:
    """Answer by answer and gradient by gradient, each rank's batch through the unsharded collection."""
    setting = data.draw(a_setting(pooled=True).filter(lambda s: not s.weighted))
    unsharded = collection(setting.tables)
    dense = Setting(setting.tables, setting.tilings, setting.world_size, setting.local_size, "dense", False)
    modules = simulate(collection(setting.tables), dense.plan(unsharded), setting.world_size)
    batches = [data.draw(a_variable_batch(setting, data.draw(st.integers(1, 4)))) for _ in modules]

    answers = forward_all(modules, batches)
    expected = [unsharded(batch) for batch in batches]
    for answer, one in zip(answers, expected):
        assert answer.keys() == one.keys()
        torch.testing.assert_close(answer.values(), one.values(), rtol=1e-4, atol=1e-5)
    torch.stack([loss_of(answer) for answer in answers]).sum().backward()
    (torch.stack([loss_of(one) for one in expected]).sum() / setting.world_size).backward()
    for name, bag in unsharded.embedding_bags.items():
        for module in modules:
            if setting.tilings[name] is None:
                continue
            for local in module.embedding_bags[name].local:
                shard = local.shard
                window = bag.weight.grad[shard.rows.start : shard.rows.stop, shard.columns.start : shard.columns.stop]
                gradient = torch.zeros_like(window) if local.weight.grad is None else local.weight.grad
                torch.testing.assert_close(gradient, window, rtol=1e-4, atol=1e-5)


@given(st.data())
@SETTINGS
def test_variable_batch_sequence(data: st.DataObject) -> None:
    setting = data.draw(a_setting(pooled=False))
    unsharded = collection(setting.tables)
    dense = Setting(setting.tables, setting.tilings, setting.world_size, setting.local_size, "dense", False)
    modules = simulate(collection(setting.tables), dense.plan(unsharded), setting.world_size)
    batches = [data.draw(a_variable_batch(setting, data.draw(st.integers(1, 4)))) for _ in modules]
    for answer, batch in zip(forward_all(modules, batches), batches):
        for name, expected in unsharded(batch).items():
            torch.testing.assert_close(answer[name].values(), expected.values(), rtol=1e-4, atol=1e-5)
            assert torch.equal(answer[name].lengths().long(), expected.lengths().long()), name
