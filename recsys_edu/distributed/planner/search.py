"""Finding a good plan: choose an option per table, place it, improve it, and know how far from perfect it is.

A choice trades two prices. A *ceiling* on the milliseconds of any one rectangle forces the heavy tables to be cut;
a *price of memory* turns to options that use less of it. For a given ceiling and price the best option of each table
is independent of the others, so thousands of tables are one `argmin`:

    option = argmin over options below the ceiling of   work on all ranks  +  price x memory on all ranks

The search walks over ceilings (where memory is tight also over ceilings on the memory of a rectangle), raises the price
where memory does not suffice, places each choice (placement.py), and improves the best plans by moving, swapping and
re-cutting what the busiest rank carries (improve.py).

`lower_bound_ms` says what no plan can beat: all work spread perfectly, with the cheapest option of each table. The
price of memory there is a Lagrange multiplier: Fisher, "The Lagrangian relaxation method", Management Science, 1981.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from recsys_edu.distributed.planner.cost import Array
from recsys_edu.distributed.planner.improve import GOOD_ENOUGH, improve, shake
from recsys_edu.distributed.planner.placement import Ints, Placement, Problem, place_all

PRICES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4, 1e8)
"""Of all memory, as multiples of the work of the cheapest options."""

SHARES = (1.0, 0.55, 0.1)
"""Of a rank's memory, for one rectangle: two that fill a rank leave no room for anything quick beside them."""

TIGHT = 0.3  # of all memory: below it only the first share is tried
IDLE = 1.03  # the busiest rank's load over the mean above which full ranks are looked for
TRY_ON = 20_000  # units placed by the walk, until which it also mixes choices that it has seen with dearer ones
MOST_CEILINGS = 14
FINALISTS = 3
MOST_REPAIRS = 12
MOST_MIXTURES = 3
SHAKES = 60


@dataclass(frozen=True)
class Found:
    """The best plan, how many were proposed and how many of those could be placed, and what no plan can beat."""

    placement: Placement
    num_proposals: int
    num_plans: int
    lower_bound_ms: float

    @property
    def gap(self) -> float:
        """How much worse than the bound the plan is at most, as a share of the bound."""
        return self.placement.cost_ms / self.lower_bound_ms - 1 if self.lower_bound_ms > 0 else 0.0


def search(problem: Problem) -> Found | None:
    """A plan, the same one in every process; None where nothing was found that fits."""
    walk = _Walk(problem if _host_memory_may_help(problem) else _on_device(problem))
    for _ in _proposals(walk):
        pass
    if not walk.plans:
        return None
    bound = lower_bound_ms(problem, min(cost for cost, *_ in walk.plans))
    plans = sorted(walk.plans, key=lambda plan: plan[0])[:FINALISTS]
    best, steps = None, 0
    for _, _, placement in plans:
        better, more = improve(placement, bound)
        steps += more
        if best is None or better.cost_ms < best.cost_ms:
            best = better
        if best.cost_ms <= bound * GOOD_ENOUGH:
            break
    assert best is not None
    shaken, more = shake(best, bound, SHAKES)
    if shaken is not best:
        shaken, few = improve(shaken, bound)
        best, steps = shaken, steps + few
    steps += more
    best.problem = problem  # with every option again, for whoever asks about them
    return Found(best, walk.num_proposals + steps, walk.num_plans + steps, min(bound, best.cost_ms))


def _host_memory_may_help(problem: Problem) -> bool:
    """Whether device memory is tight, or too small for some way to cut some table that host memory allows.

    Elsewhere every option on the host has a faster twin on the device that fits as well.
    """
    if not problem.on_host_J.any():
        return False
    on_device_UJ = problem.valid_UJ & ~problem.on_host_J
    if not on_device_UJ.any(axis=1).all():
        return True
    if np.where(on_device_UJ, problem.memory_UJ, np.inf).min(axis=1).sum() > TIGHT:
        return True
    types = [sharding_type for sharding_type, _ in problem.grid.pairs]
    for sharding_type in set(types):
        same_J = np.array([each == sharding_type for each in types])
        any_UJ, device_UJ = problem.valid_UJ & same_J, on_device_UJ & same_J
        if (any_UJ.any(axis=1) & ~device_UJ.any(axis=1)).any():
            return True
    return False


def _on_device(problem: Problem) -> Problem:
    """The problem without host memory for what a GPU looks up."""
    return replace(problem, valid_UJ=problem.valid_UJ & ~problem.on_host_J) if problem.on_host_J.any() else problem


def first_plan(problem: Problem) -> Placement | None:
    """The first plan that `search` would come by, not improved; None exactly where it finds none."""
    walk = _Walk(problem)
    for _ in _proposals(walk):
        if walk.plans:
            return walk.plans[0][2]
    return None


def quick_plan(problem: Problem) -> Placement | None:
    """One attempt: every unit in the way that takes least memory."""
    return place_with_repairs(problem, choose(problem, np.inf, 1e12))


def _proposals(walk: _Walk) -> Iterator[None]:
    """The places that a search visits, one after the other: a coarse walk, a finer one near its best, all alike."""
    ceilings = _ceilings(walk.problem)
    coarse = ceilings if len(ceilings) <= 2 * MOST_CEILINGS else ceilings[_spread(len(ceilings), MOST_CEILINGS)]
    for share in walk.shares:
        for ceiling in coarse[::-1]:
            yield walk.visit(ceiling, share)
    if walk.plans and len(coarse) < len(ceilings):
        middle = min(walk.plans, key=lambda plan: plan[0])[1]
        position = int(np.searchsorted(coarse, middle))
        low, high = coarse[max(position - 1, 0)], coarse[min(position + 1, len(coarse) - 1)]
        near = ceilings[(ceilings > low) & (ceilings < high)]
        for share in walk.shares:
            for ceiling in near[_spread(len(near), MOST_CEILINGS)]:
                yield walk.visit(ceiling, share)
    cheapest_U = walk.cheapest()
    for column in range(len(walk.problem.places_J)):
        yield walk.visit_alike(column, cheapest_U)
    if walk.plans:
        yield walk.make_room()


class _Walk:
    """The plans seen on the way over ceilings; `price` only rises while ceilings change little."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.plans: list[tuple[float, float, Placement]] = []
        self.num_proposals = self.num_plans = 0
        self._seen: dict[bytes, float] = {}  # what the choices tried cost; inf: could not be placed
        self._two_memories = bool(problem.valid_UJ[:, problem.on_host_J].any())
        self._scale = float(np.where(problem.valid_UJ, problem.work_UJ, np.inf).min(axis=1).sum())
        self._first_price = 0
        least = np.where(problem.valid_UJ, problem.memory_UJ, np.inf).min(axis=1).sum()
        self.shares = SHARES if least > TIGHT else SHARES[:1]

    def visit(self, ceiling: float, share: float) -> None:
        """The cheapest price of memory at which the choice under these ceilings can be placed, and mixtures."""
        dearer_U = None
        for index in range(max(self._first_price - 1, 0), len(PRICES)):
            choice_U = choose(self.problem, ceiling, PRICES[index] * self._scale, share)
            known = choice_U.tobytes() in self._seen
            placed = self._try(choice_U, ceiling) < np.inf
            if dearer_U is not None and (self._two_memories or self._seen[dearer_U.tobytes()] == np.inf):
                self._mix(dearer_U, choice_U, ceiling, placed)
            # Dearer choices than a known one are known too, but for mixtures with those of the host's memory.
            try_on = known and self._two_memories and self.num_proposals * len(choice_U) < TRY_ON
            if placed and not try_on:
                self._first_price = index
                return
            dearer_U = choice_U

    def _mix(self, cheap_U: Ints, frugal_U: Ints, ceiling: float, frugal_fits: bool) -> None:
        """Between a choice that takes too much memory and a frugal one: only some units, the fewest, are frugal.

        Tables alike get options alike at any price, so without this either all or none of them would leave the device.
        Where the frugal choice does not fit either (the host is full), as many as the device needs.
        """
        units = self._by_saving(cheap_U, frugal_U)

        def fits(count: int) -> bool:
            mixed_U = cheap_U.copy()
            mixed_U[units[:count]] = frugal_U[units[:count]]
            return self._try(mixed_U, ceiling) < np.inf

        low, high = 0, len(units)
        if not frugal_fits:
            fewest = self._fewest(cheap_U, frugal_U, units)
            if fewest is not None:
                any(fits(count) for count in range(fewest, min(fewest + MOST_MIXTURES, high)))
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)

    def _fewest(self, cheap_U: Ints, frugal_U: Ints, units: Ints) -> int | None:
        """How many of `units` have to be frugal for all to fit into all ranks' memory together; None: never."""
        problem, all_units = self.problem, np.arange(len(cheap_U))
        bytes_UJ2 = problem.all_bytes_UJ2
        change_2 = bytes_UJ2[units, frugal_U[units]] - bytes_UJ2[units, cheap_U[units]]
        total_2 = bytes_UJ2[all_units, cheap_U].sum(axis=0) + np.concatenate([[[0, 0]], change_2.cumsum(axis=0)])
        fits = (total_2 <= problem.caps_W2.sum(axis=0)).all(axis=1)
        return int(fits.argmax()) if fits.any() else None

    def make_room(self) -> None:
        """Mixtures of the best plan so far with a more frugal choice, if full ranks stand idle while others work.

        That it all fits does not mean that memory has no price: a rank that two rectangles fill takes no other work.
        """
        cost, ceiling, best = min(self.plans, key=lambda plan: plan[0])
        if not fills_idle_ranks(best):
            return
        problem, all_units, cheap_U = self.problem, np.arange(len(best.choice_U)), best.choice_U
        seen = set()
        for price in PRICES[1:]:
            frugal_U = choose(problem, ceiling, price * self._scale)
            saves_U = problem.memory_UJ[all_units, frugal_U] < problem.memory_UJ[all_units, cheap_U]
            frugal_U = np.where(saves_U, frugal_U, cheap_U)
            if not saves_U.any() or frugal_U.tobytes() in seen:
                continue
            seen.add(frugal_U.tobytes())
            self._best_mixture(cheap_U, frugal_U, ceiling, cost)
            if len(seen) == 2:
                return

    def _best_mixture(self, cheap_U: Ints, frugal_U: Ints, ceiling: float, cost: float) -> None:
        """How many of the units had best be frugal: a look at a few numbers, then closer around the best of them."""
        units = self._by_saving(cheap_U, frugal_U)
        costs = {0: cost}
        low, high = 0, len(units)
        while True:
            wanted = [low + int(i) for i in _spread(high - low + 1, 5)]
            new = [count for count in wanted if count not in costs]
            if not new:
                return
            for count in new:
                mixed_U = cheap_U.copy()
                mixed_U[units[:count]] = frugal_U[units[:count]]
                costs[count] = self._try(mixed_U, ceiling)
            counts = sorted(costs)
            best = min(range(len(counts)), key=lambda i: costs[counts[i]])
            low, high = counts[max(best - 1, 0)], counts[min(best + 1, len(counts) - 1)]

    def _by_saving(self, cheap_U: Ints, frugal_U: Ints) -> Ints:
        """The units whose choices differ, those first whose memory is saved with the least additional work."""
        problem = self.problem
        units = np.flatnonzero(cheap_U != frugal_U)
        saved = problem.memory_UJ[units, cheap_U[units]] - problem.memory_UJ[units, frugal_U[units]]
        added = problem.work_UJ[units, frugal_U[units]] - problem.work_UJ[units, cheap_U[units]]
        return units[np.argsort(added / np.maximum(saved, 1e-12), kind="stable")]

    def cheapest(self) -> Ints:
        """The choice at the price of memory that has been reached."""
        return choose(self.problem, np.inf, PRICES[self._first_price] * self._scale)

    def visit_alike(self, column: int, cheapest_U: Ints) -> None:
        """The same option for every unit that has it; the others as in `cheapest_U`."""
        self._try(np.where(self.problem.valid_UJ[:, column], column, cheapest_U), np.inf)

    def _try(self, choice_U: Ints, ceiling: float) -> float:
        """Place a choice; its cost, inf where it does not fit."""
        key = choice_U.tobytes()
        if key in self._seen:
            return self._seen[key]
        self.num_proposals += 1
        placement = place_with_repairs(self.problem, choice_U)
        cost = self._seen[key] = np.inf if placement is None else placement.cost_ms
        if placement is not None:
            self.num_plans += 1
            self.plans.append((cost, ceiling, placement))
        return cost


def choose(problem: Problem, ceiling_ms: float, price_ms: float, share: float = 1.0) -> Ints:
    """Per unit the best option whose rectangles take at most so long and at most a share of a rank's memory.

    Where no option does, the one with the quickest rectangles of those within the share; or of all.
    """
    score_UJ = problem.work_UJ + price_ms * problem.memory_UJ
    small_UJ = problem.valid_UJ
    if share < 1.0:
        small_UJ = small_UJ & (problem.bytes_UJ2 <= share * problem.caps_W2.max(axis=0)).all(axis=-1)
    low_UJ = small_UJ & (problem.ms_UJ <= ceiling_ms)
    choice_U = np.where(low_UJ, score_UJ, np.inf).argmin(axis=1)
    none_U = ~low_UJ.any(axis=1)
    if none_U.any():
        allowed = np.where(small_UJ.any(axis=1)[:, None], small_UJ, problem.valid_UJ)[none_U]
        smallest = np.where(allowed, problem.ms_UJ[none_U], np.inf)
        choice_U[none_U] = smallest.argmin(axis=1)
    return choice_U


def place_with_repairs(problem: Problem, choice_U: Ints) -> Placement | None:
    """Place a choice; a unit that finds no room is spread over more ranks, and placing starts again.

    Tables alike get options alike from `choose`; here some of ten may end up cut otherwise, because nine filled the
    room. After half of the repairs 1, 2, 4, ... of them at once, for there may be a hundred.
    """
    choice_U = choice_U.copy()
    share_UJ = (problem.bytes_UJ2 / np.maximum(problem.caps_W2.max(axis=0), 1)).sum(axis=-1)
    share_UJ = np.where(problem.valid_UJ, share_UJ, np.inf)
    for repair in range(MOST_REPAIRS):
        placed = place_all(problem, choice_U)
        if isinstance(placed, int) or fills_idle_ranks(placed):
            by_memory = place_all(problem, choice_U, by_memory=True)
            if isinstance(placed, int) or (not isinstance(by_memory, int) and by_memory.cost_ms < placed.cost_ms):
                placed = by_memory
        if not isinstance(placed, int):
            return placed
        smaller_J = share_UJ[placed] < share_UJ[placed, choice_U[placed]] * (1 - 1e-9)
        if not smaller_J.any():
            return None
        alike_U = (choice_U == choice_U[placed]) & (share_UJ == share_UJ[placed]).all(axis=1)
        alike_U[placed] = False
        more = np.flatnonzero(alike_U)[: 2 ** max(repair - MOST_REPAIRS // 2, 0) - 1]
        choice_U[[placed, *more]] = np.where(smaller_J, problem.work_UJ[placed], np.inf).argmin()
    return None


def fills_idle_ranks(plan: Placement) -> bool:
    """Whether much memory is used and the busiest rank does clearly more than the mean: full ranks may stand idle."""
    problem = plan.problem
    mean = float((plan.load_W / problem.slowness_W).sum() / (1 / problem.slowness_W).sum())
    used = float((1 - plan.free_W2.sum(axis=0) / np.maximum(problem.caps_W2.sum(axis=0), 1)).max())
    return plan.cost_ms > mean * IDLE and used > TIGHT


def _ceilings(problem: Problem) -> Array:
    """The heights at which a choice changes, from the lowest at which every unit has an option."""
    ms_UJ = np.where(problem.valid_UJ, problem.ms_UJ, np.inf)
    floor = ms_UJ.min(axis=1).max()
    values = np.unique(ms_UJ[np.isfinite(ms_UJ) & (ms_UJ >= floor)])
    return values


def _spread(size: int, wanted: int) -> Ints:
    """About `wanted` indices, evenly over `size`, both ends included."""
    return np.unique(np.linspace(0, size - 1, min(size, wanted)).round().astype(np.int64)) if size else np.empty(0, int)


def lower_bound_ms(problem: Problem, known_ms: float) -> float:
    """What the busiest rank takes at least, in any plan; `known_ms` is what some plan takes.

    In a plan of cost t no rectangle takes longer than t, and the work of all ranks together is at most t x their
    speeds. The bound is the smallest t for which the cheapest options allow that.
    """
    speed = float((1 / problem.slowness_W).sum())
    fastest = float(problem.slowness_W.min())
    total_2 = problem.caps_W2.sum(axis=0)
    kind = 0 if total_2[0] > 0 else 1
    memory_UJ = problem.bytes_UJ2[..., kind] * problem.count_UJ / max(total_2[kind], 1)
    ms_UJ = np.where(problem.valid_UJ, problem.ms_UJ, np.inf) * fastest

    def least(t: float) -> float:
        """All work with the cheapest options below t, perfectly spread; it changes only where t reaches an option."""
        work_UJ = np.where(ms_UJ <= t, problem.work_UJ, np.inf)
        cheapest = work_UJ.min(axis=1).sum()
        prices_P = np.array([0.0, 0.3, 1.0, 3.0]) * cheapest
        priced_PUJ = work_UJ + prices_P[:, None, None] * memory_UJ
        return float((priced_PUJ.min(axis=2).sum(axis=1) - prices_P).max()) / speed

    floor = float(ms_UJ.min(axis=1).max())
    heights = np.unique(ms_UJ[(ms_UJ > floor) & (ms_UJ < known_ms)]).tolist()
    heights = [min(floor, known_ms), *heights, known_ms]
    low, high = 0, len(heights) - 1  # the first height from which on no more than the next one is needed
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if least(heights[middle]) <= heights[middle + 1] else (middle + 1, high)
    return min(max(heights[low], least(heights[low])), known_ms)
