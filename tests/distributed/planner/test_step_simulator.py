"""The step simulator: by hand on small cases, invariants on plans, and the figures made of it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from planner_cases import TRILLION_125, collection, plan_for, random_shapes, repeated

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.calibrate import calibrate
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.kernel_costs import NO_DENSE, DensePart, DenseWork, KernelCosts, dense_work
from recsys_edu.distributed.planner.loads import rank_loads
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.scaling import scaling_curve
from recsys_edu.distributed.planner.step_simulator import simulate_step
from recsys_edu.distributed.planner.types import CustomTopologyData
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import PipelineType
from recsys_edu.models.dlrm import DLRM

# 1 ms per exchange, bandwidths so large that bytes take no time, no fixed costs.
EXCHANGES_ONLY = KernelCosts(1e30, 1e30, op_ms=0.0, engine_ms=0.0, route_bw=1e30, exchange_ms=1.0)
FAST = {"hbm_mem_bw": 1e30, "intra_host_bw": 1e30, "inter_host_bw": 1e30}
SPARSE = PipelineType.TRAIN_SPARSE_DIST


def fast_plan(world: int, local: int, kind: str = "table_wise", tables: int = 4) -> PlannedSharding:
    topology = Topology(world, "cuda", local_world_size=local, **FAST)
    constraints = {f"t{i}": ParameterConstraints(sharding_types=[kind]) for i in range(tables)}
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    return planner.plan(collection([(1000, 64)] * tables), get_default_sharders())


def test_exchanges_add_up_by_hand() -> None:
    """Sizes, ids, embeddings, gradients one after another; the all-reduce follows the gradients on the same link."""
    assert simulate_step(fast_plan(4, 4), kernels=EXCHANGES_ONLY).step_ms == pytest.approx(5)
    assert simulate_step(fast_plan(1, 1), kernels=EXCHANGES_ONLY).step_ms == pytest.approx(0, abs=1e-9)
    # Split over the ranks of one of two hosts: embeddings and gradients go twice, with and without host sums.
    with_hosts = simulate_step(fast_plan(4, 2, "table_row_wise"), kernels=EXCHANGES_ONLY)
    assert with_hosts.step_ms == pytest.approx(2 + 3 + 3 + 1)


def test_the_bottom_hides_embeddings_and_the_pipeline_hides_ids() -> None:
    work = DenseWork(DensePart(flops=1e24), DensePart(flops=1e24), 0, 0, 0)  # 0.512 ms forward, 1.024 ms backward
    plan = fast_plan(4, 4)
    plain = simulate_step(plan, work, 512, EXCHANGES_ONLY)
    # sizes, ids, embeddings (bottom inside), top and its backward, bottom's backward (gradients inside), all-reduce
    assert plain.step_ms == pytest.approx(1 + 1 + 1 + 0.512 + 1.024 + 1.024 + 1)
    piped = simulate_step(plan, work, 512, EXCHANGES_ONLY, SPARSE)
    assert piped.step_ms < plain.step_ms - 0.9


def test_delay_is_latency_and_not_traffic() -> None:
    plan = fast_plan(4, 4)
    slow = dataclasses.replace(EXCHANGES_ONLY, delay_ms=10.0)
    assert simulate_step(plan, kernels=slow).step_ms == pytest.approx(5 + 40 - 1)  # the all-reduce runs meanwhile


def test_loads_agree_with_the_plan() -> None:
    for seed in range(4):
        plan = plan_for(collection(random_shapes(seed, 12)), 8, 4)
        loads = rank_loads(plan)
        assert loads.ids_in_W.sum() == pytest.approx(loads.ids_out_W.sum())
        assert loads.flat_in_W.sum() == pytest.approx(loads.flat_out_W.sum())
        assert loads.between_in_W.sum() == pytest.approx(loads.between_out_W.sum())
        np.testing.assert_allclose(loads.lookup_ms_W, plan.phases_WP[:, 0])


def test_a_table_by_hand() -> None:
    """One table of 128 columns whole on one of 4 ranks: 512 ids of each rank come in, as many rows go out."""
    loads = rank_loads(fast_plan_of_one())
    assert sorted(loads.ids_in_W) == [0, 0, 0, 4 * 512 * 8] and loads.ids_out_W.tolist() == [512 * 8] * 4
    assert sorted(loads.flat_out_W) == [0, 0, 0, 4 * 512 * 128 * 4] and loads.flat_in_W.tolist() == [512 * 512] * 4


def fast_plan_of_one() -> PlannedSharding:
    constraints = {"t0": ParameterConstraints(sharding_types=["table_wise"])}
    return plan_for(collection([(1000, 128)]), 4, 4, constraints=constraints)


def test_dense_work_of_a_dlrm() -> None:
    model = DLRM(collection([(10, 8)] * 3), 13, [16, 8], [5, 1], dense_device=torch.device("meta"))
    work = dense_work(model)
    assert work.before.flops == 2 * (13 * 16 + 16 * 8)
    pairs = 4 * 4 * 8
    assert work.after.flops == 2 * pairs + 2 * ((8 + 6) * 5 + 5 * 1)
    dense = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    assert work.parameter_bytes == 4 * sum(p.numel() for p in dense) and work.num_parameters == len(dense) == 8
    assert work.input_bytes == 4 * 14


def test_timeline_has_no_overlaps_and_no_gaps_without_a_reason() -> None:
    model = DLRM(collection([(1000, 64)] * 6), 13, [64, 64], [64, 1], dense_device=torch.device("meta"))
    plan = plan_for(model, 4, 2)
    for pipeline in (PipelineType.NONE, SPARSE):
        step = simulate_step(plan, dense_work(model), pipeline=pipeline)
        timeline = step.timeline()
        assert timeline.ranks == [0, 1, 2, 3]
        assert timeline.step_ms() == pytest.approx(step.step_ms, rel=0.05)
        for rank in timeline.ranks:
            host = [span for span in timeline.of(rank).spans if span.stream == "host"]
            for one, two in itertools.pairwise(host):
                assert two.start_ms == pytest.approx(one.end_ms, abs=1e-6)  # waits fill what is left
        assert {"lookup", "forward", "backward", "optimizer", "pooled embeddings"} <= {s.name for s in timeline.spans}


def test_slow_ranks_slow_the_step() -> None:
    model = DLRM(collection([(1000, 64)] * 6), 13, [512, 64], [512, 1], dense_device=torch.device("meta"))
    times = []
    for speeds in ([100] * 4, [100, 100, 100, 50]):
        data = CustomTopologyData({"speed": speeds}, 4)
        planner = EmbeddingShardingPlanner(topology=Topology(4, "cuda", custom_topology_data=data))
        plan = planner.plan(model, get_default_sharders())
        times.append(simulate_step(plan, dense_work(model)).step_ms)
    assert times[1] > times[0]


def test_refusals() -> None:
    plan = fast_plan(2, 2)
    with pytest.raises(ValueError, match="batch_size 0"):
        simulate_step(plan, batch_size=0)
    with pytest.raises(ValueError, match="expected NONE or TRAIN_SPARSE_DIST"):
        simulate_step(plan, pipeline=PipelineType.TRAIN_PREFETCH_SPARSE_DIST)


def test_measured_kernels_predict() -> None:
    measured = calibrate(rounds=1)
    kernels = measured.kernels()
    assert kernels.exchange_ms == 0 and kernels.host_link_bw is None  # one process on the CPU
    assert 0 < kernels.op_ms < 10 and 0 < kernels.engine_ms < 1000 and kernels.route_bw > 0
    model = collection([(1000, 64)] * 4)
    plan = EmbeddingShardingPlanner(topology=measured.topology(1)).plan(model, get_default_sharders())
    assert simulate_step(plan, NO_DENSE, 512, kernels).step_ms >= kernels.engine_ms


def test_scaling_curves() -> None:
    model = collection([(10**6, 64)] * 64)
    topology = Topology(8, "cuda", hbm_cap=GIB, ddr_cap=0, local_world_size=8)
    weak = scaling_curve(model, topology, (8, 32, 128), 512)
    assert weak[0].step_ms is None and "need" in weak[0].why_not  # 16 GB of tables and 8 GiB of memory
    assert [point.batch_size for point in weak] == [512] * 3
    assert weak[1].examples_per_s == pytest.approx(512 * 32 / weak[1].step_ms * 1000)
    strong = scaling_curve(model, topology, (32, 128), 512, strong=True)
    assert [point.batch_size for point in strong] == [128, 32] and strong[0].step_ms < weak[1].step_ms
    with pytest.raises(ValueError, match="no multiple"):
        scaling_curve(model, topology, (12,), 512)


def test_a_trillion_parameters_on_4096_ranks() -> None:
    point = scaling_curve(repeated(TRILLION_125), Topology(128, "cuda", 80 * GIB, local_world_size=8), (4096,))[0]
    assert point.step_ms > 0 and point.work_ms <= point.step_ms


def test_figures() -> None:
    pytest.importorskip("plotly")
    from recsys_edu.viz.prediction import errors_figure, scaling_figure, step_figure

    plan = fast_plan(4, 4)
    step = simulate_step(plan)
    figure = step_figure({"plain": step, "sparse": simulate_step(plan, pipeline=SPARSE)})
    assert sum(len(bar.x) for bar in figure.data) >= len(step.timeline([0, 1]).spans)
    model, topology = collection([(1000, 64)] * 8), Topology(8, "cuda")
    curves = [scaling_curve(model, topology, (8, 16), strong=strong) for strong in (False, True)]
    assert list(scaling_figure(*curves).data[0].y) == [point.step_ms for point in curves[0]]
    rows = [{"name": "2 ranks", "measured ms": 100.0, "predicted ms": 90.0}]
    assert "-10%" in errors_figure(rows).layout.title.text
