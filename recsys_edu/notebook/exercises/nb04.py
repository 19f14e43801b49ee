"""Exercises of notebook 04, two towers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import Exercise
from recsys_edu.notebook.exercises.compare import expect_close
from recsys_edu.retrieval.losses import sampled_softmax_loss


def check_corrected_loss(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """`answer(query_BD, item_BD, log_q_B)` is the in-batch softmax loss with the logQ correction."""
    for batch in (1, 3, 8):
        query_BD, item_BD, log_q_B = torch.randn(batch, 4), torch.randn(batch, 4), torch.rand(batch).log()
        expected = sampled_softmax_loss(query_BD, item_BD, torch.arange(batch), logit_bias_C=-log_q_B)
        got = answer(query_BD.clone(), item_BD.clone(), log_q_B.clone())
        expect_close("the loss", got, expected, f"a batch of {batch}")


def check_recall(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """`answer(scores_UI, seen_UI, wanted_UI, k)` is each user's recall@k with seen items removed."""
    for k in (1, 3):
        scores_UI = torch.rand(5, 8)
        place_UI = torch.rand(5, 8)
        seen_UI, wanted_UI = place_UI < 0.3, place_UI > 0.6
        wanted_UI[:, 0], seen_UI[:, 0] = True, False
        top_Uk = scores_UI.masked_fill(seen_UI, float("-inf")).topk(k).indices
        expected = wanted_UI.gather(1, top_Uk).sum(1) / wanted_UI.sum(1)
        got = answer(scores_UI.clone(), seen_UI.clone(), wanted_UI.clone(), k)
        expect_close("recall of each user", got, expected, f"k = {k}, seen {seen_UI.int().tolist()}")


EXERCISES = (
    Exercise(
        "04.1",
        "Correct for popularity",
        "Write `corrected_loss(query_BD, item_BD, log_q_B)`: row b's item is right for query b, the other rows' items "
        "are wrong; subtract each item's `log q` from its column of logits; return the mean cross-entropy.",
        difficulty=1,
        importance=5,
        minutes=8,
        hints=(
            "All dot products at once: `query_BD @ item_BD.T` is `[B, B]`.",
            "Column c belongs to item c: `- log_q_B` broadcasts over rows as it should.",
            "The right answers lie on the diagonal: `torch.nn.functional.cross_entropy(logits, torch.arange(B))`.",
        ),
        check=check_corrected_loss,
    ),
    Exercise(
        "04.2",
        "Recall, with a policy",
        "Write `recall(scores_UI, seen_UI, wanted_UI, k)`: for each user the share of wanted films among the k best "
        "films that the user has not seen. Both masks are bool; every user wants a film.",
        difficulty=2,
        importance=5,
        minutes=10,
        hints=(
            "A film with score minus infinity is never among the best: `masked_fill`.",
            "`.topk(k).indices` are film numbers; `wanted_UI.gather(1, those)` says which of them were wanted.",
            "Divide the number of hits by `wanted_UI.sum(1)`, not by k.",
        ),
        check=check_recall,
    ),
)
