"""When nothing fits: what is in the way, and the smallest single change that would make room.

Every remedy is checked by searching for a plan with it, and is the smallest in two steps: what bytes alone rule out is
skipped, then one candidate after the other is searched, the smallest first. Where that would take long (many
candidates, or a large problem) the number comes from quick attempts, and the message says that less may do.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.options import OptionGrid, enumerate_options, grouped_reasons
from recsys_edu.distributed.planner.placement import Problem, make_problem
from recsys_edu.distributed.planner.search import first_plan, quick_plan
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.distributed.planner.types import PlannerError, PlannerErrorType
from recsys_edu.distributed.planner.utils import show_bytes
from recsys_edu.distributed.planner.workload import Workload, without_constraints

MOST_HOSTS = 4096
SEARCHED = 150_000  # tables x ranks: over all candidates of one remedy that are searched rather than quickly tried
MOST_SEARCHES = 12
MEMORY_STEPS = 64  # more memory is offered in steps of this part of what is there
_WEIGHTS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0)  # of device memory against host memory, in the bound on bytes


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan possible. Not `smallest`: a smaller one may do, too."""

    text: str
    smallest: bool = True

    def __str__(self) -> str:
        return self.text + ("" if self.smallest else " (a smaller change may do)")


def fits(workload: Workload, topology: Topology, thorough: bool = True) -> bool:
    """Whether a search finds any plan; not `thorough`: whether one quick attempt does."""
    problem = make_problem(enumerate_options(workload, topology), topology)
    if least_share(problem) > 1:
        return False
    return quick_plan(problem) is not None or (thorough and first_plan(problem) is not None)


def least_share(problem: Problem) -> float:
    """The share of all memory that any plan takes at least; above 1, and infinite without options, there is none.

    For any weights of the two kinds of memory, the tables' least weighted bytes against the ranks' weighted bytes.
    """
    total_2 = problem.caps_W2.sum(axis=0)
    if not problem.valid_UJ.any(axis=1).all():
        return math.inf
    shares = []
    for weight in _WEIGHTS:
        weights_2 = np.array([weight, 1 - weight])
        there = float(total_2 @ weights_2)
        least = np.where(problem.valid_UJ, problem.all_bytes_UJ2 @ weights_2, np.inf).min(axis=1).sum()
        if there > 0:
            shares.append(float(least) / there)
    return max(shares)


def cannot_plan(workload: Workload, topology: Topology, given: Topology, suggest: bool = True) -> PlannerError:
    """The error to raise: which tables are in the way, and, with `suggest`, what would help."""
    grid = enumerate_options(workload, topology)
    problem = make_problem(grid, topology)
    impossible = np.flatnonzero(~problem.valid_UJ.any(axis=1)).tolist()
    lines = list(_in_the_way(grid, problem, impossible) if impossible else _sizes(workload, topology, problem))
    any_size = enumerate_options(workload, topology, check_sizes=False).valid_TJ
    contradicts = any(not any_size[i].any() for u in impossible for i in problem.units[u])
    kind = _kind(topology)
    reserved = getattr(given.devices[0].storage, kind) - getattr(topology.devices[0].storage, kind)
    if reserved > 0 and not contradicts:
        lines.append(f"(the storage reservation keeps {show_bytes(reserved)} of each rank's {_NAMES[kind]} back)")
    remedies = smallest_changes(workload, topology) if suggest else []
    lines += ["Any one of these would do:", *(f"  - {remedy}" for remedy in remedies)] if remedies else []
    error = PlannerErrorType.STRICT_CONSTRAINTS if contradicts else PlannerErrorType.INSUFFICIENT_STORAGE
    return PlannerError("no plan fits. " + "\n".join(lines), error)


_NAMES = {"hbm": "HBM", "ddr": "host memory"}


def _kind(topology: Topology) -> str:
    """The memory in which tables lie unless something else is said."""
    return "ddr" if topology.compute_device == "cpu" else "hbm"


def _in_the_way(grid: OptionGrid, problem: Problem, impossible: Sequence[int]) -> Iterator[str]:
    """Tables without any option, and why."""
    workload = grid.workload
    number = sum(len(problem.units[u]) for u in impossible)
    yield f"{number} of {len(workload)} tables fit{'s' * (number == 1)} nowhere, whatever else there is:"
    for u in impossible[:3]:
        i, *others = problem.units[u]
        yield f"  {workload.tables[i].name} ({int(workload.rows_T[i]):,} x {int(workload.columns_T[i])})"
        reasons = grouped_reasons(grid, i)
        if others:
            names = ", ".join(workload.tables[other].name for other in others[:5])
            whole = problem.bytes_UJ2[u][[kind == "table_wise" for kind, _ in grid.pairs]].sum(axis=-1).min()
            group = workload.tables[i].constraint.together
            reasons.append(f"together as {group!r} with {names}, on one rank, that is {show_bytes(whole)}")
        yield from (f"    {line}" for line in reasons)
    if len(impossible) > 3:
        names = ", ".join(workload.tables[problem.units[u][0]].name for u in impossible[3:8])
        yield f"  and {names}{', ...' if len(impossible) > 8 else ''}"


def _sizes(workload: Workload, topology: Topology, problem: Problem) -> Iterator[str]:
    """What the tables take, and what there is."""
    least = np.where(problem.valid_UJ, problem.all_bytes_UJ2.sum(axis=-1), np.inf).min(axis=1).sum()
    hbm, ddr = problem.caps_W2.sum(axis=0)
    uses_host = bool((problem.valid_UJ & (problem.bytes_UJ2[..., 1] > 0)).any())
    there = [f"{show_bytes(hbm)} of HBM"] if hbm > 0 else []
    there += [f"{show_bytes(ddr)} of host memory"] if uses_host else []
    tables = f"{len(workload)} tables need" if len(workload) > 1 else f"table {workload.tables[0].name!r} needs"
    yield (
        f"{tables} {show_bytes(float(least))}, cut as frugally as the constraints allow; {topology.world_size} "
        f"rank{'s have' if topology.world_size > 1 else ' has'} {' and '.join(there)} left for tables"
    )
    if least_share(problem) <= 1:
        yield "That is enough in all, but no way was found to cut and spread them that fits rank by rank."


# ---------------------------------------------------------------- single changes


def smallest_changes(workload: Workload, topology: Topology) -> list[Remedy]:
    """Single changes, each just large enough: more ranks, more memory, smaller numbers, fewer demands, a table less."""
    changes = (_more_ranks, _more_memory, _smaller_numbers, _fewer_demands, _one_table_less)
    return [remedy for change in changes for remedy in change(workload, topology)]


def _more_ranks(workload: Workload, topology: Topology) -> Iterator[Remedy]:
    local, hosts = topology.local_world_size, topology.world_size // topology.local_world_size
    same_caps = len({(d.storage.hbm, d.storage.ddr) for d in topology.devices}) == 1
    if not same_caps or any(table.ranks is not None for table in workload.tables):
        return  # more of which, and who may go there?

    start = _smallest(lambda n: _has_room(workload, resized(topology, n * local)), hosts + 1, MOST_HOSTS)
    if start is None:
        return
    enough, smallest = _first(lambda n: (workload, resized(topology, n * local)), start, MOST_HOSTS)
    if enough is not None:
        size = f" ({enough} hosts of {local})" if local > 1 else ""
        yield Remedy(f"{enough * local} ranks instead of {topology.world_size}{size}", smallest)


def _more_memory(workload: Workload, topology: Topology) -> Iterator[Remedy]:
    """On a GPU of either kind; host memory only where some table may lie there."""
    for kind in ("ddr",) if topology.compute_device == "cpu" else ("hbm", "ddr"):
        now = max(getattr(d.storage, kind) for d in topology.devices)
        step = max(max(d.storage.hbm, d.storage.ddr) // MEMORY_STEPS for d in topology.devices) or 2**20

        def larger(extra: int, kind: str = kind, step: int = step) -> tuple[Workload, Topology]:
            return workload, _with_more(topology, kind, extra * step)

        start = _smallest(lambda n, larger=larger: _has_room(*larger(n)), 1, MEMORY_STEPS * 64)
        if start is not None:
            enough, smallest = _first(larger, start, MEMORY_STEPS * 64)
            if enough is not None:
                there = show_bytes(now + enough * step)
                yield Remedy(f"{there} of {_NAMES[kind]} for tables per rank instead of {show_bytes(now)}", smallest)


def _smaller_numbers(workload: Workload, topology: Topology) -> Iterator[Remedy]:
    """The dtype, and how few of the largest tables have to have it."""
    for name, size in (("float16", 2), ("int8", 1)):
        wide = np.flatnonzero(workload.lookups.element_bytes > size)
        if not len(wide) or not fits(with_element_bytes(workload, size, wide), topology):
            continue
        largest = wide[np.argsort(-_weight_bytes(workload)[wide], kind="stable")]

        def narrowed(count: int, largest: np.ndarray = largest, size: int = size) -> tuple[Workload, Topology]:
            return with_element_bytes(workload, size, largest[:count]), topology

        start = _smallest(lambda n, narrowed=narrowed: _has_room(*narrowed(n)), 1, len(largest)) or len(largest)
        count, smallest = _first(narrowed, start, len(largest))
        count = count or len(largest)
        names = ", ".join(workload.tables[i].name for i in largest[: min(count, 3)])
        some = f"{names}, ... ({count} of {len(workload)} tables, the largest)" if count > 3 else names
        which = "all tables" if count == len(workload) > 1 else f"table{'s' * (count > 1)} {some}"
        yield Remedy(f"weights of {which} in {name}", smallest)
        return


def _fewer_demands(workload: Workload, topology: Topology) -> Iterator[Remedy]:
    """Lifting what constraints say of sharding types and kernels."""
    free, bound = without_constraints(workload, topology.compute_device)
    if bound and fits(free, topology):
        said = [
            f"{t.name} {field}={getattr(t.constraint, field)}"
            for t in bound
            for field in ("sharding_types", "compute_kernels")
            if getattr(t.constraint, field) is not None
        ]
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        yield Remedy(f"lifting constraints: {'; '.join(said[:3])}{more}")


def _one_table_less(workload: Workload, topology: Topology) -> Iterator[Remedy]:
    """The smallest table without which the others fit; of tables of one size the first stands for all."""
    if len(workload) < 2:
        return
    bytes_T = _weight_bytes(workload)
    candidates = [int(i) for i in np.unique(bytes_T, return_index=True)[1]]  # ascending

    def others(index: int) -> tuple[Workload, Topology]:
        return _without(workload, candidates[index]), topology

    start = _smallest(lambda k: _has_room(*others(k)), 0, len(candidates) - 1)
    if start is None:
        return
    index, smallest = _first(others, start, len(candidates) - 1)
    if index is not None:
        table = workload.tables[candidates[index]]
        yield Remedy(f"leaving out table {table.name!r} ({show_bytes(bytes_T[candidates[index]])})", smallest)


# ---------------------------------------------------------------- smallest numbers


def _has_room(workload: Workload, topology: Topology) -> bool:
    """Whether the bytes alone leave a plan possible."""
    return least_share(make_problem(enumerate_options(workload, topology), topology)) <= 1


def _first(changed: Callable[[int], tuple[Workload, Topology]], start: int, last: int) -> tuple[int | None, bool]:
    """(the first number from `start` to `last` with which a plan is found, whether all smaller ones were searched)."""
    workload, topology = changed(start)
    searches = min(max(SEARCHED // (len(workload) * topology.world_size), 0), MOST_SEARCHES)
    untried = min(start + searches, last + 1)
    for number in range(start, untried):
        if fits(*changed(number)):
            return number, True
    return _smallest(lambda n: fits(*changed(n), thorough=False), untried, last) if untried <= last else None, False


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """A number in low..high for which `holds` and not for the one before, by doubling and bisection; None: none found.

    The smallest of all where `holds` once true stays true.
    """
    good, step = low, 1
    while not holds(good):
        if good >= high:
            return None
        low = good + 1
        good, step = min(good + step, high), step * 2
    while low < good:
        middle = (low + good) // 2
        low, good = (low, middle) if holds(middle) else (middle + 1, good)
    return good


# ---------------------------------------------------------------- other problems


def resized(topology: Topology, world_size: int) -> Topology:
    """The same machines, another number of them."""
    first = topology.devices[0].storage
    return Topology(
        world_size,
        topology.compute_device,
        hbm_cap=first.hbm,
        ddr_cap=first.ddr,
        ssd_cap=first.ssd,
        local_world_size=min(topology.local_world_size, world_size),
        pod_size=min(topology.intra_group_size, world_size),
        hbm_mem_bw=topology.hbm_mem_bw,
        ddr_mem_bw=topology.ddr_mem_bw,
        ssd_mem_bw=topology.ssd_mem_bw,
        hbm_to_ddr_mem_bw=topology.hbm_to_ddr_mem_bw,
        bwd_compute_multiplier=topology.bwd_compute_multiplier,
        weighted_feature_bwd_compute_multiplier=topology.weighted_feature_bwd_compute_multiplier,
        uneven_sharding_perf_multiplier=topology.uneven_sharding_perf_multiplier,
        generalized_comms_bandwidths=topology.comms_bandwidths,
    )


def _with_more(topology: Topology, kind: str, num_bytes: int) -> Topology:
    more = copy.deepcopy(topology)
    for device in more.devices:
        setattr(device.storage, kind, getattr(device.storage, kind) + num_bytes)
    return more


def with_element_bytes(workload: Workload, size: int, tables: np.ndarray) -> Workload:
    """The workload with weights of at most `size` bytes in some tables."""
    use = workload.lookups
    element, output = use.element_bytes.copy(), use.output_bytes.copy()
    element[tables] = np.minimum(element[tables], size)
    output[tables] = np.minimum(output[tables], max(size, c.BIGINT_DTYPE // 4))
    return dataclasses.replace(workload, lookups=dataclasses.replace(use, element_bytes=element, output_bytes=output))


def _weight_bytes(workload: Workload) -> np.ndarray:
    return workload.rows_T * workload.columns_T * workload.lookups.element_bytes


def _without(workload: Workload, table: int) -> Workload:
    keep = np.arange(len(workload)) != table
    arrays = {key: value[keep] for key, value in vars(workload).items() if key.endswith("_T")}
    tables = tuple(t for t, kept in zip(workload.tables, keep) if kept)
    return Workload(tables, lookups=workload.lookups.at(keep), **arrays)
