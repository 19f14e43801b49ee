"""Two towers: a query and a candidate become vectors, and their dot product says how well they go together.

    query features     -> embedding bags -> MLP -> q [B, D] --.
                                                              dot product [B]
    candidate features -> embedding bags -> MLP -> c [B, D] --'

No layer sees both sides, so every candidate's vector can be computed beforehand and searched with an index: that is
what makes retrieval from millions possible. The price: no feature can cross from one side to the other.

Shapes: B batch, F features of a tower, D output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.mlp import MLP
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

Combine = Literal["concat", "sum"]


class TwoTower(nn.Module):
    """Query and candidate vectors from one EmbeddingBagCollection.

        tower = TwoTower(embedding_bag_collection, layer_sizes=[128, 64])     # two tables: query first
        query_BD, candidate_BD = tower(kjt)

    embedding_bag_collection: two tables with one feature each, the first for queries; or, with `query_features`, any
    number: those features form the query tower and all others the candidate tower.
    layer_sizes: of both towers' MLPs; empty means no MLP.
    combine: "concat" puts a tower's embeddings side by side, "sum" adds them (equal widths).
    activation_on_last: False leaves out the ReLU after the last layer, so that coordinates may be negative.

    Raises:
        ValueError: not two one-feature tables and no `query_features`; unknown query features; an empty tower; or
            towers whose outputs differ in width.

    Counterpart: TwoTower of torchrec's examples/retrieval/modules/two_tower.py; the keyword-only arguments are ours.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        layer_sizes: list[int],
        device: torch.device | None = None,
        *,
        query_features: Sequence[str] | None = None,
        combine: Combine = "concat",
        activation_on_last: bool = True,
    ) -> None:
        super().__init__()
        widths = _widths(embedding_bag_collection)
        query, candidate = _sides(embedding_bag_collection, query_features)
        self._query_features, self._candidate_features = query, candidate
        self._combine = combine
        sizes = [_input_size([widths[name] for name in side], combine) for side in (query, candidate)]
        if not layer_sizes and sizes[0] != sizes[1]:
            raise ValueError(f"without an MLP both towers must be equally wide, got {sizes[0]} and {sizes[1]}")
        self.ebc = embedding_bag_collection
        options = {"device": device, "activation_on_last": activation_on_last}
        projections = [MLP(size, layer_sizes, **options) if layer_sizes else nn.Identity() for size in sizes]
        self.query_proj, self.candidate_proj = projections

    @property
    def query_features(self) -> list[str]:
        """Features that the query tower reads, in order."""
        return list(self._query_features)

    @property
    def candidate_features(self) -> list[str]:
        """Features that the candidate tower reads, in order."""
        return list(self._candidate_features)

    def forward(self, kjt: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Query `[B, D]` and candidate `[B, D]` vectors of B (query, candidate) pairs."""
        pooled = self.ebc(kjt)
        return self.query_vectors(pooled), self.candidate_vectors(pooled)

    def query_vectors(self, pooled: KeyedTensor) -> Tensor:
        """`[B, D]` from the query features' pooled embeddings."""
        return self.query_proj(self._joined(pooled, self._query_features))

    def candidate_vectors(self, pooled: KeyedTensor) -> Tensor:
        """`[B, D]` from the candidate features' pooled embeddings."""
        return self.candidate_proj(self._joined(pooled, self._candidate_features))

    def _joined(self, pooled: KeyedTensor, names: Sequence[str]) -> Tensor:
        parts = [pooled[name] for name in names]
        return torch.cat(parts, dim=1) if self._combine == "concat" else torch.stack(parts).sum(0)


class TwoTowerTrainTask(nn.Module):
    """Learn from pairs with labels: is this candidate the query's, yes or no?

        loss, (loss_detached, logits_B, labels_B) = TwoTowerTrainTask(tower)(batch)

    Binary cross-entropy on the dot product. `recsys_edu.retrieval.train_task.RetrievalTrainTask` learns from positives
    alone, against the other candidates in the batch, and ranks better.

    Counterpart: TwoTowerTrainTask of torchrec's examples/retrieval/modules/two_tower.py.
    """

    def __init__(self, two_tower: TwoTower) -> None:
        super().__init__()
        self.two_tower = two_tower
        self.loss_fn: nn.Module = nn.BCEWithLogitsLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss, and (loss, logits `[B]`, labels `[B]`) cut off from autograd."""
        query_BD, candidate_BD = self.two_tower(batch.sparse_features)
        logits_B = (query_BD * candidate_BD).sum(dim=1)
        loss = self.loss_fn(logits_B, batch.labels.to(logits_B.dtype))
        return loss, (loss.detach(), logits_B.detach(), batch.labels.detach())


def _widths(ebc: EmbeddingBagCollection) -> dict[str, int]:
    return {name: config.embedding_dim for config in ebc.embedding_bag_configs() for name in config.feature_names}


def _sides(ebc: EmbeddingBagCollection, query_features: Sequence[str] | None) -> tuple[list[str], list[str]]:
    features = [name for config in ebc.embedding_bag_configs() for name in config.feature_names]
    if query_features is None:
        configs = ebc.embedding_bag_configs()
        if len(configs) != 2 or any(len(config.feature_names) != 1 for config in configs):
            named = {config.name: list(config.feature_names) for config in configs}
            raise ValueError(
                f"expected two tables with one feature each, query first, got {named}; with more features say which"
                " belong to the query tower: query_features=[...]"
            )
        return [features[0]], [features[1]]
    if len(set(features)) != len(features):
        twice = sorted({name for name in features if features.count(name) > 1})
        raise ValueError(f"features {twice} feed several tables; each feature of a tower needs a name of its own")
    if unknown := [name for name in query_features if name not in features]:
        raise ValueError(f"query features {unknown} are not in the collection, which has {features}")
    candidate = [name for name in features if name not in set(query_features)]
    if not query_features or not candidate:
        raise ValueError(f"each tower needs a feature; query has {list(query_features)}, candidate has {candidate}")
    return list(query_features), candidate


def _input_size(widths: list[int], combine: Combine) -> int:
    if combine == "concat":
        return sum(widths)
    if combine != "sum":
        raise ValueError(f'combine={combine!r}: expected "concat" or "sum"')
    if len(set(widths)) != 1:
        raise ValueError(f'combine="sum" needs embeddings of one width, got {widths}')
    return widths[0]
