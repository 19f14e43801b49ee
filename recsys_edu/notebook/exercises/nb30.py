"""Exercises of notebook 30, to production."""

from __future__ import annotations

import random
from collections.abc import Callable

from recsys_edu.notebook.exercise import CheckFailed, Exercise

PORTED = """import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
import torchrec.distributed as trec_dist

print("trained with recsys_edu")  # a word in a text stays
"""


def check_place(answer: Callable[[int, int], tuple[int, int]]) -> None:
    """`answer(rank, ranks_per_host)` is the host and the local rank."""
    for _ in range(20):
        ranks_per_host = random.randint(1, 8)
        rank = random.randrange(16 * ranks_per_host)
        got = answer(rank, ranks_per_host)
        if got is None or got is ...:
            raise NotImplementedError
        expected = divmod(rank, ranks_per_host)
        if tuple(got) != expected:
            raise CheckFailed(f"for rank {rank}, {ranks_per_host} ranks per host\nexpected {expected}\ngot      {got}")


def check_port(answer: Callable[[str], str]) -> None:
    """`answer(source)` is a program that imports TorchRec where `source` imports recsys_edu."""
    for name in random.sample(("loss", "tables", "batch", "model"), 4):
        expected = PORTED.replace("trec_dist", name)
        # only lines that import change: the text in quotes has to stay
        lines = [
            line.replace("torchrec", "recsys_edu") if line.startswith(("import", "from")) else line
            for line in expected.splitlines(keepends=True)
        ]
        source = "".join(lines)
        got = answer(source)
        if got is None or got is ...:
            raise NotImplementedError
        if got != expected:
            raise CheckFailed(f"for\n{source}\nexpected\n{expected}\ngot\n{got}")


EXERCISES = (
    Exercise(
        "30.1",
        "Where is a rank?",
        "Write `place(rank, ranks_per_host)`: the pair (host, local rank) that torchrun gives to a rank.",
        difficulty=1,
        importance=4,
        minutes=5,
        hints=(
            "Ranks are counted through: host 0 has the first `ranks_per_host` of them.",
            "How often does `ranks_per_host` go into `rank`, and what is left? `divmod` gives both.",
        ),
        check=check_place,
    ),
    Exercise(
        "30.2",
        "Change the import",
        "Write `port(source)`: the same program with `torchrec` in place of `recsys_edu` in lines that begin with "
        "`import` or `from`, and nowhere else. Line breaks stay.",
        difficulty=2,
        importance=3,
        minutes=8,
        hints=(
            "`source.splitlines(keepends=True)` keeps the line breaks, so that `''.join` puts all together again.",
            "`line.startswith(('import ', 'from '))` is true for imports; `line.replace(...)` changes them.",
        ),
        check=check_port,
    ),
)
