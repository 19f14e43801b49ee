"""When nothing fits: what is in the way, and the smallest single change that would make room.

Every remedy is checked by placing the tables with it, not by dividing bytes. That is one quick attempt for each: what
it names is enough, and the whole search may manage with slightly less, at a price in time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.options import enumerate_options
from recsys_edu.distributed.planner.placement import make_problem
from recsys_edu.distributed.planner.search import choose, place_with_repairs
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.distributed.planner.types import PlannerError, PlannerErrorType
from recsys_edu.distributed.planner.utils import show_bytes
from recsys_edu.distributed.planner.workload import HOST_KERNELS, Workload

_MOST_HOSTS = 4096


def fits(workload: Workload, topology: Topology, host_kernels: Sequence[str] = ()) -> bool:
    """Whether the tables can be placed at all, each in the way that takes least memory."""
    problem = make_problem(enumerate_options(workload, topology, host_memory_kernels=host_kernels), topology)
    if not problem.valid_UJ.any(axis=1).all():
        return False
    frugal_U = choose(problem, np.inf, 1e12)
    return place_with_repairs(problem, frugal_U) is not None


def cannot_plan(workload: Workload, topology: Topology, given: Topology) -> PlannerError:
    """The error to raise: which tables are in the way, and what would help."""
    grid = enumerate_options(workload, topology)
    problem = make_problem(grid, topology)
    kind = 1 if topology.compute_device == "cpu" else 0
    caps = problem.caps_W2[:, kind]
    impossible = [u for u in range(len(problem.units)) if not problem.valid_UJ[u].any()]
    strict = [
        u for u in impossible if not any("needs" in text for text in _reasons(grid, problem.units[u][0]).values())
    ]
    lines = []
    if impossible:
        lines.append(f"{len(impossible)} of {len(workload)} tables fit nowhere, whatever else there is:")
        for u in impossible[:3]:
            i = problem.units[u][0]
            table = workload.tables[i]
            lines.append(f"  {table.name} ({int(workload.rows_T[i]):,} x {int(workload.columns_T[i])})")
            lines += [f"    {kind_} with {kernel}: {text}" for (kind_, kernel), text in _reasons(grid, i).items()]
    else:
        least = np.where(problem.valid_UJ, (problem.bytes_UJ2 * problem.count_UJ[..., None])[..., kind], np.inf)
        total = float(least.min(axis=1).sum())
        lines.append(
            f"{len(workload)} tables need {show_bytes(total)}, cut as frugally as the constraints allow; "
            f"{topology.world_size} ranks have {show_bytes(caps.sum())} left for tables"
        )
    reserved = (given.devices[0].storage.ddr if kind else given.devices[0].storage.hbm) - caps[0]
    if reserved > 0:
        lines.append(f"(the storage reservation keeps {show_bytes(reserved)} of each rank's memory back)")
    remedies = smallest_changes(workload, topology)
    lines += ["Any one of these would do:", *(f"  - {text}" for text in remedies)] if remedies else []
    kind_of_error = PlannerErrorType.STRICT_CONSTRAINTS if strict else PlannerErrorType.INSUFFICIENT_STORAGE
    return PlannerError("no plan fits. " + "\n".join(lines), kind_of_error)


def _reasons(grid: object, table: int) -> dict[tuple[str, str], str]:
    return {grid.pairs[j]: text for (i, j), text in grid.rejections.items() if i == table}  # type: ignore[attr-defined]


def smallest_changes(workload: Workload, topology: Topology) -> list[str]:
    """Single changes, each just large enough: more ranks, more memory, smaller numbers, host memory, one table less."""
    found = []
    local, hosts = topology.local_world_size, topology.world_size // topology.local_world_size
    same_caps = len({(d.storage.hbm, d.storage.ddr) for d in topology.devices}) == 1
    pinned = any(table.ranks is not None for table in workload.tables)
    if same_caps and not pinned:
        enough = _smallest(lambda n: fits(workload, resized(topology, n * local)), hosts + 1, _MOST_HOSTS)
        if enough is not None:
            found.append(f"{enough * local} ranks instead of {topology.world_size}")
    kind = "ddr" if topology.compute_device == "cpu" else "hbm"
    now = max(getattr(d.storage, kind) for d in topology.devices)
    step = max(now // 64, 2**20)
    extra = _smallest(lambda n: fits(workload, _with_more(topology, kind, n * step)), 1, 64 * 64)
    if extra is not None:
        found.append(f"{show_bytes(now + extra * step)} of memory for tables per rank instead of {show_bytes(now)}")
    for name, size in (("float16", 2), ("int8", 1)):
        smaller = _with_element_bytes(workload, size)
        if (workload.lookups.element_bytes > size).any() and fits(smaller, topology):
            found.append(f"weights in {name}")
            break
    if topology.compute_device == "cuda" and fits(workload, topology, HOST_KERNELS):
        found.append("compute_kernels=['fused_uvm_caching'] for the largest tables: weights in host memory")
    weights_T = workload.rows_T * workload.columns_T * workload.lookups.element_bytes
    largest = int(weights_T.argmax())
    if len(workload) > 1 and fits(_without(workload, largest), topology):
        found.append(f"leaving out table {workload.tables[largest].name!r} ({show_bytes(weights_T[largest])})")
    return found


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number in low..high for which `holds`, doubling first and bisecting then; None where none does."""
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


def _with_element_bytes(workload: Workload, size: int) -> Workload:
    use = workload.lookups
    smaller = dataclasses.replace(
        use,
        element_bytes=np.minimum(use.element_bytes, size),
        output_bytes=np.minimum(use.output_bytes, max(size, c.BIGINT_DTYPE // 4)),
    )
    return dataclasses.replace(workload, lookups=smaller)


def _without(workload: Workload, table: int) -> Workload:
    keep = np.arange(len(workload)) != table
    arrays = {key: value[keep] for key, value in vars(workload).items() if key.endswith("_T")}
    tables = tuple(t for t, kept in zip(workload.tables, keep) if kept)
    return Workload(tables, lookups=workload.lookups.at(keep), **arrays)
