"""Caches grow into the memory that is left, by hand and through the planner's loop."""

from __future__ import annotations

import pytest
import torch
from planner_cases import collection

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator
from recsys_edu.distributed.planner.proposers import EmbeddingOffloadScaleupProposer as Proposer
from recsys_edu.distributed.planner.shard_estimators import EmbeddingOffloadStats
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import CacheParams

MODEL = torch.tensor([[100.0, 10.0], [1000.0, 20.0], [500.0, 30.0]], dtype=torch.float64)
FACTORS = torch.full((3,), 0.1, dtype=torch.float64)
PRIORITY = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "budget, wanted",
    [
        (0, [0.1, 0.1, 0.1]),
        (100, [0.35, 0.15, 0.15]),  # 25, 50 and 25 bytes
        (500, [1.0, 0.1 + 0.41 * 2 / 3, 0.1 + 0.82 / 3]),  # the first is full after 90 bytes; 410 for the others
        (3000, [1.0, 1.0, 1.0]),
    ],
)
def test_a_budget_is_shared_by_priority(budget: int, wanted: list[float]) -> None:
    ceiling = torch.tensor([110.0, 1020.0, 530.0], dtype=torch.float64)
    assert Proposer.allocate_budget(MODEL, ceiling, FACTORS, budget, PRIORITY).tolist() == pytest.approx(wanted)


def test_tables_without_priority_get_nothing() -> None:
    ceiling = torch.tensor([110.0, 1020.0, 530.0], dtype=torch.float64)
    only_first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert Proposer.allocate_budget(MODEL, ceiling, FACTORS, 500, only_first).tolist() == pytest.approx([1.0, 0.1, 0.1])


def constraints(factor: float) -> dict[str, ParameterConstraints]:
    hist = torch.tensor([50.0, 30.0, 10.0, 5.0])
    return {
        f"t{i}": ParameterConstraints(
            sharding_types=["table_wise"],
            compute_kernels=["fused_uvm_caching"],
            cache_params=CacheParams(load_factor=factor, stats=EmbeddingOffloadStats(0.3, 400 * (i + 1), hist, 10**6)),
        )
        for i in range(2)
    }


def test_the_storage_model_is_what_the_estimator_says() -> None:
    enumerator = EmbeddingEnumerator(Topology(2, "cuda"), 512, constraints(0.1))
    options = enumerator.enumerate(collection([(10**6, 64)] * 2), get_default_sharders())
    assert Proposer.get_scalable_sharding_options(options) == options
    model, ceiling = Proposer.build_affine_storage_model(options, enumerator)
    for factor in (0.1, 0.4):
        found = Proposer.next_plan(options, 0, enumerator)
        for option in found:
            option.cache_params = CacheParams(load_factor=factor)
        enumerator.populate_estimates(found)
        hbm = [option.total_storage.hbm for option in found]
        assert Proposer.clf_to_bytes(model, factor).tolist() == pytest.approx(hbm, abs=4)
    assert ceiling.min() > 10**6 * 64 * 4
    assert Proposer.get_cacheability(options[1]) == 0.3 and Proposer.get_expected_lookups(options[1]) == 800


@pytest.mark.parametrize("gib, on_host", [(0.2, 2), (4, 0)])
def test_in_the_loop_of_proposals(gib: float, on_host: int) -> None:
    topology = Topology(1, "cuda", hbm_cap=int(gib * GIB))
    planner = EmbeddingShardingPlanner(
        topology=topology, proposer=Proposer(), constraints=constraints(0.05), enumerator=None
    )
    plan = planner.plan(collection([(10**6, 64)] * 2), get_default_sharders()).plan[""]
    assert sum(sharding.compute_kernel == "fused_uvm_caching" for sharding in plan.values()) == on_host
    if on_host:
        factors = [sharding.cache_params.load_factor for sharding in plan.values()]
        assert 0.05 < factors[0] < factors[1] < 1  # twice the lookups: the cache of t1 grows twice as much
        assert factors[1] - 0.05 == pytest.approx(2 * (factors[0] - 0.05), rel=1e-6)
