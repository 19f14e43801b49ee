"""Tables that stay in host memory: offered on GPUs, counted in both memories, refused where no GPU can read them."""

from __future__ import annotations

import pytest
import torch
from planner_cases import check, collection, plan_for

from recsys_edu.distributed.layout import Layout
from recsys_edu.distributed.planner import ParameterConstraints, Topology
from recsys_edu.distributed.planner.constants import GIB, HBM_MEM_BW, HBM_TO_DDR_MEM_BW, kernel_bw_lookup
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator
from recsys_edu.distributed.planner.one_rank import hold_rank
from recsys_edu.distributed.shard import _kernels_here, shard
from recsys_edu.distributed.sharding_plan import get_default_sharders, table_wise
from recsys_edu.distributed.tables import plan_tables, table_source
from recsys_edu.distributed.types import CacheParams, ShardingEnv
from recsys_edu.kernels import KernelSpec, OptimizerSpec, TableSpec, make_kernel
from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.fbgemm import table_location, why_not_host_memory
from recsys_edu.kernels.spec import TableMemory
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

ON_HOST = {"fused_uvm", "fused_uvm_caching"}


def test_gpus_are_offered_host_memory_and_cpus_are_not() -> None:
    for device, wanted in (("cuda", {"fused", *ON_HOST}), ("cpu", {"fused"})):
        options = EmbeddingEnumerator(Topology(4, device, local_world_size=2), 512).enumerate(
            collection([(1000, 256)]), get_default_sharders()
        )
        kernels: dict[str, set[str]] = {}
        for option in options:
            kernels.setdefault(option.sharding_type, set()).add(option.compute_kernel)
        assert kernels.pop("data_parallel") == {"dense"}
        assert len(kernels) == 6 and all(found == wanted for found in kernels.values())


def test_a_table_larger_than_device_memory_goes_to_the_host() -> None:
    model = collection([(10**8, 64), (1000, 64)])  # 24 GiB
    plan = plan_for(model, 2, 2, gib=8, host_gib=64)
    check(plan, model, 2)
    kernels = {name: sharding.compute_kernel for name, sharding in plan.plan[""].items()}
    assert kernels["t0"] == "fused_uvm_caching" and kernels["t1"] not in ON_HOST
    hbm, ddr = plan.used_bytes_W2.sum(axis=0)
    weights = 10**8 * 64 * 4
    assert weights <= ddr <= 1.001 * weights
    assert 0.2 * weights < hbm < 0.3 * weights  # the cached share, and bookkeeping for every row
    reasons = {(a.sharding_type, a.compute_kernel): a.reason for a in plan.explain("t0").choices[0].alternatives}
    assert "its rows over all ranks need 11.9 GiB of HBM per rank; 6.8 GiB there" in reasons["row_wise", "fused"]


def test_many_tables_that_do_not_all_fit_are_split_between_the_memories() -> None:
    model = collection([(10**7, 64)] * 8)  # 2.4 GiB each: five on the device, or three with their caches
    plan = plan_for(model, 1, 1, gib=16, host_gib=12)
    check(plan, model, 1)
    kernels = [sharding.compute_kernel for sharding in plan.plan[""].values()]
    assert 3 <= sum(kernel in ON_HOST for kernel in kernels) <= 5


def test_the_share_that_is_cached_counts() -> None:
    found = {}
    for share in (0.1, 0.5):
        constraints = {
            "t0": ParameterConstraints(
                sharding_types=["table_wise"],
                compute_kernels=["fused_uvm_caching"],
                cache_params=CacheParams(load_factor=share),
            )
        }
        plan = plan_for(collection([(10**6, 64)]), 2, 2, constraints=constraints, host_gib=1)
        found[share] = plan.used_bytes_W2[:, 0].max(), plan.cost_ms
        assert plan.plan[""]["t0"].cache_params == CacheParams(load_factor=share)
    assert found[0.5][0] - found[0.1][0] == pytest.approx(0.4 * 10**6 * (64 * 4 + 16), rel=1e-3)
    assert found[0.5][1] < found[0.1][1]
    mixed = (0.5 * HBM_MEM_BW + 0.5 * HBM_TO_DDR_MEM_BW) * 0.1
    bandwidth = kernel_bw_lookup("cuda", "fused_uvm_caching", HBM_MEM_BW, 1.0, HBM_TO_DDR_MEM_BW, caching_ratio=0.5)
    assert bandwidth == pytest.approx(mixed)


@pytest.mark.parametrize("kernel", sorted(ON_HOST))
def test_sharding_on_a_cpu_refuses_host_memory_kernels(kernel: str) -> None:
    tables = [EmbeddingBagConfig(name="user", num_embeddings=10, embedding_dim=4, feature_names=["f"])]
    model = EmbeddingBagCollection(tables=tables)
    env = ShardingEnv.from_local(1, 0)
    with pytest.raises(ValueError, match=rf"table 'user': the plan's kernel '{kernel}' .* this device is cpu.*'fused'"):
        shard(model, {"user": table_wise(0, compute_kernel=kernel)}, env, torch.device("cpu"))


def test_one_rank_of_a_plan_with_host_memory_is_held_in_one_memory() -> None:
    model = collection([(10**6, 64), (1000, 64)])
    plan = plan_for(model, 2, 2, gib=0.1, host_gib=2)
    assert plan.plan[""]["t0"].compute_kernel in ON_HOST
    held = sum(hold_rank(model, plan, rank).check().held_bytes for rank in range(2))
    assert held >= 10**6 * 64 * 4


def test_kernels_by_where_their_weights_lie() -> None:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=10, embedding_dim=4, feature_names=[f"f_{name}"])
        for name in ("a", "b", "c")
    ]
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    kernels = dict(zip("abc", ("fused", "fused_uvm", "fused_uvm_caching")))
    plan = {}
    for name, kernel in kernels.items():
        weight = model.embedding_bags[name].weight
        plan[name] = table_wise(0, compute_kernel=kernel)(weight, 1, 1, "cuda", None)
    plan["c"].cache_params = CacheParams(load_factor=0.3)
    sources = {name: table_source(model.embedding_bags[name].weight, None, name) for name in "abc"}
    layout: Layout = plan_tables(tables, sources, plan, 1, 1).layout
    specs = {ranked.spec.tables[0].name: ranked.spec for ranked in layout.kernels_of_rank(0)}
    assert {name: spec.memory for name, spec in specs.items()} == {
        "a": TableMemory.DEVICE,
        "b": TableMemory.HOST,
        "c": TableMemory.HOST_CACHED,
    }
    assert specs["c"].cache_share == 0.3


def test_what_a_kernel_in_host_memory_needs() -> None:
    table, cuda = TableSpec("user", 10, 4), torch.device("cuda")
    spec = KernelSpec((table,), (0,), pooled=True, optimizer=OptimizerSpec("SGD"), memory=TableMemory.HOST)
    with pytest.raises(ValueError, match=r"tables user cannot stay in host memory: .*device is cpu"):
        make_kernel(spec, "cpu")
    dense = KernelSpec((table,), (0,), pooled=True, memory=TableMemory.HOST)
    assert "dense kernel" in why_not_host_memory(dense, cuda)
    odd = KernelSpec((TableSpec("user", 10, 3),), (0,), pooled=True, optimizer=OptimizerSpec("SGD"))
    reason = why_not_host_memory(odd, cuda)
    assert "multiples of 4" in reason if fbgemm_status().available else reason == fbgemm_status().reason
    with pytest.raises(ValueError, match="cache_share 0"):
        KernelSpec((table,), (0,), pooled=True, cache_share=0.0)


@pytest.mark.skipif(not fbgemm_status().available, reason=f"no FBGEMM: {fbgemm_status().reason}")
def test_fbgemms_names_of_the_memories() -> None:
    table = TableSpec("user", 10, 4)
    names = {}
    for memory in TableMemory:
        spec = KernelSpec((table,), (0,), pooled=True, optimizer=OptimizerSpec("SGD"), memory=memory)
        names[memory] = table_location(spec, torch.device("cuda")).name
        assert table_location(spec, torch.device("cpu")).name == "HOST"
    assert names == {
        TableMemory.DEVICE: "DEVICE",
        TableMemory.HOST: "MANAGED",
        TableMemory.HOST_CACHED: "MANAGED_CACHING",
    }


def test_the_default_plan_offers_host_memory_only_where_it_can_be_read() -> None:
    assert _kernels_here("fused", torch.device("cpu")) == ["fused", "dense"]
    assert _kernels_here("dense", torch.device("cuda")) == ["dense"]
    on_gpu = set(_kernels_here("fused", torch.device("cuda")))
    assert on_gpu == {"fused", "dense", *(ON_HOST if fbgemm_status().available else ())}


def test_device_memory_is_what_it_was_for_models_that_fit() -> None:
    plan = plan_for(collection([(1000, 64)] * 4), 2, 2, gib=1, host_gib=100)
    assert not {sharding.compute_kernel for sharding in plan.plan[""].values()} & ON_HOST
    assert plan.used_bytes_W2[:, 1].max() == 0 and plan.usable.devices[0].storage.ddr == 100 * GIB
