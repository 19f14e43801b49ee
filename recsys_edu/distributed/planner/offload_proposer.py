"""Spending the device memory that is left on larger caches for the tables that lie in host memory.

    budget    |------------------------------|  HBM that a proposal leaves
    user      |====......|                      caches grow in proportion to what misses cost them,
    item      |==================|              a table that has grown whole moves into device memory

Counterpart: torchrec.distributed.planner.proposers.EmbeddingOffloadScaleupProposer, which proposers.py re-exports.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel
from recsys_edu.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology
from recsys_edu.distributed.planner.utils import BinarySearchPredicate

_CACHED = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_FUSED = EmbeddingComputeKernel.FUSED.value
_SEARCH_STEPS = 20  # the budget is found to this part of the memory that is left


class EmbeddingOffloadScaleupProposer(Proposer):
    """Starts with small caches, and looks for the largest budget of device memory for them that can still be placed.

    Only tables with the caching kernel, a `load_factor` and `stats` in their `cache_params` grow; of other tables the
    option with the least time is kept (`use_depth`: of its slowest shard, else of all). The search over budgets is a
    bisection, because a larger cache never makes a plan slower, only harder to place.

    Counterpart: torchrec.distributed.planner.proposers.EmbeddingOffloadScaleupProposer
    """

    def __init__(self, use_depth: bool = True) -> None:
        self._use_depth = use_depth
        self._enumerator: Enumerator | None = None
        self._start: list[ShardingOption] = []
        self._proposal: list[ShardingOption] | None = None
        self._search: BinarySearchPredicate | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        groups: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            groups.setdefault(option.fqn, []).append(option)

        def preference(option: ShardingOption) -> tuple[bool, float]:
            slowest = max(shard.perf.total for shard in option.shards)  # type: ignore[union-attr]
            scalable = bool(self.get_scalable_sharding_options([option]))
            return not scalable, slowest if self._use_depth else option.total_perf

        self._start = [copy.deepcopy(min(options, key=preference)) for options in groups.values()]
        self._enumerator, self._search = enumerator, None
        self.promote_high_prefetch_overheaad_table_to_hbm(enumerator, self._start)
        self._proposal = copy.deepcopy(self._start)

    def propose(self) -> list[ShardingOption] | None:
        return self._proposal

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """The first one brings the topology and with it the budget; the others steer the bisection."""
        if self._search is None:
            if not partitionable or storage_constraint is None or self._enumerator is None:
                self._proposal = None
                return
            ceiling = self.get_hbm_ceiling(self._start, self._enumerator)
            budget = max(min(self.get_budget(self._start, storage_constraint), ceiling), 0)
            self._search = BinarySearchPredicate(0, budget, budget // _SEARCH_STEPS)
        chosen = self._search.next(partitionable)
        self._proposal = None if chosen is None else self.next_plan(self._start, chosen, self._enumerator)

    @staticmethod
    def get_hbm_ceiling(starting_proposal: list[ShardingOption], enumerator: Enumerator) -> int:
        """Device memory of the proposal's growing tables were they whole there, in bytes."""
        growing = EmbeddingOffloadScaleupProposer.get_scalable_sharding_options(starting_proposal)
        return int(_fused_bytes(growing, enumerator).sum())

    @staticmethod
    def promote_high_prefetch_overheaad_table_to_hbm(
        enumerator: Enumerator | None, proposal: list[ShardingOption]
    ) -> None:
        """Tables whose cache takes longer to fill than their lookup takes move into device memory, in place."""
        promoted = False
        for option in EmbeddingOffloadScaleupProposer.get_scalable_sharding_options(proposal):
            perfs = [shard.perf for shard in option.shards if shard.perf is not None]
            if enumerator and any(p.prefetch_compute > p.fwd_compute + p.bwd_compute for p in perfs):
                _promote(option)
                promoted = True
        if promoted and enumerator is not None:
            enumerator.populate_estimates(proposal)

    @staticmethod
    def get_budget(proposal: list[ShardingOption], storage_constraint: Topology) -> int:
        """Bytes of device memory that the proposal leaves over all ranks."""
        there = sum(device.storage.hbm for device in storage_constraint.devices)
        return there - sum(option.total_storage.hbm for option in proposal)

    @staticmethod
    def get_scalable_sharding_options(proposal: list[ShardingOption]) -> list[ShardingOption]:
        """Those whose cache may grow."""
        return [
            option
            for option in proposal
            if option.compute_kernel == _CACHED
            and option.cache_params is not None
            and option.cache_params.load_factor is not None
            and option.cache_params.stats is not None
        ]

    @staticmethod
    def next_plan(
        starting_proposal: list[ShardingOption], budget: int | None, enumerator: Enumerator | None
    ) -> list[ShardingOption] | None:
        """The proposal with `budget` bytes more for its caches, estimated anew; None without a budget or tables."""
        if budget is None or enumerator is None:
            return None
        cls = EmbeddingOffloadScaleupProposer
        proposal = copy.deepcopy(starting_proposal)
        growing = cls.get_scalable_sharding_options(proposal)
        if not growing:
            return None
        factors = torch.tensor([option.cache_load_factor for option in growing], dtype=torch.float64)
        model, ceiling = cls.build_affine_storage_model(growing, enumerator)
        misses = [(cls.get_cacheability(o) or 0.0) * (cls.get_expected_lookups(o) or 0.0) for o in growing]
        grown = cls.allocate_budget(model, ceiling, factors, budget, torch.tensor(misses, dtype=torch.float64))
        for option, factor in zip(growing, grown.tolist()):
            _set_factor(option, min(factor, 1.0))
            if factor >= 1:
                _promote(option)
        enumerator.populate_estimates(proposal)
        return proposal

    @staticmethod
    def get_cacheability(sharding_option: ShardingOption) -> float | None:
        """Of its statistics: the area under the curve of misses."""
        stats = sharding_option.cache_params.stats if sharding_option.cache_params else None
        return None if stats is None else stats.cacheability

    @staticmethod
    def get_expected_lookups(sharding_option: ShardingOption) -> float | None:
        """Of its statistics: distinct rows per step."""
        stats = sharding_option.cache_params.stats if sharding_option.cache_params else None
        return None if stats is None else float(stats.expected_lookups)

    @staticmethod
    def build_affine_storage_model(
        uvm_caching_sharding_options: list[ShardingOption], enumerator: Enumerator
    ) -> tuple[Tensor, Tensor]:
        """([T, 2] slope and offset of device bytes by load factor, [T] bytes in device memory alone), by estimating."""
        low, high = 0.1, 0.9
        sizes = []
        for factor in (low, high):
            options = copy.deepcopy(uvm_caching_sharding_options)
            for option in options:
                _set_factor(option, factor)
            enumerator.populate_estimates(options)
            sizes.append(torch.tensor([option.total_storage.hbm for option in options], dtype=torch.float64))
        slope = (sizes[1] - sizes[0]) / (high - low)
        model = torch.stack([slope, sizes[0] - low * slope], dim=1)
        return model, _fused_bytes(uvm_caching_sharding_options, enumerator)

    @staticmethod
    def clf_to_bytes(model: Tensor, clfs: float | Tensor) -> Tensor:
        """Device bytes at some load factors.

        >>> EmbeddingOffloadScaleupProposer.clf_to_bytes(torch.tensor([[10.0, 20.0], [1.0, 2.0]]), 0.5)
        tensor([25.0000,  2.5000])
        """
        return model[:, 0] * clfs + model[:, 1]

    @staticmethod
    def allocate_budget(
        model: Tensor, fused_hbm_ceiling: Tensor, clfs: Tensor, budget: int, allocation_priority: Tensor
    ) -> Tensor:
        """Load factors after spending `budget` bytes in proportion to the priorities.

        A table that would take as much as without a cache gets the factor 1 for that price, and the others share what
        it leaves.
        """
        cls = EmbeddingOffloadScaleupProposer
        start = cls.clf_to_bytes(model, clfs)
        price = torch.minimum(fused_hbm_ceiling, cls.clf_to_bytes(model, 1.0))
        whole = torch.zeros_like(clfs, dtype=torch.bool)
        while True:
            left = budget - float((price - start)[whole].sum())
            shares = torch.where(whole, 0.0, allocation_priority)
            if left <= 0 or not shares.sum() > 0:
                grown = start
            else:
                grown = start + left * shares / shares.sum()
            full = ~whole & (shares > 0) & (grown >= price)
            if not full.any():
                factors = torch.where(model[:, 0] > 0, (grown - model[:, 1]) / model[:, 0], clfs)
                return torch.where(whole, 1.0, factors)
            whole |= full


def _set_factor(option: ShardingOption, factor: float) -> None:
    assert option.cache_params is not None
    option.cache_params = dataclasses.replace(option.cache_params, load_factor=factor)


def _promote(option: ShardingOption) -> None:
    """Into device memory, without a cache."""
    option.compute_kernel, option.cache_params = _FUSED, None


def _fused_bytes(options: Sequence[ShardingOption], enumerator: Enumerator) -> Tensor:
    """[T] device bytes of the options were they not cached."""
    fused = copy.deepcopy(list(options))
    for option in fused:
        _promote(option)
    enumerator.populate_estimates(fused)
    return torch.tensor([option.total_storage.hbm for option in fused], dtype=torch.float64)
