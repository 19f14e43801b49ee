"""The softmax over all items, estimated from a sample of them.

The wanted loss is `-log softmax(scores over ALL items)[the item taken]`. With millions of items a sample C must do.
The cheapest sample is the batch itself: the other rows' items. But popular items come up there more often, so they
are pushed down more often; subtracting `log q` (q: how often an item is expected in the sample) undoes that.

    row's item   7   2   7   9          batch of 4 (query, item) pairs
    unique       2   7   9              C = 3 candidates: 7 counts twice
    bias         log 1 - log q_2    log 2 - log q_7    log 1 - log q_9

A softmax over B items with repeats *equals* the softmax over the C different ones with `log(count)` added to their
logits, so only `[B, C]` numbers are computed. MovieLens-100K: 8,192 x 1,200 in place of 8,192 x 8,192.

Shapes: B batch, C candidates, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Different items against which a batch is compared.

    ids int64 `[C]` ascending; target int64 `[B]`: each row's own item as a place in `ids`; count float32 `[C]`: how
    often it was drawn.
    """

    ids: Tensor
    target: Tensor
    count: Tensor


def candidates_in_batch(item_ids_B: Tensor, extra_ids_M: Tensor | None = None) -> Candidates:
    """The batch's own items, and M further ones that were drawn for all rows ("mixed" negatives).

    >>> candidates_in_batch(torch.tensor([7, 2, 7, 9]))
    Candidates(ids=tensor([2, 7, 9]), target=tensor([1, 0, 1, 2]), count=tensor([1., 2., 1.]))

    Source of mixed negatives: Yang et al., Mixed Negative Sampling for Learning Two-tower Neural Networks, WWW 2020.
    """
    drawn = item_ids_B if extra_ids_M is None else torch.cat([item_ids_B, extra_ids_M])
    ids_C, place, count_C = drawn.unique(return_inverse=True, return_counts=True)
    return Candidates(ids_C, place[: len(item_ids_B)], count_C.float())


def log_expected_count(popularity_I: Tensor, batch_size: int, num_uniform: int = 0) -> Tensor:
    """log of how often each item is expected in a sample, float32 `[I]`.

    popularity: each item's share of the training pairs. num_uniform: items drawn uniformly beside the batch. Items
    that are never drawn get the log of a tiny number, not -inf.

    Source: Bengio and Senecal, Adaptive Importance Sampling, 2008; for two towers Yi et al., Sampling-Bias-Corrected
    Neural Modeling for Large Corpus Item Recommendations, RecSys 2019.
    """
    expected_I = popularity_I.double() * batch_size + num_uniform / len(popularity_I)
    return expected_I.clamp(min=1e-9).log().float()


def sampled_softmax_loss(
    query_BD: Tensor,
    candidate_CD: Tensor,
    target_B: Tensor,
    *,
    temperature: float = 1.0,
    logit_bias_C: Tensor | None = None,
    hidden_BC: Tensor | None = None,
    num_hard: int | None = None,
) -> Tensor:
    """Mean over rows of the cross-entropy of each row's own candidate against all others.

    temperature: dot products are divided by it; small ones make near misses count most.
    logit_bias: added to the logits, usually `log count - log q`.
    hidden: True where a candidate must not serve as a negative for a row (the query has that item too); a row's own
    candidate is never hidden.
    num_hard: keep only that many negatives per row, the ones with the highest logits.

    Raises:
        ValueError: a temperature that is not positive, `num_hard` below 1, or a mask of another shape than `[B, C]`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if num_hard is not None and num_hard < 1:
        raise ValueError(f"num_hard must be at least 1, got {num_hard}")
    logits_BC = query_BD @ candidate_CD.T / temperature
    if logit_bias_C is not None:
        logits_BC = logits_BC + logit_bias_C
    if hidden_BC is not None:
        if hidden_BC.shape != logits_BC.shape:
            raise ValueError(f"hidden has shape {tuple(hidden_BC.shape)}, expected {tuple(logits_BC.shape)}")
        own_BC = torch.zeros_like(hidden_BC).scatter_(1, target_B[:, None], True)
        logits_BC = logits_BC.masked_fill(hidden_BC & ~own_BC, float("-inf"))
    if num_hard is not None and num_hard < logits_BC.shape[1] - 1:
        logits_BC, target_B = _hardest(logits_BC, target_B, num_hard)
    return F.cross_entropy(logits_BC, target_B)


def _hardest(logits_BC: Tensor, target_B: Tensor, num_hard: int) -> tuple[Tensor, Tensor]:
    """Each row's own logit first, then its `num_hard` highest others."""
    own_B1 = logits_BC.gather(1, target_B[:, None])
    others_BC = logits_BC.scatter(1, target_B[:, None], float("-inf"))
    return torch.cat([own_B1, others_BC.topk(num_hard, dim=1).values], dim=1), torch.zeros_like(target_B)
