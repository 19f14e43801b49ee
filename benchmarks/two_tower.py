"""Samples per second of two-tower training (TFRS's protocol) beside the same model in plain PyTorch.

    python benchmarks/two_tower.py [--rounds 5] [--threads 2]

Plain PyTorch is what a tutorial would write: two nn.Embedding, the whole batch-by-batch matrix of dot products,
cross-entropy with the logQ correction. Ours compares with each different item once and weighs it by its count. The two
losses differ where the right item occurs again in the batch: the matrix counts those repeats as wrong answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, Gate, medians, parse_arguments, ratio, report, time_samples
from recsys_edu.datasets.movielens import load_movielens_100k
from recsys_edu.datasets.movielens_splits import Split, interactions, split_random
from recsys_edu.retrieval.train_task import popularity_of
from recsys_edu.retrieval.training import TowerSettings, make_task, train_towers

OURS, PLAIN = "recsys_edu", "plain PyTorch"


def our_step(data, split: Split, settings: TowerSettings) -> Callable[[], None]:
    """One training step on the next batch, batches included, epoch after epoch."""
    task, features = make_task(data, split, settings)
    optimizer = torch.optim.Adagrad(task.parameters(), lr=0.1)

    def forever():
        epoch = 0
        while True:
            yield from features.batches(settings.batch_size, seed=epoch)
            epoch += 1

    batches = forever()

    def step() -> None:
        loss, _ = task(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_step(split: Split, settings: TowerSettings) -> Callable[[], None]:
    train = split.train
    users, items = torch.from_numpy(train.users.copy()), torch.from_numpy(train.items.copy())
    user_table = torch.nn.Embedding(train.num_users, settings.dim)
    item_table = torch.nn.Embedding(train.num_items, settings.dim)
    torch.nn.init.uniform_(user_table.weight, -0.05, 0.05)
    torch.nn.init.uniform_(item_table.weight, -0.05, 0.05)
    optimizer = torch.optim.Adagrad([user_table.weight, item_table.weight], lr=0.1)
    log_q_I = popularity_of(items, train.num_items).clamp(min=1e-9).log()

    def forever():
        while True:
            yield from torch.randperm(len(users)).split(settings.batch_size)

    rows = forever()

    def step() -> None:
        rows_B = next(rows)
        user_B, item_B = users[rows_B], items[rows_B]
        logits_BB = user_table(user_B) @ item_table(item_B).T - log_q_I[item_B]
        loss = F.cross_entropy(logits_BB, torch.arange(len(rows_B)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(__doc__, argv, rounds=5)
    data = load_movielens_100k()
    split = split_random(interactions(data))
    settings = TowerSettings(batch_size=512 if args.tiny else 8192, epochs=3)
    contestants = {OURS: our_step(data, split, settings), PLAIN: plain_step(split, settings)}
    samples = time_samples(contestants, 3 if args.tiny else args.rounds, clock=args.clock, limit_s=120)
    rows = [
        {"library": name, "batch": settings.batch_size, "ms per step": ms, "samples/s": 1e3 * settings.batch_size / ms}
        for name, ms in medians(samples).items()
    ]
    started = CLOCKS[args.clock]()
    train_towers(data, split, settings)
    seconds = CLOCKS[args.clock]() - started
    rows.append({"library": f"{OURS}, 3 epochs", "batch": settings.batch_size, "ms per step": 1e3 * seconds / 30,
                 "samples/s": 3 * len(split.train) / seconds})  # fmt: skip
    gates = [
        Gate("samples/s over plain PyTorch's", ratio(samples, PLAIN, OURS), at_least=1.0),
        Gate("seconds for 3 epochs of TFRS's protocol", seconds, at_most=20.0),
    ]
    report("two_tower", rows, gates, args.out)


if __name__ == "__main__":
    main()
