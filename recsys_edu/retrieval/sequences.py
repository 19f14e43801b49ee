"""From ratings to sequences, from sequences to training batches: what was taken, in order of time.

    sequence          7 2 9 4
    next_item_batch   history 7 2 9     labels 2 9 4          (SASRec)
    cloze_batch       history 7 # 9 4   labels . 2 . .        (BERT4Rec; # is the mask)
    query_batch       history 7 2 9 4   or 7 2 9 4 #          (to recommend: the last position is the answer)

Sequences longer than a model reads are cut: to a random stretch while training, to the latest items when asked.
The "candidate" feature of every batch is the list of all items, in the first row.

Shapes: U users, B rows of a batch, N items of all rows, I items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recsys_edu.datasets.movielens_splits import Interactions
from recsys_edu.datasets.utils import Batch
from recsys_edu.models.sequence import CANDIDATE, HISTORY, NOTHING
from recsys_edu.modules.jagged_attention import positions_in_rows
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


def user_sequences(parts: Sequence[Interactions]) -> JaggedTensor:
    """Row u: the items of user u in order of time, int64; ratings of one second stay in the order of the file.

    Parts are read one after the other where times are equal: give the training part first.
    """
    users, items, times = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("users", "items", "times")
    )
    order = np.lexsort((np.arange(len(users)), times, users))
    lengths_U = np.bincount(users, minlength=parts[0].num_users)
    return JaggedTensor(torch.from_numpy(items[order]), lengths=torch.from_numpy(lengths_U))


def next_item_batch(
    sequences: JaggedTensor, users_B: Tensor, num_items: int, max_length: int, generator: torch.Generator | None = None
) -> Batch:
    """A random stretch of up to max_length + 1 items per user; at each position but the last the next one is asked.

    >>> batch = next_item_batch(JaggedTensor.from_dense([torch.tensor([7, 2, 9, 4])]), torch.tensor([0]), 10, 3)
    >>> batch.sparse_features["history"].values().tolist(), batch.labels.tolist()
    ([7, 2, 9], [2, 9, 4])
    """
    source_N, lengths_B = _stretches(sequences, users_B, max_length + 1, generator)
    ends_B = lengths_B.cumsum(0)
    is_last_N = torch.zeros(len(source_N), dtype=torch.bool)
    is_last_N[ends_B[lengths_B > 0] - 1] = True
    source_M = source_N[~is_last_N]
    features = _features(sequences.values()[source_M], (lengths_B - 1).clamp(min=0), num_items)
    return _batch(features, sequences.values()[source_M + 1])


def cloze_batch(
    sequences: JaggedTensor,
    users_B: Tensor,
    num_items: int,
    max_length: int,
    mask_share: float = 0.3,
    generator: torch.Generator | None = None,
) -> Batch:
    """A random stretch of up to max_length items per user, a share of them masked; in half of the rows the last alone.

    The mask has the number `num_items`. Masking only the last item is what the model will be asked for.
    """
    source_N, lengths_B = _stretches(sequences, users_B, max_length, generator)
    items_N = sequences.values()[source_N]
    is_last_N = torch.zeros(len(items_N), dtype=torch.bool)
    is_last_N[lengths_B.cumsum(0)[lengths_B > 0] - 1] = True
    last_only_N = torch.repeat_interleave(torch.rand(len(users_B), generator=generator) < 0.5, lengths_B)
    drawn_N = torch.rand(len(items_N), generator=generator) < mask_share
    masked_N = torch.where(last_only_N, is_last_N, drawn_N)
    features = _features(items_N.masked_fill(masked_N, num_items), lengths_B, num_items)
    return _batch(features, items_N.masked_fill(~masked_N, NOTHING))


def query_batch(
    sequences: JaggedTensor, users_B: Tensor, num_items: int, max_length: int, mask_id: int | None = None
) -> KeyedJaggedTensor:
    """Each user's latest max_length items; with a mask id, the latest max_length - 1 and the mask."""
    kept = max_length - (mask_id is not None)
    lengths_B = sequences.lengths()[users_B].clamp(max=kept)
    source_N = _places(sequences.offsets()[users_B + 1] - lengths_B, lengths_B)
    rows = list(sequences.values()[source_N].split(lengths_B.tolist()))
    if mask_id is not None:
        rows = [torch.cat([row, row.new_tensor([mask_id])]) for row in rows]
    return _features(torch.cat(rows), torch.tensor([len(row) for row in rows]), num_items)


def _stretches(
    sequences: JaggedTensor, users_B: Tensor, longest: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Where in the values a random stretch of each user lies `[N]`, and its length `[B]`."""
    all_B = sequences.lengths()[users_B].long()
    lengths_B = all_B.clamp(max=longest)
    skipped_B = (torch.rand(len(users_B), generator=generator, dtype=torch.float64) * (all_B - lengths_B + 1)).long()
    return _places(sequences.offsets()[users_B] + skipped_B, lengths_B), lengths_B


def _places(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    offsets = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
    return torch.repeat_interleave(starts_B, lengths_B) + positions_in_rows(offsets)


def _features(history_N: Tensor, lengths_B: Tensor, num_items: int) -> KeyedJaggedTensor:
    candidates_B = torch.zeros_like(lengths_B)
    candidates_B[:1] = num_items
    return KeyedJaggedTensor.from_lengths_sync(
        [HISTORY, CANDIDATE], torch.cat([history_N, torch.arange(num_items)]), torch.cat([lengths_B, candidates_B])
    )


def _batch(features: KeyedJaggedTensor, labels_N: Tensor) -> Batch:
    return Batch(torch.zeros(features.stride(), 0), features, labels_N)
