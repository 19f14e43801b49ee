"""The plan that the planner returns: a ShardingPlan that also knows why.

plan = EmbeddingShardingPlanner(topology=topology).plan(model, sharders)
plan                         in a notebook: what lies where, how long the busiest rank takes, how far from perfect
print(plan.explain("user"))  the choice, the runner-up and by how much it lost, the reason against every other
plan.to_frame()              one row per table, for sorting and filtering
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recsys_edu.distributed.planner.cost import PHASES, Array
from recsys_edu.distributed.planner.options import Place, one_line_per_reason
from recsys_edu.distributed.planner.placement import Placement
from recsys_edu.distributed.planner.search import Found
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.distributed.planner.types import PlannerError, PlannerErrorType
from recsys_edu.distributed.planner.utils import counted, show_bytes, show_ms, to_frame
from recsys_edu.distributed.types import ShardingPlan


@dataclass(frozen=True)
class Alternative:
    """What one option would have meant for the plan, in words; `cost_ms` is None where it is impossible."""

    sharding_type: str
    compute_kernel: str
    cost_ms: float | None
    work_ms: float
    reason: str


@dataclass(frozen=True)
class Choice:
    """How one table is sharded, and the other options, the best first and the impossible last."""

    table: str
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    num_rows: int
    num_columns: int
    shard_rows: int
    shard_columns: int
    shard_ms: float
    shard_bytes: int
    alternatives: tuple[Alternative, ...]

    @property
    def runner_up(self) -> Alternative | None:
        possible = [a for a in self.alternatives if a.cost_ms is not None]
        return possible[0] if possible else None

    def __str__(self) -> str:
        where = _ranks(self.ranks)
        lines = [
            f"{self.table} ({self.num_rows:,} x {self.num_columns}): {self.sharding_type}, {self.compute_kernel}, "
            f"{len(self.ranks)} shard{'s' if len(self.ranks) > 1 else ''} of {self.shard_rows:,} x "
            f"{self.shard_columns} on {where}: {show_bytes(self.shard_bytes)} and {self.shard_ms:.3g} ms each"
        ]
        for alternative in self.alternatives:
            if alternative.cost_ms is not None:
                mark = "runner-up" if alternative is self.runner_up else "against"
                kernel = f"{alternative.sharding_type}, {alternative.compute_kernel}"
                lines.append(f"  {mark} {kernel}: {alternative.reason}")
        return "\n".join([*lines, *(f"  impossible {line}" for line in self.impossible)])

    @property
    def impossible(self) -> list[str]:
        """The options that cannot be, one line for all with one reason."""
        others = [
            (a.sharding_type, a.compute_kernel, a.reason if a.cost_ms is None else None) for a in self.alternatives
        ]
        return one_line_per_reason([(self.sharding_type, self.compute_kernel, None), *others])


@dataclass(frozen=True)
class Explanation:
    """`Choice`s, and a summary of the plan; prints as text."""

    summary: str
    choices: tuple[Choice, ...]

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __str__(self) -> str:
        return "\n\n".join([self.summary, *map(str, self.choices)])

    __repr__ = __str__


@dataclass
class PlannedSharding(ShardingPlan):
    """A ShardingPlan with the search that led to it.

    Args:
        found: the placement and the bound.
        topology: what was planned for; `usable` is what the storage reservation left of it.
        seconds: how long planning took.
    """

    found: Found = field(repr=False, kw_only=True)
    topology: Topology = field(repr=False, kw_only=True)
    usable: Topology = field(repr=False, kw_only=True)
    seconds: float = field(repr=False, kw_only=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # What travels to other processes is the plan alone: the search refers to the model's modules.
        return ShardingPlan, (self.plan,)

    @property
    def cost_ms(self) -> float:
        """Milliseconds of the busiest rank per step."""
        return self.found.placement.cost_ms

    @property
    def lower_bound_ms(self) -> float:
        """What the busiest rank takes at least in any plan (of the options considered)."""
        return self.found.lower_bound_ms

    @property
    def phases_WP(self) -> Array:
        """[W, 6] milliseconds of every rank by phase, in the order of `cost.PHASES`."""
        placement = self.found.placement
        problem, total = placement.problem, np.zeros((placement.problem.world_size, len(PHASES)))
        for unit, tables in enumerate(problem.units):
            times_P = problem.grid.times_TJ[list(tables), placement.choice_U[unit]].sum(axis=0)
            np.add.at(total, placement.ranks_U[unit], times_P)
        return total * problem.slowness_W[:, None]

    @property
    def used_bytes_W2(self) -> Array:
        """[W, 2] bytes of device and host memory that the tables take on every rank."""
        return self.found.placement.problem.caps_W2 - self.found.placement.free_W2

    def summary(self) -> str:
        """The plan in two sentences."""
        grid, gap = self.found.placement.problem.grid, self.found.gap
        used_2, cap_2 = self.used_bytes_W2.max(axis=0), self.found.placement.problem.caps_W2.max(axis=0)
        kind = 0 if cap_2[0] > 0 else 1
        tables, ranks = counted(len(grid.workload), "table"), counted(self.topology.world_size, "rank")
        return (
            f"{tables} on {ranks}, planned in {self.seconds:.2g} s. The busiest rank takes {self.cost_ms:.4g} ms per "
            f"step; no plan takes less than {self.lower_bound_ms:.4g} ms, so this one is at most {gap:.1%} from the "
            f"best. The fullest rank holds {show_bytes(used_2[kind])} of {show_bytes(cap_2[kind])}."
        )

    def explain(self, table: str | None = None) -> Explanation:
        """Why each table (or one of them) lies as it does.

        Raises:
            KeyError: no such table.
        """
        grid = self.found.placement.problem.grid
        names = [t.name for t in grid.workload.tables]
        fqns = [t.fqn for t in grid.workload.tables]
        wanted = [i for i, pair in enumerate(zip(names, fqns)) if table is None or table in pair]
        if not wanted:
            raise KeyError(f"no table {table!r} in the plan; its tables are {names[:20]}")
        unit_of = {i: u for u, unit in enumerate(self.found.placement.problem.units) for i in unit}
        choices = [self._choice(i, unit_of[i]) for i in wanted]
        return Explanation(self.summary(), tuple(choices))

    def _choice(self, table: int, unit: int) -> Choice:
        placement, problem = self.found.placement, self.found.placement.problem
        grid, chosen = problem.grid, int(placement.choice_U[unit])
        without = placement.copy()
        without.remove(unit)
        alternatives = [
            self._alternative(table, unit, column, without) for column in range(len(grid.pairs)) if column != chosen
        ]
        alternatives.sort(key=lambda a: (a.cost_ms is None, a.cost_ms or 0, a.work_ms))
        return Choice(
            table=grid.workload.tables[table].name,
            sharding_type=grid.pairs[chosen][0],
            compute_kernel=grid.pairs[chosen][1],
            ranks=tuple(placement.ranks_U[unit].tolist()),
            num_rows=int(grid.workload.rows_T[table]),
            num_columns=int(grid.workload.columns_T[table]),
            shard_rows=int(grid.rows_TJ[table, chosen]),
            shard_columns=int(grid.width_TJ[table, chosen]),
            shard_ms=float(grid.ms_TJ[table, chosen]),
            shard_bytes=int(grid.bytes_TJ[table, chosen].sum()),
            alternatives=tuple(alternatives),
        )

    def _alternative(self, table: int, unit: int, column: int, without: Placement) -> Alternative:
        """What the plan would cost with this option for the unit, everything else staying where it is."""
        problem = without.problem
        grid, chosen = problem.grid, int(self.found.placement.choice_U[unit])
        work = float(problem.work_UJ[unit, column])
        rejection = grid.rejections.get((table, column))
        if rejection is None and not problem.valid_UJ[unit, column]:
            rejection = "impossible for another table that has to stay together with this one"
        ranks = None if rejection is not None else without.find(unit, column)
        if rejection is None and ranks is None:
            rejection = _no_room(without, unit, column)
        if rejection is not None:
            return Alternative(*grid.pairs[column], None, work, rejection)
        cost, own = without.cost_with(unit, column, ranks), self.cost_ms
        more = work - float(problem.work_UJ[unit, chosen])
        over = f"{show_ms(abs(more))} ms {'more' if more >= 0 else 'less'} work over all ranks"
        if cost > own * (1 + 1e-6):
            change = f"{cost:.4g} instead of {own:.4g} ms (+{show_ms(cost - own)})"
            reason = f"the busiest rank would take {change}, {over}"
        elif cost < own * (1 - 1e-6):
            reason = f"the busiest rank would take {cost:.4g} instead of {own:.4g} ms; the search stopped before it"
        else:
            reason = f"the busiest rank would take as long, with {over}"
        return Alternative(*grid.pairs[column], cost, work, reason)

    def what_if(self, changes: Mapping[str, tuple[str, Sequence[int]]]) -> float:
        """Milliseconds of the busiest rank, were these tables sharded otherwise and all others as they are.

            plan.what_if({"user": ("row_wise", range(4)), "item": ("table_wise", [2])})

        Args:
            changes: by table name, the sharding type and one rank for each shard, column block after column block. The
                kernel is the fastest of that type with which a shard fits into a rank.

        Raises:
            KeyError: no such table.
            ValueError: a change that is no pair of sharding type and ranks.
            PlannerError: an option that is impossible, a wrong number of ranks, or a rank without the memory.
        """
        state, problem = self.found.placement.copy(), self.found.placement.problem
        units = {problem.grid.workload.tables[i].name: u for u, unit in enumerate(problem.units) for i in unit}
        for name in changes:
            if name not in units:
                raise KeyError(f"no table {name!r} in the plan; its tables are {list(units)[:20]}")
            change = changes[name]
            if not isinstance(change, (tuple, list)) or len(change) != 2 or not hasattr(change[1], "__len__"):
                raise ValueError(f"table {name!r}: expected (sharding type, list of ranks), got {change!r}")
            state.remove(units[name])
        for name, (sharding_type, ranks) in changes.items():
            unit, column = units[name], self._column(name, units[name], sharding_type)
            count = int(problem.count_UJ[unit, column])
            if len(ranks) != count or not all(0 <= rank < problem.world_size for rank in ranks):
                raise PlannerError(
                    f"table {name!r}, {sharding_type}: expected {count} of the ranks 0 to {problem.world_size - 1}, "
                    f"got {list(ranks)}",
                    PlannerErrorType.INVALID_RANK_ASSIGNMENT,
                )
            state.put(unit, column, np.array(ranks, np.int64))
        short_W = -state.free_W2.min(axis=1)
        if (short_W > 0).any():
            worst = int(short_W.argmax())
            raise PlannerError(
                f"rank {worst} would lack {show_bytes(short_W[worst])} of memory", PlannerErrorType.INSUFFICIENT_STORAGE
            )
        return state.cost_ms

    def _column(self, name: str, unit: int, sharding_type: str) -> int:
        """The column of the grid with this type that the unit may have."""
        problem = self.found.placement.problem
        grid = problem.grid
        of_type = [j for j, (kind, _) in enumerate(grid.pairs) if kind == sharding_type]
        possible = [j for j in of_type if problem.valid_UJ[unit, j]]
        if possible:
            return min(possible, key=lambda j: problem.work_UJ[unit, j])
        reasons = [grid.rejections.get((i, j), "") for i in problem.units[unit] for j in of_type]
        raise PlannerError(
            f"table {name!r} cannot be {sharding_type}: {next(filter(None, reasons), 'it is not among the options')}",
            PlannerErrorType.STRICT_CONSTRAINTS,
        )

    def to_frame(self) -> Any:
        """One row per table, as a polars DataFrame (pandas where polars is missing)."""
        placement, grid = self.found.placement, self.found.placement.problem.grid
        rows = []
        for unit, tables in enumerate(placement.problem.units):
            column, ranks = int(placement.choice_U[unit]), placement.ranks_U[unit]
            for i in tables:
                sizes, count = grid.bytes_TJ[i, column], len(ranks)
                rows.append(
                    {
                        "module": grid.workload.tables[i].path,
                        "table": grid.workload.tables[i].name,
                        "rows": int(grid.workload.rows_T[i]),
                        "columns": int(grid.workload.columns_T[i]),
                        "sharding_type": grid.pairs[column][0],
                        "compute_kernel": grid.pairs[column][1],
                        "shards": count,
                        "shard_rows": int(grid.rows_TJ[i, column]),
                        "shard_columns": int(grid.width_TJ[i, column]),
                        "ranks": ranks.tolist(),
                        "shard_ms": float(grid.ms_TJ[i, column]),
                        "work_ms": float(grid.ms_TJ[i, column] * count),
                        "shard_hbm_bytes": int(sizes[0]),
                        "shard_ddr_bytes": int(sizes[1]),
                    }
                )
        return to_frame(rows)

    def check_world(self, world_size: int, local_world_size: int, device_type: str) -> None:
        """Refuse to be used on another machine than the plan was made for.

        Raises:
            PlannerError: naming both sides of every difference.
        """
        planned = (self.topology.world_size, self.topology.local_world_size, self.topology.compute_device)
        names, here = ("world size", "ranks per host", "device"), (world_size, local_world_size, device_type)
        differences = [f"{name} {was}, here {now}" for name, was, now in zip(names, planned, here) if was != now]
        if differences:
            raise PlannerError(
                f"this plan was made for {'; '.join(differences)}. Plan again with a Topology of this machine",
                PlannerErrorType.PLANNER_INPUT_CONTEXT_MISMATCH,
            )

    def figure(self) -> Any:
        """Memory and time of every rank; see recsys_edu.viz.plan for the others."""
        from recsys_edu.viz.plan import plan_figure

        return plan_figure(self)

    def _repr_html_(self) -> str:
        placement, grid = self.found.placement, self.found.placement.problem.grid
        heads = ["table", "rows x columns", "sharding type", "kernel", "shards", "ms each", "bytes each", "ranks"]
        lines = []
        unit_of = [(i, u) for u, unit in enumerate(placement.problem.units) for i in unit]
        heaviest = sorted(unit_of, key=lambda p: -float(placement.problem.work_UJ[p[1], placement.choice_U[p[1]]]))
        for i, u in heaviest[:_MOST_LINES]:
            column, ranks = int(placement.choice_U[u]), placement.ranks_U[u]
            cells = [
                grid.workload.tables[i].fqn,
                f"{int(grid.workload.rows_T[i]):,} x {int(grid.workload.columns_T[i])}",
                *grid.pairs[column],
                len(ranks),
                f"{grid.ms_TJ[i, column]:.3g}",
                show_bytes(float(grid.bytes_TJ[i, column].sum())),
                _ranks(tuple(ranks.tolist())),
            ]
            lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
        more = len(unit_of) - _MOST_LINES
        note = f"<p>and {more} more with less work; see <code>to_frame()</code></p>" if more > 0 else ""
        head = "".join(f"<th>{text}</th>" for text in heads)
        return f"<p>{html.escape(self.summary())}</p><table><tr>{head}</tr>{''.join(lines)}</table>{note}"


_MOST_LINES = 40


def _no_room(placement: Placement, unit: int, column: int) -> str:
    """How much room there is beside the other tables."""
    problem = placement.problem
    need_2 = problem.bytes_UJ2[unit, column]
    allowed_W = problem.mask_of(unit)
    free_W2 = placement.free_W2 if allowed_W is None else placement.free_W2[allowed_W]
    kind = int((need_2 > free_W2.max(axis=0))[1]) if (need_2 > free_W2.max(axis=0)).any() else 0
    if problem.places_J[column] is Place.UNIFORM:
        short_2 = free_W2.min(axis=0)
        kind = 0 if need_2[0] > short_2[0] else 1
        return (
            f"no room beside the other tables: needs {show_bytes(need_2[kind])} on every rank, and one has "
            f"{show_bytes(short_2[kind])} left"
        )
    return (
        f"no room beside the other tables: needs {problem.count_UJ[unit, column]} x {show_bytes(need_2[kind])}, and no "
        f"rank has more than {show_bytes(free_W2[:, kind].max())} left"
        + (" where it may lie" if allowed_W is not None else "")
    )


def _ranks(ranks: tuple[int, ...]) -> str:
    """Ranks for people: consecutive ones as a span."""
    distinct = sorted(set(ranks))
    if len(distinct) == 1:
        return f"rank {distinct[0]}"
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"ranks {distinct[0]} to {distinct[-1]}"
    shown = ", ".join(map(str, distinct[:8]))
    return f"ranks {shown}{', ...' if len(distinct) > 8 else ''}"
