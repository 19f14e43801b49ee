"""The smallest change that makes a plan possible, against every way to cut and place small problems."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
import torch
from planner_cases import collection

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.options import Place, enumerate_options
from recsys_edu.distributed.planner.placement import Problem, make_problem
from recsys_edu.distributed.planner.remedy import (
    _without,
    cannot_plan,
    fits,
    resized,
    smallest_changes,
    with_element_bytes,
)
from recsys_edu.distributed.planner.types import PlannerErrorType
from recsys_edu.distributed.planner.workload import Workload, read_workload
from recsys_edu.distributed.sharding_plan import get_default_sharders

MIB = 2**20


def small_problem(seed: int) -> tuple[Workload, Topology]:
    """Up to four tables that two ranks cannot hold; rows are cut by some constraint now and then."""
    rng = random.Random(seed)
    shapes = [(rng.randint(5_000, 60_000), rng.choice([32, 64])) for _ in range(rng.randint(2, 4))]
    constraints = {
        f"t{i}": ParameterConstraints(sharding_types=["table_wise"]) for i in range(len(shapes)) if rng.random() < 0.6
    }
    total = sum(4 * rows * columns for rows, columns in shapes)
    topology = Topology(2, "cpu", ddr_cap=int(rng.uniform(0.25, 0.5) * total), local_world_size=1)
    return read_workload(collection(shapes), get_default_sharders(), topology, 8, constraints), topology


def can_be_placed(problem: Problem) -> bool:
    """Every combination of options, every assignment of rectangles to ranks."""
    world, caps_W = problem.world_size, problem.caps_W2[:, 1]
    ways = []
    for u in range(len(problem.units)):
        found = set()
        for j in np.flatnonzero(problem.valid_UJ[u]).tolist():
            size, count = problem.bytes_UJ2[u, j, 1], int(problem.count_UJ[u, j])
            if problem.places_J[j] is Place.UNIFORM:
                found.add((size,) * world)
            elif problem.places_J[j] is Place.HOST_ROWS:  # hosts of one rank
                found |= {tuple(size * (r == rank) for r in range(world)) for rank in range(world)}
            else:
                for ranks in itertools.product(range(world), repeat=count):
                    found.add(tuple(size * ranks.count(r) for r in range(world)))
        ways.append(found)
    sums = {(0.0,) * world}
    for found in ways:
        added = {tuple(a + b for a, b in zip(total, way)) for total in sums for way in found}
        sums = {total for total in added if all(t <= cap for t, cap in zip(total, caps_W))}
    return bool(sums)


def as_problem(workload: Workload, topology: Topology) -> Problem:
    return make_problem(enumerate_options(workload, topology), topology)


@pytest.mark.parametrize("seed", range(24))
def test_the_smallest_changes_by_brute_force(seed: int) -> None:
    workload, topology = small_problem(seed)
    assert fits(workload, topology) == can_be_placed(as_problem(workload, topology))
    if fits(workload, topology):
        return
    texts = [str(remedy) for remedy in smallest_changes(workload, topology)]
    assert all("of host memory for" in text for text in texts if "smaller change" in text)  # many small steps
    ranks = [n for n in range(3, 9) if can_be_placed(as_problem(workload, resized(topology, n)))]
    named = [int(text.split()[0]) for text in texts if "ranks instead of" in text]
    assert named == ranks[:1] or (not ranks and (not named or named[0] > 8))
    whole = [i for i in range(len(workload)) if can_be_placed(as_problem(_without(workload, i), topology))]
    sizes = {f"t{i}": float(workload.rows_T[i] * workload.columns_T[i]) for i in range(len(workload))}
    left_out = [re.search(r"'(t\d)'", text)[1] for text in texts if text.startswith("leaving out")]
    assert [sizes[name] for name in left_out] == sorted(sizes[f"t{i}"] for i in whole)[:1]
    by_size = np.argsort(-workload.rows_T * workload.columns_T, kind="stable")
    for name, size in (("float16", 2), ("int8", 1)):
        enough = [
            k
            for k in range(1, len(workload) + 1)
            if can_be_placed(as_problem(with_element_bytes(workload, size, by_size[:k]), topology))
        ]
        text = next((t for t in texts if t.startswith("weights of") and t.endswith(name)), None)
        if not enough:
            assert text is None
            continue
        fewest = min(enough)
        tables = [f"t{i}" for i in by_size[:fewest]]
        assert text is not None and (
            "all tables" in text if fewest == len(workload) else tables == re.findall(r"\bt\d", text)
        )
        break


def test_more_memory_is_the_least_of_its_steps() -> None:
    workload, topology = small_problem(3)
    text = next(str(r) for r in smallest_changes(workload, topology) if "of host memory" in str(r))
    now = topology.devices[0].storage.ddr
    step = max(now // 64, 1)
    enough = [k for k in range(1, 200) if can_be_placed(as_problem(workload, with_cap(topology, now + k * step)))]
    assert text.startswith(f"{(now + enough[0] * step) / MIB:.3g} MiB")


def with_cap(topology: Topology, cap: int) -> Topology:
    return Topology(topology.world_size, "cpu", ddr_cap=cap, local_world_size=topology.local_world_size)


def test_host_memory_is_a_remedy_on_gpus() -> None:
    topology = Topology(2, "cuda", hbm_cap=64 * MIB, ddr_cap=MIB, local_world_size=2)
    model = collection([(10**6, 64)] * 2)
    workload = read_workload(model, get_default_sharders(), topology, 8, None)
    error = cannot_plan(workload, topology, topology)
    assert error.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    text = next(line for line in str(error).splitlines() if "of host memory for tables per rank" in line)
    enough = int(float(text.split()[1]) * MIB) + MIB
    larger = Topology(2, "cuda", hbm_cap=64 * MIB, ddr_cap=enough, local_world_size=2)
    assert fits(workload, larger)


def test_no_plan_where_none_can_be() -> None:
    model = torch.nn.ModuleDict({"a": collection([(10**6, 64)])})
    constraints = {"t0": ParameterConstraints(sharding_types=["table_wise"], ranks=[0])}
    planner = EmbeddingShardingPlanner(topology=Topology(2, "cpu", ddr_cap=MIB), constraints=constraints)
    with pytest.raises(Exception, match="1 of 1 tables fits nowhere") as caught:
        planner.plan(model, get_default_sharders())
    assert "lifting constraints" not in str(caught.value)  # on rank 0 there is no room for it either way
