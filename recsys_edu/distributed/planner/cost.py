"""The one cost function: from rectangles of tables to bytes and milliseconds, for any number of them at once.

What a rank pays for a rectangle depends on the rectangle's size, on how much of the batch asks for it, and on how its
answers get back. Four patterns cover every sharding type:

    pattern           ids that reach it    answers it gives        they travel
    REPLICA           its own batch's      its own batch's         not at all; gradients are all-reduced
    WHOLE_ROWS        all ranks'           one per bag             all-to-all                      (table-, column-wise)
    ROWS_EVERYWHERE   all ranks' / parts   a part of every bag     all-to-all, parts are added     (row-wise)
    ROWS_ON_HOST      all ranks' / parts   a part of every bag     added in the host, then beyond (table-row-wise, grid)

Every number is per step: `times_ms` has the phases of `Perf`, `storage_bytes` the weights, the optimizer's state and
the buffers of the batch. The shape of the arrays is the caller's affair: all options of all tables, or one rectangle.

Suffix: N, any shape. Bandwidths are bytes per millisecond.

Counterpart: torchrec.distributed.planner.shard_estimators, whose numbers these are (see the parity test).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.topology import CollectiveType, Topology
from recsys_edu.distributed.types import PipelineType

Array = NDArray[np.float64]

PHASES = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "input_dist_comms", "prefetch_compute")
"""The last axis of `times_ms`, in the order of Perf's fields."""
COUNTED = tuple(i for i, name in enumerate(PHASES) if name != "input_dist_comms")
"""Those that make a step longer: ids travel while the step before still computes."""

_SMALLEST_READ = 32  # a whole-row lookup reads at least this many numbers per row


class Pattern(IntEnum):
    """How a rectangle's answers get back; see the top of this file."""

    REPLICA = 0
    WHOLE_ROWS = 1
    ROWS_EVERYWHERE = 2
    ROWS_ON_HOST = 3


@dataclass(frozen=True)
class Lookups:
    """What the batch asks of tables, and what their numbers weigh; arrays that broadcast against the rectangles.

    Args:
        ids: ids per rank and step, over all features of the table.
        bags: pooled answers per rank and step.
        pooled: one answer per bag, else one per id.
        weighted: ids come with weights.
        element_bytes: of a weight.
        answer_bytes: of a number of an embedding on its way back: a weight's, or what quantised weights are turned to.
        output_bytes: of a number of an embedding in memory.
        state_per_cell, state_per_row: bytes that the optimizer keeps.
        cache_ratio: share of the rows that the device caches, for cached kernels.
        misses: rows that have to be fetched before a step, for cached kernels with statistics.
    """

    ids: Array
    bags: Array
    pooled: NDArray[np.bool_]
    weighted: NDArray[np.bool_]
    element_bytes: Array
    answer_bytes: Array
    output_bytes: Array
    state_per_cell: Array
    state_per_row: Array
    cache_ratio: Array
    misses: Array

    def at(self, index: object) -> Lookups:
        """Rows of it, or with None in the index a further axis."""
        return Lookups(**{name: value[index] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Rectangles:
    """Rectangles and how they are used; `parts` is over how many row blocks a table's ids spread.

    `kernel_bw` is the speed of the lookup, `on_host` marks weights in host memory, `cached` those with a device cache.
    """

    rows: Array
    columns: Array
    pattern: NDArray[np.int64]
    parts: Array
    kernel_bw: Array
    on_host: NDArray[np.bool_]
    cached: NDArray[np.bool_]


@dataclass(frozen=True)
class Machine:
    """What the cost function needs of a Topology."""

    world_size: int
    local_size: int
    on_cpu: bool
    input_bw: float
    gather_bw: float
    scatter_sum_bw: float
    host_sum_bw: float
    intra_bw: float
    inter_bw: float
    hbm_to_ddr_bw: float
    backward: float
    weighted_backward: float

    @staticmethod
    def of(topology: Topology) -> Machine:
        local, world, bandwidths = topology.local_world_size, topology.world_size, topology.comms_bandwidths
        fast = topology.intra_group_size

        def bandwidth(kind: CollectiveType, size: int) -> float:
            return bandwidths.get_bw(fast, size, kind)

        return Machine(
            world_size=world,
            local_size=local,
            on_cpu=topology.compute_device == "cpu",
            input_bw=bandwidth(CollectiveType.ALL_TO_ALL, world),
            gather_bw=bandwidth(CollectiveType.ALL_GATHER, world),
            scatter_sum_bw=bandwidth(CollectiveType.REDUCE_SCATTER, world),
            host_sum_bw=bandwidth(CollectiveType.REDUCE_SCATTER, local),
            intra_bw=topology.intra_host_bw,
            inter_bw=topology.inter_host_bw,
            hbm_to_ddr_bw=topology.hbm_to_ddr_mem_bw,
            backward=topology.bwd_compute_multiplier,
            weighted_backward=topology.weighted_feature_bwd_compute_multiplier,
        )


@dataclass(frozen=True)
class Traffic:
    """Ids that reach a rectangle and answers that leave it, per step."""

    ids_N: Array
    answers_N: Array


def traffic_of(rect: Rectangles, use: Lookups, machine: Machine) -> Traffic:
    """Of every rectangle: a copy serves its own rank's batch, any other shard all ranks'."""
    replica = rect.pattern == Pattern.REPLICA
    asking = np.where(replica, 1, machine.world_size)
    ids_N = asking * use.ids / rect.parts
    return Traffic(ids_N, np.where(use.pooled, asking * use.bags, ids_N))


def times_ms(rect: Rectangles, use: Lookups, machine: Machine, inference: bool = False) -> Array:
    """[..., 6] milliseconds by phase (`PHASES`) that a rank spends on each rectangle in one step.

    >>> # one table of 1000 x 128 whole on one of 4 ranks, one id per example, 512 examples per rank
    >>> # fwd_compute = (2048 ids x 8 bytes + 2048 rows x 512 bytes read + as many written) / kernel_bw
    """
    traffic = traffic_of(rect, use, machine)
    row_split = rect.pattern >= Pattern.ROWS_EVERYWHERE
    replica = rect.pattern == Pattern.REPLICA
    whole = rect.pattern == Pattern.WHOLE_ROWS

    # Lookup: read the ids, read the rows, write the answers. Narrow whole rows do not fill the kernel's blocks.
    id_bytes_N = traffic.ids_N * c.BIGINT_DTYPE * np.where(use.weighted, 2, 1)
    read_columns_N = np.where(whole, np.maximum(rect.columns, _SMALLEST_READ), rect.columns)
    row_bytes_N = traffic.ids_N * read_columns_N * use.element_bytes
    answer_bytes_N = traffic.answers_N * rect.columns * use.answer_bytes
    narrow_N = np.where(rect.columns < c.FULL_BLOCK_EMB_DIM, c.HALF_BLOCK_PENALTY, 1.0)
    narrow_N = np.where(rect.columns < c.FULL_BLOCK_EMB_DIM // 2, c.QUARTER_BLOCK_PENALTY, narrow_N)
    lookup_N = (id_bytes_N + row_bytes_N + answer_bytes_N) * np.where(whole, narrow_N, 1.0) / rect.kernel_bw
    backward_N = lookup_N * machine.backward
    weighted_N = lookup_N * (machine.backward * machine.weighted_backward + c.WEIGHTED_KERNEL_MULTIPLIER)
    backward_N = np.where(use.weighted, weighted_N, backward_N)

    # Links.
    input_N = np.where(replica, 0.0, machine.world_size * use.ids * c.BIGINT_DTYPE / machine.input_bw)
    flat_out_N = answer_bytes_N / np.where(row_split & use.pooled, machine.scatter_sum_bw, machine.input_bw)
    flat_back_N = answer_bytes_N / np.where(row_split & use.pooled, machine.gather_bw, machine.input_bw)
    two_hops_N = answer_bytes_N / machine.host_sum_bw
    if machine.world_size > machine.local_size:
        two_hops_N = two_hops_N + answer_bytes_N / machine.local_size / machine.inter_bw
    on_host = (rect.pattern == Pattern.ROWS_ON_HOST) & use.pooled
    output_N = np.where(replica, 0.0, np.where(on_host, two_hops_N, flat_out_N))
    gradients_N = np.where(replica, 0.0, np.where(on_host, two_hops_N, flat_back_N))
    # Gradients of parts are copied into the kernel's order first.
    gradients_N = gradients_N + np.where(row_split, answer_bytes_N * c.BATCHED_COPY_PERF_FACTOR / rect.kernel_bw, 0.0)
    table_bytes_N = rect.rows * rect.columns * use.element_bytes
    all_reduce_N = table_bytes_N * _all_reduce_share(machine) / machine.inter_bw
    elementwise_N = table_bytes_N * c.DP_ELEMENTWISE_KERNELS_PERF_FACTOR / rect.kernel_bw
    gradients_N = np.where(replica, all_reduce_N + elementwise_N, gradients_N)

    fetched_N = np.where(rect.cached, use.misses * rect.columns * use.element_bytes / rect.parts, 0.0)
    phases = [lookup_N, output_N, backward_N, gradients_N, input_N, fetched_N / machine.hbm_to_ddr_bw]
    if inference:
        phases[2], phases[3] = np.zeros_like(lookup_N), np.zeros_like(lookup_N)
    return np.stack(np.broadcast_arrays(*phases), axis=-1)


def _all_reduce_share(machine: Machine) -> float:
    """Table bytes that each rank's slow link carries in an all-reduce, as a share of the table (TorchRec's model)."""
    num_hosts = machine.world_size // machine.local_size
    return {1: 1.0, 2: 1.5}.get(num_hosts, 3.0) / machine.local_size


def storage_bytes(
    rect: Rectangles,
    use: Lookups,
    machine: Machine,
    pipeline: PipelineType = PipelineType.NONE,
    ephemeral: bool = False,
    inference: bool = False,
) -> Array:
    """[..., 2] bytes of device memory and of host memory that each rectangle needs on its rank.

    On the CPU everything is host memory. A cached kernel keeps the weights on the host and a share of them, with a
    few bytes of bookkeeping per row, on the device. `ephemeral` counts buffers that live only within a step.
    """
    traffic = traffic_of(rect, use, machine)
    input_N = traffic.ids_N * c.BIGINT_DTYPE
    output_N = traffic.answers_N * rect.columns * use.output_bytes
    buffers_N = buffer_bytes(input_N, output_N, np.where(rect.cached, input_N, 0.0), pipeline, None, ephemeral)
    if inference:  # buffers are the server's affair, and nothing trains
        buffers_N = np.zeros_like(buffers_N)
    weights_N = np.ceil(rect.rows * rect.columns * use.element_bytes)
    table_N = weights_N + rect.rows * rect.columns * use.state_per_cell + rect.rows * use.state_per_row
    bookkeeping_N = rect.rows * (4 + 16 * use.cache_ratio)
    cache_N = np.where(rect.cached, table_N * use.cache_ratio + bookkeeping_N, 0.0)
    device_N = np.ceil(np.where(rect.on_host, cache_N, table_N) + buffers_N)
    device_N = np.where(rect.rows > 0, device_N, 0.0)  # a rank without rows gets no ids
    host_N = np.ceil(np.where(rect.on_host, table_N, 0.0))
    if machine.on_cpu:
        device_N, host_N = np.zeros_like(device_N), device_N + host_N
    return np.stack(np.broadcast_arrays(device_N, host_N), axis=-1)


def buffer_bytes(
    input_bytes: Array,
    output_bytes: Array,
    prefetch_bytes: Array,
    pipeline: PipelineType,
    max_passes: int | None = None,
    ephemeral: bool = False,
) -> Array:
    """Bytes of the batches that a pipeline keeps in flight.

    Without a pipeline one batch's ids and answers; the sparse pipeline holds the ids of two batches, the prefetching
    one those of three and what it fetches. Pipelined answers live only within the step (`ephemeral`).
    """
    if pipeline is PipelineType.TRAIN_SPARSE_DIST:
        return 2 * input_bytes + (output_bytes if ephemeral else 0)
    if pipeline is PipelineType.TRAIN_PREFETCH_SPARSE_DIST:
        prefetching = prefetch_bytes * (1 + 6 / (max_passes or 1))
        return 3 * input_bytes + prefetching + (output_bytes if ephemeral else 0)
    return input_bytes + output_bytes
