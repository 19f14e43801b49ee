"""Copies and comparisons of JaggedTensors and KeyedJaggedTensors, tensor part by tensor part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.sparse.checks import JaggedInputError

if TYPE_CHECKING:
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor

PARTS = ("_values", "_weights", "_lengths", "_offsets")


def copy_parts(target: object, source: object, non_blocking: bool) -> None:
    """Copy values, weights, lengths and offsets between two (Keyed)JaggedTensors of one shape, all or nothing."""
    pairs = []
    for part, read in zip(PARTS, ("values", "weights_or_none", "lengths", "offsets")):
        mine = getattr(target, part)
        if mine is None and part != "_weights":
            continue  # lengths or offsets this object computes when it needs them
        theirs = getattr(source, read)()
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or mine.shape != theirs.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (mine, theirs)]
            raise JaggedInputError(
                f"copy_ needs equal shapes: {part[1:]} here is {shapes[0]}, in the source {shapes[1]}. "
                "Make room with empty_like of a batch of the source's shape."
            )
        pairs.append((mine, theirs))
    for mine, theirs in pairs:
        mine.copy_(theirs, non_blocking=non_blocking)


def room_for(tensor: Tensor | None, part: str, device: torch.device | None) -> Tensor | None:
    """An uninitialised tensor like this part; lengths and offsets are 0, so that it describes no rows until filled."""
    if tensor is None:
        return None
    make = torch.zeros_like if part in ("_lengths", "_offsets") else torch.empty_like
    return make(tensor, device=device)


def parts_are_equal(first: object, second: object) -> bool:
    """Equality of values, weights and structure of two (Keyed)JaggedTensors."""
    pairs = [
        (first.values(), second.values()),
        (first.weights_or_none(), second.weights_or_none()),
        (first.lengths(), second.lengths()),
        (first.offsets(), second.offsets()),
    ]
    return all(_same(mine, theirs) for mine, theirs in pairs)


def _same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine.shape == theirs.shape and mine.device == theirs.device and bool(torch.all(mine == theirs))


def move_keyed(
    kjt: KeyedJaggedTensor, device: torch.device, non_blocking: bool, weights_dtype: torch.dtype | None
) -> KeyedJaggedTensor:
    """See KeyedJaggedTensor.to."""

    def move(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if tensor is None else tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)

    moved = kjt._with(move(kjt._values), move(kjt._weights, weights_dtype), move(kjt._lengths), move(kjt._offsets))
    if kjt._inverse_indices is not None:
        moved._inverse_indices = (kjt._inverse_indices[0], move(kjt._inverse_indices[1]))
    return moved


def pin_keyed(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """See KeyedJaggedTensor.pin_memory."""
    pinned = kjt._with(*(None if part is None else part.pin_memory() for part in kjt._parts()))
    if kjt._inverse_indices is not None:
        pinned._inverse_indices = (kjt._inverse_indices[0], kjt._inverse_indices[1].pin_memory())
    return pinned


def empty_like_keyed(kjt: KeyedJaggedTensor, device: torch.device | None) -> KeyedJaggedTensor:
    """See KeyedJaggedTensor.empty_like."""
    room = kjt._with(*(room_for(getattr(kjt, part), part, device) for part in PARTS))
    if kjt._inverse_indices is not None:
        room._inverse_indices = (kjt._inverse_indices[0], torch.zeros_like(kjt._inverse_indices[1], device=device))
    return room.unsync()


def copy_keyed(target: KeyedJaggedTensor, source: KeyedJaggedTensor, non_blocking: bool) -> KeyedJaggedTensor:
    """See KeyedJaggedTensor.copy_."""
    if target._keys != source._keys:
        raise JaggedInputError(f"copy_ needs equal keys: here {target._keys}, in the source {source._keys}.")
    copy_parts(target, source, non_blocking)
    target._strides, target._stride_per_key, target._stride = source._strides, source._stride_per_key, source._stride
    target._lengths_offset_per_key = None
    target._jt_dict = None
    if source._inverse_indices is None:
        target._inverse_indices = None
    else:
        names, matrix = source._inverse_indices
        target._inverse_indices = (names, matrix.to(target.device(), non_blocking=non_blocking, copy=True))
    return target.unsync()
