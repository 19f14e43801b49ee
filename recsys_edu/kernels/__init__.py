"""The local lookup: many tables at once, forward and backward, in PyTorch and in FBGEMM.

Read in this order: spec.py (what a kernel is asked to do), reference.py (the lookup itself), optimizers.py (fused row
updates), lookup.py (one buffer, two backends), modules.py (kernels that own tables), fbgemm.py, chunks.py (its calls
on all cores), checks.py.
"""

from recsys_edu.kernels.checks import check_ids
from recsys_edu.kernels.lookup import flat_buffer, flatten_tables, pooled_lookup, sequence_lookup
from recsys_edu.kernels.modules import make_kernel
from recsys_edu.kernels.spec import OPTIMIZER_KINDS, Kernel, KernelSpec, OptimizerSpec, TableSpec

__all__ = [
    "OPTIMIZER_KINDS",
    "Kernel",
    "KernelSpec",
    "OptimizerSpec",
    "TableSpec",
    "check_ids",
    "flat_buffer",
    "flatten_tables",
    "make_kernel",
    "pooled_lookup",
    "sequence_lookup",
]
