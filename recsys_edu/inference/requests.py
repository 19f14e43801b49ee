"""What a server is asked, checked: JSON in, plain lists out, and every refusal with its reason.

    {"examples": [{"dense": [0.1, 0.7, 0.2], "ids": {"user": [196], "film": [242, 302]}}]}   ->   {"scores": [0.73]}

A feature that an example leaves out is empty. A weighted model also reads "weights": {"film": [1, 0.5]}, one number
for each id; ids of a feature that is left out there weigh 1. Everything else has to fit: an unknown feature, an id
that no table knows, a number that is none are refused with the place where they stand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from recsys_edu.inference.package import PackageMetadata

LARGEST_FLOAT = torch.finfo(torch.float32).max


class RefusedRequest(ValueError):
    """A request that gets no scores: an HTTP status and the reason in words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class ScoringRequest:
    """One request, checked: `dense[b]`, and per feature `lengths[f][b]` and its ids, example after example.

    `weights` lie as `values` do; None for a model that takes none.
    """

    dense: list[list[float]]
    lengths: list[list[int]]
    values: list[list[int]]
    weights: list[list[float]] | None = None

    @property
    def num_examples(self) -> int:
        return len(self.dense)


def parse_request(body: bytes, model: PackageMetadata, max_examples: int) -> ScoringRequest:
    """Read and check the body of a request.

    Raises:
        RefusedRequest: 400 for what is no JSON, 422 for JSON that does not fit the model.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5,000 digits; 10,000 brackets
        raise RefusedRequest(400, f"the body is not JSON: {error}") from error
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list):
        raise RefusedRequest(422, 'expected an object with a list "examples"')
    unknown = sorted(content.keys() - {"examples"})
    if unknown:
        raise RefusedRequest(422, f"unknown keys {unknown[:3]} beside 'examples'")
    if not 0 < len(examples) <= max_examples:
        raise RefusedRequest(422, f"{len(examples)} examples; a request has 1 to {max_examples}")
    dense, (lengths, values, weights) = [], ([[] for _ in model.features] for _ in range(3))
    keys = {"dense", "ids", "weights"} if model.weighted else {"dense", "ids"}
    for place, example in enumerate(examples):
        where = f"examples[{place}]"
        if not isinstance(example, dict) or example.keys() - keys:
            raise RefusedRequest(422, f"{where}: expected an object with {' and '.join(sorted(keys))} and nothing else")
        dense.append(_numbers_of(example.get("dense", []), model.num_dense, f"{where}.dense", "a list of {} numbers"))
        ids = _by_feature(example, "ids", model, where)
        own_weights = _by_feature(example, "weights", model, where)
        for feature, (name, num_rows) in enumerate(zip(model.features, model.num_rows)):
            found = _ids_of(ids.get(name, []), num_rows, where, name)
            lengths[feature].append(len(found))
            values[feature].extend(found)
            if model.weighted:
                own, here = own_weights.get(name, [1.0] * len(found)), f"{where}.weights[{name!r}]"
                weights[feature].extend(_numbers_of(own, len(found), here, "one number for each of {} ids"))
    return ScoringRequest(dense, lengths, values, weights if model.weighted else None)


def _by_feature(example: dict[str, Any], key: str, model: PackageMetadata, where: str) -> dict[str, Any]:
    found = example.get(key, {})
    if not isinstance(found, dict):
        raise RefusedRequest(422, f"{where}.{key}: expected an object from feature to list of {key}")
    unknown = sorted(found.keys() - set(model.features))
    if unknown:
        raise RefusedRequest(422, f"{where}.{key}: no features {unknown[:3]}; there are {model.features}")
    return found


def _numbers_of(numbers: Any, count: int, where: str, wanted: str) -> list[float]:
    """The list of `count` finite numbers that stands at `where`; `wanted` says in words what that is."""
    if not isinstance(numbers, list) or len(numbers) != count:
        got = f"{len(numbers)} of them" if isinstance(numbers, list) else type(numbers).__name__
        raise RefusedRequest(422, f"{where}: expected {wanted.format(count)}, got {got}")
    for place, number in enumerate(numbers):
        kind = type(number)  # a bool is an int to isinstance
        if (kind is not float and kind is not int) or not abs(number) <= LARGEST_FLOAT:  # NaN is not, either
            raise RefusedRequest(422, f"{where}[{place}]: {_shown(number)} is no finite 32-bit number")
    return numbers


def _ids_of(ids: Any, num_rows: int, where: str, name: str) -> list[int]:
    if not isinstance(ids, list):
        raise RefusedRequest(422, f"{where}.ids[{name!r}]: expected a list of ids, got {type(ids).__name__}")
    for each in ids:
        if type(each) is not int or not 0 <= each < num_rows:
            raise RefusedRequest(422, f"{where}.ids[{name!r}]: {_shown(each)} is no id in 0 ... {num_rows - 1}")
    return ids


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def join_requests(
    requests: Sequence[ScoringRequest], model: PackageMetadata
) -> tuple[Tensor, Tensor, list[Tensor]] | tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """One batch of all requests' examples, in order: dense [B, I], lengths [F, B], values [N] per feature.

    A weighted model's batch has a fourth part: weights [N] per feature.
    """
    device = torch.device(model.device)
    dense = list(chain.from_iterable(row for request in requests for row in request.dense))
    batch_size = sum(request.num_examples for request in requests)
    dense_BI = torch.tensor(dense, dtype=torch.float32, device=device).view(batch_size, model.num_dense)
    lengths = _feature_after_feature([request.lengths for request in requests])
    lengths_FB = torch.tensor(lengths, dtype=torch.int64).view(len(model.features), batch_size)
    counts = lengths_FB.sum(1).tolist()

    def by_feature(lists: Sequence[Sequence[list]], dtype: torch.dtype) -> list[Tensor]:
        joined = torch.tensor(_feature_after_feature(lists), dtype=dtype, device=device)
        return list(joined.split(counts))  # one tensor, not one for each feature

    batch = dense_BI, lengths_FB.to(device), by_feature([request.values for request in requests], torch.int64)
    if not model.weighted:
        return batch
    return *batch, by_feature([request.weights for request in requests], torch.float32)


def _feature_after_feature(lists: Sequence[Sequence[list]]) -> list:
    """`lists[request][feature]`, as one list: all requests' numbers of the first feature, then of the second, ..."""
    return list(chain.from_iterable(chain.from_iterable(zip(*lists))))
