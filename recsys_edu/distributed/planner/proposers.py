"""TorchRec's proposers: one option per table, again and again, learning from what became of the last one.

Counterpart: torchrec.distributed.planner.proposers
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from recsys_edu.distributed.planner.offload_proposer import EmbeddingOffloadScaleupProposer
from recsys_edu.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology

__all__ = [
    "DynamicProgrammingProposer",
    "EmbeddingOffloadScaleupProposer",
    "GreedyProposer",
    "GridSearchProposer",
    "UniformProposer",
    "proposers_to_proposals_list",
]

MAX_PROPOSALS = 10_000


def _by_table(search_space: Sequence[ShardingOption]) -> dict[str, list[ShardingOption]]:
    groups: dict[str, list[ShardingOption]] = {}
    for option in search_space:
        groups.setdefault(option.fqn, []).append(option)
    return groups


def _slowest(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards)  # type: ignore[union-attr]


class GreedyProposer(Proposer):
    """Starts with the fastest option of each table; after each feedback the table that costs most takes its next one.

    `use_depth` goes by the slowest shard of an option, else by the sum of its shards. `threshold` ends the search
    after so many proposals in a row that were not better.

    Counterpart: torchrec.distributed.planner.proposers.GreedyProposer
    """

    def __init__(self, use_depth: bool = True, threshold: int | None = None) -> None:
        self._cost = _slowest if use_depth else (lambda option: option.total_perf)
        self._threshold = threshold
        self._options: dict[str, list[ShardingOption]] = {}
        self._next: dict[str, int] = {}
        self._proposal: list[ShardingOption] | None = None
        self._best, self._in_vain = math.inf, 0

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        self._options = {name: sorted(options, key=self._cost) for name, options in _by_table(search_space).items()}
        self._next = dict.fromkeys(self._options, 0)
        self._proposal = [options[0] for options in self._options.values()]
        self._best, self._in_vain = math.inf, 0

    def propose(self) -> list[ShardingOption] | None:
        return self._proposal

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        improved = partitionable and perf_rating is not None and perf_rating < self._best
        if improved:
            self._best = perf_rating  # type: ignore[assignment]
        self._in_vain = 0 if improved else self._in_vain + 1
        movable = [name for name, index in self._next.items() if index + 1 < len(self._options[name])]
        if not movable or (self._threshold is not None and self._in_vain > self._threshold):
            self._proposal = None
            return

        def burden(name: str) -> tuple[float, ...]:
            option = self._options[name][self._next[name]]
            used = option.total_storage
            # What could not be placed is eased by the table that takes most memory, else by the slowest.
            return (self._cost(option), 0.0) if partitionable else (used.hbm, used.ddr)

        heaviest = max(movable, key=burden)
        self._next[heaviest] += 1
        self._proposal = [options[self._next[name]] for name, options in self._options.items()]


class UniformProposer(Proposer):
    """The same sharding type for all tables, each with its fastest kernel; types that a table lacks are left out.

    Counterpart: torchrec.distributed.planner.proposers.UniformProposer
    """

    def __init__(self, use_depth: bool = True) -> None:
        self._cost = _slowest if use_depth else (lambda option: option.total_perf)
        self._proposals: list[list[ShardingOption]] = []

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        groups = _by_table(search_space)
        self._proposals = []
        for sharding_type in dict.fromkeys(option.sharding_type for option in search_space):
            same = [[o for o in options if o.sharding_type == sharding_type] for options in groups.values()]
            if all(same):
                self._proposals.append([min(options, key=self._cost) for options in same])

    def propose(self) -> list[ShardingOption] | None:
        return self._proposals[0] if self._proposals else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._proposals = self._proposals[1:]


class GridSearchProposer(Proposer):
    """Every combination of options; none at all where there are more than `max_proposals`.

    Counterpart: torchrec.distributed.planner.proposers.GridSearchProposer
    """

    def __init__(self, max_proposals: int = MAX_PROPOSALS) -> None:
        self._max_proposals = max_proposals
        self._combinations: Iterable[tuple[ShardingOption, ...]] = iter(())
        self._proposal: list[ShardingOption] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        options = list(_by_table(search_space).values())
        small = math.prod(len(each) for each in options) <= self._max_proposals
        self._combinations = itertools.product(*options) if small else iter(())
        self.feedback(False)

    def propose(self) -> list[ShardingOption] | None:
        return self._proposal

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        following = next(iter(self._combinations), None)
        self._proposal = None if following is None else list(following)


class DynamicProgrammingProposer(Proposer):
    """The fastest choice for every budget of device memory: a knapsack over memory cut into bins.

    The first proposal takes the option of least memory for each table; its feedback brings the topology, and with it
    the budget. `hbm_bins_per_device` sets how fine the bins are. Source: the multiple-choice knapsack, Kellerer,
    Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.

    Counterpart: torchrec.distributed.planner.proposers.DynamicProgrammingProposer
    """

    def __init__(self, hbm_bins_per_device: int = 100) -> None:
        self._bins_per_device = max(hbm_bins_per_device, 1)
        self._options: list[list[ShardingOption]] = []
        self._proposals: list[list[ShardingOption]] = []
        self._planned = False

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        self._options = list(_by_table(search_space).values())
        self._proposals = [[min(each, key=lambda option: option.total_storage.hbm) for each in self._options]]
        self._planned = False

    def propose(self) -> list[ShardingOption] | None:
        return self._proposals[0] if self._proposals else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._proposals = self._proposals[1:]
        if not self._planned and storage_constraint is not None:
            self._planned = True
            self._proposals = self._solve(storage_constraint)

    def _solve(self, topology: Topology) -> list[list[ShardingOption]]:
        kind = "ddr" if topology.compute_device == "cpu" else "hbm"
        capacity = sum(getattr(device.storage, kind) for device in topology.devices)
        num_bins = self._bins_per_device * len(topology.devices)
        bin_bytes = max(capacity / num_bins, 1)
        best = np.full(num_bins + 1, np.inf)  # by bins used: the least time
        best[0] = 0
        came_from = []
        for options in self._options:
            sizes = [math.ceil(getattr(option.total_storage, kind) / bin_bytes) for option in options]
            times = [option.total_perf for option in options]
            after, choice = np.full(num_bins + 1, np.inf), np.full(num_bins + 1, -1)
            for index, (size, time) in enumerate(zip(sizes, times)):
                if size > num_bins:
                    continue
                shifted = np.full(num_bins + 1, np.inf)
                shifted[size:] = best[: num_bins + 1 - size] + time
                better = shifted < after
                after[better], choice[better] = shifted[better], index
            came_from.append((choice, sizes))
            best = after
        # Larger budgets are worth proposing only where they buy time.
        proposals, fastest = [], np.inf
        for used in range(num_bins + 1):
            if best[used] < fastest:
                fastest = best[used]
                proposals.append(self._trace(came_from, used))
        return proposals[::-1]

    def _trace(self, came_from: list[tuple[np.ndarray, list[int]]], used: int) -> list[ShardingOption]:
        picked = []
        for options, (choice, sizes) in zip(self._options[::-1], came_from[::-1]):
            index = int(choice[used])
            picked.append(options[index])
            used -= sizes[index]
        return picked[::-1]


def proposers_to_proposals_list(
    proposers_list: list[Proposer], search_space: list[ShardingOption]
) -> list[list[ShardingOption]]:
    """What all proposers would propose when every proposal fits, without repetitions."""
    proposals: dict[tuple[int, ...], list[ShardingOption]] = {}
    for proposer in proposers_list:
        proposer.load(search_space)
        while (proposal := proposer.propose()) is not None:
            proposals.setdefault(tuple(sorted(hash(option) for option in proposal)), proposal)
            proposer.feedback(True, proposal, 1.0)
    return list(proposals.values())
