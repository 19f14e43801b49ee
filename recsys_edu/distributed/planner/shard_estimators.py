"""TorchRec's estimators: fill in the bytes and the milliseconds of every shard of a list of options, in one call.

Counterpart: torchrec.distributed.planner.shard_estimators
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recsys_edu.distributed.embedding_types import HOST_MEMORY_KERNELS
from recsys_edu.distributed.planner import constants as c
from recsys_edu.distributed.planner.cost import (
    Array,
    Lookups,
    Machine,
    Pattern,
    Rectangles,
    buffer_bytes,
    storage_bytes,
    times_ms,
)
from recsys_edu.distributed.planner.options import CACHED_KERNELS, KINDS
from recsys_edu.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    PlannerError,
    PlannerErrorType,
    SharderData,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from recsys_edu.distributed.planner.utils import get_num_poolings
from recsys_edu.distributed.planner.workload import OUTPUT_BYTES, answer_bytes, optimizer_state_bytes, weight_bytes
from recsys_edu.distributed.types import KeyValueParams, PipelineType


class EmbeddingPerfEstimator(ShardEstimator):
    """Milliseconds per phase of every shard, from sizes, bandwidths and what the batch asks for.

    `is_inference` leaves out the backward. Counterpart: torchrec's class of this name.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        is_inference: bool = False,
    ) -> None:
        self._topology = topology
        self._constraints = constraints or {}
        self._is_inference = is_inference

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: dict[str, SharderData]) -> None:
        rectangles, lookups = _flatten(sharding_options, self._topology, self._constraints, sharder_data_map)
        times = times_ms(rectangles, lookups, Machine.of(self._topology), self._is_inference)
        shards = [shard for option in sharding_options for shard in option.shards]
        for shard, phases in zip(shards, times.tolist()):
            shard.perf = Perf(*phases)


class EmbeddingStorageEstimator(ShardEstimator):
    """Bytes of every shard: weights, the optimizer's state, and the buffers of the batches in flight.

    Args:
        pipeline_type: how many batches are in flight.
        run_embedding_at_peak_memory: count buffers that live only within a step.

    Counterpart: torchrec's class of this name.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        pipeline_type: PipelineType = PipelineType.NONE,
        run_embedding_at_peak_memory: bool = False,
        is_inference: bool = False,
    ) -> None:
        self._topology = topology
        self._constraints = constraints or {}
        self._pipeline_type = pipeline_type
        self._ephemeral = run_embedding_at_peak_memory
        self._is_inference = is_inference

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: dict[str, SharderData]) -> None:
        rectangles, lookups = _flatten(sharding_options, self._topology, self._constraints, sharder_data_map)
        machine = Machine.of(self._topology)
        sizes = storage_bytes(rectangles, lookups, machine, self._pipeline_type, self._ephemeral, self._is_inference)
        shards = [shard for option in sharding_options for shard in option.shards]
        for shard, (hbm, ddr) in zip(shards, sizes.astype(np.int64).tolist()):
            shard.storage = Storage(hbm=hbm, ddr=ddr)


def _flatten(
    options: Sequence[ShardingOption],
    topology: Topology,
    constraints: dict[str, ParameterConstraints],
    sharder_data_map: dict[str, SharderData] | None,
) -> tuple[Rectangles, Lookups]:
    """All shards of all options as arrays."""
    per_option: list[dict[str, float]] = []
    counts = []
    for option in options:
        data = (sharder_data_map or {}).get(option.module_type_key)
        fused_params = data.fused_params if data is not None else None
        per_option.append(_option_numbers(option, topology, constraints.get(option.name), fused_params))
        counts.append(len(option.shards))
    sizes = [shard.size for option in options for shard in option.shards]
    columns = {
        key: np.repeat(np.array([numbers[key] for numbers in per_option], dtype=np.float64), counts)
        for key in (per_option[0] if per_option else ())
    }
    flags = {key: columns.pop(key).astype(bool) for key in ("on_host", "cached", "pooled", "weighted")}
    own = {key: columns.pop(key) for key in ("pattern", "parts", "kernel_bw")}
    size_N2 = np.array(sizes, dtype=np.float64)
    rectangles = Rectangles(
        size_N2[:, 0], size_N2[:, 1], on_host=flags.pop("on_host"), cached=flags.pop("cached"), **own
    )
    return rectangles, Lookups(**columns, **flags)


def _option_numbers(
    option: ShardingOption,
    topology: Topology,
    constraint: ParameterConstraints | None,
    fused_params: dict[str, object] | None,
) -> dict[str, float]:
    kind = KINDS[option.sharding_type]
    lengths = option.input_lengths
    poolings = option.num_poolings or get_num_poolings(None, option)
    batches = [option.batch_size] * len(lengths)
    if constraint is not None and constraint.batch_sizes:
        batches = constraint.batch_sizes
    cache = option.cache_params
    ratio = c.UVM_CACHING_RATIO if cache is None or cache.load_factor is None else cache.load_factor
    kernel_bw = c.kernel_bw_lookup(
        topology.compute_device,
        option.compute_kernel,
        topology.hbm_mem_bw,
        topology.ddr_mem_bw,
        topology.hbm_to_ddr_mem_bw,
        ratio,
        bool(cache is not None and cache.prefetch_pipeline),
        topology.ssd_mem_bw,
    )
    if kernel_bw is None:
        raise PlannerError(
            f"table {option.name!r}: kernel {option.compute_kernel!r} does not run on {topology.compute_device!r}",
            PlannerErrorType.INVALID_COMPUTE_KERNEL,
        )
    module = option.module[1]
    element_bytes, row_bytes = weight_bytes(option.tensor, topology.compute_device)
    answer = answer_bytes(module, option.tensor)
    state = optimizer_state_bytes(option.tensor, fused_params)
    stats = None if cache is None else cache.stats
    is_split = kind.pattern >= Pattern.ROWS_EVERYWHERE
    return {
        "pattern": kind.pattern,
        "parts": _row_parts(option) if is_split else 1,
        "kernel_bw": kernel_bw,
        "on_host": option.compute_kernel in HOST_MEMORY_KERNELS,
        "cached": option.compute_kernel in CACHED_KERNELS,
        "pooled": option.is_pooled,
        "weighted": bool(getattr(module, "is_weighted", lambda: False)()),
        "ids": sum(b * length * p for b, length, p in zip(batches, lengths, poolings)),
        "bags": sum(b * min(length, 1) * p for b, length, p in zip(batches, lengths, poolings)),
        "element_bytes": element_bytes,
        "answer_bytes": answer,
        "output_bytes": answer if option.output_dtype is None else OUTPUT_BYTES.get(option.output_dtype, 4),
        "state_per_cell": state[0],
        "state_per_row": state[1] + row_bytes,
        "cache_ratio": ratio,
        "misses": 0.0 if stats is None else stats.expected_miss_rate(ratio) * stats.expected_lookups,
    }


def _row_parts(option: ShardingOption) -> int:
    """Row blocks per column block; empty ones count, their ranks answer too."""
    return len(option.shards) // len({shard.offset[1] for shard in option.shards})


def calculate_pipeline_io_cost(
    input_size: int,
    output_size: int,
    prefetch_size: int,
    pipeline_type: PipelineType,
    multipass_prefetch_max_pass: int | None,
    count_ephemeral_storage_cost: bool = False,
    is_inference: bool = False,
) -> int:
    """Bytes of the buffers that a pipeline holds; see `cost.buffer_bytes`. None while serving."""
    if is_inference:
        return 0
    sizes = (np.float64(size) for size in (input_size, output_size, prefetch_size))
    return int(np.ceil(buffer_bytes(*sizes, pipeline_type, multipass_prefetch_max_pass, count_ephemeral_storage_cost)))


def calculate_shard_storages(
    sharder_data: SharderData,
    sharding_type: str,
    tensor: Tensor,
    compute_device: str,
    compute_kernel: str,
    shard_sizes: list[list[int]],
    batch_sizes: list[int],
    world_size: int,
    local_world_size: int,
    input_lengths: list[float],
    num_poolings: list[float],
    caching_ratio: float,
    is_pooled: bool,
    input_data_type_size: float,
    output_data_type_size: float,
    pipeline_type: PipelineType = PipelineType.NONE,
    count_ephemeral_storage_cost: bool = False,
    is_inference: bool = False,
    multipass_prefetch_max_pass: int | None = None,
    key_value_params: KeyValueParams | None = None,
    kv_cache_load_factor: float = c.KV_CACHING_RATIO,
    use_virtual_table: bool = False,
) -> list[Storage]:
    """The storage formula for the shards of one table; sizes in bytes.

    Virtual tables and key-value tables are counted as tables on the host.
    """
    del multipass_prefetch_max_pass, key_value_params, kv_cache_load_factor, use_virtual_table
    kind = KINDS[sharding_type]
    topology = Topology(world_size, compute_device, local_world_size=local_world_size)
    ids = sum(b * length * p for b, length, p in zip(batch_sizes, input_lengths, num_poolings))
    bags = sum(b * min(length, 1) * p for b, length, p in zip(batch_sizes, input_lengths, num_poolings))
    split = {Pattern.ROWS_EVERYWHERE: world_size, Pattern.ROWS_ON_HOST: local_world_size}
    state = optimizer_state_bytes(tensor, sharder_data.fused_params)
    element_bytes, row_bytes = weight_bytes(tensor, compute_device)
    size_N2 = np.array(shard_sizes, dtype=np.float64)

    def one(value: float) -> Array:
        return np.array(value, dtype=np.float64)

    rectangles = Rectangles(
        size_N2[:, 0],
        size_N2[:, 1],
        np.array(kind.pattern),
        one(split.get(kind.pattern, 1)),
        one(1),
        np.array(compute_kernel in HOST_MEMORY_KERNELS),
        np.array(compute_kernel in CACHED_KERNELS),
    )
    lookups = Lookups(
        ids=one(ids * input_data_type_size / c.BIGINT_DTYPE),
        bags=one(bags),
        pooled=np.array(is_pooled),
        weighted=np.array(False),
        element_bytes=one(element_bytes),
        answer_bytes=one(output_data_type_size),
        output_bytes=one(output_data_type_size),
        state_per_cell=one(state[0]),
        state_per_row=one(state[1] + row_bytes),
        cache_ratio=one(caching_ratio),
        misses=one(0),
    )
    sizes = storage_bytes(
        rectangles, lookups, Machine.of(topology), pipeline_type, count_ephemeral_storage_cost, is_inference
    )
    return [Storage(hbm=hbm, ddr=ddr) for hbm, ddr in sizes.astype(np.int64).tolist()]


class EmbeddingOffloadStats:
    """How often a cache of a given share of a table misses, from a histogram of reuse distances.

    Args:
        cacheability: area under the miss-rate curve, 0 (a tiny cache catches all) to 1.
        expected_lookups: distinct rows per step.
        mrc_hist_counts: how many lookups found their row within each of equal bins of distances.
        height: rows of the table.
    """

    def __init__(self, cacheability: float, expected_lookups: int, mrc_hist_counts: Tensor, height: int) -> None:
        self._cacheability = cacheability
        self._expected_lookups = expected_lookups
        self.height = height
        if mrc_hist_counts.dim() != 1 or len(mrc_hist_counts) == 0:
            raise ValueError(f"expected a histogram of one dimension, got shape {tuple(mrc_hist_counts.shape)}")
        self.hist = mrc_hist_counts
        self.bins = torch.linspace(0, height, len(mrc_hist_counts) + 1)

    @property
    def expected_lookups(self) -> int:
        return self._expected_lookups

    @property
    def cacheability(self) -> float:
        return self._cacheability

    def expected_miss_rate(self, clf: float) -> float:
        """Share of the lookups that miss a cache of `clf` x height rows."""
        return float(self.estimate_cache_miss_rate(torch.tensor(clf * self.height), self.hist, self.bins))

    @staticmethod
    def estimate_cache_miss_rate(cache_sizes: Tensor, hist: Tensor, bins: Tensor) -> Tensor:
        """For caches of so many rows the share of lookups whose distance is beyond: the bin a size falls in counts
        as caught."""
        caught = torch.cat([torch.zeros(1), hist.cumsum(0) / hist.sum()])
        index = torch.searchsorted(bins.contiguous(), cache_sizes.to(bins.dtype), right=False)
        return 1 - caught[index.clamp(max=len(hist))]
