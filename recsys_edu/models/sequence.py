"""Transformers over what a user took, in order: SASRec guesses the next item, BERT4Rec the ones that were masked.

    history  [7 2 9] [4]  -> rows of the item table + rows of the position table -> blocks -> hidden [N, D]
    candidate [0 1 2 ... I-1]  -> rows of the same item table                             -> candidates [C, D]
    logits = hidden @ candidates.T

Both features read *one* table of an EmbeddingCollection, unpooled, so input and output embeddings are tied and the
table can be sharded in any way: no rank needs the whole of it, what it scores is looked up. Rows stay ragged.

Shapes: B rows, N items of all histories, C candidates, M positions with something to predict, D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.modules.embedding_configs import EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingCollection
from recsys_edu.modules.jagged_attention import JaggedTransformerBlock, positions_in_rows, with_values
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

HISTORY, CANDIDATE = "history", "candidate"
NOTHING = -100
"""The label of a position at which nothing is to be predicted."""


class SequenceModel(nn.Module):
    """Transformer blocks over the "history" feature of an EmbeddingCollection; candidates come from the same table.

    >>> model = sasrec(num_items=10, dim=8, max_length=5)
    >>> features = KeyedJaggedTensor.from_lengths_sync(
    ...     ["history", "candidate"], torch.tensor([7, 2, 9, 0, 1, 2]), torch.tensor([2, 1, 3, 0]))
    >>> hidden, candidates = model(features)
    >>> hidden.values().shape, candidates.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))

    embedding_collection: its tables' features include "history" and "candidate"; plain or sharded.
    dim: its embedding_dim. max_length: the longest row. causal: whether a position sees only what came before it.

    Raises:
        ValueError: (forward) a row longer than max_length.

    `mask_id`: the id that stands for "hidden" in BERT4Rec's input, None for SASRec.
    """

    def __init__(
        self,
        embedding_collection: nn.Module,
        dim: int,
        max_length: int,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.3,
        causal: bool = True,
        mask_id: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.max_length, self.causal, self.mask_id = max_length, causal, mask_id
        self.embedding_collection = embedding_collection
        self.position = nn.Embedding(max_length, dim, device=device)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            JaggedTransformerBlock(dim, num_heads, causal, dropout, device=device) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim, device=device)

    def forward(self, features: KeyedJaggedTensor) -> tuple[JaggedTensor, Tensor]:
        """The hidden vector of every position `[N, D]`, and the candidates' vectors `[C, D]`."""
        rows = self.embedding_collection(features)
        return self.encode(rows[HISTORY]), rows[CANDIDATE].values()

    def encode(self, history: JaggedTensor) -> JaggedTensor:
        """Item vectors `[N, D]` to hidden vectors `[N, D]`; row b never sees row c."""
        hidden = self.embed(history)
        for block in self.blocks:
            hidden = block(hidden)
        return with_values(hidden, self.norm(hidden.values()))

    def embed(self, history: JaggedTensor) -> JaggedTensor:
        """What the first block reads: the item's vector plus that of its place in the row."""
        position_N = positions_in_rows(history.offsets())
        longest = int(position_N.max()) + 1 if len(position_N) else 0  # host sync: positions outside their table
        if longest > self.max_length:
            raise ValueError(f"a row has {longest} items, the model was made for at most {self.max_length}: cut it")
        return with_values(history, self.dropout(history.values() + self.position(position_N)))


def sasrec(
    num_items: int,
    dim: int = 64,
    max_length: int = 50,
    num_blocks: int = 2,
    num_heads: int = 2,
    dropout: float = 0.3,
    device: torch.device | None = None,
) -> SequenceModel:
    """A causal transformer: at every position it guesses the next item.

    As published, but for the loss: we compare with all items (or all candidates), not with one sampled item.

    Source: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018.
    """
    collection = _collection(num_items, dim, device)
    return SequenceModel(collection, dim, max_length, num_blocks, num_heads, dropout, causal=True, device=device)


def bert4rec(
    num_items: int,
    dim: int = 64,
    max_length: int = 50,
    num_blocks: int = 2,
    num_heads: int = 2,
    dropout: float = 0.3,
    device: torch.device | None = None,
) -> SequenceModel:
    """A transformer that sees both sides and guesses masked items; item number `num_items` is the mask.

    To recommend, append the mask to a history: `max_length` counts it.

    Source: Sun et al., BERT4Rec, CIKM 2019. Counterpart: BERT4Rec of torchrec's examples/bert4rec.
    """
    collection = _collection(num_items + 1, dim, device)
    return SequenceModel(
        collection, dim, max_length, num_blocks, num_heads, dropout, causal=False, mask_id=num_items, device=device
    )


class SequenceTrainTask(nn.Module):
    """Softmax over the candidates at every position that has a label.

        loss, (loss_detached, logits_MC, labels_M) = SequenceTrainTask(model)(batch)

    batch.labels `[N]`, one per position of the histories: the place of the right item among the candidates (its id
    where the candidates are all items), or -100 where nothing is to be predicted. The loss is the mean over labels;
    0 where there is none.
    """

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        hidden, candidates_CD = self.model(batch.sparse_features)
        asked_N = batch.labels != NOTHING
        # host sync: the number of positions with a label is known to the device only
        logits_MC = hidden.values()[asked_N] @ candidates_CD.T
        labels_M = batch.labels[asked_N]
        loss = F.cross_entropy(logits_MC, labels_M, reduction="sum") / max(len(labels_M), 1)
        return loss, (loss.detach(), logits_MC.detach(), labels_M)


def _collection(num_rows: int, dim: int, device: torch.device | None) -> EmbeddingCollection:
    table = EmbeddingConfig(name="item", num_embeddings=num_rows, embedding_dim=dim, feature_names=[HISTORY, CANDIDATE])
    return EmbeddingCollection(tables=[table], device=device)
