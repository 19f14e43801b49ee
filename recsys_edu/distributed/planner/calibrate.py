"""Measure this machine, and plan with what was measured instead of what a data centre has.

    measured = calibrate()
    topology = measured.topology(world_size=2)

Every number is measured in the terms in which the cost function uses it: the lookup's bandwidth counts ids, rows and
answers; the link's counts what all ranks send in one exchange. Under a process group all ranks must call it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.kernels.spec import KernelSpec, OptimizerSpec, TableSpec

_ROWS, _COLUMNS, _TABLES, _BATCH, _POOLING = 100_000, 128, 4, 2048, 4


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
    """

    device_type: str
    lookup_bw: float
    backward: float
    copy_bw: float
    matmul_flops: float
    link_bw: float | None
    memory_bytes: int | None

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

    def __str__(self) -> str:
        link = "not measured (no process group)" if self.link_bw is None else f"{_gb(self.link_bw):.3g} GB/s"
        return (
            f"{self.device_type}: lookup {_gb(self.lookup_bw):.3g} GB/s, its backward {self.backward:.2g} x as long, "
            f"copy {_gb(self.copy_bw):.3g} GB/s, matrix product {self.matmul_flops / 1e9:.3g} GFLOP/s, link {link}"
        )


def _gb(bytes_per_ms: float) -> float:
    return bytes_per_ms * 1000 / 1e9


def calibrate(device: torch.device | str = "cpu", pg: dist.ProcessGroup | None = None, rounds: int = 5) -> Calibration:
    """Measure lookup, copy, matrix product and, where a process group is initialised, the link between its ranks.

    Takes about a second. Each number is the median of `rounds` runs after a warm-up.
    """
    device = torch.device(device)
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: expected at least 1")
    if pg is None and dist.is_available() and dist.is_initialized():
        pg = dist.group.WORLD
    forward_ms, backward_ms, moved = _lookup(device, rounds)
    source = torch.ones(16 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), device, rounds)
    size = 512
    square = torch.ones(size, size, device=device)
    matmul_ms = _median_ms(lambda: square @ square, device, rounds)
    speeds = [
        moved / forward_ms,
        forward_ms / backward_ms,
        2 * source.numel() / copy_ms,
        2 * size**3 / (matmul_ms / 1000),
        _link(device, pg, rounds) if pg is not None and dist.get_world_size(pg) > 1 else 0.0,
    ]
    if pg is not None:  # all ranks must plan with the same numbers: those of the slowest
        agreed = torch.tensor(speeds, dtype=torch.float64, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=pg)
        speeds = agreed.tolist()  # host sync: a measurement, not a step
    lookup_bw, forward_share, copy_bw, matmul_flops, link_bw = speeds
    return Calibration(
        device_type=device.type,
        lookup_bw=lookup_bw,
        backward=1 / forward_share,
        copy_bw=copy_bw,
        matmul_flops=matmul_flops,
        link_bw=link_bw or None,
        memory_bytes=_memory(device),
    )


def _lookup(device: torch.device, rounds: int) -> tuple[float, float, float]:
    """(forward ms, backward ms, bytes that the cost function counts for the forward) of a fused pooled lookup."""
    from recsys_edu.kernels.modules import make_kernel

    spec = KernelSpec(
        tables=tuple(TableSpec(f"t{i}", _ROWS, _COLUMNS) for i in range(_TABLES)),
        lane_tables=tuple(range(_TABLES)),
        pooled=True,
        optimizer=OptimizerSpec("SGD", learning_rate=0.01),
        validate_ids=False,
    )
    kernel = make_kernel(spec, device)
    num_ids = _TABLES * _BATCH * _POOLING
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_ROWS, (num_ids,), generator=generator).to(device)
    offsets = torch.arange(0, num_ids + 1, _POOLING, device=device)
    output = kernel(ids, offsets)
    gradient = torch.ones_like(output)
    forward_ms = _median_ms(lambda: kernel(ids, offsets), device, rounds)
    both_ms = _median_ms(lambda: kernel(ids, offsets).backward(gradient), device, rounds)
    moved = num_ids * c.BIGINT_DTYPE + num_ids * _COLUMNS * 4 + output.numel() * 4
    return forward_ms, max(both_ms - forward_ms, forward_ms * 0.1), moved


def _link(device: torch.device, pg: dist.ProcessGroup, rounds: int) -> float:
    """Bytes per millisecond: what one rank gets from all, itself included, over the time of the exchange."""
    world = dist.get_world_size(pg)
    sent = torch.ones(world * 2**18, device=device)
    received = torch.empty_like(sent)
    elapsed_ms = _median_ms(lambda: dist.all_to_all_single(received, sent, group=pg), device, rounds)
    return sent.numel() * sent.element_size() / elapsed_ms


def _median_ms(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # host sync: kernels run behind the caller's back
        return (time.perf_counter() - start) * 1000

    once()
    return statistics.median(once() for _ in range(rounds))


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
