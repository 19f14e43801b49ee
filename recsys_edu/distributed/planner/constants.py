"""What the planner assumes where nobody says otherwise: bandwidths in bytes per millisecond, capacities in bytes.

`calibrate()` replaces the bandwidths by measured ones.

Counterpart: torchrec.distributed.planner.constants
"""

from __future__ import annotations

from recsys_edu.distributed.embedding_types import EmbeddingComputeKernel

GIB = 1024**3
MAX_SIZE: int = 2**63 - 1

# Links, per direction and rank.
INTRA_NODE_BANDWIDTH: float = 600 * GIB / 1000
CROSS_NODE_BANDWIDTH: float = 12.5 * GIB / 1000

# Memory.
HBM_CAP: int = 32 * GIB
DDR_CAP: int = 128 * GIB
SSD_CAP: int = 2 * 1024 * GIB
HUNDRED_GB: int = 100 * GIB
HBM_MEM_BW: float = 897 * GIB / 1000
DDR_MEM_BW: float = 51 * GIB / 1000
HBM_TO_DDR_MEM_BW: float = 32 * GIB / 1000
SSD_MEM_BW: float = 100 * 1024**2 / 1000
UVM_CACHING_RATIO: float = 0.2
KV_CACHING_RATIO: float = 0.2

# The batch.
BATCH_SIZE: int = 512
POOLING_FACTOR: float = 1.0
NUM_POOLINGS: float = 1.0
BIGINT_DTYPE: int = 8

# Tables and kernels.
MIN_CW_DIM: int = 128
FULL_BLOCK_EMB_DIM: int = 128
HALF_BLOCK_PENALTY: float = 1.15
QUARTER_BLOCK_PENALTY: float = 1.75
BATCHED_COPY_PERF_FACTOR: float = 2.455
BWD_COMPUTE_MULTIPLIER: float = 2
WEIGHTED_KERNEL_MULTIPLIER: float = 1.1
WEIGHTED_FEATURE_BWD_COMPUTE_MULTIPLIER: float = 1
DP_ELEMENTWISE_KERNELS_PERF_FACTOR: float = 9.22
DEFAULT_PERF_ESTIMATOR: str = "default_estimator"

# A kernel that reads host memory row by row gets this share of the link's streaming bandwidth.
RANDOM_HOST_ACCESS_SHARE: float = 0.1
# A kernel that makes whole gradients gets this share of the memory's bandwidth.
DENSE_KERNEL_SHARE: float = 0.5


def kernel_bw_lookup(
    compute_device: str,
    compute_kernel: str,
    hbm_mem_bw: float,
    ddr_mem_bw: float,
    hbm_to_ddr_mem_bw: float,
    caching_ratio: float | None = None,
    prefetch_pipeline: bool = False,
    ssd_mem_bw: float = SSD_MEM_BW,
) -> float | None:
    """Bytes per millisecond at which a kernel reads table rows; None where it does not run on that device.

    >>> kernel_bw_lookup("cuda", "fused", hbm_mem_bw=900.0, ddr_mem_bw=50.0, hbm_to_ddr_mem_bw=30.0)
    900.0
    >>> kernel_bw_lookup("cuda", "fused_uvm_caching", 900.0, 50.0, 30.0, caching_ratio=0.5)
    46.5

    A cached table reads `caching_ratio` of its rows from device memory; with `prefetch_pipeline` all of them, because
    the rows were fetched before the step.
    """
    kernel = EmbeddingComputeKernel
    if compute_device == "cpu":
        on_cpu = {kernel.DENSE: DENSE_KERNEL_SHARE, kernel.FUSED: 1.0, kernel.QUANT: 1.0}
        share = on_cpu.get(_known(compute_kernel))
        return None if share is None else share * ddr_mem_bw
    cached = UVM_CACHING_RATIO if caching_ratio is None else caching_ratio
    mixed = (cached * hbm_mem_bw + (1 - cached) * hbm_to_ddr_mem_bw) * RANDOM_HOST_ACCESS_SHARE
    return {
        kernel.DENSE: DENSE_KERNEL_SHARE * hbm_mem_bw,
        kernel.FUSED: hbm_mem_bw,
        kernel.FUSED_TRITON: hbm_mem_bw,
        kernel.QUANT: hbm_mem_bw,
        kernel.FUSED_UVM: hbm_to_ddr_mem_bw * RANDOM_HOST_ACCESS_SHARE,
        kernel.QUANT_UVM: hbm_to_ddr_mem_bw * RANDOM_HOST_ACCESS_SHARE,
        kernel.FUSED_UVM_CACHING: hbm_mem_bw if prefetch_pipeline else mixed,
        kernel.QUANT_UVM_CACHING: mixed,
        kernel.KEY_VALUE: ssd_mem_bw,
        kernel.SSD_VIRTUAL_TABLE: hbm_to_ddr_mem_bw,
        kernel.DRAM_VIRTUAL_TABLE: hbm_to_ddr_mem_bw,
    }.get(_known(compute_kernel))


def _known(compute_kernel: str) -> EmbeddingComputeKernel | None:
    return next((kernel for kernel in EmbeddingComputeKernel if kernel.value == compute_kernel), None)
