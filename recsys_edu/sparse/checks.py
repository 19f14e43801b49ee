"""What is checked when a jagged tensor is built: shapes and dtypes only, so no wait for a device.

Checks that look at the data itself are in `jagged_tensor_validator`, on request.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recsys_edu.sparse.keyed_jagged import KeyedJaggedTensor

_INTEGERS = (torch.int32, torch.int64)


class JaggedInputError(ValueError, AssertionError):
    """Tensors that do not describe one ragged batch. Both a ValueError and an AssertionError."""


class JaggedTypeError(JaggedInputError, TypeError):
    """A part that is no tensor, or keys that are no list: also a TypeError."""


class TraceableMeta(ABCMeta, torch.fx.ProxyableClassMeta):
    """Lets torch.fx record a construction: with a Proxy among the arguments the class call becomes a graph node."""

    def __call__(cls, *args, **kwargs):
        # Straight to the object where nothing is being traced: torch.fx's own search of all arguments costs more
        # than the construction, and logs a warning about its deprecated flag.
        if any(isinstance(argument, torch.fx.Proxy) for argument in (*args, *kwargs.values())):
            return super().__call__(*args, **kwargs)
        return type.__call__(cls, *args, **kwargs)


def checks_apply(what: str, values: object) -> bool:
    """Whether there are real shapes to look at: not in torch.compile or torch.export, not for stand-ins of tensors."""
    if isinstance(values, Tensor):
        return not torch.compiler.is_compiling()
    refuse_data(what, "values", values)
    return False


def refuse_data(what: str, name: str, part: object) -> None:
    """Lists and arrays are data, not yet tensors; anything else unknown is a stand-in of one, such as a fx.Proxy."""
    if isinstance(part, (list, tuple)) or type(part).__module__ == "numpy":
        raise JaggedTypeError(f"{what}: {name} must be a tensor, got {type(part).__name__}. Use torch.tensor({name}).")


def check_keys(keys: object) -> None:
    """A list of names; a single string would otherwise be read letter by letter."""
    if isinstance(keys, str):
        raise JaggedTypeError(f"KeyedJaggedTensor: keys must be a list of feature names, got {keys!r}. Use [{keys!r}].")


def check_structure(what: str, lengths: Tensor | None, offsets: Tensor | None) -> None:
    """Lengths or offsets are there, and integers (or empty)."""
    refuse_data(what, "lengths", lengths)
    refuse_data(what, "offsets", offsets)
    if lengths is None and offsets is None:
        raise JaggedInputError(
            f"{what} needs lengths or offsets: pass one of them (the other is computed when needed)."
        )
    for name, tensor in (("lengths", lengths), ("offsets", offsets)):
        if tensor is not None and tensor.dtype not in _INTEGERS and tensor.numel() > 0:
            raise JaggedInputError(
                f"{what}: {name} must be of integer type (int32 or int64), got {tensor.dtype}. Use {name}.long()."
            )
    if offsets is not None and lengths is not None and offsets.numel() not in (lengths.numel() + 1, 0):
        raise JaggedInputError(
            f"{what}: offsets has {offsets.numel()} entries and lengths {lengths.numel()}; "
            "offsets must have one entry more than lengths (it starts with 0)."
        )


def check_weights(what: str, values: Tensor, weights: Tensor | None) -> None:
    """One weight per value."""
    if weights is not None and weights.size(0) != values.size(0):
        raise JaggedInputError(
            f"{what}: {weights.size(0)} weights for {values.size(0)} values; there must be one weight per value."
        )


def check_keyed_structure(
    keys: list[str], num_lengths: int, stride: int | None, strides: list[list[int]] | Tensor | None
) -> None:
    """Every key has its rows: `keys x stride` lengths, or the per-key batch sizes summed (variable batch)."""
    shown = f"{keys[:8]}{' ...' if len(keys) > 8 else ''}"
    if strides is not None:
        if len(strides) != len(keys):
            raise JaggedInputError(
                f"stride_per_key_per_rank has {len(strides)} rows for {len(keys)} keys {shown}; give one row per key."
            )
        if isinstance(strides, Tensor):
            return  # comparing sums would wait for the device
        if (expected := sum(map(sum, strides))) != num_lengths:
            raise JaggedInputError(
                f"Keys {shown} with batch sizes {[sum(row) for row in strides[:8]]} need {expected} lengths, "
                f"got {num_lengths}."
            )
    elif stride is not None and keys and stride * len(keys) != num_lengths:
        raise JaggedInputError(
            f"{len(keys)} keys {shown} with stride (batch size) {stride} need {stride * len(keys)} lengths, "
            f"got {num_lengths}."
        )
    elif keys and num_lengths % len(keys):
        raise JaggedInputError(
            f"{num_lengths} lengths do not divide among {len(keys)} keys {shown}: every key needs the same number of "
            "rows. Check the keys, or pass stride_per_key_per_rank if batch sizes differ by key."
        )
    elif not keys and num_lengths:
        raise JaggedInputError(f"{num_lengths} lengths but no keys: name the feature each block of lengths belongs to.")


def lengths_fit(kjt: KeyedJaggedTensor) -> bool:
    """Whether no length is negative and all of them add up to the number of values: what a kernel may rely on."""
    lengths = kjt.lengths()
    if lengths.numel() and int(lengths.min()) < 0:  # host sync: a kernel would read outside the values
        return False
    return sum(kjt.length_per_key()) == kjt.values().size(0)
