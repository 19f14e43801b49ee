"""Plans by hand, where a rank sits, and the helpers of `distributed.utils`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recsys_edu.distributed import comm, utils
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder, BaseQuantEmbeddingSharder, OptimType
from recsys_edu.distributed.sharding.tiling import CUSTOM, Shard, shards_from
from recsys_edu.distributed.sharding_plan import (
    apply_to_all,
    calculate_shard_sizes_and_offsets,
    column_block_width,
    column_wise,
    construct_module_sharding_plan,
    custom,
    data_parallel,
    get_module_to_default_sharders,
    get_sharding_constructor_from_type,
    grid_shard,
    placement,
    placement_helper,
    row_wise,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from recsys_edu.distributed.types import CacheParams, ParameterSharding, ShardedModule, ShardingType
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.optim import optimizers as markers
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

WORLD = {"local_size": 2, "world_size": 4, "device_type": "cpu"}


class TablesSharder(BaseEmbeddingSharder[nn.ParameterDict]):
    """Shards a plain dict of parameters, so that these tests need no sharded module."""

    @property
    def module_type(self) -> type[nn.ParameterDict]:
        return nn.ParameterDict


def tables(**shapes: tuple[int, int]) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})


def plan_of(generator: Any, shape: tuple[int, int] = (10, 16), **world: Any) -> ParameterSharding:
    module = tables(user=shape)
    return construct_module_sharding_plan(module, {"user": generator}, TablesSharder(), **{**WORLD, **world})["user"]


def rectangles(sharding: ParameterSharding) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    shards = shards_from("user", sharding, 10, 16)
    return [((s.rows.start, s.rows.stop), (s.columns.start, s.columns.stop), s.rank) for s in shards]


@pytest.mark.parametrize(
    ("generator", "sharding_type", "expected"),
    [
        (table_wise(rank=3), "table_wise", [((0, 10), (0, 16), 3)]),
        (
            row_wise(),
            "row_wise",
            [((0, 3), (0, 16), 0), ((3, 6), (0, 16), 1), ((6, 9), (0, 16), 2), ((9, 10), (0, 16), 3)],
        ),
        (row_wise(([7, 3], "cpu")), "row_wise", [((0, 7), (0, 16), 0), ((7, 10), (0, 16), 1)]),
        (row_wise(([7, 3], "cpu"), ranks=[3, 1]), "row_wise", [((0, 7), (0, 16), 3), ((7, 10), (0, 16), 1)]),
        (row_wise(ranks=[1, 3]), "row_wise", [((0, 5), (0, 16), 1), ((5, 10), (0, 16), 3)]),
        (row_wise(num_buckets=5, ranks=[0, 1]), "row_wise", [((0, 6), (0, 16), 0), ((6, 10), (0, 16), 1)]),
        (column_wise(ranks=[2, 0]), "column_wise", [((0, 10), (0, 8), 2), ((0, 10), (8, 16), 0)]),
        (column_wise(size_per_rank=[4, 12]), "column_wise", [((0, 10), (0, 4), 0), ((0, 10), (4, 16), 1)]),
        (
            column_wise(ranks=[3, 1], size_per_rank=[4, 12]),
            "column_wise",
            [((0, 10), (0, 4), 3), ((0, 10), (4, 16), 1)],
        ),
        (column_wise(), "column_wise", [((0, 10), (4 * i, 4 * i + 4), i) for i in range(4)]),
        (table_row_wise(host_index=1), "table_row_wise", [((0, 5), (0, 16), 2), ((5, 10), (0, 16), 3)]),
        (table_column_wise(host_index=1), "table_column_wise", [((0, 10), (0, 8), 2), ((0, 10), (8, 16), 3)]),
        (
            grid_shard(host_indexes=[1, 0]),
            "grid_shard",
            [((0, 5), (0, 8), 2), ((5, 10), (0, 8), 3), ((0, 5), (8, 16), 0), ((5, 10), (8, 16), 1)],
        ),
        (custom([Shard("user", range(10), range(16), 1)]), CUSTOM, [((0, 10), (0, 16), 1)]),
        (
            custom(lambda r: [Shard(r.table, range(r.num_rows), range(r.num_columns), r.world_size - 1)]),
            CUSTOM,
            [((0, 10), (0, 16), 3)],
        ),
    ],
)
def test_every_generator_makes_its_rectangles(generator: Any, sharding_type: str, expected: list) -> None:
    sharding = plan_of(generator)
    assert sharding.sharding_type == sharding_type
    assert rectangles(sharding) == expected
    assert sharding.ranks == [rank for _, _, rank in expected]


def test_data_parallel_is_replicated_with_a_dense_kernel() -> None:
    sharding = plan_of(data_parallel())
    assert (sharding.sharding_type, sharding.compute_kernel) == ("data_parallel", "dense")
    assert (sharding.ranks, sharding.sharding_spec) == ([0, 1, 2, 3], None)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (table_wise(rank=4), r"table 'user': shard .* on rank 4, but the ranks are 0 to 3"),
        (table_row_wise(host_index=2), r"table 'user': shard .* on rank 4, but the ranks are 0 to 3"),
        (row_wise(([7, 4], "cpu")), r"table 'user': sizes \[7, 4\] .* add up to the table's 10 rows"),
        (row_wise(num_buckets=3), "3 buckets for 4 ranks"),
        (row_wise(num_buckets=7), "10 rows cannot be divided into 7 buckets"),
        (column_wise(ranks=[0, 1, 2]), "16 columns cannot be divided evenly into 3 blocks"),
        (column_wise(size_per_rank=[6, 10]), "table 'user': column cut 6 is not a multiple of 4"),
        (column_wise(ranks=[0, 1], device_types=["cpu"]), "1 device types .* for 2 shards"),
        (custom([Shard("user", range(9), range(16), 1)]), r"gap: no shard holds rows 9:10"),
        (custom([Shard("item", range(10), range(16), 1)]), r"table 'user': got a shard of table 'item'"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_when_it_is_made(generator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(generator)


def test_sizes_and_buckets_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        row_wise(([7, 3], "cpu"), num_buckets=2)


def test_generators_can_be_called_as_torchrec_calls_them() -> None:
    parameter = nn.Parameter(torch.zeros(10, 16))
    for generator in (table_wise(3), custom([Shard("user", range(10), range(16), 3)])):
        sharding = generator(parameter, 2, 4, "cuda", TablesSharder())
        assert [str(s.placement) for s in sharding.sharding_spec.shards] == ["rank:3/cuda:1"]


def test_device_types_override_the_worlds() -> None:
    sharding = plan_of(column_wise(ranks=[3, 1], device_types=["cpu", "cuda"]))
    assert [str(s.placement) for s in sharding.sharding_spec.shards] == ["rank:3/cpu", "rank:1/cuda:1"]
    assert str(plan_of(table_wise(3, device="cuda")).sharding_spec.shards[0].placement) == "rank:3/cuda:1"


def test_the_kernel_follows_the_optimizer() -> None:
    module = tables(user=(10, 16), item=(10, 16))
    apply_optimizer_in_backward(torch.optim.SGD, [module["user"]], {"lr": 0.1})
    generators = apply_to_all(module, table_wise(0), TablesSharder())

    def kernels(sharder: TablesSharder) -> dict[str, str]:
        plan = construct_module_sharding_plan(module, generators, sharder, **WORLD)
        return {name: sharding.compute_kernel for name, sharding in plan.items()}

    assert kernels(TablesSharder()) == {"user": "fused", "item": "dense"}
    assert kernels(TablesSharder(fused_params={"optimizer": OptimType.SGD})) == {"user": "fused", "item": "fused"}
    assert kernels(TablesSharder(fused_params={"learning_rate": 0.1})) == {"user": "fused", "item": "dense"}
    assert plan_of(table_wise(0, compute_kernel="fused")).compute_kernel == "fused"
    served = row_wise()(module["item"], 2, 4, "cpu", BaseQuantEmbeddingSharder())
    assert served.compute_kernel == "quant"


def test_every_table_needs_a_generator_and_every_generator_a_table() -> None:
    module = tables(user=(10, 16), item=(10, 16))
    with pytest.raises(AssertionError, match=r"Missing: \['item'\]; unknown: \['movie'\]"):
        construct_module_sharding_plan(module, {"user": row_wise(), "movie": row_wise()}, TablesSharder(), **WORLD)


def test_without_a_group_the_world_size_must_be_given() -> None:
    with pytest.raises(ValueError, match="pass world_size="):
        construct_module_sharding_plan(tables(user=(4, 4)), {"user": row_wise()}, TablesSharder())


@pytest.mark.parametrize("sharding_type", ShardingType)
def test_constructor_from_type(sharding_type: ShardingType) -> None:
    arguments = {
        ShardingType.TABLE_WISE: {"rank": 0},
        ShardingType.TABLE_ROW_WISE: {"host_index": 0},
        ShardingType.TABLE_COLUMN_WISE: {"host_index": 0},
        ShardingType.GRID_SHARD: {"host_indexes": [0, 1]},
    }.get(sharding_type, {})
    generator = get_sharding_constructor_from_type(sharding_type)(**arguments)
    assert plan_of(generator).sharding_type == sharding_type.value


def test_sizes_and_offsets() -> None:
    tensor = torch.empty(10, 16)
    assert calculate_shard_sizes_and_offsets(tensor, 4, 2, "row_wise") == (
        [[3, 16], [3, 16], [3, 16], [1, 16]],
        [[0, 0], [3, 0], [6, 0], [9, 0]],
    )
    assert calculate_shard_sizes_and_offsets(tensor, 4, 2, "grid_shard", col_wise_shard_dim=8)[1] == [
        [0, 0],
        [5, 0],
        [0, 8],
        [5, 8],
    ]
    with pytest.raises(ValueError, match="'diagonal': expected one of"):
        calculate_shard_sizes_and_offsets(tensor, 4, 2, "diagonal")
    with pytest.raises(ValueError, match="one above 0"):
        calculate_shard_sizes_and_offsets(tensor, 2, 2, "row_wise", device_memory_sizes=[0, 0])
    assert [column_block_width(d, 128) for d in (64, 256, 384, 500, 512)] == [64, 128, 128, 500, 128]


def test_placements() -> None:
    assert placement("cuda", 3, 2) == "rank:3/cuda:1"
    assert placement("cpu", 3, 2) == "rank:3/cpu"
    assert placement_helper("cuda", 1, 2) == "rank:2/cuda:1"
    assert placement_helper("cpu", 1, 2) == "rank:0/cpu"


# ---------------------------------------------------------------- comm


@pytest.mark.parametrize(
    ("local_world_size", "world_size", "expected"),
    [(None, 4, 4), (None, 16, 8), (None, 12, 12), ("2", 4, 2), ("3", 16, 16), ("8", 4, 4)],
)
def test_local_size(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str | None, world_size: int, expected: int
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert comm.get_local_size(world_size) == expected
    assert comm.get_num_groups(world_size) == world_size // expected
    for rank in range(world_size):
        assert comm.get_local_rank(world_size, rank) == rank % expected
        assert comm.get_group_rank(world_size, rank) == rank // expected


def test_local_rank_comes_from_the_environment_where_it_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert comm.get_local_rank(4) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE='two'"):
        comm.get_local_size(4)


def test_no_groups_without_a_process_group() -> None:
    assert comm.intra_and_cross_node_pg() == (None, None)


@pytest.mark.parametrize("rank", range(4))
def test_groups_inside_and_across_hosts(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's fake backend gives one process the view of any rank; who talks to whom needs no talking.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        intra, cross = comm.intra_and_cross_node_pg()
        host, place = divmod(rank, 2)
        assert dist.get_process_group_ranks(intra) == [2 * host, 2 * host + 1]
        assert dist.get_process_group_ranks(cross) == [place, place + 2]
        assert comm.intra_and_cross_node_pg() == (intra, cross)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert comm.intra_and_cross_node_pg() == (None, None)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- utils


def test_names_and_prefixes() -> None:
    assert [utils.append_prefix(*p) for p in (("", "a"), ("a", ""), ("a", "b"))] == ["a", "a", "a.b"]
    state = OrderedDict([("a.b", torch.ones(1)), ("ab.c", torch.ones(1)), ("a.c.d", torch.ones(1))])
    assert list(utils.filter_state_dict(state, "a")) == ["b", "c.d"]
    values = {"a": 1, "b": 2}
    utils.add_prefix_to_state_dict(values, "x.")
    assert list(values.items()) == [("x.a", 1), ("x.b", 2)]
    with pytest.raises(AssertionError, match="no module"):
        utils.none_throws(None, "no module")
    assert utils.none_throws(0) == 0


class Sharded(nn.Module):
    pass


ShardedModule.register(Sharded)


def test_unsharded_module_names_are_the_largest_unsharded_parts() -> None:
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(1, 1),
            "sparse": nn.Sequential(Sharded(), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU())),
            "over": nn.Sequential(nn.ReLU(), nn.Linear(1, 1)),
        }
    )
    assert utils.get_unsharded_module_names(model) == ["dense", "sparse.1", "sparse.2", "over"]
    assert utils.get_unsharded_module_names(nn.Linear(1, 1)) == []
    assert utils.get_unsharded_module_names(Sharded()) == []


def test_copy_to_device_moves_only_what_is_on_the_current_device() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")})
    model["c"] = nn.Linear(2, 2)
    model["c"].weight = model["a"].weight
    moved = utils.copy_to_device(model, torch.device("meta"), torch.device("meta"))
    assert (moved["a"].weight.device.type, moved["b"].weight.device.type) == ("cpu", "meta")
    away = utils.copy_to_device(model, torch.device("cpu"), torch.device("meta"))
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert away["c"].weight is away["a"].weight
    assert isinstance(away["a"].weight, nn.Parameter)
    assert model["a"].weight.device.type == "cpu"
    same = utils.copy_to_device(model, torch.device("cpu"), torch.device("cpu"))
    assert torch.equal(same["a"].weight, model["a"].weight)
    assert same["a"].weight.data_ptr() != model["a"].weight.data_ptr()


class Ones(nn.Module):
    """Sets its child's weight itself, differently from the child's own initialisation."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, device=device)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.inner.weight)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(2, device="meta"))


def test_init_parameters_materialises_and_initialises_children_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), Ones("meta"), Ones("cpu"))
    kept = copy.deepcopy(model[2].inner.weight)
    utils.init_parameters(model, torch.device("cpu"))
    assert not any(p.is_meta for p in model.parameters())
    assert torch.isfinite(model[0].weight).all() and model[0].weight.abs().max() <= 1
    assert torch.equal(model[1].inner.weight, torch.ones(2, 2))
    assert torch.equal(model[2].inner.weight, kept)


def test_init_parameters_names_what_it_cannot_initialise() -> None:
    with pytest.warns(UserWarning, match=r"no initial values for 0\.1"):
        utils.init_parameters(nn.Sequential(nn.Sequential(nn.ReLU(), Bare())), torch.device("cpu"))


def test_settings_are_merged_without_touching_the_originals() -> None:
    base = {"learning_rate": 0.1, "eps": 1e-8}
    assert utils.merge_fused_params(base, {"eps": 1e-3}) == {"learning_rate": 0.1, "eps": 1e-3}
    sharding = ParameterSharding(
        "row_wise", "fused", cache_params=CacheParams(load_factor=0.5), enforce_hbm=True, stochastic_rounding=False
    )
    assert utils.add_params_from_parameter_sharding({"x": 1}, sharding) == {
        "x": 1,
        "cache_load_factor": 0.5,
        "enforce_hbm": True,
        "stochastic_rounding": False,
    }
    assert base == {"learning_rate": 0.1, "eps": 1e-8}
    assert utils.merge_fused_params() == {}


def test_optimizer_classes_have_names() -> None:
    assert utils.optimizer_type_to_emb_opt_type(torch.optim.Adagrad) is OptimType.ADAGRAD
    assert utils.optimizer_type_to_emb_opt_type(markers.LarsSGD) is OptimType.LARS_SGD
    with pytest.raises(ValueError, match="RMSprop cannot run inside backward"):
        utils.optimizer_type_to_emb_opt_type(torch.optim.RMSprop)


# ---------------------------------------------------------------- the package's own sharders


def test_default_sharders_plan_the_packages_modules() -> None:
    device = torch.device("meta")
    pooled = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="user", num_embeddings=10, embedding_dim=16, feature_names=["u"])],
        device=device,
    )
    sequence = EmbeddingCollection(
        tables=[EmbeddingConfig(name="user", num_embeddings=10, embedding_dim=16, feature_names=["u"])], device=device
    )
    assert {EmbeddingBagCollection, EmbeddingCollection} <= set(get_module_to_default_sharders())
    for module in (pooled, sequence):
        plan = construct_module_sharding_plan(module, apply_to_all(module, row_wise()), **WORLD)
        assert rectangles(plan["user"])[-1] == ((9, 10), (0, 16), 3)
    with pytest.raises(ValueError, match="no default sharder for Linear"):
        construct_module_sharding_plan(nn.Linear(1, 1), {}, **WORLD)
