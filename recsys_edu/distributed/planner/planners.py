"""The planner: a model, a topology, constraints; out comes a plan that fits and is fast.

    topology = Topology(world_size=128, compute_device="cuda", hbm_cap=80 * GIB, local_world_size=8)
    plan = EmbeddingShardingPlanner(topology=topology, batch_size=512).plan(model, get_default_sharders())

    reserve memory for the rest -> read the tables -> cost every option -> search -> a ShardingPlan that explains itself
    (storage_reservations)         (workload)         (options, cost)      (search)  (report)

Whoever brings proposers, a partitioner, an enumerator or a performance model of their own gets TorchRec's loop instead:
propose, partition, rate, until no proposer has another idea.

Counterpart: torchrec.distributed.planner.planners
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.planner.constants import BATCH_SIZE
from recsys_edu.distributed.planner.enumerators import EmbeddingEnumerator, options_from
from recsys_edu.distributed.planner.options import enumerate_options
from recsys_edu.distributed.planner.partitioners import GreedyPerfPartitioner
from recsys_edu.distributed.planner.perf_models import NoopPerfModel
from recsys_edu.distributed.planner.placement import make_problem
from recsys_edu.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from recsys_edu.distributed.planner.remedy import cannot_plan
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.search import Found, search
from recsys_edu.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from recsys_edu.distributed.planner.stats import NoopEmbeddingStats
from recsys_edu.distributed.planner.storage_reservations import HeuristicalStorageReservation
from recsys_edu.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    Partitioner,
    PerfModel,
    PlanLoader,
    PlannerError,
    PlannerErrorType,
    Proposer,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
    sharder_data_of,
)
from recsys_edu.distributed.planner.utils import reset_shard_rank
from recsys_edu.distributed.planner.workload import Workload, read_workload, shardable_modules
from recsys_edu.distributed.sharding.tiling import Shard, parameter_sharding_from, validate
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingPlanner,
    ShardingType,
)


def to_sharding_plan(sharding_options: list[ShardingOption], topology: Topology) -> ShardingPlan:
    """Placed options as a plan; every table's shards are checked to tile it.

    Raises:
        PlannerError: a shard without a rank.
    """
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for option in sharding_options:
        ranks = [shard.rank for shard in option.shards]
        if None in ranks:
            raise PlannerError(
                f"table {option.name!r}: shard {ranks.index(None)} of {len(ranks)} has no rank",
                PlannerErrorType.INVALID_RANK_ASSIGNMENT,
            )
        modules.setdefault(option.path, EmbeddingModuleShardingPlan())[option.name] = _parameter_sharding(
            option, topology
        )
    return ShardingPlan(modules)  # type: ignore[arg-type]


def _parameter_sharding(option: ShardingOption, topology: Topology) -> ParameterSharding:
    ranks = [shard.rank for shard in option.shards]
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        sharding = ParameterSharding(option.sharding_type, option.compute_kernel, ranks)  # type: ignore[arg-type]
    else:
        num_rows, num_columns = option.tensor.shape
        shards = [
            Shard(option.name, range(o[0], o[0] + s[0]), range(o[1], o[1] + s[1]), rank)  # type: ignore[arg-type]
            for o, s, rank in ((shard.offset, shard.size, shard.rank) for shard in option.shards)
        ]
        validate(shards, num_rows, num_columns, topology.world_size, option.name)
        sharding = parameter_sharding_from(
            shards, option.sharding_type, option.compute_kernel, topology.compute_device, topology.local_world_size
        )
    sharding.cache_params = option.cache_params
    sharding.enforce_hbm = option.enforce_hbm
    sharding.stochastic_rounding = option.stochastic_rounding
    sharding.bounds_check_mode = option.bounds_check_mode
    sharding.output_dtype = option.output_dtype
    sharding.key_value_params = option.key_value_params
    return sharding


def extract_plan(
    search_space: list[ShardingOption], loaded_sharding_options: dict[int, ShardingOption]
) -> list[ShardingOption]:
    """The options of the search space that a stored plan names by their `storage_hash`, with its ranks.

    Raises:
        PlannerError: an option that is no longer there, or two with the same hash.
    """
    by_hash: dict[int, ShardingOption] = {}
    for option in search_space:
        if option.storage_hash() in by_hash:
            raise PlannerError(
                f"{option} and {by_hash[option.storage_hash()]} have the same storage hash",
                PlannerErrorType.PLAN_LOADING_FAILED,
            )
        by_hash[option.storage_hash()] = option
    plan = []
    for key, loaded in loaded_sharding_options.items():
        if key not in by_hash:
            raise PlannerError(
                f"the stored plan names {loaded}, which this model and topology do not have",
                PlannerErrorType.PLAN_LOADING_FAILED,
            )
        option = copy.deepcopy(by_hash[key])
        for shard, stored in zip(option.shards, loaded.shards):
            shard.rank = stored.rank
        plan.append(option)
    return plan


class EmbeddingShardingPlanner(ShardingPlanner):
    """Finds a sharding plan.

    Args:
        topology: default: the process group's world (or one rank) on this machine's device.
        batch_size: per rank; default 512.
        storage_reservation: default: 15% and the dense part, `HeuristicalStorageReservation(0.15)`.
        constraints: by table name.
        stats: told about every plan.
        callbacks: each may change the chosen options before they become the plan.
        timeout_seconds: bound on TorchRec's loop; the search needs none.
        plan_loader: a stored plan to use instead of searching.
        suggest: where nothing fits, find out for the error what would, which takes longer than planning (ours).
        enumerator, proposer, partitioner, performance_model: with any of these, TorchRec's loop.

    Raises (when it plans):
        PlannerError: contradictory constraints, or nothing fits: with the tables, the numbers, and what would help.

    Counterpart: torchrec.distributed.planner.EmbeddingShardingPlanner
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        enumerator: Enumerator | None = None,
        storage_reservation: StorageReservation | None = None,
        proposer: Proposer | list[Proposer] | None = None,
        partitioner: Partitioner | None = None,
        performance_model: PerfModel | None = None,
        stats: Stats | list[Stats] | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        debug: bool = True,
        callbacks: list[Callable[[list[ShardingOption]], list[ShardingOption]]] | None = None,
        timeout_seconds: int | None = None,
        plan_loader: PlanLoader | None = None,
        *,
        suggest: bool = True,
    ) -> None:
        self._topology = topology or default_topology()
        self._batch_size = BATCH_SIZE if batch_size is None else batch_size
        self._constraints = constraints
        self._storage_reservation = storage_reservation or HeuristicalStorageReservation(0.15)
        self._enumerator = enumerator
        self._proposers = proposer if isinstance(proposer, list) or proposer is None else [proposer]
        self._partitioner = partitioner
        self._perf_model = performance_model
        self._stats = stats if isinstance(stats, list) else [stats or NoopEmbeddingStats()]
        self._debug = debug
        self._callbacks = callbacks or []
        self._timeout_seconds = timeout_seconds
        self.plan_loader = plan_loader
        self._suggest = suggest

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Rank 0 of the group plans and sends the plan to the others; an error on rank 0 is raised on all."""
        sharders = sharders or get_default_sharders()
        pg = pg or dist.group.WORLD
        if dist.get_rank(pg) != 0:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, group_src=0, group=pg)
            if isinstance(received[0], PlannerError):
                raise received[0]
            return received[0]
        try:
            plan = self.plan(module, sharders)
        except PlannerError as error:
            dist.broadcast_object_list([error], group_src=0, group=pg)
            raise
        dist.broadcast_object_list([plan], group_src=0, group=pg)
        return plan

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[Any]]) -> ShardingPlan:
        """The plan, from what this process knows."""
        start = time.perf_counter()
        usable = self._storage_reservation.reserve(
            self._topology, self._batch_size, module, sharders, self._constraints
        )
        own_parts = (self._enumerator, self._proposers, self._partitioner, self._perf_model, self.plan_loader)
        if any(part is not None for part in own_parts):
            return self._plan_by_proposals(module, sharders, usable, start)
        workload = read_workload(module, sharders, self._topology, self._batch_size, self._constraints)
        if not len(workload):
            paths = shardable_modules(module, sharders)
            return ShardingPlan({path: EmbeddingModuleShardingPlan() for path in paths})
        found = self._search(workload, usable)
        options = chosen_options(found, self._batch_size)
        plan = self._finish(options, sharders, start, found.num_proposals, found.num_plans)
        empty = {path: EmbeddingModuleShardingPlan() for path in shardable_modules(module, sharders)}
        return PlannedSharding(
            {**empty, **plan.plan},
            found=found,
            topology=self._topology,
            usable=usable,
            seconds=time.perf_counter() - start,
        )

    def _search(self, workload: Workload, usable: Topology) -> Found:
        problem = make_problem(enumerate_options(workload, usable), usable)
        found = search(problem) if problem.valid_UJ.any(axis=1).all() else None
        if found is not None:
            return found
        raise cannot_plan(workload, usable, self._topology, self._suggest)

    def _plan_by_proposals(
        self, module: nn.Module, sharders: list[ModuleSharder[Any]], usable: Topology, start: float
    ) -> ShardingPlan:
        """TorchRec's loop over proposals."""
        enumerator = self._enumerator or EmbeddingEnumerator(self._topology, self._batch_size, self._constraints)
        partitioner = self._partitioner or GreedyPerfPartitioner()
        perf_model = self._perf_model or NoopPerfModel(self._topology)
        proposers = self._proposers or [
            GridSearchProposer(),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ]
        space = enumerator.enumerate(module, sharders)
        best: list[ShardingOption] | None = None
        best_cost, num_proposals, num_plans, last_error = float("inf"), 0, 0, ""
        if self.plan_loader is not None and (stored := self.plan_loader.load()) is not None:
            best, proposers = extract_plan(space, dict(stored)), []
        for proposer in proposers:
            proposer.load(space, enumerator=enumerator)
            while (proposal := proposer.propose()) is not None:
                out_of_time = self._timeout_seconds is not None and time.perf_counter() - start > self._timeout_seconds
                if out_of_time:
                    break
                num_proposals += 1
                reset_shard_rank(proposal)
                try:
                    plan = partitioner.partition(proposal, usable)
                except PlannerError as error:
                    last_error = str(error)
                    proposer.feedback(False, proposal, None, usable)
                    continue
                num_plans += 1
                cost = perf_model.rate(plan)
                if cost < best_cost:
                    best, best_cost = copy.deepcopy(plan), cost
                proposer.feedback(True, plan, cost, usable)
        if best is None:
            if self._enumerator is None:
                workload = read_workload(module, sharders, self._topology, self._batch_size, self._constraints)
                raise cannot_plan(workload, usable, self._topology, self._suggest)
            raise PlannerError(
                f"none of {num_proposals} proposals could be placed; the last one: {last_error}",
                PlannerErrorType.PARTITION,
            )
        return self._finish(best, sharders, start, num_proposals, num_plans)

    def _finish(
        self,
        options: list[ShardingOption],
        sharders: Sequence[ModuleSharder[Any]],
        start: float,
        num_proposals: int,
        num_plans: int,
    ) -> ShardingPlan:
        for callback in self._callbacks:
            options = callback(options)
        plan = to_sharding_plan(options, self._topology)
        talkative = [stats for stats in self._stats if not isinstance(stats, NoopEmbeddingStats)]
        if talkative:
            data = sharder_data_of(sharders)
            EmbeddingPerfEstimator(self._topology, self._constraints).estimate(options, data)
            EmbeddingStorageEstimator(self._topology, self._constraints).estimate(options, data)
        for stats in talkative:
            stats.log(
                sharding_plan=plan,
                topology=self._topology,
                batch_size=self._batch_size,
                storage_reservation=self._storage_reservation,
                num_proposals=num_proposals,
                num_plans=num_plans,
                run_time=time.perf_counter() - start,
                best_plan=options,
                constraints=self._constraints,
                sharders=list(sharders),
                enumerator=self._enumerator,
                debug=self._debug,
            )
        return plan


def chosen_options(found: Found, batch_size: int) -> list[ShardingOption]:
    """The options that a search chose, with the ranks it placed them on."""
    placement, problem = found.placement, found.placement.problem
    unit_of = {i: u for u, unit in enumerate(problem.units) for i in unit}
    wanted = [(i, int(placement.choice_U[unit_of[i]])) for i in range(len(problem.grid.workload))]
    options = options_from(problem.grid, wanted, batch_size)
    for i, option in enumerate(options):
        for shard, rank in zip(option.shards, placement.ranks_U[unit_of[i]].tolist(), strict=True):
            shard.rank = rank
    return options


def default_topology() -> Topology:
    """This process's world: the process group, or one rank, on cuda where there is one."""
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Topology(world_size, device, local_world_size=get_local_size(world_size))
