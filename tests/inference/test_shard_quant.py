"""Quantised tables over several devices answer as on one: every sharding type, any tiling, any batch."""

from __future__ import annotations

import copy

import engine_cases as cases
import pytest
import test_engine_random as random_cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.planner import ParameterConstraints, Topology
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator
from recsys_edu.distributed.planner.workload import weight_bytes
from recsys_edu.distributed.types import ModuleShardingPlan, ShardingPlan
from recsys_edu.inference.modules import (
    assign_weights_to_tbe,
    default_quant_sharders,
    get_table_to_weights_from_tbe,
    quantize_embeddings,
    set_index_remappings,
    shard_quant_model,
)
from recsys_edu.kernels.quantized_remap import keep_largest_rows
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.types import DataType

PER_TABLE = {"t1": torch.quint4x2, "t2": torch.float16}


class Model(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor):
        return self.collection(features)


def quantised(tables, weighted: bool = False, **kwargs) -> Model:
    names = {table.name for table in tables}
    per_table = {name: dtype for name, dtype in PER_TABLE.items() if name in names}
    model = Model(cases.collection(tables, weighted))
    return quantize_embeddings(model, torch.int8, inplace=True, per_table_weight_dtype=per_table, **kwargs)


def plan_of(model: Model, generators, world_size: int) -> ShardingPlan:
    sharder = next(s for s in default_quant_sharders() if s.module_type is type(model.collection))
    plan = plans.construct_module_sharding_plan(model.collection, generators, sharder, world_size, world_size, "cpu")
    return ShardingPlan({"collection": plan})


def sharded(model: Model, generators, world_size: int) -> Model:
    plan = plan_of(model, generators, world_size)
    return shard_quant_model(copy.deepcopy(model), world_size, "cpu", sharding_plan=plan)[0]


def assert_same(answer, expected) -> None:
    for part, other in zip(cases.blocks_of(answer), cases.blocks_of(expected), strict=True):
        assert part.dtype == other.dtype
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-6)


def no_mail_left(model: Model) -> bool:
    return not model.collection.shards.ends[0].exchange.world.mailboxes


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", [kind for kind in cases.TYPES])
@pytest.mark.parametrize("what", ["pooled", "weighted", "sequence"])
def test_every_sharding_type(what: str, kind: str, world_size: int) -> None:
    if kind == "mixed" and world_size == 1:
        pytest.skip("a mix needs two devices")
    tables = cases.sequence_tables() if what == "sequence" else cases.bag_tables()
    model = quantised(tables, what == "weighted")
    make = cases.TYPES[kind]
    generators = {table.name: make(index, world_size, world_size) for index, table in enumerate(tables)}
    several = sharded(model, generators, world_size)
    generator = torch.Generator().manual_seed(world_size)
    for batch_size in (5, 0, 1):
        batch = cases.make_batch(cases.features_of(tables), batch_size, what == "weighted", generator)
        assert_same(several(batch), model(batch))
        assert no_mail_left(several)
    assert sum(several.collection.shards.memory_bytes_W()) >= model.collection.memory_bytes()


@given(data=st.data(), pooled=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
def test_any_tiling_and_any_batch(data: st.DataObject, pooled: bool) -> None:
    setting = data.draw(random_cases.a_setting(pooled))
    model = quantised(setting.tables, setting.weighted)
    generators = {
        name: plans.data_parallel() if shards is None else plans.custom(shards)
        for name, shards in setting.tilings.items()
    }
    several = sharded(model, generators, setting.world_size)
    batch = data.draw(random_cases.a_batch(setting, data.draw(st.integers(0, 3))))
    assert_same(several(batch), model(batch))
    assert no_mail_left(several)


@pytest.mark.parametrize("what", ["pooled", "sequence"])
def test_pruned_tables(what: str) -> None:
    tables = cases.bag_tables() if what == "pooled" else cases.sequence_tables()
    model = Model(cases.collection(tables))
    weights = {name.split(".")[-2]: weight for name, weight in model.named_parameters()}
    keep = {"t0": keep_largest_rows(weights["t0"], 5).array(), "t2": keep_largest_rows(weights["t2"], 12).array()}
    model = quantize_embeddings(set_index_remappings(model, keep), torch.int8, inplace=True)
    several = sharded(model, {name: plans.row_wise() for name in weights}, 3)
    generator = torch.Generator().manual_seed(0)
    batch = cases.make_batch(cases.features_of(tables), 6, False, generator)
    assert_same(several(batch), model(batch))
    with pytest.raises(IndexError, match="t0"):
        several(KeyedJaggedTensor(batch.keys(), batch.values() + 13, lengths=batch.lengths()))


def test_variable_batches() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    several = sharded(model, {table.name: plans.row_wise() for table in tables}, 2)
    lengths = torch.tensor([1, 1, 2, 0, 1])  # f0 has one bag, f1 two, f2 one, f3 one
    batch = KeyedJaggedTensor(
        ["f0", "f1", "f2", "f3"],
        torch.tensor([3, 1, 0, 2, 4]),
        lengths=lengths,
        stride_per_key_per_rank=[[1], [2], [1], [1]],
        inverse_indices=(["f0", "f1", "f2", "f3"], torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0]])),
    )
    assert_same(several(batch), model(batch))


def test_a_batch_that_is_refused_leaves_nothing_behind() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    several = sharded(model, {table.name: plans.column_wise() for table in tables}, 2)
    good = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    bad = KeyedJaggedTensor(good.keys(), good.values() + 100, lengths=good.lengths())
    expected = model(good)
    for _ in range(3):
        with pytest.raises(IndexError, match=r"feature 'f.' has id"):
            several(bad)
        assert no_mail_left(several)
        assert_same(several(good), expected)
    with pytest.raises(KeyError, match="f0"):
        several(KeyedJaggedTensor(["f1"], torch.tensor([0]), lengths=torch.tensor([1])))


def test_rows_travel_between_plans() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    rows = sharded(model, {table.name: plans.row_wise() for table in tables}, 3)
    columns = sharded(quantised(cases.bag_tables()), {table.name: plans.column_wise() for table in tables}, 2)
    for table in columns.collection.embedding_bags.values():
        table.fill(torch.zeros_like(table.weight))
    batch = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    columns.load_state_dict(rows.state_dict())
    assert_same(columns(batch), model(batch))
    for table in columns.collection.embedding_bags.values():
        table.fill(torch.zeros_like(table.weight))
    assign_weights_to_tbe(columns, get_table_to_weights_from_tbe(rows))
    assert_same(columns(batch), model(batch))
    model.load_state_dict(columns.state_dict())
    assert_same(model(batch), rows(batch))


def test_meta_tables_are_sharded_first_and_filled_later() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    empty = Model(type(cases.collection(tables))(cases.bag_tables(), device=torch.device("meta")))
    empty = quantize_embeddings(empty, torch.int8, inplace=True, per_table_weight_dtype=PER_TABLE)
    with pytest.raises(RuntimeError, match="meta"):
        empty(cases.make_batch(cases.features_of(tables), 4, False, torch.Generator()))
    several, _ = shard_quant_model(empty, 2, "cpu")
    several.load_state_dict(model.state_dict())
    batch = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    assert_same(several(batch), model(batch))


def test_the_planner_plans_quantised_tables() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    constraints = {
        "t0": ParameterConstraints(sharding_types=["row_wise"]),
        "t1": ParameterConstraints(sharding_types=["column_wise"], min_partition=16),
        "t2": ParameterConstraints(sharding_types=["table_wise"]),
    }
    several, plan = shard_quant_model(copy.deepcopy(model), 2, "cpu", constraints=constraints)
    found = {name: sharding.sharding_type for name, sharding in plan.plan["collection"].items()}
    assert found == {"t0": "row_wise", "t1": "column_wise", "t2": "table_wise"}
    assert all(sharding.compute_kernel == "quant" for sharding in plan.plan["collection"].values())
    batch = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    assert_same(several(batch), model(batch))


@pytest.mark.parametrize("dtype", [torch.int8, torch.quint4x2, torch.quint2x4, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_the_planner_counts_the_bytes_that_shards_have(dtype: torch.dtype, kind: str) -> None:
    tables = cases.bag_tables()
    model = quantize_embeddings(Model(cases.collection(tables)), dtype, inplace=True)
    constraints = {
        table.name: ParameterConstraints(sharding_types=[kind], min_partition=8, pooling_factors=[0.0])
        for table in tables
    }  # without ids there are no buffers: what is left are the weights
    topology = Topology(2, "cpu", local_world_size=2)
    options = EmbeddingEnumerator(topology, 1, constraints).enumerate(model, default_quant_sharders())
    several, _ = shard_quant_model(model, 2, "cpu", constraints=constraints)
    planned = sum(shard.storage.ddr for option in options for shard in option.shards)
    assert len(options) == len(tables)
    assert planned == sum(several.collection.shards.memory_bytes_W())


def test_the_planner_counts_padding_on_cuda() -> None:
    table = torch.empty(10, 64, dtype=torch.uint8, device="meta")
    for data_type, row_bytes in ((DataType.INT8, 80), (DataType.INT4, 48), (DataType.FP16, 128)):
        table._data_type = data_type
        per_weight, per_row = weight_bytes(table, "cuda")
        assert 64 * per_weight + per_row == row_bytes
    assert weight_bytes(torch.empty(10, 64), "cuda") == (4, 0)


@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16])
def test_answers_in_half_precision(output_dtype: torch.dtype) -> None:
    tables = cases.bag_tables()
    model = quantised(tables, output_dtype=output_dtype)
    several = sharded(model, {table.name: plans.table_wise(rank=1) for table in tables}, 2)
    batch = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    answer, expected = several(batch).values(), model(batch).values()
    assert answer.dtype == expected.dtype == output_dtype
    torch.testing.assert_close(answer, expected)


def test_moving_the_model_leaves_shards_and_codes_alone() -> None:
    tables = cases.bag_tables()
    model = quantised(tables)
    several = sharded(model, {table.name: plans.row_wise() for table in tables}, 2)
    batch = cases.make_batch(cases.features_of(tables), 4, False, torch.Generator().manual_seed(0))
    assert_same(copy.deepcopy(several).half().to("cpu")(batch), model(batch))


def test_what_does_not_fit_is_refused() -> None:
    model = quantised(cases.bag_tables())
    with pytest.raises(ValueError, match="no quantised embedding collection"):
        shard_quant_model(Model(cases.collection(cases.bag_tables())), 2, "cpu")
    with pytest.raises(ValueError, match=r"tables without a plan \['t1', 't2'\]"):
        plan = plan_of(model, {name: plans.row_wise() for name in ("t0", "t1", "t2")}, 2)
        part = {"t0": plan.plan["collection"]["t0"]}
        kind = type(plan.plan["collection"])
        assert issubclass(kind, ModuleShardingPlan)
        shard_quant_model(model, 2, "cpu", sharding_plan=ShardingPlan({"collection": kind(part)}))
