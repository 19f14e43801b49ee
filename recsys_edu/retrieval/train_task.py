"""Train two towers on positives alone: every row's item against the other items of the batch.

A batch is B (query, item) pairs, then M rows whose query bags are empty: further negatives for everybody. With
sharded tables every rank compares its own rows, so that no vector of another rank is needed.

Shapes: B pairs, M further negatives, C different candidates, D width, I items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.models.two_tower import TwoTower
from recsys_edu.retrieval.losses import candidates_in_batch, log_expected_count, sampled_softmax_loss
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class RetrievalTrainTask(nn.Module):
    """The in-batch softmax of two towers, corrected for how often an item is drawn.

        task = RetrievalTrainTask(tower, popularity_I=popularity_of(split.train))
        loss, (loss_detached, logits_B, labels_B) = task(batch)

    batch.labels has B entries (their values are not used); the KeyedJaggedTensor has B rows, or B + M with M further
    candidates at the end.

    candidate_id: the feature that holds exactly one item id per row.
    popularity_I: each item's share of the training pairs, for the logQ correction; None leaves the correction out,
    as TFRS's basic example does, and popular items are then pushed down too much.
    temperature, num_hard: see `sampled_softmax_loss`.
    l2: weight of the mean squared length of the pairs' vectors, against overfitting.
    seen_UI: bool `[U, I]`; with it, items that a row's query has are no negatives of that row. `query_id` names the
    feature with the row's user.

    Raises:
        ValueError (at once): a popularity that is not one-dimensional. (In forward) a row without exactly one item
            id, fewer rows than labels, or `seen_UI` where a row has not exactly one query id.
    """

    def __init__(
        self,
        two_tower: TwoTower,
        *,
        popularity_I: Tensor | None = None,
        candidate_id: str = "item",
        query_id: str = "user",
        temperature: float = 1.0,
        num_hard: int | None = None,
        l2: float = 0.0,
        seen_UI: Tensor | None = None,
    ) -> None:
        super().__init__()
        if popularity_I is not None and popularity_I.dim() != 1:
            raise ValueError(f"popularity has shape {tuple(popularity_I.shape)}, expected one number per item")
        self.two_tower = two_tower
        self.candidate_id, self.query_id = candidate_id, query_id
        self.temperature, self.num_hard, self.l2 = temperature, num_hard, l2
        self.register_buffer("popularity_I", popularity_I, persistent=False)
        self.register_buffer("seen_UI", seen_UI, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss, and (loss, each row's own dot product `[B]`, labels `[B]`) cut off from autograd."""
        kjt, num_pairs = batch.sparse_features, len(batch.labels)
        item_ids = _one_id_per_row(kjt, self.candidate_id, kjt.stride())
        if len(item_ids) < num_pairs:
            raise ValueError(f"{num_pairs} labels but only {len(item_ids)} rows of features")
        query, candidate = self.two_tower(kjt)
        query_BD = query[:num_pairs]
        sample = candidates_in_batch(item_ids[:num_pairs], item_ids[num_pairs:])
        candidate_CD = candidate[_first_rows(item_ids, sample.ids)]
        bias_C = sample.count.log()
        if self.popularity_I is not None:
            expected_I = log_expected_count(self.popularity_I, num_pairs, len(item_ids) - num_pairs)
            bias_C = bias_C - expected_I[sample.ids]
        hidden_BC = None
        if self.seen_UI is not None:
            users_B = _one_id_per_row(kjt, self.query_id, kjt.stride(), num_pairs)
            hidden_BC = self.seen_UI[users_B][:, sample.ids]
        loss = sampled_softmax_loss(
            query_BD, candidate_CD, sample.target, temperature=self.temperature, logit_bias_C=bias_C,
            hidden_BC=hidden_BC, num_hard=self.num_hard,
        )  # fmt: skip
        own_BD = candidate[:num_pairs]
        if self.l2:
            loss = loss + self.l2 * (query_BD.square() + own_BD.square()).sum(dim=1).mean()
        own_B = (query_BD * own_BD).sum(dim=1)
        return loss, (loss.detach(), own_B.detach(), batch.labels.detach())


def popularity_of(item_ids_E: Tensor, num_items: int) -> Tensor:
    """Each item's share of the training pairs, float32 `[I]`.

    >>> popularity_of(torch.tensor([0, 2, 2, 2]), 3)
    tensor([0.2500, 0.0000, 0.7500])
    """
    return torch.bincount(item_ids_E, minlength=num_items).float() / len(item_ids_E)


def _one_id_per_row(kjt: KeyedJaggedTensor, name: str, num_rows: int, first: int | None = None) -> Tensor:
    """The ids of the first rows of a feature that must have exactly one in each."""
    column = kjt[name]
    first = num_rows if first is None else first
    lengths = column.lengths()[:first]
    if not bool((lengths == 1).all()):  # host sync: ids and rows would silently go apart
        row = int((lengths != 1).nonzero()[0])
        raise ValueError(f"feature {name!r}, row {row}: expected exactly one id, got {int(lengths[row])}")
    return column.values()[:first]


def _first_rows(item_ids: Tensor, wanted_C: Tensor) -> Tensor:
    """A row in which each wanted item (ascending) stands; all rows of one item have equal features."""
    order = torch.argsort(item_ids, stable=True)
    return order[torch.searchsorted(item_ids[order], wanted_C)]
