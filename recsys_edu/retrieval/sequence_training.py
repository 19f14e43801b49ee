"""Train SASRec or BERT4Rec on users' sequences and score all items: what the notebook and the command line share.

Shapes: U users, B rows of a batch, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recsys_edu.datasets.utils import Batch
from recsys_edu.models.sequence import SequenceModel, SequenceTrainTask, bert4rec, sasrec
from recsys_edu.retrieval.sequences import cloze_batch, next_item_batch, query_batch
from recsys_edu.sparse.jagged_tensor import JaggedTensor


@dataclass(frozen=True)
class SequenceSettings:
    """Everything that decides what a sequence model learns, apart from the data.

    An epoch is one random stretch of every user. The learning rate rises over `warmup_epochs` and stays. mask_share
    concerns BERT4Rec alone. The defaults come from a few trials compared by Hit@10 on MovieLens-100K's validation part.
    """

    model: Literal["sasrec", "bert4rec"] = "sasrec"
    dim: int = 64
    num_blocks: int = 2
    num_heads: int = 2
    dropout: float = 0.2
    max_length: int = 50
    batch_size: int = 64
    epochs: int = 30
    learning_rate: float = 3e-3
    warmup_epochs: int = 3
    mask_share: float = 0.3
    seed: int = 0


def make_model(num_items: int, settings: SequenceSettings) -> SequenceModel:
    """An untrained model; equal settings give equal weights.

    Raises:
        ValueError: an unknown kind of model.
    """
    if settings.model not in ("sasrec", "bert4rec"):
        raise ValueError(f'model={settings.model!r}: expected "sasrec" or "bert4rec"')
    torch.manual_seed(settings.seed)
    make = sasrec if settings.model == "sasrec" else bert4rec
    return make(num_items, settings.dim, settings.max_length, settings.num_blocks, settings.num_heads, settings.dropout)


def epoch_batches(
    sequences: JaggedTensor, num_items: int, settings: SequenceSettings, generator: torch.Generator
) -> Iterator[Batch]:
    """One random stretch of every user with two items or more, in random order."""
    users_U = (sequences.lengths() > 1).nonzero().flatten()
    for users_B in users_U[torch.randperm(len(users_U), generator=generator)].split(settings.batch_size):
        if settings.model == "sasrec":
            yield next_item_batch(sequences, users_B, num_items, settings.max_length, generator)
        else:
            yield cloze_batch(sequences, users_B, num_items, settings.max_length, settings.mask_share, generator)


def train_sequences(
    sequences: JaggedTensor,
    num_items: int,
    settings: SequenceSettings | None = None,
    *,
    each_epoch: Callable[[int, float, SequenceModel], None] | None = None,
) -> SequenceModel:
    """Train with Adam; `each_epoch(epoch, mean loss, model)` is called after every epoch.

    >>> model = train_sequences(user_sequences([split.train]), rated.num_items)              # doctest: +SKIP

    Raises:
        FloatingPointError: the loss stopped being a number.
    """
    settings = settings or SequenceSettings()
    task = SequenceTrainTask(make_model(num_items, settings))
    optimizer = torch.optim.Adam(task.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_of_epoch(epoch, settings)
        task.train()
        losses = []
        for batch in epoch_batches(sequences, num_items, settings, generator):
            loss, _ = task(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())  # host sync: once per epoch, to show it and to stop on NaN
        if mean != mean:
            raise FloatingPointError(f"the loss is NaN after epoch {epoch}; try a lower learning_rate than {settings}")
        if each_epoch is not None:
            each_epoch(epoch, mean, task.model)
    return task.model.eval()


def rate_of_epoch(epoch: int, settings: SequenceSettings) -> float:
    """The learning rate of an epoch as a share of the highest one."""
    return min(1.0, (epoch + 1) / max(settings.warmup_epochs, 1))


@torch.no_grad()
def sequence_scores(model: SequenceModel, sequences: JaggedTensor, num_items: int, batch_size: int = 256) -> Tensor:
    """`[U, I]`: how well every item would follow every user's sequence; a user without items gets zeros.

    The model is scored without dropout and left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    scores_UI = torch.zeros(len(sequences.lengths()), num_items)
    for users_B in (sequences.lengths() > 0).nonzero().flatten().split(batch_size):
        features = query_batch(sequences, users_B, num_items, model.max_length, model.mask_id)
        hidden, candidates_ID = model(features)
        scores_UI[users_B] = hidden.values()[hidden.offsets()[1:].long() - 1] @ candidates_ID.T
    model.train(was_training)
    return scores_UI


def what_next(model: SequenceModel, history: list[int], num_items: int, k: int = 10) -> list[tuple[int, float]]:
    """The k items that best follow a history, best first, with their probabilities; items of the history are left out.

    Raises:
        ValueError: an empty history, or an item number that does not exist.
    """
    strange = [item for item in history if not 0 <= item < num_items]
    if not history or strange:
        raise ValueError(f"expected a history of item numbers from 0 to {num_items - 1}, got {strange or history}")
    scores_I = sequence_scores(model, JaggedTensor.from_dense([torch.tensor(history)]), num_items)[0]
    scores_I[history] = float("-inf")
    best = scores_I.softmax(0).topk(min(k, num_items - len(set(history))))
    return list(zip(best.indices.tolist(), best.values.tolist()))
