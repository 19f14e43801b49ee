"""The lookups that modules call, on whichever backend fits, for parameters that live elsewhere.

FBGEMM reads all tables from one buffer. `flatten_tables` moves parameters into one, as nn.RNN's flatten_parameters
does: the Parameter objects stay, their `.data` become neighbouring views. `pooled_lookup` recognises such neighbours
by address. Parameters that are not neighbours (after `copy.deepcopy`, or a wrapper that re-homed them) are looked up
table by table in PyTorch: slower, never wrong. Moving them inside a forward would cut whatever aliases their memory.

Shapes: B batch, L lanes, N values, R rows, D columns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.kernels import reference
from recsys_edu.kernels.chunks import Chunk, Ids, LookupInChunks, chunks_for, cut, lookup_in_chunks
from recsys_edu.kernels.fbgemm import Layout, flat_pooled_lookup, layout, single_id_lookup, why_not_lookup

BACKENDS = ("fbgemm", "pytorch")


def pooled_lookup(
    weights: Sequence[Tensor],
    lane_tables: Sequence[int],
    values_N: Tensor,
    offsets: Tensor,
    per_sample_weights_N: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum every bag of every lane: [B, sum of lane dims] float32, differentiable in weights and sample weights.

    Args:
        weights: one [R, D] tensor per table.
        lane_tables: for each lane the index of its table.
        values_N, offsets: the ids, lane after lane, and the L * B + 1 positions where bags start. Ids are NOT checked
            here: call `check_ids` first.
        backend: None picks FBGEMM where it can, "pytorch" avoids it, "fbgemm" makes a fallback an error.

    Raises:
        ValueError: `backend="fbgemm"` and FBGEMM cannot serve these tables.
    """
    values_N, offsets, per_sample_weights_N = prepare(values_N, offsets, per_sample_weights_N)
    reference.batch_size_of(offsets, len(lane_tables))
    flat = flat_buffer(weights) if backend != "pytorch" else None
    reason = _why_not_flat(weights, flat) if backend != "pytorch" else "PyTorch was asked for"
    if reason is None and lane_tables and offsets.numel() > 1:
        return _flat_lookup(flat, weights, tuple(lane_tables), Ids(values_N, offsets, per_sample_weights_N))
    if backend == "fbgemm" and reason is not None:
        raise ValueError(f"backend='fbgemm' was asked for, but {reason}")
    return reference.pooled_lookup(weights, lane_tables, values_N, offsets, per_sample_weights_N)


def sequence_lookup(
    weights: Sequence[Tensor],
    lane_tables: Sequence[int],
    values_N: Tensor,
    offsets: Tensor,
    backend: str | None = None,
) -> Tensor:
    """One row per value: [N, D] float32, differentiable in the weights.

    A sequence lookup is a plain gather, so PyTorch's own is used on every backend. Ids are NOT checked here.
    """
    del backend
    values_N, offsets, _ = prepare(values_N, offsets, None)
    return reference.sequence_lookup(weights, lane_tables, values_N, offsets)


def prepare(
    values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What all kernels expect: contiguous, offsets in the ids' integer type, sample weights in float32.

    Raises:
        TypeError: ids that are not int32 or int64.
    """
    if values_N.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {values_N.dtype}")
    if values_N.dtype == torch.int32 and values_N.numel() > torch.iinfo(torch.int32).max:
        values_N = values_N.long()  # the offsets need 64 bits, and FBGEMM wants one type for both
    if per_sample_weights_N is not None:
        per_sample_weights_N = per_sample_weights_N.float().contiguous()
    return values_N.contiguous(), offsets.to(values_N.dtype).contiguous(), per_sample_weights_N


def _why_not_flat(weights: Sequence[Tensor], flat: Tensor | None) -> str | None:
    if flat is None:
        return "the tables do not lie in one buffer (see flatten_tables)"
    return why_not_lookup([weight.shape[1] for weight in weights], flat.dtype, flat.device)


def flat_buffer(weights: Sequence[Tensor]) -> Tensor | None:
    """The one buffer that holds the tables end to end, or None. Costs a pointer comparison per table."""
    filled = [weight for weight in weights if weight.numel()]
    if not filled:
        return None
    first = filled[0]
    start, dtype = first.data_ptr(), first.dtype
    expected = start
    for weight in filled:
        if weight.data_ptr() != expected or weight.dtype != dtype or not weight.is_contiguous():
            return None
        expected += weight.nbytes
    storage = first.untyped_storage()
    if storage.data_ptr() + storage.nbytes() < expected:
        return None  # neighbours by accident, in two allocations
    return first.data.as_strided(((expected - start) // first.element_size(),), (1,))


def flatten_tables(parameters: Sequence[Tensor]) -> bool:
    """Move the tables into one buffer, in place; True when they now (or already) lie in one.

    The parameters stay the same objects; memory that aliased their old storage no longer does. Tables of several
    dtypes or devices, meta tensors, and one parameter listed twice are left alone: False.

    >>> tables = [torch.nn.Parameter(torch.ones(2, 4)), torch.nn.Parameter(torch.zeros(3, 4))]
    >>> flatten_tables(tables)
    True
    """
    if not parameters or len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
        return False
    if parameters[0].is_meta or len({id(parameter) for parameter in parameters}) < len(parameters):
        return False
    if flat_buffer(parameters) is not None:
        return True
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return flat.numel() > 0


def _quiet_autograd(device: torch.device) -> contextlib.AbstractContextManager:
    """FBGEMM's CPU lookup records its own backward below PyTorch's autograd layer, which would warn about it."""
    return torch._C._AutoDispatchBelowAutograd() if device.type == "cpu" else contextlib.nullcontext()


def _flat_lookup(flat: Tensor, weights: Sequence[Tensor], lane_tables: tuple[int, ...], ids: Ids) -> Tensor:
    """`pooled_lookup` by FBGEMM, in chunks of whole tables."""
    shapes = tuple(weight.shape for weight in weights)
    ascend = list(lane_tables) == sorted(lane_tables)  # then chunks read disjoint parts of the buffer
    lane_dims = tuple(shapes[table][1] for table in lane_tables)
    tensors = (*weights, ids.per_sample_weights_N)
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if ascend:
        chunks = chunks_for(lane_tables, lane_dims, ids.values_N, backward)
    else:
        chunks = cut(lane_tables, lane_dims, 1)
    spans = [_span(shapes, lane_tables, chunk, flat.device) for chunk in chunks]
    flats = {chunk: flat[span.elements] for chunk, span in zip(chunks, spans)}
    layouts = {chunk: span.layout for chunk, span in zip(chunks, spans)}

    def lookup(chunk: Chunk, part: Ids, root: Tensor | None = None) -> Tensor:
        root = flats[chunk] if root is None else root
        with _quiet_autograd(root.device):
            return flat_pooled_lookup(root, layouts[chunk], part.values_N, part.offsets, part.per_sample_weights_N)

    if not backward:
        where = layout(shapes, lane_tables, flat.device)
        single = single_id_lookup(flat, where, ids.values_N, ids.offsets, ids.per_sample_weights_N)
        if single is not None:
            return single
        return lookup_in_chunks(lookup, chunks, len(lane_tables), True, ids)
    roots = [_Neighbours.apply(flats[chunk], span.used, *weights[span.tables]) for chunk, span in zip(chunks, spans)]
    return LookupInChunks.apply(
        lookup, chunks, len(lane_tables), True, ids.values_N, ids.offsets, ids.per_sample_weights_N, *roots
    )


@dataclass(frozen=True)
class _Span:
    """The neighbouring tables that a chunk reads, and where they lie in the flat buffer."""

    tables: slice
    elements: slice
    used: tuple[bool, ...]
    layout: Layout


@functools.lru_cache(maxsize=1024)
def _span(
    shapes: tuple[tuple[int, int], ...], lane_tables: tuple[int, ...], chunk: Chunk, device: torch.device
) -> _Span:
    read = lane_tables[chunk.lanes]
    first, last = min(read), max(read) + 1
    start, end = (sum(rows * dim for rows, dim in shapes[:table]) for table in (first, last))
    return _Span(
        tables=slice(first, last),
        elements=slice(start, end),
        used=tuple(table in read for table in range(first, last)),
        layout=layout(shapes[first:last], tuple(table - first for table in read), device),
    )


class _Neighbours(torch.autograd.Function):
    """Connects tables to the part of the flat buffer that they fill: their gradients are slices of its gradient."""

    @staticmethod
    def forward(ctx, flat: Tensor, used: tuple[bool, ...], *weights: Tensor) -> Tensor:
        ctx.wanted = [read and needed for read, needed in zip(used, ctx.needs_input_grad[2:])]
        ctx.shapes = [weight.shape for weight in weights]
        return flat.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        pieces = gradient.split([shape.numel() for shape in ctx.shapes])
        slices = [piece.view(shape) if wanted else None for piece, shape, wanted in zip(pieces, ctx.shapes, ctx.wanted)]
        return None, None, *slices
