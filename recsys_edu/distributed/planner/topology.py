"""The machines a plan is for: ranks, hosts, memory caps, bandwidths.

    Topology(world_size=16, compute_device="cuda", local_world_size=8)

        host 0   rank 0  1 ... 7     600 GiB/s between them      every rank: 32 GiB HBM at 897 GiB/s,
        host 1   rank 8  9 ... 15                                            128 GiB DDR at 51 GiB/s
        between hosts: 12.5 GiB/s per rank

Counterpart: the machine part of torchrec.distributed.planner.types
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any

from recsys_edu.distributed.planner import constants as c


@dataclass
class Perf:
    """Milliseconds of one step by phase. Perfs add up.

    `total` leaves out `input_dist_comms`, as TorchRec's does: ids travel while the step before still computes.

    >>> (Perf(1, 2, 3, 4, input_dist_comms=9) + Perf(1, 1, 1, 1)).total
    14.0
    """

    fwd_compute: float
    fwd_comms: float
    bwd_compute: float
    bwd_comms: float
    input_dist_comms: float = 0.0
    prefetch_compute: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()) - self.input_dist_comms)

    def __add__(self, other: Perf) -> Perf:
        return Perf(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


@dataclass
class Storage:
    """Bytes by kind of memory: `hbm` on the accelerator, `ddr` on the host, `ssd`. Storages add and subtract.

    >>> Storage(hbm=5, ddr=0).fits_in(Storage(hbm=4, ddr=9))
    False
    """

    hbm: int
    ddr: int
    ssd: int = 0

    def __add__(self, other: Storage) -> Storage:
        return Storage(self.hbm + other.hbm, self.ddr + other.ddr, self.ssd + other.ssd)

    def __sub__(self, other: Storage) -> Storage:
        return Storage(self.hbm - other.hbm, self.ddr - other.ddr, self.ssd - other.ssd)

    def __lt__(self, other: Storage) -> bool:
        return (self.hbm, self.ddr, self.ssd) < (other.hbm, other.ddr, other.ssd)

    def __hash__(self) -> int:
        return hash((self.hbm, self.ddr, self.ssd))

    def fits_in(self, other: Storage) -> bool:
        """True where every kind of memory suffices."""
        return self.hbm <= other.hbm and self.ddr <= other.ddr and self.ssd <= other.ssd


@dataclass
class DeviceHardware:
    """One rank: what memory it has (left), and the time it has been given so far."""

    rank: int
    storage: Storage
    perf: Perf


class CustomTopologyData:
    """Numbers that differ between ranks: one list, as long as the world, per key.

        CustomTopologyData({"hbm_cap": [80 * GIB] * 4 + [40 * GIB] * 4}, world_size=8)

    Keys: `hbm_cap`, `ddr_cap` in bytes; `speed` in percent (ours): a rank of speed 50 takes twice as long for all work.

    Raises:
        ValueError: an unknown key, a list of another length, a negative capacity, a speed that is not above 0.
    """

    supported_fields = ("ddr_cap", "hbm_cap", "speed")

    def __init__(self, data: dict[str, list[int]], world_size: int) -> None:
        for key, values in data.items():
            if key not in self.supported_fields:
                raise ValueError(f"custom topology data {key!r}: expected one of {list(self.supported_fields)}")
            if len(values) != world_size:
                raise ValueError(f"custom topology data {key!r} has {len(values)} values for {world_size} ranks")
            worst = min(range(world_size), key=lambda rank: values[rank])
            if values[worst] < (1 if key == "speed" else 0):
                raise ValueError(f"custom topology data {key!r} of rank {worst} is {values[worst]}")
        self._data = data
        self._world_size = world_size

    def get_data(self, key: str) -> list[int]:
        return self._data[key]

    def has_data(self, key: str) -> bool:
        return key in self._data


class CollectiveType(Enum):
    """Kinds of collectives a bandwidth may depend on."""

    ALL_TO_ALL = "all_to_all"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"


class GeneralizedCommsBandwidth(ABC):
    """Bytes per millisecond of a collective over `world_size` ranks on hosts of `local_world_size`."""

    @abstractmethod
    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float: ...

    @property
    @abstractmethod
    def intra_host_bw(self) -> float: ...

    @property
    @abstractmethod
    def inter_host_bw(self) -> float: ...


class BasicCommsBandwidths(GeneralizedCommsBandwidth):
    """The fast number inside a host, the slow one as soon as a collective leaves it."""

    def __init__(
        self, inter_host_bw: float = c.CROSS_NODE_BANDWIDTH, intra_host_bw: float = c.INTRA_NODE_BANDWIDTH
    ) -> None:
        self._inter_host_bw = inter_host_bw
        self._intra_host_bw = intra_host_bw

    def __str__(self) -> str:
        return f"BasicCommsBandwidths: inter_host_bw={self.inter_host_bw}, intra_host_bw={self.intra_host_bw}"

    @property
    def inter_host_bw(self) -> float:
        return self._inter_host_bw

    @property
    def intra_host_bw(self) -> float:
        return self._intra_host_bw

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:
        return self._intra_host_bw if world_size <= local_world_size else self._inter_host_bw


DEVICES = ("cpu", "cuda", "mtia")


class Topology:
    """Ranks, hosts, memory and links. Capacities in bytes per rank, bandwidths in bytes per millisecond.

    Args:
        world_size: number of ranks; ranks 0 to local_world_size - 1 are host 0, and so on.
        compute_device: "cuda" (also "mtia") or "cpu".
        hbm_cap, ddr_cap, ssd_cap: default 32 GiB (0 on the CPU), 128 GiB, 2 TiB.
        local_world_size: ranks per host; default: all on one host.
        pod_size: ranks whose links are as fast as inside a host, where that is more than a host.
        bwd_compute_multiplier: backward of a lookup over its forward.
        custom_topology_data: capacities and speeds that differ between ranks.
        generalized_comms_bandwidths: overrides intra_host_bw and inter_host_bw.

    Raises:
        ValueError: a size that is not positive, a world that is no multiple of the host, a negative capacity.

    Counterpart: torchrec.distributed.planner.types.Topology
    """

    def __init__(
        self,
        world_size: int,
        compute_device: str,
        hbm_cap: int | None = None,
        ddr_cap: int | None = None,
        ssd_cap: int | None = None,
        local_world_size: int | None = None,
        pod_size: int | None = None,
        hbm_mem_bw: float = c.HBM_MEM_BW,
        ddr_mem_bw: float = c.DDR_MEM_BW,
        ssd_mem_bw: float = c.SSD_MEM_BW,
        hbm_to_ddr_mem_bw: float = c.HBM_TO_DDR_MEM_BW,
        intra_host_bw: float = c.INTRA_NODE_BANDWIDTH,
        inter_host_bw: float = c.CROSS_NODE_BANDWIDTH,
        bwd_compute_multiplier: float = c.BWD_COMPUTE_MULTIPLIER,
        custom_topology_data: CustomTopologyData | None = None,
        weighted_feature_bwd_compute_multiplier: float = c.WEIGHTED_FEATURE_BWD_COMPUTE_MULTIPLIER,
        uneven_sharding_perf_multiplier: float = 1.0,
        generalized_comms_bandwidths: GeneralizedCommsBandwidth | None = None,
        created_by_factory: bool = False,
    ) -> None:
        del created_by_factory
        if compute_device not in DEVICES:
            raise ValueError(f"compute_device {compute_device!r}: expected one of {list(DEVICES)}")
        local_world_size = world_size if local_world_size is None else local_world_size
        pod_size = local_world_size if pod_size is None else pod_size
        _check_sizes(world_size=world_size, local_world_size=local_world_size, pod_size=pod_size)
        if world_size % local_world_size:
            raise ValueError(f"world_size {world_size} is no multiple of local_world_size {local_world_size}")
        self._compute_device = compute_device
        self._world_size = world_size
        self._local_world_size = local_world_size
        self._intra_group_size = min(max(pod_size, local_world_size), world_size)
        self._hbm_mem_bw, self._ddr_mem_bw, self._ssd_mem_bw = hbm_mem_bw, ddr_mem_bw, ssd_mem_bw
        self._hbm_to_ddr_mem_bw = hbm_to_ddr_mem_bw
        self._comms_bandwidths = generalized_comms_bandwidths or BasicCommsBandwidths(inter_host_bw, intra_host_bw)
        self._bwd_compute_multiplier = bwd_compute_multiplier
        self._weighted_feature_bwd_compute_multiplier = weighted_feature_bwd_compute_multiplier
        self._uneven_sharding_perf_multiplier = uneven_sharding_perf_multiplier
        self._custom_topology_data = custom_topology_data
        for name in ("hbm_mem_bw", "ddr_mem_bw", "ssd_mem_bw", "hbm_to_ddr_mem_bw", "intra_host_bw", "inter_host_bw"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: a bandwidth is above 0 bytes per millisecond")

        for name in ("bwd_compute_multiplier", "weighted_feature_bwd_compute_multiplier"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number, at least 0")

        default_hbm = 0 if compute_device == "cpu" else c.HBM_CAP
        caps: dict[str, list[int]] = {}
        for name, given, default in (
            ("hbm_cap", hbm_cap, default_hbm),
            ("ddr_cap", ddr_cap, c.DDR_CAP),
            ("ssd_cap", ssd_cap, c.SSD_CAP),
        ):
            cap = default if given is None else given
            if cap < 0:
                raise ValueError(f"{name} is {cap} bytes: a capacity is at least 0")
            caps[name] = [cap] * world_size
            if custom_topology_data is not None and custom_topology_data.has_data(name):
                caps[name] = list(custom_topology_data.get_data(name))
                if len(caps[name]) != world_size:
                    raise ValueError(f"custom {name} has {len(caps[name])} values for {world_size} ranks")
        self._devices = [
            DeviceHardware(rank, Storage(hbm, ddr, ssd), Perf(0, 0, 0, 0))
            for rank, (hbm, ddr, ssd) in enumerate(zip(caps["hbm_cap"], caps["ddr_cap"], caps["ssd_cap"]))
        ]

    @property
    def compute_device(self) -> str:
        return self._compute_device

    @property
    def devices(self) -> list[DeviceHardware]:
        return self._devices

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def local_world_size(self) -> int:
        return self._local_world_size

    @property
    def intra_group_size(self) -> int:
        """Ranks that the fast links join."""
        return self._intra_group_size

    @property
    def hbm_mem_bw(self) -> float:
        return self._hbm_mem_bw

    @property
    def ddr_mem_bw(self) -> float:
        return self._ddr_mem_bw

    @property
    def ssd_mem_bw(self) -> float:
        return self._ssd_mem_bw

    @property
    def hbm_to_ddr_mem_bw(self) -> float:
        return self._hbm_to_ddr_mem_bw

    @property
    def intra_host_bw(self) -> float:
        return self._comms_bandwidths.intra_host_bw

    @property
    def inter_host_bw(self) -> float:
        return self._comms_bandwidths.inter_host_bw

    @property
    def comms_bandwidths(self) -> GeneralizedCommsBandwidth:
        return self._comms_bandwidths

    @property
    def bwd_compute_multiplier(self) -> float:
        return self._bwd_compute_multiplier

    @property
    def weighted_feature_bwd_compute_multiplier(self) -> float:
        return self._weighted_feature_bwd_compute_multiplier

    @property
    def uneven_sharding_perf_multiplier(self) -> float:
        return self._uneven_sharding_perf_multiplier

    @property
    def speeds(self) -> list[float]:
        """How fast each rank is, 1.0 being what the bandwidths say (ours)."""
        data = self._custom_topology_data
        return (
            [s / 100 for s in data.get_data("speed")] if data and data.has_data("speed") else [1.0] * self._world_size
        )

    def copy(self) -> Topology:
        """The same machines, with memory of their own to take from (ours)."""
        twin = copy.copy(self)
        twin._devices = [DeviceHardware(d.rank, copy.copy(d.storage), copy.copy(d.perf)) for d in self._devices]
        return twin

    def facts(self) -> Mapping[str, Any]:
        """Everything that a plan may depend on, by name."""
        names = [name for name, value in vars(Topology).items() if isinstance(value, property)]
        facts = {name: getattr(self, name) for name in names if name not in ("devices", "comms_bandwidths", "speeds")}
        caps = [(d.storage.hbm, d.storage.ddr, d.storage.ssd) for d in self._devices]
        facts["capacities"] = caps[0] if len(set(caps)) == 1 else caps
        if len(set(self.speeds)) > 1:
            facts["speeds"] = self.speeds
        return facts

    def _hash(self) -> int:
        """The same number for equal topologies in every process; plans in a cache are found by it."""
        digest = hashlib.sha256(repr(sorted(self.facts().items())).encode()).hexdigest()
        return int(digest, 16)

    def __repr__(self) -> str:
        return "Topology(" + ", ".join(f"{name}={value}" for name, value in self.facts().items()) + ")"


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a whole number, at least 1")
