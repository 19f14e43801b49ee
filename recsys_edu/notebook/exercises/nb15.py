"""Exercises of notebook 15, the planner."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.types import PlannerError
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_number
from recsys_edu.notebook.replan import tables_on_meta

SHAPES = ((6_000_000, 128), (3_000_000, 128), (3_000_000, 64), (900_000, 256), (400_000, 64), (80_000, 128))


def check_lower_bound(answer: Callable[[Sequence[Sequence[float]], int], Any]) -> None:
    """`answer(work_ms, world_size)`: work of each option of each table, over all ranks."""
    for _ in range(8):
        work = [[random.uniform(0.1, 9) for _ in range(random.randrange(1, 5))] for _ in range(random.randrange(2, 9))]
        world = random.choice([2, 8, 16])
        got = answer(work, world)
        if got is None or got is ...:
            raise NotImplementedError
        expect_number("the bound", got, sum(map(min, work)) / world, f"work {work}, {world} ranks")


def check_greedy(answer: Callable[[Sequence[float], int], Any]) -> None:
    """`answer(ms, world_size)` is a rank per table, the costliest first, each where the load is lowest."""
    for _ in range(8):
        ms = random.sample([0.1 * k for k in range(1, 200)], random.randrange(3, 12))
        world = random.choice([2, 3, 4])
        got = answer(ms, world)
        if got is None or got is ...:
            raise NotImplementedError
        if len(got) != len(ms) or not all(0 <= rank < world for rank in got):
            raise CheckFailed(f"expected a rank from 0 to {world - 1} for each of {len(ms)} tables, got {got}")
        load, expected = [0.0] * world, [0.0] * world
        for cost, rank in zip(ms, got):
            load[rank] += cost
        for cost in sorted(ms, reverse=True):
            expected[expected.index(min(expected))] += cost
        expect_number("the busiest rank's ms", max(load), max(expected), f"ms {ms}, {world} ranks")


def planned_by_the_library() -> PlannedSharding:
    """What exercise 15.3 has to match: six tables on two hosts of two ranks with 4 GiB each."""
    topology = Topology(4, "cuda", hbm_cap=4 * GIB, ddr_cap=0, local_world_size=2)
    return EmbeddingShardingPlanner(topology=topology).plan(tables_on_meta(SHAPES), get_default_sharders())


def check_by_hand(answer: Callable[[], Any]) -> None:
    """`answer()` is {table: (sharding type, ranks)} for all six tables."""
    by_hand = answer()
    if by_hand is None or by_hand is ...:
        raise NotImplementedError
    plan = planned_by_the_library()
    names = [f"t{i}" for i in range(len(SHAPES))]
    if not isinstance(by_hand, Mapping) or sorted(by_hand) != names:
        raise CheckFailed(f"expected a dictionary with the tables {names}, got {by_hand}")
    try:
        cost = plan.what_if(by_hand)
    except (PlannerError, ValueError) as error:
        raise CheckFailed(str(error)) from None
    if cost > 1.05 * plan.cost_ms:
        raise CheckFailed(
            f"your busiest rank takes {cost:.4g} ms, the planner's {plan.cost_ms:.4g}: come within 5% of it"
        )


EXERCISES = (
    Exercise(
        "15.1",
        "What nobody can beat",
        "Write `lower_bound(work_ms, world_size)`: `work_ms[t]` lists, for table t, the milliseconds over all ranks "
        "of each of its options. What does the busiest rank take at least, whatever is chosen and wherever it lies?",
        difficulty=1,
        importance=5,
        minutes=5,
        hints=(
            "No table can do with less work than its cheapest option.",
            "However the work is spread, one rank has at least the average.",
        ),
        check=check_lower_bound,
    ),
    Exercise(
        "15.2",
        "Longest processing time first",
        "Write `place(ms, world_size)`: a rank for each table, in the order of `ms`. Take the costliest first, and put "
        "each where the load is lowest so far. Memory is no matter here.",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "`sorted(range(len(ms)), key=lambda t: -ms[t])` is the order in which to place.",
            "Keep `load = [0.0] * world_size`; `load.index(min(load))` is the least loaded rank.",
        ),
        check=check_greedy,
    ),
    Exercise(
        "15.3",
        "Beat the planner by hand",
        "Six tables, two hosts of two ranks, 4 GiB each: `planned_by_the_library()` is the planner's answer. Write "
        "`my_plan()`, a dictionary `{table: (sharding type, ranks)}` with one rank per shard, that comes within 5% of "
        "it, or beats it. `plan.what_if(my_plan())` says what it costs.",
        difficulty=4,
        importance=3,
        minutes=20,
        hints=(
            "`planned_by_the_library().explain()` shows each table's options and what is impossible for memory.",
            "Row-wise makes everybody carry a share of every table's answers; what is small lies better whole.",
            "Begin with the planner's types, `{c.table: (c.sharding_type, c.ranks) for c in plan.explain()}`, change "
            "one table at a time, and keep what is not worse.",
        ),
        check=check_by_hand,
    ),
)
