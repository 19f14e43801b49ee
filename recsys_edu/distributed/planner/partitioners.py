"""TorchRec's partitioners: give every shard of a proposal a rank.

Counterpart: torchrec.distributed.planner.partitioners
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum

from recsys_edu.distributed.planner.perf_models import NoopPerfModel
from recsys_edu.distributed.planner.types import (
    DeviceHardware,
    PartitionByType,
    Partitioner,
    Perf,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Storage,
    Topology,
)
from recsys_edu.distributed.planner.utils import BinarySearchPredicate, reset_shard_rank, show_bytes


class SortBy(Enum):
    """What is placed first: the largest, or the slowest."""

    STORAGE = "storage"
    PERF = "perf"


class GreedyPerfPartitioner(Partitioner):
    """Uniform options on all ranks; then, from the largest (or slowest) on, each shard where the least time is spent.

    Options of the same `dependency` are placed as one, on the same ranks. With `balance_modules` the tables of each
    module are spread by themselves. The topology given is not changed; the proposal's shards get their ranks.

    Raises (when it partitions):
        PlannerError: something has no room, naming the table.

    Counterpart: torchrec.distributed.planner.partitioners.GreedyPerfPartitioner
    """

    def __init__(self, sort_by: SortBy = SortBy.STORAGE, balance_modules: bool = False) -> None:
        self._sort_by = sort_by
        self._balance_modules = balance_modules

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, hbm_per_device: int | None = None
    ) -> list[ShardingOption]:
        devices = copy.deepcopy(storage_constraint.devices)
        if hbm_per_device is not None:
            for device in devices:
                device.storage.hbm = min(device.storage.hbm, hbm_per_device)
        for option in proposal:
            if option.partition_by == PartitionByType.UNIFORM.value:
                _place_uniform(option, devices)
        groups: dict[object, list[ShardingOption]] = {}
        for index, option in enumerate(proposal):
            if option.partition_by != PartitionByType.UNIFORM.value:
                groups.setdefault(option.dependency or index, []).append(option)
        ordered = sorted(groups.values(), key=self._size, reverse=True)
        if self._balance_modules:
            ordered = _one_module_after_the_other(ordered)
        hosts = [
            devices[i : i + storage_constraint.local_world_size]
            for i in range(0, len(devices), storage_constraint.local_world_size)
        ]
        for group in ordered:
            self._place(group, devices, hosts)
        return proposal

    def _size(self, group: list[ShardingOption]) -> tuple[float, ...]:
        if self._sort_by is SortBy.PERF:
            return (sum(option.total_perf for option in group),)
        total = sum((option.total_storage for option in group), Storage(0, 0))
        return total.hbm, total.ddr, total.ssd

    def _place(
        self, group: list[ShardingOption], devices: list[DeviceHardware], hosts: list[list[DeviceHardware]]
    ) -> None:
        kind = group[0].partition_by
        if len(group) > 1:
            _place_together(group, devices)
        elif kind == PartitionByType.DEVICE.value:
            _place_shards(group[0], group[0].shards, devices)
        elif kind == PartitionByType.HOST.value:
            _place_on_host(group[0], group[0].shards, hosts)
        else:
            option, columns = group[0], sorted({shard.offset[1] for shard in group[0].shards})
            for column in columns:
                _place_on_host(option, [shard for shard in option.shards if shard.offset[1] == column], hosts)


def _charge(device: DeviceHardware, shard: Shard) -> None:
    shard.rank = device.rank
    device.storage = device.storage - shard.storage  # type: ignore[operator]
    device.perf = device.perf + shard.perf  # type: ignore[operator]


def _place_uniform(option: ShardingOption, devices: list[DeviceHardware]) -> None:
    if len(option.shards) != len(devices):
        raise PlannerError(
            f"table {option.name!r}: {len(option.shards)} shards for {len(devices)} ranks of a uniform option",
            PlannerErrorType.PARTITION,
        )
    for shard, device in zip(option.shards, devices):
        if not shard.storage.fits_in(device.storage):  # type: ignore[union-attr]
            raise _no_room(option, shard, [device])
        _charge(device, shard)


def _place_shards(option: ShardingOption, shards: Sequence[Shard], devices: Sequence[DeviceHardware]) -> None:
    for shard in shards:
        roomy = [device for device in devices if shard.storage.fits_in(device.storage)]  # type: ignore[union-attr]
        if not roomy:
            raise _no_room(option, shard, devices)
        _charge(min(roomy, key=lambda device: (device.perf.total, device.rank)), shard)


def _place_on_host(option: ShardingOption, shards: Sequence[Shard], hosts: list[list[DeviceHardware]]) -> None:
    """On the first host, by time spent so far, where all shards have room; row blocks one per rank in order."""
    one_each = len({shard.offset[0] for shard in shards}) > 1
    for host in sorted(hosts, key=lambda host: sum(device.perf.total for device in host)):
        trial = copy.deepcopy(host)
        ranks = [shard.rank for shard in shards]
        try:
            if one_each:
                for shard, device in zip(shards, trial):
                    _place_shards(option, [shard], [device])
            else:
                _place_shards(option, shards, trial)
        except PlannerError:
            for shard, rank in zip(shards, ranks):
                shard.rank = rank
            continue
        for device, placed in zip(host, trial):
            device.storage, device.perf = placed.storage, placed.perf
        return
    raise _no_room(option, shards[0], [device for host in hosts for device in host])


def _place_together(group: list[ShardingOption], devices: list[DeviceHardware]) -> None:
    """Shard i of every option of the group on one rank."""
    for shards in zip(*(option.shards for option in group), strict=True):
        storage = sum((shard.storage for shard in shards), Storage(0, 0))
        perf = sum((shard.perf for shard in shards), Perf(0, 0, 0, 0))
        joint = Shard(shards[0].size, shards[0].offset, storage, perf)
        _place_shards(group[0], [joint], devices)
        for shard in shards:
            shard.rank = joint.rank


def _one_module_after_the_other(groups: list[list[ShardingOption]]) -> list[list[ShardingOption]]:
    paths = list(dict.fromkeys(group[0].path for group in groups))
    return [group for path in paths for group in groups if group[0].path == path]


def _no_room(option: ShardingOption, shard: Shard, devices: Sequence[DeviceHardware]) -> PlannerError:
    need, most = shard.storage, max(devices, key=lambda device: device.storage.hbm).storage
    return PlannerError(
        f"table {option.name!r}, {option.sharding_type} with {option.compute_kernel}: a shard needs "
        f"{show_bytes(need.hbm)} HBM and {show_bytes(need.ddr)} host memory; the roomiest of {len(devices)} ranks "  # type: ignore[union-attr]
        f"has {show_bytes(most.hbm)} and {show_bytes(most.ddr)} left",
        PlannerErrorType.PARTITION,
    )


class MemoryBalancedPartitioner(Partitioner):
    """The greedy partition under the lowest bound on every rank's memory that costs at most `tolerance` more time.

    Counterpart: torchrec.distributed.planner.partitioners.MemoryBalancedPartitioner
    """

    def __init__(self, max_search_count: int = 10, tolerance: float = 0.02, balance_modules: bool = False) -> None:
        self._max_search_count = max_search_count
        self._tolerance = tolerance
        self._greedy = GreedyPerfPartitioner(SortBy.PERF, balance_modules)

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        model = NoopPerfModel(storage_constraint)
        best = copy.deepcopy(self._greedy.partition(proposal, storage_constraint))
        allowed = model.rate(best) * (1 + self._tolerance)
        largest = max(shard.storage.hbm for option in proposal for shard in option.shards)  # type: ignore[union-attr]
        high = max(device.storage.hbm for device in storage_constraint.devices)
        search, good = BinarySearchPredicate(largest, high, max(high // 100, 1)), False
        # The predicate looks for the largest number that holds, so it is asked for the memory that is taken away.
        for _ in range(self._max_search_count):
            probe = search.next(good)
            if probe is None:
                break
            bound = largest + high - probe
            reset_shard_rank(proposal)
            try:
                plan = self._greedy.partition(proposal, storage_constraint, hbm_per_device=bound)
            except PlannerError:
                good = False
                continue
            good = model.rate(plan) <= allowed
            if good:
                best = copy.deepcopy(plan)
        return best
