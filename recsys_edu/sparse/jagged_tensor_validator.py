"""A full check of a KeyedJaggedTensor's data: reads every length and id, so it waits for the device.

Counterpart: torchrec.sparse.jagged_tensor_validator.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from recsys_edu.kernels.jagged_ops import complete_cumsum
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

logger = logging.getLogger(__name__)


def validate_keyed_jagged_tensor(kjt: KeyedJaggedTensor, configs: list[Any] | None = None) -> bool:
    """Check that lengths, offsets, values and weights describe one batch; with `configs` also its features and ids.

    >>> import torch
    >>> validate_keyed_jagged_tensor(KeyedJaggedTensor(["a"], torch.tensor([4]), lengths=torch.tensor([1])))
    True

    Args:
        configs: EmbeddingBagConfigs or EmbeddingConfigs; their features must be keys and ids in [0, num_embeddings).

    Returns:
        True when all is well; False, with a log line per finding, when a config's feature is missing or an id is
        out of range.

    Raises:
        ValueError: the batch itself is inconsistent; the message names the check and, where there is one, the key.
    """
    _check_keys(kjt)
    _check_counts(kjt)
    _check_lengths(kjt)
    _check_offsets(kjt)
    return all([_config_fits(kjt, config) for config in configs or ()])  # a list: report every finding


def _check_keys(kjt: KeyedJaggedTensor) -> None:
    seen: set[str] = set()
    for key in kjt._keys:
        if key in seen:
            raise ValueError(f"keys must be unique, but {key!r} occurs more than once in {kjt.keys()}.")
        seen.add(key)


def _check_counts(kjt: KeyedJaggedTensor) -> None:
    lengths, offsets = kjt.lengths_or_none(), kjt.offsets_or_none()
    if lengths is None and offsets is None:
        raise ValueError("lengths and offsets are both missing; a batch needs one of them.")
    num_lengths = lengths.numel() if lengths is not None else max(offsets.numel() - 1, 0)
    if lengths is not None and offsets is not None and offsets.numel() not in (num_lengths + 1, 0):
        raise ValueError(f"offsets has {offsets.numel()} entries; with {num_lengths} lengths it must have one more.")
    if not kjt.keys():
        if num_lengths or kjt.values().size(0):
            raise ValueError(f"no keys, but {num_lengths} lengths and {kjt.values().size(0)} values.")
        return
    if kjt.variable_stride_per_key():
        if (expected := sum(kjt.stride_per_key())) != num_lengths:
            raise ValueError(f"batch sizes per key {kjt.stride_per_key()} need {expected} lengths, got {num_lengths}.")
    elif num_lengths % len(kjt.keys()):
        raise ValueError(f"{num_lengths} lengths are not a multiple of the number of keys, {len(kjt.keys())}.")
    weights = kjt.weights_or_none()
    if weights is not None and weights.size(0) != kjt.values().size(0):
        raise ValueError(f"{weights.size(0)} weights for {kjt.values().size(0)} values; there must be one per value.")


def _check_lengths(kjt: KeyedJaggedTensor) -> None:
    lengths = kjt.lengths_or_none()
    if lengths is None:
        return
    # host sync: full validation reads the data
    rows = lengths.reshape(-1).tolist()
    for position, length in enumerate(rows):
        if length < 0:
            raise ValueError(
                f"lengths must not be negative: key {_key_at(kjt, position)} has a row of length {length}."
            )
    if sum(rows) != kjt.values().size(0):
        raise ValueError(f"lengths sum to {sum(rows)}, but there are {kjt.values().size(0)} values.")


def _check_offsets(kjt: KeyedJaggedTensor) -> None:
    offsets_tensor = kjt.offsets_or_none()
    if offsets_tensor is None or offsets_tensor.numel() == 0:
        return
    # host sync: full validation reads the data
    offsets = offsets_tensor.tolist()
    if offsets[0] != 0:
        raise ValueError(f"offsets must start with 0, got {offsets[0]}.")
    for position, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"offsets must not decrease: key {_key_at(kjt, position)} has a row from {start} to {end}."
            )
    if offsets[-1] != kjt.values().size(0):
        raise ValueError(f"offsets end at {offsets[-1]}, but there are {kjt.values().size(0)} values.")
    lengths = kjt.lengths_or_none()
    if lengths is not None and not bool((complete_cumsum(lengths.reshape(-1)) == offsets_tensor).all()):
        raise ValueError("lengths and offsets disagree: offsets must be the running sum of lengths, beginning with 0.")


def _key_at(kjt: KeyedJaggedTensor, position: int) -> str:
    """The key whose row stands at this position of the lengths."""
    starts = kjt.lengths_offset_per_key()
    index = next(i for i, end in enumerate(starts[1:]) if position < end)
    return f"{kjt.keys()[index]!r} (row {position - starts[index]})"


def _config_fits(kjt: KeyedJaggedTensor, config: Any) -> bool:
    fits = True
    for feature in config.feature_names:
        if feature not in kjt.index_per_key():
            logger.warning(
                "Table %r reads feature %r, which is not among the keys %s.", config.name, feature, kjt.keys()
            )
            fits = False
            continue
        ids = kjt[feature].values()
        outside = ids[(ids < 0) | (ids >= config.num_embeddings)]
        # host sync: full validation reads the data
        if outside.numel():
            logger.warning(
                "Feature %r has id %d, but table %r has %d rows: ids must be in [0, %d).",
                feature, int(outside[0]), config.name, config.num_embeddings, config.num_embeddings,
            )  # fmt: skip
            fits = False
    return fits
