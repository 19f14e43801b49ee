"""Data-parallel tables: a whole copy on every rank, looked up where the batch is, trained with averaged gradients.

Counterpart: torchrec's data_parallel sharding (dense compute kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys_edu.distributed.routing import offsets_of
from recsys_edu.distributed.shards import Tables
from recsys_edu.kernels import make_kernel
from recsys_edu.kernels.jagged_ops import permute_2d
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class Replicas:
    """The dense kernel of a module's data-parallel tables; `lookup` gives None when there are none."""

    def __init__(self, tables: Tables, device: torch.device, weighted: bool = False) -> None:
        self.names, self._device, self._weighted = tables.replicated, device, weighted
        self.kernel = make_kernel(tables.replica_spec(), device) if self.names else None
        self._features = tuple(
            output.feature for output in tables.layout.outputs if output.table.name in tables.replicated
        )

    def lookup(self, kjt: KeyedJaggedTensor) -> Tensor | None:
        """Pooled sums [B, columns] or one row per id, lane after lane, for this rank's own batch."""
        if self.kernel is None:
            return None
        keys = kjt.keys()
        rows_L = torch.tensor([keys.index(feature) for feature in self._features], device=self._device)
        lengths_LB, values, weights = permute_2d(
            rows_L, kjt.lengths().view(len(keys), -1), kjt.values(), kjt.weights() if self._weighted else None
        )
        return self.kernel(values, offsets_of(lengths_LB), weights)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The replicated weight of each table."""
        return dict(zip(self.names, self.kernel.weights)) if self.kernel is not None else {}
