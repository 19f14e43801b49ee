"""The lookups that modules call, on whichever backend fits, for parameters that live elsewhere.

FBGEMM reads all tables from one buffer. `flatten_tables` moves parameters into one, as nn.RNN's flatten_parameters
does: the Parameter objects stay, their `.data` become neighbouring views. `pooled_lookup` recognises such neighbours
by address. Parameters that are not neighbours (after `copy.deepcopy`, or a wrapper that re-homed them) are looked up
table by table in PyTorch: slower, never wrong. Moving them inside a forward would cut whatever aliases their memory.

Shapes: B batch, L lanes, N values, R rows, D columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_edu.kernels import reference
from recsys_edu.kernels.fbgemm import Layout, flat_pooled_lookup, layout, why_not_lookup

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
        where = layout(tuple(weight.shape for weight in weights), tuple(lane_tables), values_N.device)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (per_sample_weights_N, *weights)):
            return _FlatPooledLookup.apply(flat, where, values_N, offsets, per_sample_weights_N, *weights)
        return flat_pooled_lookup(flat, where, values_N, offsets, per_sample_weights_N)
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


class _FlatPooledLookup(torch.autograd.Function):
    """Connects many parameters to one flat lookup: their gradients are slices of the flat gradient."""

    @staticmethod
    def forward(
        ctx,
        flat: Tensor,
        where: Layout,
        values_N: Tensor,
        offsets: Tensor,
        per_sample_weights_N: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        needs_samples = ctx.needs_input_grad[4]
        ctx.wanted = [needed and table in where.used_tables for table, needed in enumerate(ctx.needs_input_grad[5:])]
        needs_flat = any(ctx.wanted)
        with torch.enable_grad(), _quiet_autograd(where.columns.device):
            flat = flat.detach().requires_grad_(needs_flat)
            if per_sample_weights_N is not None:
                per_sample_weights_N = per_sample_weights_N.detach().requires_grad_(needs_samples)
            pooled_BD = flat_pooled_lookup(flat, where, values_N, offsets, per_sample_weights_N)
        ctx.inputs = [x for x, needed in ((flat, needs_flat), (per_sample_weights_N, needs_samples)) if needed]
        ctx.pooled_BD, ctx.shapes = pooled_BD, [weight.shape for weight in weights]
        return pooled_BD.detach()

    @staticmethod
    def backward(ctx, gradient_BD: Tensor):
        if not ctx.inputs:
            return (None,) * (5 + len(ctx.shapes))
        # The inner graph is kept for callers who run backward twice; it goes when the outer graph does.
        found = torch.autograd.grad(ctx.pooled_BD, ctx.inputs, gradient_BD.contiguous(), retain_graph=True)
        samples = found[-1] if ctx.needs_input_grad[4] else None
        slices: list[Tensor | None] = [None] * len(ctx.shapes)
        if any(ctx.wanted):
            pieces = found[0].split([shape.numel() for shape in ctx.shapes])
            slices = [
                piece.view(shape) if wanted else None for piece, shape, wanted in zip(pieces, ctx.shapes, ctx.wanted)
            ]
        return None, None, None, None, samples, *slices
