"""Where TorchRec is installed: estimators give the same numbers, and by its own our plans are as good as its plans."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

pytest.importorskip("torchrec")

import torchrec.distributed.planner.types as their_types
from torchrec import EmbeddingBagCollection as TheirCollection
from torchrec import EmbeddingBagConfig as TheirConfig
from torchrec import EmbeddingCollection as TheirSequenceCollection
from torchrec import EmbeddingConfig as TheirSequenceConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder as TheirSequenceSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TheirSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner as TheirPlanner
from torchrec.distributed.planner import constants as their_constants
from torchrec.distributed.planner import shard_estimators as their_estimators
from torchrec.distributed.planner import storage_reservations as their_reservations
from torchrec.distributed.planner import utils as their_utils
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator as TheirEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel as TheirPerfModel
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer as TheirScaleup
from torchrec.distributed.types import PipelineType as TheirPipelineType
from torchrec.types import DataType as TheirDataType

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, constants, shard_estimators, utils
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator
from recsys_edu.distributed.planner.proposers import EmbeddingOffloadScaleupProposer as OurScaleup
from recsys_edu.distributed.planner.storage_reservations import (
    FixedAbsoluteStorageReservation,
    FixedPercentageStorageReservation,
    HeuristicalStorageReservation,
    InferenceStorageReservation,
)
from recsys_edu.distributed.planner.types import ParameterConstraints, Perf, Topology
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import PipelineType
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.types import DataType

ROUNDING = 1e-3  # TorchRec rounds numbers of ids and bytes up
META = torch.device("meta")
TYPES = [
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
SEQUENCE_TYPES = ["data_parallel", "table_wise", "column_wise", "row_wise"]
PHASES = ["fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "input_dist_comms", "prefetch_compute"]


def both_models(shapes: list[tuple[int, int, int]], pooled: bool, weighted: bool, data_type: str) -> tuple[Any, Any]:
    """(rows, columns, features) per table."""
    models = []
    for config, collection, types in (
        (EmbeddingBagConfig if pooled else EmbeddingConfig, EmbeddingBagCollection, DataType),
        (TheirConfig if pooled else TheirSequenceConfig, TheirCollection, TheirDataType),
    ):
        tables = [
            config(
                name=f"t{i}",
                num_embeddings=rows,
                embedding_dim=columns,
                feature_names=[f"f{i}_{k}" for k in range(features)],
                data_type=types[data_type],
            )
            for i, (rows, columns, features) in enumerate(shapes)
        ]
        if pooled:
            models.append(collection(tables=tables, device=META, is_weighted=weighted))
        else:
            sequence = EmbeddingCollection if collection is EmbeddingBagCollection else TheirSequenceCollection
            models.append(sequence(tables=tables, device=META))
    return models[0], models[1]


def facts(options: list[Any]) -> dict[tuple[str, str, str], list[Any]]:
    return {(o.name, o.sharding_type, o.compute_kernel): o.shards for o in options}


@pytest.mark.parametrize("world", [(1, 1), (2, 2), (4, 2), (4, 1), (8, 4), (24, 8), (6, 3)])
@pytest.mark.parametrize(
    "pooled, weighted, data_type",
    [(True, False, "FP32"), (True, True, "FP32"), (True, False, "FP16"), (False, False, "FP32")],
)
def test_estimates(world: tuple[int, int], pooled: bool, weighted: bool, data_type: str) -> None:
    rng = random.Random(repr((world, pooled, weighted, data_type)))
    width = rng.choice([64, 256]) if not pooled else None
    shapes = [
        (rng.randint(10, 5000), width or 4 * rng.choice([1, 4, 9, 16, 20, 32, 64, 96]), rng.randint(1, 3))
        for _ in range(5)
    ]
    ours, theirs = both_models(shapes, pooled, weighted, data_type)
    knobs = {"bwd_compute_multiplier": 3.0, "weighted_feature_bwd_compute_multiplier": 1.5}
    our_options, their_options = [], []
    for model, types, kinds, enumerator, sharders, out in (
        (ours, ParameterConstraints, Topology, EmbeddingEnumerator, get_default_sharders(), our_options),
        (
            theirs,
            their_types.ParameterConstraints,
            their_types.Topology,
            TheirEnumerator,
            [TheirSharder(), TheirSequenceSharder()],
            their_options,
        ),
    ):
        # Type by type, for types that come to the same thing are listed once by us and twice by them.
        for sharding_type in TYPES if pooled else SEQUENCE_TYPES:
            dice = random.Random(1)
            kernel = ["dense"] if sharding_type == "data_parallel" else ["fused", "fused_uvm", "fused_uvm_caching"]
            constraints = {
                f"t{i}": types(
                    sharding_types=[sharding_type],
                    compute_kernels=kernel,
                    pooling_factors=[dice.uniform(0.5, 20) for _ in range(features)],
                    num_poolings=[dice.choice([1.0, 2.0]) for _ in range(features)],
                    batch_sizes=[dice.randint(100, 600) for _ in range(features)],
                    min_partition=dice.choice([None, 32]),
                )
                for i, (_, _, features) in enumerate(shapes)
            }
            topology = kinds(world_size=world[0], local_world_size=world[1], compute_device="cuda", **knobs)
            listing = enumerator(topology=topology, batch_size=512, constraints=constraints)
            out += listing.enumerate(torch.nn.ModuleDict({"m": model}), sharders)
    mine, wanted = facts(our_options), facts(their_options)
    assert set(mine) == set(wanted)
    for key, shards in wanted.items():
        assert [s.size for s in mine[key]] == [s.size for s in shards], key
        assert [s.offset for s in mine[key]] == [s.offset for s in shards], key
        for own, their in zip(mine[key], shards):
            for phase in PHASES:
                assert getattr(own.perf, phase) == pytest.approx(getattr(their.perf, phase), rel=ROUNDING), (key, phase)
            for kind in ("hbm", "ddr"):
                assert getattr(own.storage, kind) == pytest.approx(getattr(their.storage, kind), rel=ROUNDING), (
                    key,
                    kind,
                )


def test_estimates_on_the_cpu() -> None:
    shapes = [(1000, 64, 1), (2000, 256, 1)]
    ours, theirs = both_models(shapes, True, False, "FP32")
    mine = facts(EmbeddingEnumerator(Topology(4, "cpu"), 512).enumerate(ours, get_default_sharders()))
    wanted = facts(TheirEnumerator(their_types.Topology(4, "cpu"), 512).enumerate(theirs, [TheirSharder()]))
    common = set(mine) & set(wanted)
    assert {key[1] for key in common} == {"data_parallel", "table_wise", "column_wise"}
    for key in common:
        for own, their in zip(mine[key], wanted[key]):
            assert own.perf.total == pytest.approx(their.perf.total)
            assert (own.storage.hbm, own.storage.ddr) == (their.storage.hbm, their.storage.ddr)


def test_constants_and_bandwidths() -> None:
    for name in vars(constants):
        if name.isupper() and hasattr(their_constants, name):
            assert getattr(constants, name) == pytest.approx(getattr(their_constants, name)), name
    kernels = [
        "dense",
        "fused",
        "fused_uvm",
        "fused_uvm_caching",
        "quant",
        "quant_uvm",
        "quant_uvm_caching",
        "key_value",
    ]
    for device, kernel, ratio, prefetch in itertools.product(["cuda", "cpu"], kernels, [None, 0.4], [False, True]):
        arguments = (device, kernel, 900.0, 50.0, 30.0, ratio, prefetch)
        assert constants.kernel_bw_lookup(*arguments) == pytest.approx(their_constants.kernel_bw_lookup(*arguments))


def test_reservations() -> None:
    ours, theirs = both_models([(1000, 64, 1), (10, 32, 1)], True, False, "FP32")
    ours, theirs = (
        torch.nn.ModuleDict({"sparse": model, "dense": torch.nn.Linear(10, 10)}) for model in (ours, theirs)
    )
    for mine, their, device in (
        (FixedPercentageStorageReservation(0.3), their_reservations.FixedPercentageStorageReservation(0.3), "cuda"),
        (HeuristicalStorageReservation(0.15), their_reservations.HeuristicalStorageReservation(0.15), "cuda"),
        (HeuristicalStorageReservation(0.15), their_reservations.HeuristicalStorageReservation(0.15), "cpu"),
        (FixedAbsoluteStorageReservation(2**30), their_reservations.FixedAbsoluteStorageReservation(2**30), "cuda"),
        (FixedAbsoluteStorageReservation(2**30), their_reservations.FixedAbsoluteStorageReservation(2**30), "cpu"),
        (InferenceStorageReservation(0.2), their_reservations.InferenceStorageReservation(0.2), "cuda"),
    ):
        left = mine.reserve(Topology(2, device), 512, ours, get_default_sharders()).devices[0].storage
        wanted = their.reserve(their_types.Topology(2, device), 512, theirs, [TheirSharder()]).devices[0].storage
        assert (left.hbm, left.ddr) == (wanted.hbm, wanted.ddr)


def test_pipeline_buffers() -> None:
    for name, ephemeral, passes in itertools.product([t.name for t in PipelineType], [False, True], [None, 4]):
        sizes = (1000, 300, 128)
        mine = shard_estimators.calculate_pipeline_io_cost(*sizes, PipelineType[name], passes, ephemeral)
        assert mine == their_estimators.calculate_pipeline_io_cost(*sizes, TheirPipelineType[name], passes, ephemeral)


def test_miss_rates() -> None:
    hist = torch.tensor([50.0, 30.0, 10.0, 5.0])
    mine = shard_estimators.EmbeddingOffloadStats(0.3, 400, hist, 1000)
    their = their_estimators.EmbeddingOffloadStats(0.3, 400, hist, 1000)
    for share in (0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0):
        assert mine.expected_miss_rate(share) == pytest.approx(their.expected_miss_rate(share), abs=1e-6)


def test_totals() -> None:
    assert Perf(1, 2, 3, 4, 5, 6).total == their_types.Perf(1, 2, 3, 4, 5, 6).total


def test_searches_driven_from_outside() -> None:
    for limit in (0, 3, 40, 99, 100):
        answers = []
        for search in (utils.BinarySearchPredicate(0, 100, 0), their_utils.BinarySearchPredicate(0, 100, 0)):
            probe, held = search.next(True), -1
            while probe is not None:
                held = max(held, probe) if probe <= limit else held
                probe = search.next(probe <= limit)
            answers.append(held)
        assert answers[0] == answers[1] == limit


def as_their_options(plan: Any, model: Any, topology: Any, batch_size: int) -> list[Any]:
    """A plan of ours in TorchRec's form, its shards estimated by TorchRec."""
    options = []
    for name, sharding in plan.plan[""].items():
        weight = model.embedding_bags[name].weight
        spec = sharding.sharding_spec
        shards = [
            their_types.Shard(size=list(s.shard_sizes), offset=list(s.shard_offsets), rank=s.placement.rank())
            for s in (spec.shards if spec is not None else ())
        ] or [their_types.Shard(size=list(weight.shape), offset=[0, 0], rank=rank) for rank in sharding.ranks]
        options.append(
            their_types.ShardingOption(
                name=name,
                tensor=weight,
                module=("", model),
                input_lengths=[1.0],
                batch_size=batch_size,
                sharding_type=sharding.sharding_type,
                partition_by="device",
                compute_kernel=sharding.compute_kernel,
                shards=shards,
            )
        )
    enumerator = TheirEnumerator(topology=topology, batch_size=batch_size)
    enumerator.enumerate(model, [TheirSharder()])
    enumerator.populate_estimates(options)
    return options


@pytest.mark.parametrize("seed, count, world", [(0, 10, (2, 2)), (1, 14, (4, 2)), (2, 12, (8, 4)), (3, 10, (16, 8))])
def test_our_plan_is_as_good_by_torchrecs_own_estimate(seed: int, count: int, world: tuple[int, int]) -> None:
    rng = random.Random(seed)
    shapes = [(int(10 ** rng.uniform(3, 7)), rng.choice([32, 64, 128, 256]), 1) for _ in range(count)]
    ours, theirs = both_models(shapes, True, False, "FP32")
    topology = their_types.Topology(world_size=world[0], local_world_size=world[1], compute_device="cuda")
    planner = TheirPlanner(topology=topology, batch_size=512, debug=False)
    planner.plan(theirs, [TheirSharder()])
    their_cost = TheirPerfModel(topology).rate(planner._best_plan)
    mine = EmbeddingShardingPlanner(topology=Topology(world[0], "cuda", local_world_size=world[1]), batch_size=512)
    plan = mine.plan(ours, get_default_sharders())
    our_cost = TheirPerfModel(topology).rate(as_their_options(plan, theirs, topology, 512))
    assert our_cost == pytest.approx(plan.cost_ms, rel=1e-6)
    assert our_cost <= their_cost * 1.01


@pytest.mark.parametrize("seed", [2, 9, 11, 13, 17, 27, 33])
def test_our_plan_is_as_good_where_tables_have_to_leave_device_memory(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.choice([4, 8, 12, 16])
    world, local = rng.choice([(2, 2), (4, 2), (8, 4), (8, 8)])
    shapes = [(int(10 ** rng.uniform(5, 8)), rng.choice([32, 64, 128, 256]), 1) for _ in range(count)]
    if seed % 2 == 0:  # tables alike
        shapes = [(10**7, rng.choice([64, 128]), 1)] * count
    total = sum(4 * rows * columns for rows, columns, _ in shapes)
    caps = {"hbm_cap": int(total / world * rng.choice([0.4, 0.7, 1.0])), "ddr_cap": 2 * total // world}
    ours, theirs = both_models(shapes, True, False, "FP32")
    topology = their_types.Topology(world_size=world, local_world_size=local, compute_device="cuda", **caps)
    planner = TheirPlanner(topology=topology, batch_size=512, debug=False)
    planner.plan(theirs, [TheirSharder()])
    assert any("uvm" in option.compute_kernel for option in planner._best_plan)
    mine = EmbeddingShardingPlanner(topology=Topology(world, "cuda", local_world_size=local, **caps), batch_size=512)
    plan = mine.plan(ours, get_default_sharders())
    our_cost = TheirPerfModel(topology).rate(as_their_options(plan, theirs, topology, 512))
    assert our_cost == pytest.approx(plan.cost_ms, rel=1e-6)
    assert our_cost <= TheirPerfModel(topology).rate(planner._best_plan) * 1.01


def test_a_budget_for_caches_is_shared_alike() -> None:
    model = torch.tensor([[100.0, 10.0], [1000.0, 20.0], [500.0, 30.0]], dtype=torch.float64)
    factors = torch.full((3,), 0.1, dtype=torch.float64)
    for ceiling, priority, budget in itertools.product(
        ([110.0, 1020.0, 530.0], [60.0, 1020.0, 530.0], [1000.0, 2000.0, 3000.0]),
        ([1.0, 2.0, 1.0], [0.5, 0.5, 0.5], [3.0, 1.0, 2.0]),
        (0, 50, 100, 500, 1000, 1490, 3000),
    ):
        price, weight = (torch.tensor(values, dtype=torch.float64) for values in (ceiling, priority))
        mine = OurScaleup.allocate_budget(model, price, factors, budget, weight)
        wanted = TheirScaleup.allocate_budget(model, price, factors.clone(), budget, weight)
        assert mine.tolist() == pytest.approx(wanted.tolist())
        assert OurScaleup.clf_to_bytes(model, factors).tolist() == TheirScaleup.clf_to_bytes(model, factors).tolist()
