"""How many stars will this user give this film? Biases and a dot product; the ranking stage of notebook 04.

    rating = mean + b_user + b_item + p_user . q_item        one table row holds (b, p)

Known as biased matrix factorisation: Koren, Bell and Volinsky, Matrix Factorization Techniques for Recommender
Systems, IEEE Computer 2009.

Shapes: B pairs, U users, I items, D columns of a table (a bias and D - 1 factors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys_edu.datasets.baselines import fit_biases
from recsys_edu.datasets.movielens_splits import Interactions
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class RatingSettings:
    """dim: columns of a row, bias included. l2: weight of the pairs' mean squared factors."""

    dim: int = 32
    learning_rate: float = 0.01
    l2: float = 0.06
    epochs: int = 3
    batch_size: int = 1000
    seed: int = 0


class RatingModel(nn.Module):
    """Predicted ratings of (user, item) pairs, in stars.

        model = RatingModel(num_users=943, num_items=1682, mean=3.53)
        stars_B = model(pairs(users_B, items_B))

    The tables are one EmbeddingBagCollection with features "user" and "item", so they can be sharded like any other.
    """

    def __init__(self, num_users: int, num_items: int, mean: float, dim: int = 32) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables=[_table("user", num_users, dim), _table("item", num_items, dim)])
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        """float32 `[B]`."""
        return self.stars(*self.rows(kjt))

    def rows(self, kjt: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """The users' and the items' rows, `[B, D]` each: column 0 is the bias."""
        pooled = self.ebc(kjt)
        return pooled["user"], pooled["item"]

    def stars(self, user_BD: Tensor, item_BD: Tensor) -> Tensor:
        """Ratings from rows; the last dimension is reduced, the others broadcast."""
        return self.mean + user_BD[..., 0] + item_BD[..., 0] + (user_BD[..., 1:] * item_BD[..., 1:]).sum(-1)

    def item_rows(self) -> Tensor:
        """`[I, D]`, detached."""
        return self.ebc.embedding_bags["t_item"].weight.detach()

    def user_rows(self) -> Tensor:
        """`[U, D]`, detached."""
        return self.ebc.embedding_bags["t_user"].weight.detach()

    def fold_in(self, item_ids: Sequence[int], ratings: Sequence[float], strength: float = 3.0) -> Tensor:
        """The row `[D]` of a stranger who gave these ratings: ridge regression with the items' rows fixed.

        Without ratings it is zero: a stranger is the average person. `strength` is the weight of that assumption,
        in ratings.

        Raises:
            ValueError: not as many items as ratings, or an item number out of range.
        """
        if len(item_ids) != len(ratings):
            raise ValueError(f"{len(item_ids)} items but {len(ratings)} ratings")
        item_ID = self.item_rows()
        if wrong := [item for item in item_ids if not 0 <= item < len(item_ID)]:
            raise ValueError(f"item numbers {wrong} do not lie in [0, {len(item_ID)})")
        rated_ND = item_ID[torch.tensor(list(item_ids), dtype=torch.int64)]
        wanted_N = torch.tensor(list(ratings), dtype=torch.float32) - self.mean - rated_ND[:, 0]
        inputs_ND = torch.cat([torch.ones(len(rated_ND), 1), rated_ND[:, 1:]], dim=1)
        gram_DD = inputs_ND.T @ inputs_ND + strength * torch.eye(inputs_ND.shape[1])
        return torch.linalg.solve(gram_DD, inputs_ND.T @ wanted_N)


def pairs(users_B: Tensor, items_B: Tensor) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor with one user and one item per row."""
    lengths = torch.ones(2 * len(users_B), dtype=torch.int32)
    return KeyedJaggedTensor(["user", "item"], torch.cat([users_B, items_B]), lengths=lengths, stride=len(users_B))


def train_rating_model(train: Interactions, settings: RatingSettings | None = None) -> RatingModel:
    """Least squares with Adam, starting from fitted biases.

    >>> model = train_rating_model(split.train)                                           # doctest: +SKIP
    """
    settings = settings or RatingSettings()
    torch.manual_seed(settings.seed)
    start = fit_biases(train.users, train.items, train.ratings, train.num_users, train.num_items)
    model = RatingModel(train.num_users, train.num_items, start.mean, settings.dim)
    with torch.no_grad():
        model.user_rows()[:, 0] = torch.from_numpy(start.user).float()
        model.item_rows()[:, 0] = torch.from_numpy(start.item).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    users, items, ratings = (torch.from_numpy(part.copy()) for part in (train.users, train.items, train.ratings))
    for _ in range(settings.epochs):
        for rows_B in torch.randperm(len(users)).split(settings.batch_size):
            user_BD, item_BD = model.rows(pairs(users[rows_B], items[rows_B]))
            error_B = model.stars(user_BD, item_BD) - ratings[rows_B]
            factors_B = user_BD[:, 1:].square().sum(1) + item_BD[:, 1:].square().sum(1)
            biases_B = user_BD[:, 0].square() + item_BD[:, 0].square()
            loss = error_B.square().mean() + settings.l2 * factors_B.mean() + 0.005 * biases_B.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def predicted_ratings(model: RatingModel, part: Interactions) -> Tensor:
    """float32 `[E]`, the model's guess for each rating of `part`."""
    return model(pairs(torch.from_numpy(part.users.copy()), torch.from_numpy(part.items.copy())))


def _table(name: str, rows: int, dim: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"t_{name}", num_embeddings=rows, embedding_dim=dim, feature_names=[name], pooling=PoolingType.SUM,
        weight_init_min=-0.08, weight_init_max=0.08,
    )  # fmt: skip
