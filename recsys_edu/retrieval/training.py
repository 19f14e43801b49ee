"""Build, train and score two towers on MovieLens in one process: what the notebook and the command line share.

Shapes: U users, I items, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.datasets.movielens_formats import MovieLens
from recsys_edu.datasets.movielens_splits import Split
from recsys_edu.models.two_tower import TwoTower
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.retrieval.features import TowerFeatures, tower_features
from recsys_edu.retrieval.train_task import RetrievalTrainTask, popularity_of


@dataclass(frozen=True)
class TowerSettings:
    """Everything that decides what two towers learn, apart from the data.

    features: names of `retrieval.features`. dim: columns of every table and, without `layer_sizes`, of the vectors.
    layer_sizes: the towers' MLPs on the sum of their embeddings; none means the sum itself. num_uniform: mixed
    negatives per batch. log_q: correct for popularity. The rest: see `RetrievalTrainTask`.
    """

    features: tuple[str, ...] = ("user", "item")
    dim: int = 32
    layer_sizes: tuple[int, ...] = ()
    batch_size: int = 8192
    epochs: int = 3
    learning_rate: float = 0.1
    log_q: bool = True
    num_uniform: int = 0
    num_hard: int | None = None
    temperature: float = 1.0
    l2: float = 0.0
    hide_seen: bool = False
    max_history: int = 50
    seed: int = 0


def make_task(
    data: MovieLens, split: Split, settings: TowerSettings, device: torch.device | None = None
) -> tuple[RetrievalTrainTask, TowerFeatures]:
    """Untrained towers with their loss, and the features that they read."""
    from recsys_edu.retrieval.evaluation import seen_mask

    train = split.train
    features = tower_features(data, train, settings.features, max_history=settings.max_history)
    torch.manual_seed(settings.seed)
    ebc = EmbeddingBagCollection(tables=features.tables(settings.dim), device=device)
    tower = TwoTower(
        ebc, list(settings.layer_sizes), device, query_features=features.query_names, combine="sum",
        activation_on_last=False,
    )  # fmt: skip
    popularity = popularity_of(torch.from_numpy(train.items.copy()), train.num_items) if settings.log_q else None
    task = RetrievalTrainTask(
        tower, popularity_I=popularity, temperature=settings.temperature, num_hard=settings.num_hard, l2=settings.l2,
        seen_UI=seen_mask([train]) if settings.hide_seen else None,
    )  # fmt: skip
    return task, features


def train_towers(
    data: MovieLens,
    split: Split,
    settings: TowerSettings | None = None,
    *,
    each_epoch: Callable[[int, float, TwoTower], None] | None = None,
) -> tuple[TwoTower, TowerFeatures]:
    """Train on the training part with Adagrad; `each_epoch(epoch, mean loss, towers)` is called after every epoch.

    >>> tower, features = train_towers(data, split, TowerSettings(epochs=3))              # doctest: +SKIP

    Raises:
        FloatingPointError: the loss stopped being a number.
    """
    settings = settings or TowerSettings()
    task, features = make_task(data, split, settings)
    optimizer = torch.optim.Adagrad(task.parameters(), lr=settings.learning_rate)
    for epoch in range(settings.epochs):
        losses = []
        seed = settings.seed * 1_000_003 + epoch
        for batch in features.batches(settings.batch_size, seed=seed, num_uniform=settings.num_uniform):
            loss, _ = task(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())  # host sync: once per epoch, to show it and to stop on NaN
        if mean != mean:
            raise FloatingPointError(f"the loss is NaN after epoch {epoch}; try a lower learning_rate than {settings}")
        if each_epoch is not None:
            each_epoch(epoch, mean, task.two_tower)
    return task.two_tower, features


@torch.no_grad()
def user_vectors(tower: TwoTower, features: TowerFeatures) -> Tensor:
    """`[U, D]`: every user as a query."""
    return tower.query_vectors(tower.ebc(features.all_users().sparse_features))


@torch.no_grad()
def item_vectors(tower: TwoTower, features: TowerFeatures) -> Tensor:
    """`[I, D]`: every item as a candidate."""
    return tower.candidate_vectors(tower.ebc(features.all_items().sparse_features))


def tower_scores(tower: TwoTower, features: TowerFeatures) -> Tensor:
    """`[U, I]`: the dot product of every user with every item."""
    return user_vectors(tower, features) @ item_vectors(tower, features).T
