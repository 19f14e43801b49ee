"""Plans: valid, within memory, deterministic, near the bound; what the user demands; what is refused and how."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from planner_cases import TRILLION_3, TRILLION_125, check, collection, plan_for, random_shapes, repeated

from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.cost import COUNTED
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator
from recsys_edu.distributed.planner.improve import unevenness
from recsys_edu.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner, SortBy
from recsys_edu.distributed.planner.placement import place_all
from recsys_edu.distributed.planner.proposers import DynamicProgrammingProposer, GreedyProposer, UniformProposer
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.types import CustomTopologyData, PlannerError, PlannerErrorType
from recsys_edu.distributed.planner.workload import read_workload
from recsys_edu.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from recsys_edu.distributed.shard import default_plan
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import ShardingEnv, ShardingPlan
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from recsys_edu.types import DataType


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("world", [(1, 1), (2, 2), (4, 2), (8, 4), (16, 8)])
def test_random_models_get_valid_plans(world: tuple[int, int], device: str) -> None:
    for seed in range(4):
        model = collection(random_shapes(seed, 12))
        check(plan_for(model, *world, device=device), model, world[0])


def test_tight_memory() -> None:
    # 16 tables of 0.25 GB and 4 ranks: 1 GB of weights each, and 1.15 usable of 1.35.
    model = collection([(1_000_000, 64)] * 16)
    plan = plan_for(model, 4, 2, gib=1.3)
    check(plan, model, 4)
    assert plan.used_bytes_W2[:, 0].max() <= 1.3 * 0.85 * GIB


def test_small_problems_are_solved_to_the_optimum() -> None:
    """Against every combination of options, each placed by every assignment of its rectangles to ranks."""
    for seed in range(6):
        plan = plan_for(collection(random_shapes(seed + 100, 4)), 2, 2)
        problem = plan.found.placement.problem
        options = [np.flatnonzero(valid).tolist() for valid in problem.valid_UJ]
        best = np.inf
        for columns in itertools.product(*options):
            spread = [
                [(0, 1)] if problem.places_J[j] == 0 else list(itertools.product((0, 1), repeat=problem.count_UJ[u, j]))
                for u, j in enumerate(columns)
            ]
            for ranks in itertools.product(*spread):
                load = [0.0, 0.0]
                for u, j in enumerate(columns):
                    for rank in ranks[u]:
                        load[rank] += problem.ms_UJ[u, j]
                best = min(best, max(load))
        assert plan.lower_bound_ms <= best * (1 + 1e-9)
        assert plan.cost_ms <= best * 1.01


def test_the_same_plan_every_time() -> None:
    shapes = random_shapes(7, 30)
    first, second = (plan_for(collection(shapes), 8, 4) for _ in range(2))
    assert str(first) == str(second)


def test_trillion_parameters() -> None:
    for spec, gib in ((TRILLION_125, 80), (TRILLION_3, 141)):
        model = repeated(spec)
        plan = plan_for(model, 128, 8, gib=gib)
        check(plan, model, 128)
        giant = plan.explain("t0").choices[0]
        assert len(set(giant.ranks)) >= 16  # a terabyte needs many ranks, over several hosts
        reasons = {(a.sharding_type, a.compute_kernel): a.reason for a in giant.alternatives}
        assert "954 GiB" in reasons["table_wise", "fused"]


def test_more_memory_never_costs_more() -> None:
    """On 141 GiB two giant rectangles fit on a rank and leave no room for other work: that must not look cheap."""
    model = repeated(TRILLION_3)
    costs = [plan_for(model, 128, 8, gib=gib).cost_ms for gib in (120, 141, 160)]
    assert costs == sorted(costs, reverse=True)


def test_dozens_of_tables_alike_are_repaired_in_a_few_steps() -> None:
    """The giants leave room for only some of the hundred tables of 12 GiB to lie whole."""
    plan = plan_for(repeated(TRILLION_3), 176, 8, gib=80)
    assert plan.cost_ms < 1.3 * plan.lower_bound_ms


def test_one_rank_has_whole_tables() -> None:
    plan = plan_for(collection([(1000, 32), (50_000, 64), (500, 256)]), 1, 1, device="cpu")
    assert {sharding.sharding_type for sharding in plan.plan[""].values()} == {"table_wise"}
    reasons = {a.sharding_type: a.reason for a in plan.explain("t0").choices[0].alternatives}
    assert reasons["row_wise"] == "the same as table_wise: there is one rank"
    assert plan.summary().startswith("3 tables on 1 rank,")


def test_equally_busy_ranks_are_relieved_one_by_one() -> None:
    """A step that leaves the cost may still help: one busy rank less, though there is more work in all."""
    assert unevenness(np.array([10.0, 6.5, 6.5]), 10.0) < unevenness(np.array([10.0, 10.0, 1.0]), 10.0)


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16])
def test_answers_of_quantised_tables_have_the_size_of_the_outputs_type(output_dtype: torch.dtype) -> None:
    tables = [EmbeddingBagConfig(100, 64, name="t", feature_names=["f"], data_type=DataType.INT8)]
    module = QuantEmbeddingBagCollection(tables, False, torch.device("cpu"), output_dtype)
    topology, sharders = Topology(2, "cpu"), [QuantEmbeddingBagCollectionSharder()]
    use = read_workload(module, sharders, topology, 512, None).lookups
    assert (use.element_bytes[0], use.answer_bytes[0]) == (1, output_dtype.itemsize) == (1, use.output_bytes[0])
    options = EmbeddingEnumerator(topology, 512).enumerate(module, sharders)
    whole = next(option for option in options if option.sharding_type == "table_wise")
    assert whole.shards[0].perf.fwd_comms == pytest.approx(
        2 * 512 * 64 * output_dtype.itemsize / topology.intra_host_bw
    )


def test_what_does_not_fit_says_what_would() -> None:
    model = repeated(TRILLION_3)
    with pytest.raises(PlannerError, match="Any one of these would do") as caught:
        plan_for(model, 128, 8, gib=80)
    assert caught.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    lines = str(caught.value).splitlines()
    assert "  - 168 ranks instead of 128 (21 hosts of 8)" in lines
    assert any("t0" in line and "largest) in float16" in line for line in lines)
    check(plan_for(model, 168, 8, gib=80), model, 168)  # and it is true


def test_a_table_that_fits_nowhere_is_named_with_every_reason() -> None:
    constraints = {"t1": ParameterConstraints(sharding_types=["table_wise", "data_parallel"])}
    with pytest.raises(PlannerError, match=r"t1 \(100,000,000 x 64\)") as caught:
        plan_for(collection([(100, 64), (100_000_000, 64)]), 4, 2, gib=8, constraints=constraints)
    text = str(caught.value)
    assert "table_wise with fused: the whole table on one rank needs 23.8 GiB" in text
    assert text.count("not among the allowed sharding types") == 1  # one line for all that the constraint forbids
    assert "column_wise, row_wise, table_row_wise, table_column_wise, grid_shard: not among" in text
    assert "lifting constraints: t1 sharding_types=['table_wise', 'data_parallel']" in text


def test_together_pinned_and_forbidden() -> None:
    model = collection(random_shapes(3, 10))
    constraints = {
        "t0": ParameterConstraints(ranks=[3]),
        "t1": ParameterConstraints(together="pair"),
        "t2": ParameterConstraints(together="pair"),
        "t3": ParameterConstraints(hosts=[1]),
        "t4": ParameterConstraints(forbidden_ranks=[0, 1, 2]),
        "t5": ParameterConstraints(sharding_types=["row_wise"], ranks=[1, 2]),
        "t6": ParameterConstraints(sharding_types=["row_wise"], forbidden_hosts=[0]),
    }
    plan = plan_for(model, 4, 2, constraints=constraints)
    check(plan, model, 4)
    ranks = {name: set(sharding.ranks) for name, sharding in plan.plan[""].items()}
    assert ranks["t0"] == {3} and ranks["t1"] == ranks["t2"] and len(ranks["t1"]) == 1
    assert ranks["t3"] <= {2, 3} and ranks["t4"] == {3} and ranks["t5"] == {1, 2} and ranks["t6"] == {2, 3}
    assert "constraint allows only ranks 3" in str(plan.explain("t0"))


def test_constraints_on_types_kernels_and_widths() -> None:
    constraints = {
        "t0": ParameterConstraints(sharding_types=["column_wise"], min_partition=32),
        "t1": ParameterConstraints(compute_kernels=["dense"]),
        "t2": ParameterConstraints(compute_kernels=["fused_uvm_caching"], sharding_types=["table_wise"]),
    }
    plan = plan_for(collection([(1000, 128)] * 3), 4, 2, constraints=constraints, host_gib=1)
    assert plan.plan[""]["t0"].sharding_type == "column_wise" and len(plan.plan[""]["t0"].ranks) == 4
    assert plan.plan[""]["t1"].compute_kernel == "dense"
    assert plan.plan[""]["t2"].compute_kernel == "fused_uvm_caching"


@pytest.mark.parametrize(
    "constraint, message",
    [
        ({"t9": ParameterConstraints()}, "unknown tables \\['t9'\\]"),
        ({"t0": ParameterConstraints(sharding_types=["diagonal"])}, "table 't0': sharding type 'diagonal'"),
        ({"t0": ParameterConstraints(compute_kernels=["quant"])}, "table 't0': nothing is left"),
        ({"t0": ParameterConstraints(pooling_factors=[1.0, 2.0])}, "has 2 numbers; the table has 1 feature "),
        ({"t0": ParameterConstraints(pooling_factors=[-1.0])}, "pooling_factors is -1.0"),
        ({"t0": ParameterConstraints(batch_sizes=[-3])}, "batch_sizes is -3"),
        ({"t0": ParameterConstraints(ranks=[7])}, "ranks=\\[7\\], but there are 0 to 3"),
        ({"t0": ParameterConstraints(ranks=[1], forbidden_ranks=[1])}, "leave no rank: ranks=\\[1\\], forbidden_ranks"),
        ({"t0": ParameterConstraints(hosts=[0], ranks=[3])}, "leave no rank"),
        (
            {
                "t0": ParameterConstraints(together="pair", ranks=[0]),
                "t1": ParameterConstraints(together="pair", ranks=[1]),
            },
            "'pair' have no rank in common: .*'t0' only ranks \\[0\\], 't1' only ranks \\[1\\]",
        ),
        (
            {"t0": ParameterConstraints(together="pair"), "t1": ParameterConstraints(together="pair", hosts=[])},
            "'t1': its constraints leave no rank: hosts=\\[\\]",
        ),
        (
            {"t1": ParameterConstraints(together="pair", sharding_types=["row_wise"])},
            "'t1': constraint together='pair' keeps it whole.*sharding_types=\\['row_wise'\\] .* leaves only row_wise",
        ),
        (
            {"t0": ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["fused"])},
            "sharding_types=\\['data_parallel'\\] and compute_kernels=\\['fused'\\]; .* data_parallel with dense",
        ),
        ({"t0": ParameterConstraints(sharding_types="row_wise")}, "sharding_types='row_wise': expected a list"),
        ({"t0": ParameterConstraints(ranks=3)}, "ranks=3: expected a list"),
        ({"t0": ["row_wise"]}, "'t0': expected a ParameterConstraints"),
        ({"t0": ParameterConstraints(sharding_types=["data_parallel"], ranks=[1])}, "a copy on every rank, but the"),
        ({"t0": ParameterConstraints(sharding_types=["table_row_wise"], ranks=[1])}, "needs all 2 ranks of a host"),
        ({"t0": ParameterConstraints(min_partition=0)}, "min_partition 0"),
        ({"t0": ParameterConstraints(pooling_factors=[float("inf")])}, "pooling_factors is inf"),
        ({"t0": ParameterConstraints(pooling_factors=["1"])}, "pooling_factors is '1'"),
        ({"t0": ParameterConstraints(ranks=[True])}, "ranks=\\[True\\], but there are 0 to 3"),
        ({"t0": ParameterConstraints(device_group="tpu")}, "'t0': constraint device_group='tpu': expected one of"),
        ([ParameterConstraints()], "expected a dict from table names"),
    ],
)
def test_bad_constraints(constraint: dict[str, ParameterConstraints], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        plan_for(collection([(100, 64), (50, 32)]), 4, 2, constraints=constraint)


def test_bad_topologies() -> None:
    for arguments, message in (
        ({"world_size": 0}, "world_size is 0"),
        ({"world_size": 2.0}, "world_size is 2.0: expected a whole number"),
        ({"world_size": 2, "local_world_size": 0}, "local_world_size is 0"),
        ({"world_size": 2, "bwd_compute_multiplier": -1.0}, "bwd_compute_multiplier is -1.0"),
        ({"world_size": 6, "local_world_size": 4}, "6 is no multiple of local_world_size 4"),
        ({"world_size": 2, "hbm_cap": -1}, "hbm_cap is -1"),
        ({"world_size": 2, "inter_host_bw": 0.0}, "inter_host_bw is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Topology(compute_device="cuda", **arguments)
    with pytest.raises(ValueError, match=r"expected one of \['cpu', 'cuda', 'mtia'\]"):
        Topology(2, "abacus")
    with pytest.raises(ValueError, match="has 1 values for 2 ranks"):
        CustomTopologyData({"hbm_cap": [1]}, 2)
    with pytest.raises(PlannerError, match="batch_size 0"):
        EmbeddingShardingPlanner(topology=Topology(2, "cuda"), batch_size=0).plan(
            collection([(4, 4)]), get_default_sharders()
        )


def test_ranks_that_differ() -> None:
    data = CustomTopologyData({"hbm_cap": [GIB * 4, GIB, GIB, GIB], "speed": [100, 100, 100, 50]}, 4)
    topology = Topology(4, "cuda", local_world_size=2, custom_topology_data=data)
    model = collection([(10_000_000, 64)] + [(100_000, 64)] * 20)  # the first needs 2.4 GiB
    constraints = {"t0": ParameterConstraints(sharding_types=["table_wise"])}
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, get_default_sharders())
    check(plan, model, 4)
    assert plan.plan[""]["t0"].ranks == [0]
    work_W = plan.found.placement.load_W / plan.found.placement.problem.slowness_W
    assert work_W[3] < 0.75 * work_W[1]  # half as fast: gets less to do


def test_explanations_frame_and_html() -> None:
    plan = plan_for(collection(random_shapes(1, 6)), 4, 2)
    explanation = plan.explain()
    assert len(explanation.choices) == 6
    for choice in explanation:
        assert len(choice.alternatives) == len(plan.found.placement.problem.grid.pairs) - 1
        assert all(alternative.reason for alternative in choice.alternatives)
        assert choice.runner_up is None or choice.runner_up.cost_ms >= plan.cost_ms * (1 - 1e-6)
    with pytest.raises(KeyError, match="no table 'absent'"):
        plan.explain("absent")
    frame = plan.to_frame()
    assert frame["table"].to_list() == [f"t{i}" for i in range(6)]
    assert plan.phases_WP[:, COUNTED].sum(axis=1).max() == pytest.approx(plan.cost_ms)
    assert "<table>" in plan._repr_html_() and "busiest rank" in plan._repr_html_()


def test_a_runner_up_costs_what_it_says() -> None:
    plan = plan_for(collection(random_shapes(5, 8)), 4, 2)
    problem, placement = plan.found.placement.problem, plan.found.placement
    for unit, choice in enumerate(plan.explain()):
        runner_up = choice.runner_up
        trial = placement.copy()
        trial.remove(unit)
        column = problem.grid.pairs.index((runner_up.sharding_type, runner_up.compute_kernel))
        trial.put(unit, column, trial.find(unit, column))
        assert trial.cost_ms == pytest.approx(runner_up.cost_ms)


def test_removing_and_putting_back_changes_nothing() -> None:
    plan = plan_for(collection(random_shapes(2, 9)), 8, 4)
    state = plan.found.placement.copy()
    for unit in range(9):
        column, ranks = int(state.choice_U[unit]), state.ranks_U[unit]
        state.remove(unit)
        state.put(unit, column, ranks)
    np.testing.assert_allclose(state.load_W, plan.found.placement.load_W)
    np.testing.assert_allclose(state.free_W2, plan.found.placement.free_W2)
    anew = place_all(state.problem, state.choice_U)
    assert not isinstance(anew, int)


def test_a_plan_travels_without_the_search() -> None:
    plan = plan_for(collection(random_shapes(2, 3)), 4, 2)
    received = pickle.loads(pickle.dumps(plan))
    assert type(received) is ShardingPlan and str(received) == str(plan)


def test_a_plan_for_other_machines_is_refused() -> None:
    plan = plan_for(collection([(10, 4)]), 4, 2)
    plan.check_world(4, 2, "cuda")
    with pytest.raises(PlannerError, match="world size 4, here 2; device cuda, here cpu"):
        plan.check_world(2, 2, "cpu")
    with pytest.raises(PlannerError, match="world size 4, here 1; ranks per host 2, here 1; device cuda, here cpu"):
        DistributedModelParallel(torch.nn.Sequential(collection([(10, 4)])), plan=moved_to(plan, "0"))


def moved_to(plan: PlannedSharding, path: str) -> PlannedSharding:
    """The plan of a collection, for a model that has it at `path`."""
    return dataclasses.replace(plan, plan={path: plan.plan[""]})


def test_a_model_without_a_plan_gets_the_planners() -> None:
    model = torch.nn.Sequential(collection([(10, 4), (2000, 8)]), torch.nn.Linear(12, 1))
    plan = default_plan(model, ShardingEnv.from_local(4, 0), torch.device("cpu"), get_default_sharders())
    assert isinstance(plan, PlannedSharding) and sorted(plan.plan["0"]) == ["t0", "t1"]
    kernels = {sharding.compute_kernel for sharding in plan.plan["0"].values()}
    assert kernels == {"dense"}  # no optimizer is attached, so gradients are wanted
    assert default_plan(torch.nn.Linear(1, 1), ShardingEnv.from_local(4, 0), torch.device("cpu"), []).plan == {}
    empty = EmbeddingShardingPlanner(topology=Topology(2, "cpu")).plan(collection([]), get_default_sharders())
    assert empty.plan == {"": {}}


@pytest.mark.parametrize(
    "parts",
    [
        {"proposer": GreedyProposer()},
        {"proposer": [GreedyProposer(use_depth=False), UniformProposer()]},
        {"proposer": DynamicProgrammingProposer(), "partitioner": MemoryBalancedPartitioner()},
        {"partitioner": GreedyPerfPartitioner(SortBy.PERF, balance_modules=True)},
    ],
    ids=["greedy", "greedy and uniform", "dynamic programming, memory balanced", "default proposers"],
)
def test_the_loop_of_proposals_is_no_better_than_the_search(parts: dict) -> None:
    model = collection(random_shapes(11, 6))
    topology = Topology(4, "cuda", local_world_size=2)
    loop = EmbeddingShardingPlanner(topology=topology, **parts).plan(model, get_default_sharders())
    assert sorted(loop.plan[""]) == [f"t{i}" for i in range(6)]
    for name, sharding in loop.plan[""].items():
        if sharding.sharding_type != "data_parallel":
            rows, columns = model.embedding_bags[name].weight.shape
            from recsys_edu.distributed.sharding.tiling import shards_from, validate

            validate(shards_from(name, sharding, rows, columns), rows, columns, 4, name)


def test_what_if() -> None:
    plan = plan_for(collection([(10**6, 64)] * 4), 2, 2, gib=1.4)  # 1.2 GiB for tables, each 0.24 GiB
    assert plan.what_if({}) == plan.cost_ms
    same = {c.table: (c.sharding_type, c.ranks) for c in plan.explain()}
    assert plan.what_if(same) == pytest.approx(plan.cost_ms)
    alternatives = {f"t{i}": ("table_wise", [0]) for i in range(4)}
    problem = plan.found.placement.problem
    each_ms = problem.ms_UJ[0, [kind for kind, _ in problem.grid.pairs].index("table_wise")]
    assert plan.what_if(alternatives) == pytest.approx(4 * each_ms)
    assert plan.what_if(alternatives) > plan.cost_ms
    with pytest.raises(KeyError, match="no table 'absent'"):
        plan.what_if({"absent": ("row_wise", [0, 1])})
    for malformed in ("table_wise", ("table_wise", 0), ("table_wise",)):
        with pytest.raises(ValueError, match="table 't0': expected \\(sharding type, list of ranks\\), got"):
            plan.what_if({"t0": malformed})
    with pytest.raises(PlannerError, match="expected 2 of the ranks 0 to 1, got \\[0\\]"):
        plan.what_if({"t0": ("row_wise", [0])})
    with pytest.raises(PlannerError, match="cannot be column_wise: the same as table_wise"):
        plan.what_if({"t0": ("column_wise", [0])})
    tight = plan_for(collection([(10**6, 64)] * 4), 2, 2, gib=0.8)
    with pytest.raises(PlannerError, match="rank 0 would lack"):
        tight.what_if(alternatives)
