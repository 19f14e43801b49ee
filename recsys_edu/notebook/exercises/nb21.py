"""Exercises of notebook 21, quantised inference and serving."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_number


def check_join(answer: Callable[[list[dict[str, list[int]]], list[str]], Any]) -> None:
    """`answer(requests, features)` is (lengths, values): per feature one length per request, and all ids in order."""
    for _ in range(10):
        features = random.sample(["user", "film", "seen", "age"], random.choice([1, 2, 3]))
        requests = [
            {name: random.choices(range(100), k=random.randrange(4)) for name in features if random.random() < 0.8}
            for _ in range(random.randrange(1, 4))
        ]
        expected = (
            [[len(each.get(name, [])) for each in requests] for name in features],
            [[one for each in requests for one in each.get(name, [])] for name in features],
        )
        got = answer([dict(each) for each in requests], list(features))
        if got is None or got is ...:
            raise NotImplementedError
        if not isinstance(got, tuple) or tuple(got) != expected:
            raise CheckFailed(f"for {requests}, features {features}\nexpected {expected}\ngot {got}")


def check_percentile(answer: Callable[[list[float], float], Any]) -> None:
    """`answer(latencies, percent)` is the smallest latency that at least `percent` percent do not exceed."""
    for _ in range(20):
        latencies = [round(random.uniform(1, 50), 1) for _ in range(random.randrange(1, 200))]
        percent = random.choice([1, 50, 90, 99, 100])
        got = answer(list(latencies), percent)
        if got is None or got is ...:
            raise NotImplementedError
        expected = sorted(latencies)[math.ceil(len(latencies) * percent / 100) - 1]
        expect_number(f"the {percent}th percentile", got, expected, f"{len(latencies)} latencies {latencies[:5]} ...")


def check_waiting(answer: Callable[[float, float, float], Any]) -> None:
    """`answer(clients, fixed_ms, each_ms)`: a round's milliseconds when all clients go in one batch, every time."""
    for _ in range(20):
        clients, fixed_ms, each_ms = random.randrange(1, 100), random.uniform(0.5, 5), random.uniform(0.01, 0.5)
        got = answer(clients, fixed_ms, each_ms)
        if got is None or got is ...:
            raise NotImplementedError
        given = f"{clients} clients, {fixed_ms:.2f} ms a batch and {each_ms:.3f} ms an example"
        expect_number("the answers per second", got, 1e3 * clients / (fixed_ms + clients * each_ms), given)


EXERCISES = (
    Exercise(
        "21.1",
        "Join requests",
        "Write `join(requests, features)`. A request is a dict from feature to list of ids; a feature that is missing "
        "has none. Return `(lengths, values)`: for each feature the list of lengths, one per request, and the list of "
        "all its ids, request after request.",
        difficulty=2,
        importance=4,
        minutes=8,
        hints=(
            "`request.get(name, [])` are the ids of a feature, an empty list where it is missing.",
            "Feature by feature: a list over requests inside a list over features.",
            "`values`: `[one for request in requests for one in request.get(name, [])]`, for each `name`.",
        ),
        check=check_join,
    ),
    Exercise(
        "21.2",
        "A percentile",
        "Write `percentile(latencies, percent)`: the smallest of the latencies that at least `percent` percent of them "
        "do not exceed.",
        difficulty=2,
        importance=4,
        minutes=6,
        hints=(
            "Sort them first.",
            "Of n latencies, `ceil(n * percent / 100)` must not exceed the answer.",
            "`sorted(latencies)[math.ceil(len(latencies) * percent / 100) - 1]`.",
        ),
        check=check_percentile,
    ),
    Exercise(
        "21.3",
        "What batching can give",
        "A batch takes `fixed_ms`, and `each_ms` more for each example in it. Each client asks again as soon as it is "
        "answered, and all of them always go together. Write `answers_per_second(clients, fixed_ms, each_ms)`.",
        difficulty=2,
        importance=5,
        minutes=6,
        hints=(
            "How long does a batch with all clients in it take?",
            "In that time every client gets one answer.",
            "`1000 * clients / (fixed_ms + clients * each_ms)`.",
        ),
        check=check_waiting,
    ),
)
