"""Measure this machine, and plan with what was measured instead of what a data centre has.

    measured = calibrate()
    topology = measured.topology(world_size=2)

Every number is measured in the terms in which the cost function uses it: the lookup's bandwidth counts ids, rows and
answers; the link's counts what all ranks send in one exchange. Under a process group all ranks must call it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.kernel_costs import KernelCosts
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.kernels.spec import KernelSpec, OptimizerSpec, TableSpec

_ROWS, _COLUMNS, _TABLES, _BATCH, _POOLING = 100_000, 128, 4, 2048, 4
_FEATURES, _ENGINE_BATCHES = 26, (128, 2048)
_LINK_ELEMENTS = 2**18  # to every rank
_WINDOW_MS = 20.0  # long enough to share cores with the other ranks


@dataclass(frozen=True)
class Calibration:
    """What was measured: bytes per millisecond, but `matmul_flops` per second.

    Args:
        lookup_bw: of the fused lookup, forward: ids and rows read, answers written.
        backward: time of backward with the optimizer over the forward's.
        copy_bw: of a plain copy, read and written.
        matmul_flops: float32 matrix product.
        link_bw: of an all-to-all between the ranks of the process group; None without one.
        memory_bytes: of this machine (of the device on cuda); None where the system does not say.
        exchange_ms: of an all-to-all of next to nothing; None without a process group.
        op_ms: of an operation on next to nothing.
        engine_ms, route_bw: of a sharded collection's step besides the lookup: milliseconds, however small the batch,
            and bytes of ids per millisecond.
        host_link_bw: of copies from the host; None on the CPU.
    """

    device_type: str
    lookup_bw: float
    backward: float
    copy_bw: float
    matmul_flops: float
    link_bw: float | None
    memory_bytes: int | None
    exchange_ms: float | None
    op_ms: float
    engine_ms: float
    route_bw: float
    host_link_bw: float | None

    def topology(
        self,
        world_size: int,
        local_world_size: int | None = None,
        hbm_cap: int | None = None,
        ddr_cap: int | None = None,
    ) -> Topology:
        """A Topology of `world_size` ranks like the measured one; on the CPU they share the machine's memory.

        A link that was not measured keeps TorchRec's assumption. The link measured counts inside and between hosts.
        """
        local = local_world_size or get_local_size(world_size)
        links = {} if self.link_bw is None else {"intra_host_bw": self.link_bw, "inter_host_bw": self.link_bw}
        on_cpu = self.device_type == "cpu"
        if self.memory_bytes is not None:
            if on_cpu and ddr_cap is None:
                ddr_cap = self.memory_bytes // local
            if not on_cpu and hbm_cap is None:
                hbm_cap = self.memory_bytes
        return Topology(
            world_size,
            self.device_type,
            hbm_cap=hbm_cap,
            ddr_cap=ddr_cap,
            local_world_size=local,
            bwd_compute_multiplier=self.backward,
            **({"ddr_mem_bw": self.lookup_bw} if on_cpu else {"hbm_mem_bw": self.lookup_bw}),
            **links,
        )

    def kernels(self) -> KernelCosts:
        """What the step simulator needs besides a Topology. An exchange that was not measured is assumed free."""
        return KernelCosts(
            matmul_flops=self.matmul_flops,
            copy_bw=self.copy_bw,
            op_ms=self.op_ms,
            engine_ms=self.engine_ms,
            route_bw=self.route_bw,
            exchange_ms=self.exchange_ms or 0.0,
            host_link_bw=self.host_link_bw,
        )

    def __str__(self) -> str:
        link = "not measured (no process group)" if self.link_bw is None else f"{_gb(self.link_bw):.3g} GB/s"
        return (
            f"{self.device_type}: lookup {_gb(self.lookup_bw):.3g} GB/s, its backward {self.backward:.2g} x as long, "
            f"copy {_gb(self.copy_bw):.3g} GB/s, matrix product {self.matmul_flops / 1e9:.3g} GFLOP/s, link {link}"
        )


def _gb(bytes_per_ms: float) -> float:
    return bytes_per_ms * 1000 / 1e9


def calibrate(device: torch.device | str = "cpu", pg: dist.ProcessGroup | None = None, rounds: int = 5) -> Calibration:
    """Measure lookup, copy, matrix product, fixed costs and, under a process group, the link between its ranks.

    Takes two seconds or so. Each number is the median of `rounds` averages over 20 ms or more, after a warm-up. Ranks
    measure at the same time, so that what they share (cores, memory) counts as shared, and agree on the slowest rank's
    numbers.
    """
    device = torch.device(device)
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: expected at least 1")
    if pg is None and dist.is_available() and dist.is_initialized():
        pg = dist.group.WORLD
    if pg is not None and dist.get_world_size(pg) == 1:
        pg = None
    clock = _Clock(device, rounds, pg)
    forward_ms, backward_ms, moved = _lookup(clock)
    engine_ms, route_bw = _engine(clock)
    exchange_ms, link_bw = _link(clock) if pg is not None else (math.inf, 0.0)
    speeds = {
        "lookup_bw": moved / forward_ms,
        "backward": forward_ms / backward_ms,
        "copy_bw": _copy_bw(clock, device),
        "matmul_flops": _matmul_flops(clock),
        "link_bw": link_bw,
        "exchange_ms": 1 / exchange_ms,
        "op_ms": 1 / _op_ms(clock),
        "engine_ms": 1 / engine_ms,
        "route_bw": route_bw,
        "host_link_bw": _copy_bw(clock, torch.device("cpu")) if device.type == "cuda" else 0.0,
    }
    if pg is not None:  # all ranks must plan with the same numbers: those of the slowest
        agreed = torch.tensor(list(speeds.values()), dtype=torch.float64, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=pg)
        speeds = dict(zip(speeds, agreed.tolist()))  # host sync: a measurement, not a step
    inverse = ("backward", "exchange_ms", "op_ms", "engine_ms")  # the smallest of 1 / x is the slowest rank's
    found = {name: (1 / value if value else None) if name in inverse else value for name, value in speeds.items()}
    optional = {name: found.pop(name) or None for name in ("link_bw", "host_link_bw")}
    return Calibration(device_type=device.type, memory_bytes=_memory(device), **found, **optional)


@dataclass(frozen=True)
class _Clock:
    """Times calls on `device`; with a group, on all ranks at once."""

    device: torch.device
    rounds: int
    pg: dist.ProcessGroup | None

    def median_ms(self, call: Callable[[], object]) -> float:
        """Median over the rounds of the mean time of a call."""
        self._mean_ms(call, 1)
        once_ms = self._mean_ms(call, 1)
        repeats = torch.tensor(max(1.0, _WINDOW_MS / max(once_ms, 1e-3)), device=self.device)
        if self.pg is not None:  # calls that exchange must be as many on every rank
            dist.all_reduce(repeats, op=dist.ReduceOp.MAX, group=self.pg)
        return statistics.median(self._mean_ms(call, int(repeats)) for _ in range(self.rounds))

    def _mean_ms(self, call: Callable[[], object], repeats: int) -> float:
        if self.pg is not None:
            dist.barrier(group=self.pg)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # host sync: kernels run behind the caller's back
        return (time.perf_counter() - start) * 1000 / repeats


def _copy_bw(clock: _Clock, source_device: torch.device) -> float:
    """Bytes per ms of a copy to the device: read and written on it, or, from elsewhere, moved."""
    source = torch.ones(16 * 2**20, dtype=torch.uint8, device=source_device)
    if source_device.type != clock.device.type:
        source = source.pin_memory()
    target = torch.empty_like(source, device=clock.device)
    both = 2 if source_device.type == clock.device.type else 1
    return both * source.numel() / clock.median_ms(lambda: target.copy_(source, non_blocking=True))


def _matmul_flops(clock: _Clock) -> float:
    """Of a layer's product, [1024, 512] by [512, 512]."""
    inputs, weights = torch.ones(1024, 512, device=clock.device), torch.ones(512, 512, device=clock.device)
    return 2 * inputs.numel() * 512 / (clock.median_ms(lambda: inputs @ weights) / 1000)


def _op_ms(clock: _Clock) -> float:
    small = torch.ones(8, device=clock.device)
    return clock.median_ms(lambda: small + small)


def _lookup(clock: _Clock) -> tuple[float, float, float]:
    """(forward ms, backward ms, bytes that the cost function counts for the forward) of a fused pooled lookup."""
    from recsys_edu.kernels.modules import make_kernel

    spec = KernelSpec(
        tables=tuple(TableSpec(f"t{i}", _ROWS, _COLUMNS) for i in range(_TABLES)),
        lane_tables=tuple(range(_TABLES)),
        pooled=True,
        optimizer=OptimizerSpec("SGD", learning_rate=0.01),
        validate_ids=False,
    )
    kernel = make_kernel(spec, clock.device)
    num_ids = _TABLES * _BATCH * _POOLING
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_ROWS, (num_ids,), generator=generator).to(clock.device)
    offsets = torch.arange(0, num_ids + 1, _POOLING, device=clock.device)
    output = kernel(ids, offsets)
    gradient = torch.ones_like(output)
    forward_ms = clock.median_ms(lambda: kernel(ids, offsets))
    both_ms = clock.median_ms(lambda: kernel(ids, offsets).backward(gradient))
    moved = num_ids * c.BIGINT_DTYPE + num_ids * _COLUMNS * 4 + output.numel() * 4
    return forward_ms, max(both_ms - forward_ms, forward_ms * 0.1), moved


def _engine(clock: _Clock) -> tuple[float, float]:
    """(fixed ms, bytes of ids per ms) of a sharded collection's forward and backward on narrow tables.

    Two batch sizes tell them apart. No other rank takes part: exchanges are measured by themselves.
    """
    from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from recsys_edu.distributed.simulation import forward_all, simulate
    from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
    from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

    keys = [f"f{i}" for i in range(_FEATURES)]
    tables = [
        EmbeddingBagConfig(name=f"t{key}", num_embeddings=100, embedding_dim=4, feature_names=[key]) for key in keys
    ]
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    generators = {table.name: row_wise() for table in tables}
    plan = construct_module_sharding_plan(model, generators, local_size=1, world_size=1, device_type=clock.device.type)
    ranks = simulate(model, plan, world_size=1, device=clock.device)
    times_ms = []
    for size in _ENGINE_BATCHES:
        ids = torch.arange(_FEATURES * size, device=clock.device) % 100
        batch = KeyedJaggedTensor(keys, ids, lengths=torch.ones_like(ids, dtype=torch.int32))
        gradient = torch.ones(size, 4 * _FEATURES, device=clock.device)
        times_ms.append(clock.median_ms(lambda b=batch, g=gradient: forward_all(ranks, [b])[0].values().backward(g)))
    small, large = (_FEATURES * size * c.BIGINT_DTYPE for size in _ENGINE_BATCHES)
    ms_per_byte = max(times_ms[1] - times_ms[0], 1e-3 * times_ms[0]) / (large - small)
    return max(times_ms[0] - small * ms_per_byte, 0.1 * times_ms[0]), 1 / ms_per_byte


def _link(clock: _Clock) -> tuple[float, float]:
    """(ms of a small all-to-all, bytes per ms that a large one takes beyond it); a rank's bytes for itself count."""
    world = dist.get_world_size(clock.pg)

    def exchange_ms(elements: int) -> float:
        sent = torch.ones(world * elements, device=clock.device)
        received = torch.empty_like(sent)
        return clock.median_ms(lambda: dist.all_to_all_single(received, sent, group=clock.pg))

    small_ms, large_ms = exchange_ms(1), exchange_ms(_LINK_ELEMENTS)
    return small_ms, world * _LINK_ELEMENTS * 4 / max(large_ms - small_ms, 0.1 * large_ms)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
