"""A quantised model in the form that torch.export writes down: plain tensors in, scores out, every lookup an operator.

    dense [B, I], lengths [F, B], per feature ids [N], perhaps weights [N]  ->  KeyedJaggedTensor  ->  model  ->  [B]

The ids of a request come feature by feature, so no graph has to cut one tensor at places that only its data knows.
Ids outside their table find zeros, as -1 does: a graph that runs far from here must not read foreign memory.

Shapes: B batch, F features, I dense inputs, N values of one feature, L lanes, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys_edu.inference.modules import with_replaced
from recsys_edu.kernels.quantized import found_rows, sum_bags
from recsys_edu.kernels.quantized_remap import ArrayRemap
from recsys_edu.modules.embedding_configs import PoolingType
from recsys_edu.modules.embedding_modules import Lanes
from recsys_edu.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


class Served(nn.Module):
    """The model behind the calling convention of packages.

    Args:
        model: called as `model(dense, kjt)`, or `model(kjt)` where num_dense is 0.
        features: the F features, in the order of lengths and values.
        num_dense: I.
        score: "probability" puts a sigmoid behind the model, "raw" does not.
    """

    def __init__(self, model: nn.Module, features: list[str], num_dense: int, score: str) -> None:
        super().__init__()
        self.model, self.features, self.num_dense, self.score = model, features, num_dense, score

    def forward(
        self, dense_BI: Tensor, lengths_FB: Tensor, values: list[Tensor], weights: list[Tensor] | None = None
    ) -> Tensor:
        jagged = {
            name: JaggedTensor(values[place], lengths=lengths_FB[place], weights=weights[place] if weights else None)
            for place, name in enumerate(self.features)
        }
        kjt = KeyedJaggedTensor(
            self.features,
            torch.cat(values),
            torch.cat(weights) if weights else None,
            lengths=lengths_FB.flatten(),
            stride=lengths_FB.shape[1],
            length_per_key=[feature_values.shape[0] for feature_values in values],
            jt_dict=jagged,
        )
        answer = self.model(dense_BI, kjt) if self.num_dense else self.model(kjt)
        answer = answer.float().sigmoid() if self.score == "probability" else answer.float()
        return answer.squeeze(-1)


class LookupBags(nn.Module):
    """A quantised EmbeddingBagCollection in operators.

    With FBGEMM's kernel one operator reads all tables; otherwise each lane is a few of PyTorch's own.
    """

    def __init__(self, bags: EmbeddingBagCollection, kernels: str) -> None:
        super().__init__()
        self.kernel, self.kernels = bags.kernel, kernels
        self._lanes, self._remap, self._weighted = bags._lanes, bags._remap, bags.is_weighted()
        self._output_dtype = bags.output_dtype()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        lanes, jagged = self._lanes, features.to_dict()
        rows = [
            row_numbers(lanes, self._remap, lane, jagged[name].values()) for lane, name in enumerate(lanes.features)
        ]
        weights = [jagged[name].weights().float() for name in lanes.features] if self._weighted else None
        lengths_LB = torch.stack([jagged[name].lengths() for name in lanes.features])
        if self.kernels == "fbgemm":
            weights_N = torch.cat(weights) if weights else None
            sums = list(
                self.kernel(torch.cat(rows), _offsets(lengths_LB.flatten()), weights_N).split(lanes.dims, dim=1)
            )
        else:
            sums = [
                self._sums_of(lane, rows[lane], lengths_LB[lane], weights[lane] if weights else None)
                for lane in range(len(rows))
            ]
        for lane, pooling in enumerate(lanes.poolings):
            if pooling is PoolingType.MEAN:
                sums[lane] = sums[lane] / lengths_LB[lane].clamp(min=1).unsqueeze(1)
        pooled_BD = torch.cat(sums, dim=1).to(self._output_dtype)
        return KeyedTensor(keys=list(lanes.names), length_per_key=list(lanes.dims), values=pooled_BD)

    def _sums_of(self, lane: int, rows_N: Tensor, lengths_B: Tensor, weights_N: Tensor | None) -> Tensor:
        table, spec = self._lanes.tables[lane], self.kernel.spec
        vectors_ND = found_rows(self.kernel.table_rows()[table], spec.data_types[table], self._lanes.dims[lane], rows_N)
        return sum_bags(vectors_ND, _offsets(lengths_B), weights_N)


class LookupRows(nn.Module):
    """A quantised EmbeddingCollection in PyTorch's operators."""

    def __init__(self, sequences: EmbeddingCollection) -> None:
        super().__init__()
        self.kernel, self._lanes, self._remap = sequences.kernel, sequences._lanes, sequences._remap
        self._output_dtype, self._need_indices = sequences.output_dtype(), sequences.need_indices()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        lanes, jagged, spec, answers = self._lanes, features.to_dict(), self.kernel.spec, {}
        rows_of_table = self.kernel.table_rows()
        for lane, (feature, table, name) in enumerate(zip(lanes.features, lanes.tables, lanes.names)):
            given = jagged[feature]
            rows_N = row_numbers(lanes, self._remap, lane, given.values())
            vectors_ND = found_rows(rows_of_table[table], spec.data_types[table], lanes.dims[lane], rows_N)
            answers[name] = JaggedTensor(
                values=vectors_ND.to(self._output_dtype),
                lengths=given.lengths(),
                weights=given.values() if self._need_indices else None,
            )
        return answers


def row_numbers(lanes: Lanes, remap: ArrayRemap | None, lane: int, ids_N: Tensor) -> Tensor:
    """Ids as rows of the lane's table; -1, which finds zeros, for those outside it."""
    known_N = (ids_N >= 0) & (ids_N < lanes.num_rows[lane])
    inside_N = torch.where(known_N, ids_N, 0)
    if remap is not None:
        inside_N = remap.remap_lane(lane, inside_N)
    return torch.where(known_N, inside_N, -1)


def _offsets(lengths_B: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths_B.long().cumsum(0), (1, 0))


def with_lookups(module: nn.Module, kernels: str) -> nn.Module:
    """The model with its quantised collections as lookups; it shares every tensor with the original, which stays."""
    if isinstance(module, EmbeddingBagCollection):
        return LookupBags(module, kernels)
    if isinstance(module, EmbeddingCollection):
        return LookupRows(module)
    return with_replaced(module, lambda child: with_lookups(child, kernels))


def in_plain_tensors(module: nn.Module) -> nn.Module:
    """Make plain tensors of a clone's parameters, in place: torchao's int8 weights are tensors of its own kind.

    torch.export would pickle those, and unpickling runs whatever a file says.
    """
    if all(type(parameter) in (nn.Parameter, Tensor) for parameter in module.parameters()):
        return module
    from torchao.utils import unwrap_tensor_subclass

    return unwrap_tensor_subclass(module)
