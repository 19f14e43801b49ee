"""Calibration: plausible numbers, a topology made of them, the same on all ranks."""

from __future__ import annotations

import pytest
from planner_cases import check, collection, random_shapes

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, Topology
from recsys_edu.distributed.planner.calibrate import calibrate
from recsys_edu.distributed.planner.constants import INTRA_NODE_BANDWIDTH
from recsys_edu.distributed.planner.types import PlannerError
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.testing import RankPool


def test_one_process() -> None:
    measured = calibrate(rounds=1)
    # Between what a 1990s computer and the fastest of today could do, in bytes per millisecond.
    assert 1e4 < measured.lookup_bw < 1e10 and 1e4 < measured.copy_bw < 1e10
    assert 1e7 < measured.matmul_flops < 1e15 and measured.backward > 0 and measured.link_bw is None
    assert "GFLOP/s" in str(measured)
    topology = measured.topology(4, local_world_size=2)
    assert topology.ddr_mem_bw == measured.lookup_bw and topology.bwd_compute_multiplier == measured.backward
    assert topology.intra_host_bw == INTRA_NODE_BANDWIDTH
    model = collection(random_shapes(0, 6))
    check(EmbeddingShardingPlanner(topology=topology).plan(model, get_default_sharders()), model, 4)


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds 0"):
        calibrate(rounds=0)


def _plan(rank: int, world_size: int, group) -> tuple[str, str]:
    planner = EmbeddingShardingPlanner(topology=Topology(world_size, "cpu"))
    plan = planner.collective_plan(collection(random_shapes(0, 5)), pg=group)
    broken = EmbeddingShardingPlanner(topology=Topology(world_size, "cpu", ddr_cap=10**6))
    try:
        broken.collective_plan(collection(random_shapes(0, 5)), pg=group)
    except PlannerError as error:
        return str(plan), str(error)
    return str(plan), "no error"


@pytest.mark.ranks
def test_collective_plan(ranks: RankPool) -> None:
    first, second = ranks.run(_plan, 2)
    assert first == second and "no plan fits" in first[1]


def _measure(rank: int, world_size: int, group) -> tuple:
    measured = calibrate(rounds=1, pg=group)
    return measured.lookup_bw, measured.backward, measured.link_bw


@pytest.mark.ranks
def test_ranks_agree(ranks: RankPool) -> None:
    first, second = ranks.run(_measure, 2)
    assert first == second and 1e3 < first[2] < 1e10
