"""Random ragged batches and kernels with equal weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys_edu.kernels import KernelSpec, OptimizerSpec, TableSpec, make_kernel
from recsys_edu.types import DataType

BACKENDS = ("pytorch", pytest.param("fbgemm", marks=pytest.mark.fbgemm))


def make_spec(
    lane_tables=(0, 0, 1), pooled=True, optimizer=None, data_type=DataType.FP32, rows=(10, 7), dims=(8, 4), **fields
) -> KernelSpec:
    if not pooled:
        dims = (dims[0],) * len(dims)
    tables = tuple(TableSpec(f"t{i}", r, d) for i, (r, d) in enumerate(zip(rows, dims)))
    if isinstance(optimizer, str):
        optimizer = OptimizerSpec(optimizer, learning_rate=0.1)
    return KernelSpec(tables, tuple(lane_tables), pooled, data_type, optimizer, **fields)


def random_batch(spec: KernelSpec, batch_size: int, dtype=torch.int64, longest: int = 4) -> tuple[Tensor, Tensor]:
    """Ids and offsets: every lane ragged, with empty bags and repeated ids."""
    lengths = torch.randint(0, longest + 1, (len(spec.lane_tables), batch_size))
    ids = [
        torch.randint(rows, (int(total),)) if rows else torch.empty(0, dtype=torch.int64)
        for rows, total in zip(spec.lane_rows, lengths.sum(1))
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.cat([*ids, torch.empty(0, dtype=torch.int64)]).to(dtype), offsets.to(dtype)


def with_random_weights(*kernels):
    """Give all kernels the same random weights."""
    for tables in zip(*(kernel.table_weights() for kernel in kernels)):
        values = torch.randn(tables[0].shape)
        for table in tables:
            table.copy_(values)
    return kernels


def both_backends(spec: KernelSpec):
    return with_random_weights(make_kernel(spec, backend="fbgemm"), make_kernel(spec, backend="pytorch"))


def snapshot(kernel) -> list[Tensor]:
    states = [tensor for state in kernel.optimizer_state() for tensor in state.values()]
    return [tensor.detach().clone() for tensor in (*kernel.table_weights(), *states)]


def assert_same_tables(one, other, **tolerance) -> None:
    for a, b in zip(one.table_weights(), other.table_weights(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(one.optimizer_state(), other.optimizer_state(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance)


def pooled_by_hand(tables, lane_tables, ids, offsets, sample_weights=None) -> Tensor:
    """Bag by bag, value by value: no code in common with the kernels."""
    batch_size = (len(offsets) - 1) // len(lane_tables)
    out = torch.zeros(batch_size, sum(tables[t].shape[1] for t in lane_tables))
    column = 0
    for lane, table in enumerate(lane_tables):
        dim = tables[table].shape[1]
        for example in range(batch_size):
            bag = lane * batch_size + example
            for n in range(int(offsets[bag]), int(offsets[bag + 1])):
                weight = 1.0 if sample_weights is None else float(sample_weights[n])
                out[example, column : column + dim] += weight * tables[table][int(ids[n])].float()
        column += dim
    return out
