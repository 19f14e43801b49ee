"""Improving a plan by small steps: whatever relieves the busiest rank without burdening another one as much.

Three steps, in this order: move one of its rectangles, exchange one or two for lighter ones elsewhere, or give one of
its tables another sharding type. A step is taken when it lowers the plan's cost (the busiest rank's load), or leaves
the cost and evens out the rest. Where no step helps, `shake` takes a few tables out at once and puts them back, each
where it then costs least ("ruin and recreate": Schrimpf et al., Journal of Computational Physics 159, 2000).

The dice start from a fixed seed and there is no clock: every process takes the same steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys_edu.distributed.planner.cost import Array
from recsys_edu.distributed.planner.options import Place
from recsys_edu.distributed.planner.placement import Placement, Problem

MOST_UNITS = 48  # of the busiest rank whose other options are tried at each step
BUDGET = 60_000_000  # array elements looked at, over all steps: the bound on the time
PER_LOOK = 400  # what looking at one option costs besides its arrays
MOST_TARGETS = 3  # ranks with which an exchange is tried
MOST_PAIRED = 14  # rectangles of a rank that are exchanged in pairs
PATIENCE = 4  # attempts in a row that were in vain; more where the plan is far from the bound
MOST_PATIENCE = 16
GOOD_ENOUGH = 1.0025  # of the bound: no estimate is as exact as that
DOUBLINGS = 7  # of the exponent with which loads count in `unevenness`


def improve(start: Placement, bound_ms: float, thorough: bool = True) -> tuple[Placement, int]:
    """The improved plan and the number of steps taken; `start` stays as it is. Not `thorough`: moves and swaps only."""
    plan, steps, spent = start.copy(), 0, 0
    look = plan.problem.world_size + PER_LOOK
    while plan.cost_ms > bound_ms * GOOD_ENOUGH and spent < BUDGET:
        rank = int(plan.load_W.argmax())
        units = plan.units_on(rank)
        spent += look * len(units)
        if _move_or_swap(plan, rank, units, pairs=thorough):
            steps += 1
            continue
        if not thorough:
            break
        tried, better = _recut(plan, rank, units)
        spent += tried * look
        if not better:
            break
        steps += 1
    return plan, steps


def promising(plan: Placement) -> NDArray[np.bool_]:
    """[U, J] the options that a cheaper plan than this one may have.

    None that takes a rank longer than the plan costs; and none whose extra work, with the cheapest option of every
    other unit, makes more than all ranks do within the plan's cost.
    """
    problem = plan.problem
    least_U = np.where(problem.valid_UJ, problem.work_UJ, np.inf).min(axis=1)
    slack = plan.cost_ms * float((1 / problem.slowness_W).sum()) - least_U.sum()
    quick_UJ = problem.ms_UJ * problem.slowness_W.min() <= plan.cost_ms
    return problem.valid_UJ & quick_UJ & (problem.work_UJ - least_U[:, None] <= slack)


def shake(start: Placement, bound_ms: float, rounds: int) -> tuple[Placement, int]:
    """The best plan of `rounds` attempts to rebuild a part of it, and how many plans were made."""
    dice = np.random.default_rng(0)
    best, made, in_vain = start, 0, 0
    num_units, options_UJ = len(start.ranks_U), promising(start)
    for _ in range(rounds if num_units > 1 else 0):
        gap = best.cost_ms / bound_ms - 1 if bound_ms > 0 else 0.0
        if gap <= GOOD_ENOUGH - 1 or in_vain >= min(PATIENCE + 40 * gap, MOST_PATIENCE):
            break
        in_vain += 1
        trial = best.copy()
        busiest = trial.units_on(int(trial.load_W.argmax()))
        some = min(int(dice.integers(2, 6)), num_units)
        out = {int(dice.choice(busiest)), *dice.choice(num_units, size=some, replace=False).tolist()}
        if not _rebuild(trial, options_UJ, sorted(out, key=lambda u: -trial.problem.work_UJ[u, trial.choice_U[u]])):
            continue
        trial, more = improve(trial, bound_ms, thorough=False)
        made += 1 + more
        if _better(trial, best):
            in_vain = 0 if trial.cost_ms < best.cost_ms * (1 - 1e-3) else in_vain
            best = trial
    return best, made


def _better(plan: Placement, other: Placement) -> bool:
    """Cheaper; or as cheap and more even."""
    mine, theirs = plan.cost_ms, other.cost_ms
    evener = unevenness(plan.load_W, theirs) < unevenness(other.load_W, theirs) * (1 - 1e-9)
    return mine < theirs * (1 - 1e-9) or (mine <= theirs * (1 + 1e-9) and evener)


def unevenness(load_W: Array, top: float) -> float:
    """How many ranks are about as busy as the busiest: the sum of (load / top)^128.

    It falls when one of several equally busy ranks is relieved, also where that makes more work for ranks with time to
    spare; the sum of squares would not.
    """
    share_W = load_W / top
    for _ in range(DOUBLINGS):
        share_W = share_W * share_W
    return float(share_W.sum())


def _rebuild(plan: Placement, options_UJ: NDArray[np.bool_], units: list[int]) -> bool:
    """Take units out and put them back one after the other, each with the option that then costs least."""
    for unit in units:
        plan.remove(unit)
    problem = plan.problem
    for unit in units:
        best: tuple[float, float, int, np.ndarray] | None = None
        for column in np.flatnonzero(options_UJ[unit]).tolist():
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


def _move_or_swap(plan: Placement, rank: int, units: list[int], pairs: bool) -> bool:
    """One rectangle of `rank` to another rank, perhaps against a lighter one from there; True where it helped."""
    mine = [u for u in units if _movable(plan, u)]
    return _move(plan, rank, mine) or any(
        _exchange(plan, rank, mine, most_together) for most_together in ((1, 2) if pairs else (1,))
    )


def _move(plan: Placement, rank: int, mine: list[int]) -> bool:
    """The one rectangle of `rank` to the one other rank that lowers the load of both together most."""
    if not mine:
        return False
    problem, top, slow_W = plan.problem, plan.load_W[rank], plan.problem.slowness_W
    columns = plan.choice_U[mine]  # M: the movable units
    ms_M, need_M2 = problem.ms_UJ[mine, columns], problem.bytes_UJ2[mine, columns]
    fits_MW = (plan.free_W2 >= need_M2[:, None]).all(axis=-1)
    for i in np.flatnonzero(problem.pinned_U[mine]).tolist():
        fits_MW[i] &= problem.mask_of(mine[i])
    fits_MW[:, rank] = False
    after_MW = np.where(fits_MW, plan.load_W + ms_M[:, None] * slow_W, np.inf)
    target_M = after_MW.argmin(axis=1)
    result_M = np.maximum(after_MW[np.arange(len(mine)), target_M], top - ms_M * slow_W[rank])
    best = int(result_M.argmin())
    if result_M[best] >= top * (1 - 1e-9):
        return False
    _shift(plan, mine[best], rank, int(target_M[best]))
    return True


def _exchange(plan: Placement, rank: int, mine: list[int], most_together: int) -> bool:
    """The best exchange of one or two rectangles for as many (or one more, or less) with one of the idlest ranks."""
    problem, top = plan.problem, plan.load_W[rank]
    if not mine:
        return False
    best: tuple[float, int, list[int], list[int]] = (top * (1 - 1e-9), -1, [], [])
    give, give_ms, give_bytes = _bundles(plan, mine, most_together)
    for target in np.argsort(plan.load_W, kind="stable")[:MOST_TARGETS].tolist():
        theirs = [u for u in plan.units_on(target) if _movable(plan, u)] if target != rank else []
        if not theirs:
            continue
        take, take_ms, take_bytes = _bundles(plan, theirs, most_together)
        moved = give_ms[:, None] - take_ms[None, :]
        here = top - moved * problem.slowness_W[rank]
        there = plan.load_W[target] + moved * problem.slowness_W[target]
        after = np.where(moved > 0, np.maximum(here, there), np.inf)
        for flat in np.argsort(after, axis=None)[:4].tolist() if after.size <= 400 else [int(after.argmin())]:
            i, k = divmod(flat, len(take))
            if after[i, k] >= best[0]:
                break
            needs_2 = give_bytes[i] - take_bytes[k]
            fits = (plan.free_W2[target] >= needs_2).all() and (plan.free_W2[rank] >= -needs_2).all()
            allowed = all(_may(problem, u, target) for u in give[i]) and all(_may(problem, u, rank) for u in take[k])
            if fits and allowed:
                best = (float(after[i, k]), target, give[i], take[k])
                break
    _, target, given, taken = best
    for unit in given:
        _shift(plan, unit, rank, target)
    for unit in taken:
        _shift(plan, unit, target, rank)
    return target >= 0


def _bundles(plan: Placement, units: list[int], most_together: int) -> tuple[list[list[int]], Array, Array]:
    """Single units, and pairs of the heaviest: the units, their milliseconds, their bytes."""
    problem = plan.problem
    ms_U, bytes_U2 = problem.ms_UJ[units, plan.choice_U[units]], problem.bytes_UJ2[units, plan.choice_U[units]]
    bundles = [[unit] for unit in units]
    if most_together == 1 or len(units) < 2:
        return bundles, ms_U, bytes_U2
    heaviest = np.argsort(-ms_U, kind="stable")[:MOST_PAIRED]
    first, second = (heaviest[index] for index in np.triu_indices(len(heaviest), 1))
    bundles += [[units[a], units[b]] for a, b in zip(first.tolist(), second.tolist())]
    return (
        bundles,
        np.concatenate([ms_U, ms_U[first] + ms_U[second]]),
        np.concatenate([bytes_U2, bytes_U2[first] + bytes_U2[second]]),
    )


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
    top = plan.cost_ms
    before = (top * (1 - 1e-9), unevenness(plan.load_W, top) * (1 - 1e-9))
    best: tuple[float, float, int, int, np.ndarray] | None = None
    tried, options_UJ = 0, promising(plan)
    for unit in heaviest:
        old, old_ranks = int(plan.choice_U[unit]), plan.ranks_U[unit]
        plan.remove(unit)
        for column in np.flatnonzero(options_UJ[unit]).tolist():
            tried += 1
            ranks = plan.find(unit, column)
            if ranks is None or (column == old and np.array_equal(ranks, old_ranks)):
                continue
            load_W = plan.load_W.copy()
            np.add.at(load_W, ranks, problem.ms_UJ[unit, column] * problem.slowness_W[ranks])
            cost, evenness = float(load_W.max()), unevenness(load_W, top)
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
