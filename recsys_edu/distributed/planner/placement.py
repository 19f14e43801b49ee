"""Placing rectangles on ranks: the state of a plan in the making, and the rule that adds to it.

The load of a rank is the sum of the milliseconds of its rectangles, and a plan costs what its busiest rank costs: the
others wait for it. Rectangles go, the costliest first, where the load is lowest and the memory suffices (the "longest
processing time" rule: Graham, "Bounds on multiprocessing timing anomalies", 1969). `Placement.add` and `remove` change
the state by one unit, so a search looks at neighbours of a plan without making it anew.

Suffixes: U units (a table, or tables that stay together), J (type, kernel) pairs, W ranks, H hosts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from recsys_edu.distributed.embedding_types import HOST_MEMORY_KERNELS
from recsys_edu.distributed.planner.cost import Array
from recsys_edu.distributed.planner.options import OptionGrid, Place
from recsys_edu.distributed.planner.topology import Topology

Ints = NDArray[np.int64]

HOST_MEMORY_WEIGHT = 0.1
NO_RANKS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Problem:
    """What has to be placed where.

    Args:
        units: for each unit the tables (rows of the grid) it stands for.
        ms_UJ, bytes_UJ2: of one rectangle, summed over the unit's tables; device and host memory.
        caps_W2: bytes; slowness_W: milliseconds on the rank per millisecond of work (1 / speed).
        ranks_U: where a unit may lie; None: anywhere.
    """

    grid: OptionGrid
    units: tuple[tuple[int, ...], ...]
    ms_UJ: Array
    bytes_UJ2: Array
    valid_UJ: NDArray[np.bool_]
    row_blocks_UJ: Ints
    column_blocks_UJ: Ints
    places_J: tuple[Place, ...]
    caps_W2: Array
    slowness_W: Array
    ranks_U: tuple[tuple[int, ...] | None, ...]
    local_size: int

    @property
    def world_size(self) -> int:
        return len(self.caps_W2)

    @cached_property
    def on_host_J(self) -> NDArray[np.bool_]:
        """Which options leave weights in the host's memory for a GPU to read."""
        return np.array([kernel in HOST_MEMORY_KERNELS for _, kernel in self.grid.pairs])

    @cached_property
    def place_J(self) -> Ints:
        """`places_J` as numbers."""
        return np.array(self.places_J, dtype=np.int64)

    @cached_property
    def pinned_U(self) -> NDArray[np.bool_]:
        """Which units may not lie anywhere."""
        return np.array([ranks is not None for ranks in self.ranks_U])

    @cached_property
    def count_UJ(self) -> Ints:
        return self.row_blocks_UJ * self.column_blocks_UJ

    @cached_property
    def work_UJ(self) -> Array:
        """Milliseconds over all ranks."""
        return self.ms_UJ * self.count_UJ

    @cached_property
    def all_bytes_UJ2(self) -> Array:
        """Bytes over all ranks, of device and host memory."""
        return self.bytes_UJ2 * self.count_UJ[..., None]

    @cached_property
    def memory_UJ(self) -> Array:
        """Bytes over all ranks as a share of all there are; beside device memory, host memory counts little."""
        total = self.caps_W2.sum(axis=0)
        weights = np.array([1.0, HOST_MEMORY_WEIGHT if total[0] > 0 else 1.0])
        return (self.all_bytes_UJ2 / np.maximum(total, 1)) @ weights

    def mask_of(self, unit: int) -> NDArray[np.bool_] | None:
        """[W] where the unit may lie; None: anywhere."""
        ranks = self.ranks_U[unit]
        if ranks is None:
            return None
        mask = np.zeros(self.world_size, bool)
        mask[list(ranks)] = True
        return mask


def make_problem(grid: OptionGrid, topology: Topology) -> Problem:
    """Tables, and tables that stay together, as the units of a search."""
    tables = grid.workload.tables
    groups: dict[object, list[int]] = {}
    for i, table in enumerate(tables):
        groups.setdefault(table.constraint.together or i, []).append(i)
    units = tuple(map(tuple, groups.values()))
    first = np.array([unit[0] for unit in units], dtype=np.int64)
    ms, sizes, valid = grid.ms_TJ[first], grid.bytes_TJ[first], grid.valid_TJ[first]
    for u, unit in enumerate(units):
        for i in unit[1:]:
            ms[u] += grid.ms_TJ[i]
            sizes[u] += grid.bytes_TJ[i]
            valid[u] &= grid.valid_TJ[i]
    caps = np.array([(d.storage.hbm, d.storage.ddr) for d in topology.devices], dtype=np.float64)
    return Problem(
        grid=grid,
        units=units,
        ms_UJ=ms,
        bytes_UJ2=sizes,
        valid_UJ=valid & (sizes <= caps.max(axis=0)).all(axis=-1),
        row_blocks_UJ=grid.row_blocks_TJ[first],
        column_blocks_UJ=grid.column_blocks_TJ[first],
        places_J=grid.places_J,
        caps_W2=caps,
        slowness_W=1 / np.array(topology.speeds),
        ranks_U=tuple(_common_ranks([tables[i].ranks for i in unit]) for unit in units),
        local_size=topology.local_world_size,
    )


def _common_ranks(allowed: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    given = [set(ranks) for ranks in allowed if ranks is not None]
    return tuple(sorted(set.intersection(*given))) if given else None


class Placement:
    """A plan in the making: the choice and the ranks of each placed unit, what every rank carries and has left."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.load_W = np.zeros(problem.world_size)
        self.free_W2 = problem.caps_W2.copy()
        self.choice_U = np.full(len(problem.units), -1)
        self.ranks_U: list[Ints] = [NO_RANKS] * len(problem.units)
        self._holds_WU: NDArray[np.bool_] | None = None  # made when first asked for: most plans are never improved
        self.fair: tuple[float, float] | None = None  # a rank's share of all work and of all memory; see `place_all`

    def copy(self) -> Placement:
        twin = Placement.__new__(Placement)
        twin.problem = self.problem
        twin.load_W, twin.free_W2, twin.choice_U = self.load_W.copy(), self.free_W2.copy(), self.choice_U.copy()
        twin.ranks_U, twin.fair = list(self.ranks_U), self.fair
        twin._holds_WU = None if self._holds_WU is None else self._holds_WU.copy()
        return twin

    @property
    def cost_ms(self) -> float:
        """Of the busiest rank."""
        return float(self.load_W.max())

    def put(self, unit: int, column: int, ranks: Ints) -> None:
        """Charge these ranks, one per rectangle, for the unit."""
        self._charge(unit, column, ranks, 1)
        self.choice_U[unit], self.ranks_U[unit] = column, ranks
        if self._holds_WU is not None:
            self._holds_WU[ranks, unit] = True

    def units_on(self, rank: int) -> list[int]:
        """The units with a rectangle on `rank`."""
        if self._holds_WU is None:
            self._holds_WU = np.zeros((self.problem.world_size, len(self.ranks_U)), bool)
            for unit, ranks in enumerate(self.ranks_U):
                self._holds_WU[ranks, unit] = True
        return self._holds_WU[rank].nonzero()[0].tolist()

    def remove(self, unit: int) -> None:
        """The opposite of `put`."""
        ranks = self.ranks_U[unit]
        self._charge(unit, int(self.choice_U[unit]), ranks, -1)
        self.choice_U[unit], self.ranks_U[unit] = -1, NO_RANKS
        if self._holds_WU is not None:
            self._holds_WU[ranks, unit] = False

    def _charge(self, unit: int, column: int, ranks: Ints, sign: int) -> None:
        ms, sizes = self.problem.ms_UJ[unit, column], self.problem.bytes_UJ2[unit, column]
        if len(ranks) == 1:
            rank = ranks[0]
            self.load_W[rank] += sign * ms * self.problem.slowness_W[rank]
            self.free_W2[rank] -= sign * sizes
            return
        np.add.at(self.load_W, ranks, sign * ms * self.problem.slowness_W[ranks])
        np.subtract.at(self.free_W2, ranks, sign * sizes)

    def cost_with(self, unit: int, column: int, ranks: Ints) -> float:
        """What the plan would cost with the unit there."""
        ms, slow_W = self.problem.ms_UJ[unit, column], self.problem.slowness_W
        if len(ranks) == 1:
            return max(self.cost_ms, float(self.load_W[ranks[0]] + ms * slow_W[ranks[0]]))
        if self.problem.column_blocks_UJ[unit, column] == 1:  # row blocks lie on different ranks
            return max(self.cost_ms, float((self.load_W[ranks] + ms * slow_W[ranks]).max()))
        load_W = self.load_W.copy()
        np.add.at(load_W, ranks, ms * slow_W[ranks])
        return float(load_W.max())

    def find(self, unit: int, column: int) -> Ints | None:
        """The ranks where the unit would go now, or None where it does not fit."""
        problem = self.problem
        place, need_2 = problem.places_J[column], problem.bytes_UJ2[unit, column]
        mask_W = problem.mask_of(unit)
        fits_W = (self.free_W2 >= need_2).all(axis=1)
        if mask_W is not None:
            fits_W = fits_W & mask_W
        if place is Place.UNIFORM:
            ranks = np.flatnonzero(mask_W) if mask_W is not None else np.arange(problem.world_size)
            return ranks if fits_W[ranks].all() else None
        ms = float(problem.ms_UJ[unit, column])
        blocks = int(problem.column_blocks_UJ[unit, column])
        if place is Place.DEVICE:
            return self._find_devices(ms, need_2, blocks, fits_W, mask_W)
        if place is Place.HOST:
            return self._find_host(ms, need_2, blocks, mask_W)
        return self._find_host_rows(ms, need_2, blocks, mask_W)

    def _find_devices(
        self, ms: float, need_2: Array, count: int, fits_W: NDArray[np.bool_], mask_W: NDArray[np.bool_] | None
    ) -> Ints | None:
        slow_W, load_W, ranks = self.problem.slowness_W, self.load_W, []
        if count == 1:
            after_W = np.where(fits_W, load_W + ms * slow_W, np.inf)
            best = int(after_W.argmin())
            return np.array([best]) if fits_W[best] else None
        load_W, free_W2 = load_W.copy(), self.free_W2.copy()
        for _ in range(count):
            after_W = np.where(fits_W, load_W + ms * slow_W, np.inf)
            best = int(after_W.argmin())
            if not fits_W[best]:
                return None
            ranks.append(best)
            load_W[best] = after_W[best]
            free_W2[best] -= need_2
            fits_W[best] = (free_W2[best] >= need_2).all() and (mask_W is None or mask_W[best])
        return np.array(ranks)

    def _by_host(
        self, mask_W: NDArray[np.bool_] | None, keep: bool = False
    ) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
        """Load, memory and slowness by host and rank in it, and which hosts may be used; `keep` promises no writes."""
        local = self.problem.local_size
        allowed_H = np.ones(self.problem.world_size // local, bool)
        if mask_W is not None:
            allowed_H = mask_W.reshape(-1, local).all(axis=1)
        load_HL, free_HL2 = self.load_W.reshape(-1, local), self.free_W2.reshape(-1, local, 2)
        if not keep:
            load_HL, free_HL2 = load_HL.copy(), free_HL2.copy()
        return load_HL, free_HL2, self.problem.slowness_W.reshape(-1, local), allowed_H

    def _fullness(self, load_HL: Array, free_HL2: Array) -> Array:
        """What makes a rank less welcome: its load, or, where shares are given, that or its memory."""
        if self.fair is None:
            return load_HL
        ms, share = self.fair
        caps_HL2 = np.maximum(self.problem.caps_W2.reshape(free_HL2.shape), 1)
        return np.maximum(load_HL / ms, (1 - free_HL2 / caps_HL2).max(axis=-1) / share)

    def _find_host(self, ms: float, need_2: Array, count: int, mask_W: NDArray[np.bool_] | None) -> Ints | None:
        """All rectangles on the one host where they end lowest, each there on the least loaded rank."""
        load_HL, free_HL2, slow_HL, ok_H = self._by_host(mask_W)
        hosts = np.arange(len(load_HL))
        picks = []
        for _ in range(count):
            fits_HL = (free_HL2 >= need_2).all(axis=-1)
            after_HL = self._fullness(load_HL + ms * slow_HL, free_HL2 - need_2)
            place_H = np.where(fits_HL, after_HL, np.inf).argmin(axis=1)
            ok_H = ok_H & fits_HL[hosts, place_H]
            load_HL[hosts, place_H] += ms * slow_HL[hosts, place_H]
            free_HL2[hosts, place_H] -= need_2
            picks.append(place_H)
        if not ok_H.any():
            return None
        host = int(np.where(ok_H, self._fullness(load_HL, free_HL2).max(axis=1), np.inf).argmin())
        return np.array([host * self.problem.local_size + place_H[host] for place_H in picks])

    def _find_host_rows(self, ms: float, need_2: Array, blocks: int, mask_W: NDArray[np.bool_] | None) -> Ints | None:
        """For each column block the host where its busiest rank ends lowest."""
        load_HL, free_HL2, slow_HL, ok_H = self._by_host(mask_W, keep=blocks == 1)
        local, ranks = self.problem.local_size, []
        for block in range(blocks):
            fits_H = ok_H & (free_HL2 >= need_2).all(axis=(1, 2))
            after_HL = self._fullness(load_HL + ms * slow_HL, free_HL2 - need_2)
            host = int(np.where(fits_H, after_HL.max(axis=1), np.inf).argmin())
            if not fits_H[host]:
                return None
            ranks.append(np.arange(host * local, (host + 1) * local))
            if block < blocks - 1:
                load_HL[host] += ms * slow_HL[host]
                free_HL2[host] -= need_2
        return ranks[0] if blocks == 1 else np.concatenate(ranks)


def place_all(problem: Problem, choice_U: Ints, by_memory: bool = False) -> Placement | int:
    """A whole plan from a choice for every unit, or the unit for which the rule finds no room.

    Uniform units lie everywhere, so they come first and all at once; then what has the least freedom; then the
    costliest. `by_memory` goes by bytes instead: what is largest is placed while there is room for it.
    """
    state = Placement(problem)
    units = np.arange(len(problem.units))
    ms_U, bytes_U2 = problem.ms_UJ[units, choice_U], problem.bytes_UJ2[units, choice_U]
    place_U, pinned_U = problem.place_J[choice_U], problem.pinned_U
    everywhere_U = (place_U == int(Place.UNIFORM)) & ~pinned_U
    state.load_W += ms_U[everywhere_U].sum() * problem.slowness_W
    state.free_W2 -= bytes_U2[everywhere_U].sum(axis=0)
    state.choice_U = choice_U.copy()
    all_ranks = np.arange(problem.world_size)
    for unit in np.flatnonzero(everywhere_U):
        state.ranks_U[unit] = all_ranks
    if (state.free_W2 < 0).any():
        taken_U = np.where(everywhere_U, bytes_U2.sum(axis=1), -1)
        return int(taken_U.argmax())
    if by_memory:
        count_U = problem.count_UJ[units, choice_U]
        share_2 = (bytes_U2 * count_U[:, None]).sum(axis=0) / np.maximum(problem.caps_W2.sum(axis=0), 1)
        state.fair = (
            max(float((ms_U * count_U).sum()) / problem.world_size, 1e-12),
            max(float(share_2.max()), 1e-12),
        )
    size_U = (bytes_U2 / np.maximum(problem.caps_W2.max(axis=0), 1)).max(axis=1) if by_memory else ms_U
    single_U = (place_U == int(Place.DEVICE)) & ~pinned_U
    order = np.lexsort((-size_U, single_U, ~pinned_U))
    for unit in order[~everywhere_U[order] & ~single_U[order]].tolist():
        column = int(choice_U[unit])
        ranks = state.find(unit, column)
        if ranks is None:
            return unit
        state.put(unit, column, ranks)
    state.fair = None
    failed = _place_single(state, order[single_U[order]].tolist(), ms_U, bytes_U2)
    return state if failed is None else failed


def _place_single(state: Placement, units: Sequence[int], ms_U: Array, bytes_U2: Array) -> int | None:
    """Rectangles that may lie anywhere, in the given order, on the least loaded rank with room: a heap of ranks.

    Returns the unit that found no room, or None.
    """
    problem = state.problem
    count_U = problem.count_UJ[np.arange(len(problem.units)), state.choice_U].tolist()
    load, slow = state.load_W.tolist(), problem.slowness_W.tolist()
    hbm, ddr = state.free_W2[:, 0].tolist(), state.free_W2[:, 1].tolist()
    ms_list, bytes_list = ms_U.tolist(), bytes_U2.tolist()
    heap = list(zip(load, range(len(load))))
    heapq.heapify(heap)
    taken: list[list[int]] = []
    full: list[tuple[float, int]] = []  # those without room for the unit before; they have none for a larger one either
    last_hbm = last_ddr = 0.0
    for unit in units:
        ms, (need_hbm, need_ddr) = ms_list[unit], bytes_list[unit]
        if full and (need_hbm < last_hbm or need_ddr < last_ddr):
            for entry in full:
                heapq.heappush(heap, entry)
            full = []
        last_hbm, last_ddr = need_hbm, need_ddr
        ranks = []
        for _ in range(count_U[unit]):
            while heap and (hbm[heap[0][1]] < need_hbm or ddr[heap[0][1]] < need_ddr):
                full.append(heapq.heappop(heap))
            if not heap:
                return unit
            rank = heap[0][1]
            load[rank] += ms * slow[rank]
            hbm[rank] -= need_hbm
            ddr[rank] -= need_ddr
            heapq.heapreplace(heap, (load[rank], rank))
            ranks.append(rank)
        taken.append(ranks)
    ends = list(accumulate(map(len, taken)))
    all_ranks = np.array([rank for ranks in taken for rank in ranks], dtype=np.int64)
    for unit, start, end in zip(units, [0, *ends], ends):
        state.ranks_U[unit] = all_ranks[start:end]
    state.load_W = np.array(load)
    state.free_W2 = np.stack([hbm, ddr], axis=1)
    return None
