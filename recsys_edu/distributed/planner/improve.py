"""Improving a plan by small steps: whatever relieves the busiest rank without burdening another one as much.

Three steps, in this order: move one of its rectangles, swap one with a lighter one elsewhere, or give one of its
tables another sharding type. A step is taken when it lowers the plan's cost (the load of the busiest rank), or leaves
the cost and evens out the rest. Where no step helps, `shake` takes a few tables out at once and puts them back, each
where it then costs least ("ruin and recreate": Schrimpf et al., Journal of Computational Physics 159, 2000).

The dice start from a fixed seed and there is no clock: every process takes the same steps.
"""

from __future__ import annotations

import numpy as np

from recsys_edu.distributed.planner.options import Place
from recsys_edu.distributed.planner.placement import Placement, Problem

MOST_UNITS = 48  # of the busiest rank whose other options are tried at each step
BUDGET = 60_000_000  # array elements looked at, over all steps: the bound on the time
PER_LOOK = 400  # what looking at one option costs besides its arrays
PATIENCE = 10  # attempts in a row that were in vain
GOOD_ENOUGH = 1.001


def improve(start: Placement, bound_ms: float, recut: bool = True) -> tuple[Placement, int]:
    """The improved plan and the number of steps taken; `start` stays as it is. `recut` allows other sharding types."""
    plan, steps, spent = start.copy(), 0, 0
    look = plan.problem.world_size + PER_LOOK
    while plan.cost_ms > bound_ms * GOOD_ENOUGH and spent < BUDGET:
        rank = int(plan.load_W.argmax())
        units = plan.units_on(rank)
        spent += look * len(units)
        if _move_or_swap(plan, rank, units):
            steps += 1
            continue
        if not recut:
            break
        tried, better = _recut(plan, rank, units)
        spent += tried * look
        if not better:
            break
        steps += 1
    return plan, steps


def shake(start: Placement, bound_ms: float, rounds: int) -> tuple[Placement, int]:
    """The best plan of `rounds` attempts to rebuild a part of it, and how many plans were made."""
    dice = np.random.default_rng(0)
    best, made, in_vain = start, 0, 0
    num_units = len(start.ranks_U)
    for _ in range(rounds if num_units > 1 else 0):
        if best.cost_ms <= bound_ms * GOOD_ENOUGH or in_vain >= PATIENCE:
            break
        in_vain += 1
        trial = best.copy()
        busiest = trial.units_on(int(trial.load_W.argmax()))
        some = min(int(dice.integers(2, 6)), num_units)
        out = {int(dice.choice(busiest)), *dice.choice(num_units, size=some, replace=False).tolist()}
        if not _rebuild(trial, sorted(out, key=lambda u: -trial.problem.work_UJ[u, trial.choice_U[u]])):
            continue
        trial, more = improve(trial, bound_ms, recut=False)
        made += 1 + more
        if _better(trial, best):
            in_vain = 0 if trial.cost_ms < best.cost_ms * (1 - 1e-3) else in_vain
            best = trial
    return best, made


def _better(plan: Placement, other: Placement) -> bool:
    """Cheaper; or as cheap and more even."""
    mine, theirs = plan.cost_ms, other.cost_ms
    evener = float((plan.load_W**2).sum()) < float((other.load_W**2).sum()) * (1 - 1e-9)
    return mine < theirs * (1 - 1e-9) or (mine <= theirs * (1 + 1e-9) and evener)


def _rebuild(plan: Placement, units: list[int]) -> bool:
    """Take units out and put them back one after the other, each with the option that then costs least."""
    for unit in units:
        plan.remove(unit)
    problem = plan.problem
    for unit in units:
        best: tuple[float, float, int, np.ndarray] | None = None
        for column in np.flatnonzero(problem.valid_UJ[unit]).tolist():
            ranks = plan.find(unit, column)
            if ranks is None:
                continue
            # Where the busiest rank does not care, the least work counts: other units are still to come.
            key = (plan.cost_with(unit, column, ranks), float(problem.work_UJ[unit, column]))
            if best is None or key < best[:2]:
                best = (*key, column, ranks)
        if best is None:
            return False
        plan.put(unit, best[2], best[3])
    return True


def _movable(plan: Placement, unit: int) -> bool:
    return plan.problem.places_J[plan.choice_U[unit]] is Place.DEVICE


def _move_or_swap(plan: Placement, rank: int, units: list[int]) -> bool:
    """One rectangle of `rank` to another rank, perhaps against a lighter one from there; True where it helped."""
    problem = plan.problem
    mine = [u for u in units if _movable(plan, u)]
    top, slow_W = plan.load_W[rank], problem.slowness_W
    best = (top * (1 - 1e-9), None)
    for unit in mine:
        ms, need_2 = problem.ms_UJ[unit, plan.choice_U[unit]], problem.bytes_UJ2[unit, plan.choice_U[unit]]
        fits_W = (plan.free_W2 >= need_2).all(axis=1)
        mask_W = problem.mask_of(unit)
        fits_W = fits_W if mask_W is None else fits_W & mask_W
        fits_W[rank] = False
        after_W = np.where(fits_W, plan.load_W + ms * slow_W, np.inf)
        target = int(after_W.argmin())
        result = max(after_W[target], top - ms * slow_W[rank])
        if result < best[0]:
            best = (result, (unit, target, None))
    if best[1] is None:
        best = _best_swap(plan, rank, mine, best)
    if best[1] is None:
        return False
    unit, target, partner = best[1]
    _shift(plan, unit, rank, target)
    if partner is not None:
        _shift(plan, partner, target, rank)
    return True


def _best_swap(plan: Placement, rank: int, mine: list[int], best: tuple) -> tuple:
    """The best exchange with one of the least loaded ranks."""
    problem = plan.problem
    if not mine:
        return best
    targets = [t for t in np.argsort(plan.load_W, kind="stable")[:4].tolist() if t != rank]
    for target in targets:
        theirs = [u for u in plan.units_on(target) if _movable(plan, u)]
        if not theirs:
            continue
        mine_ms = problem.ms_UJ[mine, plan.choice_U[mine]][:, None]
        their_ms = problem.ms_UJ[theirs, plan.choice_U[theirs]][None, :]
        delta = mine_ms - their_ms
        here = plan.load_W[rank] - delta * problem.slowness_W[rank]
        there = plan.load_W[target] + delta * problem.slowness_W[target]
        mine_bytes = problem.bytes_UJ2[mine, plan.choice_U[mine]][:, None]
        their_bytes = problem.bytes_UJ2[theirs, plan.choice_U[theirs]][None, :]
        fits = (plan.free_W2[target] >= mine_bytes - their_bytes).all(axis=-1)
        fits &= (plan.free_W2[rank] >= their_bytes - mine_bytes).all(axis=-1)
        result = np.where(fits & (delta > 0), np.maximum(here, there), np.inf)
        i, k = divmod(int(result.argmin()), len(theirs))
        if result[i, k] < best[0] and _may(problem, mine[i], target) and _may(problem, theirs[k], rank):
            best = (result[i, k], (mine[i], target, theirs[k]))
    return best


def _may(problem: Problem, unit: int, rank: int) -> bool:
    ranks = problem.ranks_U[unit]
    return ranks is None or rank in ranks


def _shift(plan: Placement, unit: int, source: int, target: int) -> None:
    column, ranks = int(plan.choice_U[unit]), plan.ranks_U[unit].copy()
    ranks[np.flatnonzero(ranks == source)[0]] = target
    plan.remove(unit)
    plan.put(unit, column, ranks)


def _recut(plan: Placement, rank: int, units: list[int]) -> tuple[int, bool]:
    """Another option for one of the units on `rank`; (options looked at, whether one helped)."""
    problem = plan.problem
    heaviest = sorted(units, key=lambda u: -problem.ms_UJ[u, plan.choice_U[u]])[:MOST_UNITS]
    before = (plan.cost_ms * (1 - 1e-9), float((plan.load_W**2).sum()) * (1 - 1e-9))
    best: tuple[float, float, int, int, np.ndarray] | None = None
    tried = 0
    for unit in heaviest:
        old, old_ranks = int(plan.choice_U[unit]), plan.ranks_U[unit]
        plan.remove(unit)
        if plan.cost_ms < before[0] or len(old_ranks) > 1:
            for column in np.flatnonzero(problem.valid_UJ[unit]).tolist():
                tried += 1
                ranks = plan.find(unit, column)
                if ranks is None or (column == old and np.array_equal(ranks, old_ranks)):
                    continue
                load_W = plan.load_W.copy()
                np.add.at(load_W, ranks, problem.ms_UJ[unit, column] * problem.slowness_W[ranks])
                cost, evenness = float(load_W.max()), float((load_W**2).sum())
                helps = cost < before[0] or (cost <= before[0] * (1 + 1e-9) and evenness < before[1])
                if helps and (best is None or (cost, evenness) < best[:2]):
                    best = (cost, evenness, unit, column, ranks)
        plan.put(unit, old, old_ranks)
    if best is None:
        return tried, False
    _, _, unit, column, ranks = best
    plan.remove(unit)
    plan.put(unit, column, ranks)
    return tried, True
