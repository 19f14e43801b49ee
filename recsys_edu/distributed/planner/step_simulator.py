"""A training step that nobody has run: predicted from the plan, the topology and measured kernels.

    predicted = simulate_step(plan, dense_work(model), batch_size=512, kernels=calibrate().kernels())
    predicted.step_ms                    # how long a step takes once the pipeline is full
    predicted.timeline(ranks=[0, 1])     # spans as a measured timeline has them (timeline.py, viz/timeline.py)

A step is a list of operations in the order in which a rank's Python issues them. An operation runs on one stream of its
rank, host, network or copy, each of which does one thing at a time; a transfer begins when all its ranks have come:

    host      start input |.............| lookup | bottom MLP | wait | top MLP, both ways | bottom back | optimizer
    network                |ids |                |embeddings  |                           |gradients  |all-reduce|

Unpipelined, a step begins when the one before has ended. With TRAIN_SPARSE_DIST the ids of the next batch travel while
this one is computed.

Suffixes: W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recsys_edu.distributed.planner.cost import Array, Machine
from recsys_edu.distributed.planner.kernel_costs import NO_DENSE, DenseWork, KernelCosts, assumed_kernels
from recsys_edu.distributed.planner.loads import RankLoads, rank_loads
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.timeline import HOST, NETWORK, Span, Timeline
from recsys_edu.distributed.types import PipelineType

COPY = "copy"
STEPS = 4  # simulated steps: two to fill a pipeline, two to measure between


@dataclass(frozen=True)
class Op:
    """One operation of every rank.

    Args:
        name, stream: as in a measured timeline, but for parts of forward and backward.
        ms_W: how long it takes once it has begun; bytes_W: what a transfer sends.
        after: names of operations that have to be over; `name@-1` is that of the step before.
        together: how many consecutive ranks begin it together (1: each by itself).
        delay_ms: how much later it has arrived; the stream is free by then.
    """

    name: str
    stream: str
    ms_W: Array
    after: tuple[str, ...] = ()
    bytes_W: Array | None = None
    together: int = 1
    delay_ms: float = 0.0

    @property
    def label(self) -> str:
        """As a measured timeline calls it: that does not tell the parts of forward and backward apart."""
        first = self.name.split()[0]
        return first if first in ("forward", "backward") else self.name


@dataclass(frozen=True)
class PredictedStep:
    """The operations of a few steps with the times at which each rank begins and ends them.

    `starts` and `ends` have one [W] array per operation, in the order of `ops`, step after step.
    """

    ops: tuple[Op, ...]
    starts: tuple[Array, ...]
    ends: tuple[Array, ...]
    batch_size: float

    @property
    def world_size(self) -> int:
        return len(self.ends[0])

    @property
    def step_ms(self) -> float:
        """From one end of the optimizer to the next, on the slowest rank."""
        last = [end for op, end in zip(self.ops, self.ends) if op.name == "optimizer"]
        return float(last[-1].max() - last[-2].max())

    @property
    def examples_per_s(self) -> float:
        """Of all ranks together."""
        return self.batch_size * self.world_size / self.step_ms * 1000

    @property
    def work_ms(self) -> float:
        """Milliseconds in which the busiest rank's host (on cuda: the device) computes in a step."""
        busy = np.zeros(self.world_size)
        for op in self.ops[: len(self.ops) // STEPS]:
            busy += op.ms_W if op.stream == HOST else 0
        return float(busy.max())

    def timeline(self, ranks: Iterable[int] | None = None, steps: int = 2) -> Timeline:
        """Spans of the last `steps` steps on some ranks (default: the first eight), waits of the hosts included."""
        per_step = len(self.ops) // STEPS
        first = len(self.ops) - per_step * min(steps, STEPS)
        shown = zip(self.ops[first:], self.starts[first:])
        zero = float(min(start.min() for op, start in shown if op.stream == HOST))
        spans: list[Span] = []
        for rank in ranks if ranks is not None else range(min(self.world_size, 8)):
            free: float | None = None
            for index in range(first, len(self.ops)):
                op, start, end = self.ops[index], float(self.starts[index][rank]), float(self.ends[index][rank])
                num_bytes = 0 if op.bytes_W is None else int(op.bytes_W[rank])
                if op.stream == HOST:
                    if free is not None and start > free + 1e-9:
                        cause = self._last_before(index, rank)
                        spans.append(Span(rank, HOST, f"wait {cause}", free - zero, start - free))
                    free = end
                if end > start >= zero:  # a batch may have been copied during the step before
                    spans.append(Span(rank, op.stream, op.label, start - zero, end - start, num_bytes))
        return Timeline(tuple(sorted(spans, key=lambda span: (span.start_ms, span.rank))))

    def _last_before(self, index: int, rank: int) -> str:
        """What ended just when the operation could begin."""
        start = self.starts[index][rank]
        for other in range(len(self.ops)):
            if other != index and self.ops[other].stream != HOST and abs(self.ends[other][rank] - start) < 1e-9:
                return self.ops[other].name
        return "others"


def simulate_step(
    plan: PlannedSharding,
    work: DenseWork = NO_DENSE,
    batch_size: float = 512,
    kernels: KernelCosts | None = None,
    pipeline: PipelineType = PipelineType.NONE,
) -> PredictedStep:
    """Predict a step of the plan on its topology.

    Args:
        work: the model's dense part; default: none.
        batch_size: per rank, the one that was planned for.
        kernels: default: assumed for the topology's device.

    Raises:
        ValueError: a batch size that is not positive, or a pipeline other than NONE and TRAIN_SPARSE_DIST.
    """
    if not batch_size > 0:
        raise ValueError(f"batch_size {batch_size}: expected a number above 0")
    if pipeline not in (PipelineType.NONE, PipelineType.TRAIN_SPARSE_DIST):
        raise ValueError(f"pipeline {pipeline}: expected NONE or TRAIN_SPARSE_DIST")
    kernels = kernels or assumed_kernels(plan.topology)
    machine = Machine.of(plan.topology)
    ops = step_ops(rank_loads(plan), work, batch_size, machine, kernels)
    slowness_W = 1 / np.array(plan.topology.speeds)
    ops = [op if op.stream != HOST else _slowed(op, slowness_W) for op in ops]
    order = _pipelined(ops) if pipeline is PipelineType.TRAIN_SPARSE_DIST else ops
    return _run(order, batch_size)


def step_ops(loads: RankLoads, work: DenseWork, batch_size: float, machine: Machine, kernels: KernelCosts) -> list[Op]:
    """The operations of one unpipelined step, in the order in which a rank issues them.

    Lookup times of the plan's cost are for ranks of normal speed; `simulate_step` slows the slow ones down.
    """
    world, local = machine.world_size, machine.local_size

    def all_(ms: float) -> Array:
        return np.full(world, ms)

    def transfer(sent_W: Array, got_W: Array, bandwidth: float, ranks: int) -> Array:
        if ranks == 1:
            return np.zeros(world)
        largest_W = np.maximum(sent_W, got_W).reshape(-1, ranks).max(axis=1)
        fixed_ms = kernels.exchange_ms + kernels.message_ms * (ranks - 1)
        return np.repeat(fixed_ms + largest_W / bandwidth, ranks)

    ids_ms_W = transfer(loads.ids_out_W, loads.ids_in_W, machine.input_bw, world)
    sizes_ms_W = transfer(np.zeros(world), np.zeros(world), machine.input_bw, world)
    out_ms_W = transfer(loads.flat_out_W, loads.flat_in_W, machine.gather_bw, world)
    back_ms_W = transfer(loads.flat_in_W, loads.flat_out_W, machine.gather_bw, world)
    inside_ms_W = transfer(loads.host_W, loads.host_W, machine.host_sum_bw, local)
    between_W = (loads.between_out_W, loads.between_in_W)
    between_ms_W = transfer(*between_W, machine.inter_bw, world)
    reduced = (work.parameter_bytes + loads.replica_bytes) * 2 * (world - 1) / world
    reduce_ms_W = transfer(all_(reduced), all_(reduced), machine.gather_bw, world)
    moved_W = 2 * (loads.flat_in_W + loads.between_in_W) / kernels.copy_bw  # put together: read and written
    before, after = work.before, work.after
    step_bytes = 3 * (work.parameter_bytes + loads.replica_bytes)  # weights and gradients read, weights written
    has_hosts = bool(loads.host_W.any())
    answers = ("pooled embeddings", "host sums") if has_hosts else ("pooled embeddings",)
    gradients = ("gradients of pooled embeddings",) + (("gradients inside hosts",) if has_hosts else ())

    copied = work.input_bytes * batch_size + loads.ids_out_W
    ops = [
        Op("copy batch", COPY, copied / kernels.host_link_bw if kernels.host_link_bw else all_(0.0), ("optimizer@-1",)),
        Op("start input", HOST, kernels.engine_ms + loads.ids_out_W / kernels.route_bw, ("copy batch",)),
        Op("sizes", NETWORK, sizes_ms_W, ("start input",), all_(32.0 * world), world),
        Op("lengths and ids", NETWORK, ids_ms_W, ("sizes",), loads.ids_out_W, world),
        Op("lookup", HOST, loads.fetch_ms_W + loads.lookup_ms_W, ("lengths and ids",)),
        Op("pooled embeddings", NETWORK, out_ms_W, ("lookup",), loads.flat_out_W, world),
        Op("partial sums", NETWORK, inside_ms_W, ("lookup",), loads.host_W, local),
        Op("host sums", NETWORK, between_ms_W, ("partial sums",), loads.between_out_W, world),
        Op("forward bottom", HOST, all_(before.forward_ms(kernels, batch_size)), ("lookup",)),
        Op("forward top", HOST, moved_W + after.forward_ms(kernels, batch_size), answers),
        Op("backward top", HOST, moved_W + after.backward_ms(kernels, batch_size)),
        Op("gradients of pooled embeddings", NETWORK, back_ms_W, ("backward top",), loads.flat_in_W, world),
        Op("gradients between hosts", NETWORK, between_ms_W, ("backward top",), loads.between_in_W, world),
        Op("gradients inside hosts", NETWORK, inside_ms_W, ("gradients between hosts",), loads.host_W, local),
        Op("backward bottom", HOST, all_(before.backward_ms(kernels, batch_size))),
        Op("gloo:all_reduce", NETWORK, reduce_ms_W, ("backward bottom",), all_(reduced), world),
        Op("backward lookup", HOST, loads.backward_ms_W, gradients),
        Op(
            "optimizer",
            HOST,
            all_(step_bytes / kernels.copy_bw + work.num_parameters * kernels.op_ms),
            ("gloo:all_reduce",),
        ),
    ]
    unused = set() if has_hosts else {"partial sums", "host sums", "gradients between hosts", "gradients inside hosts"}
    delayed = {op.name for op in ops if op.stream == NETWORK and op.name != "gloo:all_reduce"} if world > 1 else set()
    ops = [replace(op, delay_ms=kernels.delay_ms) if op.name in delayed else op for op in ops]
    return [op for op in ops if op.name not in unused]


def _slowed(op: Op, slowness_W: Array) -> Op:
    """Lookups are in the plan's phases, which know of slow ranks already."""
    if op.name in ("lookup", "backward lookup"):
        return op
    return replace(op, ms_W=op.ms_W * slowness_W)


def _pipelined(ops: Sequence[Op]) -> list[Op]:
    """The same step with the input of the next one in it, in the order of TrainPipelineSparseDist.

    Routing comes first; the ids are sent when the forward has been issued, and travel during the backward.
    """
    by_name = {op.name: op for op in ops}
    early = [replace(by_name["copy batch"], after=("lookup@-1",)), by_name["start input"], by_name["sizes"]]
    ids = replace(by_name["lengths and ids"], after=("sizes", "forward top"))
    rest = [op for op in ops if op not in early and op.name not in ("copy batch", "lengths and ids")]
    rest = [replace(op, after=("lengths and ids@-1",)) if op.name == "lookup" else op for op in rest]
    cut = next(i for i, op in enumerate(rest) if op.name == "backward top")
    return [*early, *rest[:cut], ids, *rest[cut:]]


def _run(ops: Sequence[Op], batch_size: float) -> PredictedStep:
    """Give every operation of `STEPS` steps its times: streams in order, transfers when all their ranks have come."""
    world = len(ops[0].ms_W)
    free = {stream: np.zeros(world) for stream in (HOST, NETWORK, COPY)}
    ended: dict[str, Array] = {}
    starts, ends = [], []
    for _ in range(STEPS):
        before = dict(ended)
        for op in ops:
            ready_W = free[op.stream]
            for name in op.after:
                known = before.get(name.removesuffix("@-1")) if name.endswith("@-1") else ended.get(name)
                ready_W = ready_W if known is None else np.maximum(ready_W, known)
            if op.together > 1:
                ready_W = np.repeat(ready_W.reshape(-1, op.together).max(axis=1), op.together)
            free[op.stream] = ready_W + op.ms_W
            ended[op.name] = free[op.stream] + op.delay_ms
            starts.append(ready_W)
            ends.append(ended[op.name])
    return PredictedStep(tuple(ops) * STEPS, tuple(starts), tuple(ends), batch_size)
