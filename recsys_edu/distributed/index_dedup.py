"""Distinct ids: each id of a feature travels and is looked up once per batch, however often it occurs.

    given      ids 7 7 2 7        distinct   2 7        place      1 1 0 1
    answer     rows of 2 and 7, each put at the places of its id

Long sequences repeat their ids; then this saves most of what is sent. The gradients of a repeated id are added before
they travel.

Counterpart: torchrec's `use_index_dedup`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.sparse.checks import lengths_fit
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Repeats:
    """A batch as it was given and, for each id of a feature, its place among the feature's distinct ids."""

    kjt: KeyedJaggedTensor
    place_F: tuple[Tensor, ...]


def distinct_ids(kjt: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Repeats | None]:
    """Every feature's distinct ids as one bag, and what undoes it.

    >>> batch = KeyedJaggedTensor(["f"], torch.tensor([7, 7, 2, 7]), lengths=torch.tensor([3, 1]))
    >>> distinct, repeats = distinct_ids(batch)
    >>> distinct.values().tolist(), repeats.place_F[0].tolist()
    ([2, 7], [1, 1, 0, 1])

    A batch whose lengths miss its values comes back as it is, with None: the lookup refuses it with its own words.
    """
    if not lengths_fit(kjt):
        return kjt, None
    found = [ids.unique(return_inverse=True) for ids in kjt.values().split(kjt.length_per_key())]
    if not found:
        return kjt, None
    lengths_F = torch.tensor([ids.numel() for ids, _ in found], device=kjt.device())
    distinct = KeyedJaggedTensor(kjt.keys(), torch.cat([ids for ids, _ in found]), lengths=lengths_F, stride=1)
    return distinct, Repeats(kjt, tuple(place for _, place in found))
