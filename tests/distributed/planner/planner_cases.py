"""Models on meta for planner tests, and what has to hold for every plan."""

from __future__ import annotations

import random

import torch

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.sharding.tiling import shards_from, validate
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

TRILLION_125 = [(4, 10**9, 256), (40, 25 * 10**6, 128), (100, 5 * 10**6, 128), (500, 5 * 10**5, 64), (140, 10**6, 128)]
TRILLION_3 = [(10, 10**9, 256), (100, 25 * 10**6, 128), (150, 5 * 10**6, 128), (500, 5 * 10**5, 64), (62, 10**6, 128)]


def collection(shapes: list[tuple[int, int]]) -> EmbeddingBagCollection:
    """Tables t0, t1, ... of (rows, columns), one feature each."""
    configs = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=rows, embedding_dim=columns, feature_names=[f"f{i}"])
        for i, (rows, columns) in enumerate(shapes)
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def repeated(spec: list[tuple[int, int, int]]) -> EmbeddingBagCollection:
    """Tables from (how many, rows, columns)."""
    return collection([(rows, columns) for count, rows, columns in spec for _ in range(count)])


def random_shapes(seed: int, count: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(int(10 ** rng.uniform(2, 7)), rng.choice([16, 32, 64, 128, 256, 512])) for _ in range(count)]


def plan_for(
    model: torch.nn.Module,
    world_size: int,
    local_size: int,
    gib: float = 32,
    device: str = "cuda",
    constraints: dict[str, ParameterConstraints] | None = None,
    host_gib: float = 0,
) -> PlannedSharding:
    """`gib` is what each rank computes from; on cuda `host_gib` is beside it."""
    caps = {"hbm_cap": gib, "ddr_cap": host_gib} if device == "cuda" else {"ddr_cap": gib}
    caps = {name: int(size * GIB) for name, size in caps.items()}
    topology = Topology(world_size, device, local_world_size=local_size, **caps)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.plan(model, get_default_sharders())
    assert isinstance(plan, PlannedSharding)
    return plan


def check(plan: PlannedSharding, model: EmbeddingBagCollection, world_size: int) -> None:
    """Every table is in the plan and tiled exactly; memory suffices; the state of the search adds up."""
    module_plan = plan.plan[""]
    assert sorted(module_plan) == sorted(c.name for c in model.embedding_bag_configs())
    for config in model.embedding_bag_configs():
        sharding = module_plan[config.name]
        if sharding.sharding_type == "data_parallel":
            assert sharding.ranks == list(range(world_size))
            continue
        shards = shards_from(config.name, sharding, config.num_embeddings, config.embedding_dim)
        validate(shards, config.num_embeddings, config.embedding_dim, world_size, config.name)
    placement = plan.found.placement
    problem = placement.problem
    load, used = [0.0] * world_size, [[0.0, 0.0] for _ in range(world_size)]
    for unit, ranks in enumerate(placement.ranks_U):
        column = int(placement.choice_U[unit])
        assert len(ranks) == problem.count_UJ[unit, column]
        for rank in ranks:
            load[rank] += problem.ms_UJ[unit, column] * problem.slowness_W[rank]
            used[rank][0] += problem.bytes_UJ2[unit, column, 0]
            used[rank][1] += problem.bytes_UJ2[unit, column, 1]
    for rank in range(world_size):
        assert abs(load[rank] - placement.load_W[rank]) <= 1e-6 * max(load[rank], 1e-9)
        assert used[rank][0] <= problem.caps_W2[rank, 0] and used[rank][1] <= problem.caps_W2[rank, 1]
    assert plan.lower_bound_ms <= plan.cost_ms * (1 + 1e-9)
