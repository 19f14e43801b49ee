"""The public language: results to come, codecs, plans and how they print, environments, sharders, small helpers."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from recsys_edu.distributed import types
from recsys_edu.distributed.embedding_types import (
    BaseEmbeddingSharder,
    BaseQuantEmbeddingSharder,
    EmbeddingComputeKernel,
    KJTList,
    ListOfKJTList,
    OptimType,
)
from recsys_edu.distributed.sharding.row_wise import row_wise_shards
from recsys_edu.distributed.sharding.tiling import parameter_sharding_from
from recsys_edu.distributed.types import (
    Awaitable,
    EmbeddingModuleShardingPlan,
    GetItemLazyAwaitable,
    LazyAwaitable,
    LazyGetItemMixin,
    LazyNoWait,
    ModuleSharder,
    NoOpQuantizedCommCodec,
    NoWait,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardedModule,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
)
from recsys_edu.kernels.spec import OPTIMIZER_KINDS
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class Counting(LazyAwaitable[torch.Tensor]):
    """Says how often its result was computed."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value
        self.waits = 0

    def _wait_impl(self) -> object:
        self.waits += 1
        return self.value


class CountingDict(LazyGetItemMixin, Counting):
    pass


def test_wait_computes_once_and_applies_callbacks_in_order() -> None:
    lazy = Counting(2)
    lazy.callbacks.append(lambda x: x + 1)
    lazy.callbacks.append(lambda x: x * 10)
    assert (lazy.wait(), lazy.wait(), lazy.waits) == (30, 30, 1)
    assert NoWait("there").wait() == "there"


def test_awaitable_is_abstract() -> None:
    with pytest.raises(TypeError, match="_wait_impl"):
        Awaitable()  # type: ignore[abstract]


def test_lazy_result_waits_when_used_and_not_before() -> None:
    lazy = Counting(torch.tensor([1.0, 2.0]))
    assert isinstance(lazy, LazyAwaitable)
    assert lazy.waits == 0
    assert lazy.shape == (2,)
    assert lazy.sum().item() == 3.0
    assert lazy.waits == 1


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda x: x + 1, [3.0, 5.0]),
        (lambda x: 1 + x, [3.0, 5.0]),
        (lambda x: 1 - x, [-1.0, -3.0]),
        (lambda x: x - x, [0.0, 0.0]),
        (lambda x: x * torch.tensor([2.0, 3.0]), [4.0, 12.0]),
        (lambda x: torch.tensor([2.0, 3.0]) * x, [4.0, 12.0]),
        (lambda x: 8 / x, [4.0, 2.0]),
        (lambda x: x**2, [4.0, 16.0]),
        (lambda x: -x, [-2.0, -4.0]),
        (lambda x: x > 3, [False, True]),
        (lambda x: x @ torch.eye(2), [2.0, 4.0]),
        (lambda x: x[1:], [4.0]),
        (lambda x: torch.relu(-x), [0.0, 0.0]),
        (lambda x: torch.cat([x, x]), [2.0, 4.0, 2.0, 4.0]),
        (lambda x: torch.stack([x], dim=0)[0], [2.0, 4.0]),
        (lambda x: torch.stack(list(x)), [2.0, 4.0]),
    ],
)
def test_operators_and_torch_functions_act_on_the_result(use, expected: list) -> None:
    assert use(LazyNoWait(torch.tensor([2.0, 4.0]))).tolist() == expected


def test_lazy_result_has_no_private_attributes_of_the_result_and_survives_pickle() -> None:
    lazy = Counting(torch.tensor([1.0]))
    with pytest.raises(AttributeError, match="Counting"):
        _ = lazy._version
    assert lazy.waits == 0
    assert pickle.loads(pickle.dumps(LazyNoWait([1, 2]))).wait() == [1, 2]
    assert len({LazyNoWait(1): "a", LazyNoWait(1): "b"}) == 2  # equality is identity


def test_subscripting_a_dict_to_come_is_lazy() -> None:
    lazy = CountingDict({"user": torch.ones(2)})
    entry = lazy["user"]
    assert isinstance(entry, GetItemLazyAwaitable)
    assert lazy.waits == 0
    assert entry.sum().item() == 2.0
    assert lazy.waits == 1
    assert isinstance(lazy["user"], torch.Tensor)


def test_lazy_results_stay_one_node_under_fx() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return LazyNoWait(x + 1) * 2

    traced = torch.fx.symbolic_trace(Model())
    assert traced(torch.tensor([1.0])).tolist() == [4.0]
    assert any(node.target is LazyNoWait for node in traced.graph.nodes)


def test_the_default_codec_changes_nothing() -> None:
    codecs = QuantizedCommCodecs()
    tensor = torch.randn(3, 4)
    assert codecs.forward.decode(codecs.forward.encode(tensor)) is tensor
    assert isinstance(codecs.backward, NoOpQuantizedCommCodec)
    assert codecs.forward is not QuantizedCommCodecs().forward
    assert (codecs.forward.quantized_dtype, codecs.forward.calc_quantized_size(7)) == (torch.float32, 7)
    assert codecs.forward.padded_size(tensor, [4, 8], 0, None) == (4, 0)


def example_plan() -> EmbeddingModuleShardingPlan:
    return EmbeddingModuleShardingPlan(
        user=parameter_sharding_from(row_wise_shards("user", 10, 4, [0, 1]), ShardingType.ROW_WISE, "fused"),
        item=ParameterSharding("data_parallel", "dense", ranks=[0, 1]),
    )


def test_a_plan_prints_as_two_tables() -> None:
    assert str(example_plan()) == (
        "param | sharding type | compute kernel | ranks\n"
        "----- | ------------- | -------------- | ------\n"
        "user  | row_wise      | fused          | [0, 1]\n"
        "item  | data_parallel | dense          | [0, 1]\n"
        "\n"
        "param | shard offsets | shard sizes | placement\n"
        "----- | ------------- | ----------- | ----------\n"
        "user  | [0, 0]        | [5, 4]      | rank:0/cpu\n"
        "user  | [5, 0]        | [5, 4]      | rank:1/cpu"
    )


def test_a_plan_shows_every_shard_in_html_and_escapes_names() -> None:
    plan = EmbeddingModuleShardingPlan({"<user>": example_plan()["user"], "item": example_plan()["item"]})
    shown = ShardingPlan({"sparse.ebc": plan})._repr_html_()
    assert shown.count("<tr>") == 4  # the head, two shards of one table, one replicated table
    assert "&lt;user&gt;" in shown and "<user>" not in shown
    assert "a copy on each of ranks [0, 1]" in shown
    assert "sparse.ebc" in shown


def test_a_model_plan_finds_its_modules() -> None:
    plan = ShardingPlan({"sparse.ebc": example_plan()})
    assert plan.get_plan_for_module("sparse.ebc") is plan.plan["sparse.ebc"]
    assert plan.get_plan_for_module("dense") is None
    assert str(plan).startswith("module: sparse.ebc\n\nparam")


def test_environment_without_a_group() -> None:
    env = ShardingEnv.from_local(world_size=4, rank=3)
    assert (env.world_size, env.rank, env.process_group, env.output_dtensor) == (4, 3, None, False)
    with pytest.raises(ValueError, match="rank 4 is not one of the ranks 0 to 3"):
        ShardingEnv.from_local(world_size=4, rank=4)


class Doubling(ShardedModule):
    """Four phases that can be told apart in the result."""

    def create_context(self) -> list[str]:
        return []

    def input_dist(self, ctx: list[str], *input: torch.Tensor, **kwargs: torch.Tensor) -> Awaitable:
        ctx.append("input")
        return NoWait(NoWait(input[0]))

    def compute(self, ctx: list[str], dist_input: torch.Tensor) -> torch.Tensor:
        ctx.append("compute")
        return dist_input * 2

    def output_dist(self, ctx: list[str], output: torch.Tensor) -> LazyAwaitable:
        ctx.append("output")
        return LazyNoWait((ctx, output))


def test_forward_of_a_sharded_module_is_its_phases_in_order() -> None:
    phases, output = Doubling()(torch.ones(2)).wait()
    assert phases == ["input", "compute", "output"]
    assert output.tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match="abstract"):
        ShardedModule()  # type: ignore[abstract]


def test_module_sharder_defaults() -> None:
    class LinearSharder(ModuleSharder[nn.Linear]):
        @property
        def module_type(self) -> type[nn.Linear]:
            return nn.Linear

    sharder = LinearSharder()
    linear = nn.Linear(2, 3)
    assert sharder.shardable_parameters(linear).keys() == {"weight", "bias"}
    assert sharder.sharding_types("cpu") == ["data_parallel"]
    assert sharder.storage_usage(linear.weight, "cpu", "dense") == {"ddr": 24}
    assert sharder.storage_usage(linear.weight, "cuda", "dense") == {"hbm": 24}
    with pytest.raises(NotImplementedError, match="LinearSharder does not say how to shard a Linear"):
        sharder.shard(linear, EmbeddingModuleShardingPlan(), ShardingEnv.from_local(1, 0))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_embedding_sharders_allow_every_type_on_every_device(device_type: str) -> None:
    sharder = BaseEmbeddingSharder(fused_params={"learning_rate": 0.1})
    assert set(sharder.sharding_types(device_type)) == {t.value for t in ShardingType}
    assert sharder.compute_kernels("data_parallel", device_type) == ["dense"]
    on_host = ["fused_uvm", "fused_uvm_caching"] if device_type == "cuda" else []
    assert sharder.compute_kernels("row_wise", device_type) == ["fused", *on_host, "dense"]
    assert sharder.fused_params == {"learning_rate": 0.1}
    assert sharder.storage_usage(torch.empty(3, 4), device_type, "fused_uvm") == {"ddr": 48}
    quant = BaseQuantEmbeddingSharder()
    assert "data_parallel" not in quant.sharding_types(device_type)
    assert quant.compute_kernels("row_wise", device_type) == ["quant"]


def test_quant_sharder_names_tables_that_do_not_exist() -> None:
    module = nn.ModuleDict({"user": nn.Linear(2, 3, bias=False), "item": nn.Linear(2, 3, bias=False)})
    assert BaseQuantEmbeddingSharder(shardable_params=["item"]).shardable_parameters(module).keys() == {"item"}
    assert BaseQuantEmbeddingSharder().shardable_parameters(module).keys() == {"user", "item"}
    with pytest.raises(ValueError, match=r"\['movie'\]: the module's tables are \['item', 'user'\]"):
        BaseQuantEmbeddingSharder(shardable_params=["movie"]).shardable_parameters(module)


def test_kernels_optimizers_are_all_named() -> None:
    assert set(OPTIMIZER_KINDS) <= {t.value for t in OptimType}
    assert EmbeddingComputeKernel("fused") is EmbeddingComputeKernel.FUSED


def test_lists_of_jagged_tensors() -> None:
    kjt = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor([1, 2]), torch.tensor([2, 0]))
    features = KJTList([kjt, kjt])
    assert (len(features), features[1] is kjt, list(features) == [kjt, kjt]) == (2, True, True)
    nested = ListOfKJTList([features])
    assert (len(nested), nested[0] is features, list(nested) == [features]) == (1, True, True)


def test_small_helpers() -> None:
    assert types.rank_device("cpu", 3) == torch.device("cpu")
    assert types.rank_device("cuda", 0) == torch.device("cuda", 0)
    assert types.get_tensor_size_bytes(torch.empty(3, 4, dtype=torch.float16)) == 24


def test_scope_names_a_method_in_the_profile() -> None:
    class Worker:
        @types.scope
        def work(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert Worker().work(torch.ones(1)).item() == 2.0
    assert any(event.key.endswith("Worker.work") for event in profile.key_averages())
