"""Train SASRec or BERT4Rec on MovieLens-100K, leave one out by time, all films ranked, beside EASE and popularity.

    python -m recsys_edu.examples.train_sequence --check
    python -m recsys_edu.examples.train_sequence --seeds 3
    python -m recsys_edu.examples.train_sequence --model bert4rec --epochs 60

Each user's last rating is the test, the one before it is only shown (to every model alike), and films that a user has
seen are not recommended. The number of epochs is fixed: a run never looks at the test to stop. The defaults come from a
handful of trials compared on the validation films; the trials' test figures were printed beside them, so the test is
not untouched.
The intervals over seeds say how much training varies; 943 test ratings add their own error (about +- .024), which the
paired difference to EASE shows.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time

import torch
from torch import Tensor

from recsys_edu.datasets.baselines import fit_ease, popularity_scores
from recsys_edu.datasets.movielens import load_movielens_100k
from recsys_edu.datasets.movielens_splits import Split, interactions, split_leave_one_out
from recsys_edu.examples.command_line import (
    CommandLineError,
    add_option,
    folder_to_write,
    make_parser,
    number,
    run_program,
    users_mistakes,
    whole_number,
)
from recsys_edu.metrics.ranking import full_ranking
from recsys_edu.retrieval.evaluation import Estimate, baseline_scores, estimate, evaluate_ranking, seen_mask
from recsys_edu.retrieval.sequence_training import SequenceSettings, sequence_scores, train_sequences
from recsys_edu.retrieval.sequences import user_sequences

GATE = 0.1410
"""EASE's Hit@10 when it is fitted on the training part."""


def main(argv: list[str] | None = None) -> dict[str, Estimate]:
    """Train once per seed and print a table; returns the model's estimates by metric."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    with users_mistakes():
        split = split_leave_one_out(interactions(load_movielens_100k(args.data)))
    rivals = rival_scores(split)
    for name, scores in rivals.items():
        found = evaluate_ranking(scores, split, seen="removed", ks=(10,))
        print(f"{name:28} Hit@10 {found['hit@10']:.4f}  NDCG@10 {found['ndcg@10']:.4f}", flush=True)
    results, scores = [], torch.empty(0)
    for seed in range(args.seed, args.seed + args.seeds):
        started = time.process_time()
        scores = train_and_score(split, sequence_settings(args, seed), args.verbose)
        results.append(evaluate_ranking(scores, split, seen="removed", ks=(10,)))
        found = results[-1]
        print(
            f"{f'{args.model}, seed {seed}':28} Hit@10 {found['hit@10']:.4f}  NDCG@10 {found['ndcg@10']:.4f}"
            f"  ({time.process_time() - started:.0f} s of CPU)",
            flush=True,
        )
    print("last seed against EASE:", paired_difference(scores, torch.from_numpy(rivals["EASE"]), split))
    estimates = {name: estimate([result[name] for result in results]) for name in ("hit@10", "ndcg@10")}
    if args.seeds > 1:
        print(*(f"{name} {value}" for name, value in estimates.items()), sep="\n")
    hit = estimates["hit@10"].mean
    if args.check:
        print(f"{'met' if hit > GATE else 'MISSED'}  Hit@10 {hit:.4f} > {GATE}")
        if hit <= GATE:
            sys.exit(1)
    return estimates


def train_and_score(split: Split, settings: SequenceSettings, verbose: bool = False) -> Tensor:
    """`[U, I]`: trained on the training part; asked with everything before the test."""

    def told(epoch: int, loss: float, model: torch.nn.Module) -> None:
        if verbose:
            print(f"  epoch {epoch + 1}: loss {loss:.3f}", flush=True)

    num_items = split.train.num_items
    model = train_sequences(user_sequences([split.train]), num_items, settings, each_epoch=told)
    return sequence_scores(model, user_sequences(split.before("test")), num_items)


def rival_scores(split: Split) -> dict[str, Tensor]:
    """Baselines on the training part as published, and EASE that also knows the validation part, as our models do."""
    scores = baseline_scores(split, names=("popularity", "EASE"))
    train_UI = split.train.matrix()
    known_UI = train_UI + split.valid.matrix()
    scores["popularity, all before test"] = popularity_scores(known_UI)
    scores["EASE asked with validation"] = known_UI @ fit_ease(train_UI)
    scores["EASE, all before the test"] = known_UI @ fit_ease(known_UI)
    return scores


def paired_difference(scores_UI: Tensor, rival_UI: Tensor, split: Split, k: int = 10) -> str:
    """The difference of two Hit@k on the same users with its 95% interval over users."""
    exclude_UI = seen_mask(split.before("test"))
    users_E, items_E = (torch.from_numpy(part) for part in (split.test.users, split.test.items))
    mine_E, theirs_E = (
        (full_ranking(each, k, exclude_UI)[users_E] == items_E[:, None]).any(1).double()
        for each in (scores_UI, rival_UI)
    )
    difference_E = mine_E - theirs_E
    half_width = 1.96 * float(difference_E.std()) / math.sqrt(len(difference_E))
    return f"Hit@{k} {float(difference_E.mean()):+.4f} ± {half_width:.4f} ({len(difference_E)} users)"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """
    Raises:
        CommandLineError: an unknown argument, a bad value, or a width that the heads do not divide.
    """
    parser, usual = make_parser("train_sequence", __doc__.splitlines()[0]), SequenceSettings()
    add = functools.partial(add_option, parser)
    add("--model", choices=["sasrec", "bert4rec"], default=usual.model, help="reads forwards, or both ways")
    add("--dim", type=whole_number(1), default=usual.dim, help="width; the heads divide it")
    add("--epochs", type=whole_number(1), default=usual.epochs, help="an epoch is one stretch of every user")
    add("--batch-size", type=whole_number(1), default=usual.batch_size, help="users per step")
    add("--max-length", type=whole_number(1), default=usual.max_length, help="items that the model reads")
    add("--num-blocks", type=whole_number(1), default=usual.num_blocks, help="of attention")
    add("--dropout", type=number(at_least=0, below=1), default=usual.dropout, help="share that is dropped")
    add("--learning-rate", type=number(above=0), default=usual.learning_rate, help="Adam's")
    add("--seed", type=whole_number(0), default=0, help="the first one")
    add("--seeds", type=whole_number(1), default=1, help="how many runs; more than one gives intervals")
    add("--threads", type=whole_number(1), default=1, help="of PyTorch")
    add("--data", type=folder_to_write, help="folder of the MovieLens cache (default: the user's cache)")
    add("--verbose", action="store_true", help="print the loss of every epoch")
    add("--check", action="store_true", help="fail where the gate is missed")
    args = parser.parse_args(argv)
    if args.dim % usual.num_heads:
        raise CommandLineError(f"--dim {args.dim}: {usual.num_heads} heads of attention do not divide it")
    return args


def sequence_settings(args: argparse.Namespace, seed: int) -> SequenceSettings:
    names = ("dim", "epochs", "batch_size", "max_length", "num_blocks", "dropout", "learning_rate")
    return SequenceSettings(args.model, seed=seed, **{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    run_program(main)
