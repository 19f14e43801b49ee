"""Data-parallel tables: a whole copy on every rank, looked up where the batch is, trained with averaged gradients.

Counterpart: torchrec's data_parallel sharding (dense compute kernel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys_edu.distributed.routing import offsets_of
from recsys_edu.distributed.tables import Tables
from recsys_edu.kernels import Kernel, make_kernel
from recsys_edu.kernels.jagged_ops import permute_2d
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class Replicas:
    """The dense kernels of a module's data-parallel tables, one per weight type; `lookup` gives None without any."""

    def __init__(self, tables: Tables, device: torch.device, weighted: bool = False) -> None:
        self._device, self._weighted = device, weighted
        self.kernels = [make_kernel(spec, device) for spec in tables.replica_specs().values()]
        outputs = tables.replica_outputs()
        self._features = [kernel.spec.lane_features for kernel in self.kernels]
        lanes = [o for data_type in tables.replica_specs() for o in outputs if o.table.data_type is data_type]
        self._lane_of_output = [lanes.index(output) for output in outputs]

    def lookup(self, kjt: KeyedJaggedTensor) -> Tensor | None:
        """Pooled sums [B, columns] or one row per id, output after output, for this rank's own batch."""
        answers = [self._lookup(kernel, features, kjt) for kernel, features in zip(self.kernels, self._features)]
        if len(answers) < 2:
            return answers[0][0] if answers else None
        dim = 1 if self.kernels[0].spec.pooled else 0
        pieces = [piece for answer, sizes in answers for piece in answer.split(sizes, dim)]
        return torch.cat([pieces[lane] for lane in self._lane_of_output], dim)

    def _lookup(self, kernel: Kernel, features: Sequence[str], kjt: KeyedJaggedTensor) -> tuple[Tensor, list[int]]:
        """A kernel's answer and the size of each lane in it."""
        keys = kjt.keys()
        rows = [keys.index(feature) for feature in features]
        lengths_LB, values, weights = permute_2d(
            torch.tensor(rows, device=self._device),
            kjt.lengths().view(len(keys), -1),
            kjt.values(),
            kjt.weights() if self._weighted else None,
        )
        counts = kjt.length_per_key()
        sizes = list(kernel.spec.lane_dims) if kernel.spec.pooled else [counts[row] for row in rows]
        return kernel(values, offsets_of(lengths_LB), weights), sizes

    def parameters(self) -> dict[str, nn.Parameter]:
        """The replicated weight of each table."""
        return {
            table.name: weight for kernel in self.kernels for table, weight in zip(kernel.spec.tables, kernel.weights)
        }
