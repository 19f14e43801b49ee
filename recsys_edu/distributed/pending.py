"""Answers that are still on their way: they wait by themselves when they are first read.

A model written for the unsharded collection gets the overlap for nothing: it calls the sharded collection, computes
its dense part, and only then reads the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recsys_edu.distributed.spans import span
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedTensor


class PendingKeyedTensor(KeyedTensor):
    """A KeyedTensor whose values are fetched when they are first read, or by `wait()`, as TorchRec's users do."""

    def __init__(
        self, keys: list[str], length_per_key: list[int], device: torch.device, finish: Callable[[], Tensor]
    ) -> None:
        super().__init__(keys, length_per_key, torch.empty(0, sum(length_per_key), device=device))
        self._finish: Callable[[], Tensor] | None = finish

    def values(self) -> Tensor:
        if self._finish is not None:
            finish, self._finish = self._finish, None
            with span("output_dist"):
                self._values = finish()
        return self._values

    def device(self) -> torch.device:
        return self._values.device

    def wait(self) -> KeyedTensor:
        """The finished answer as a plain KeyedTensor."""
        return KeyedTensor(self.keys(), self.length_per_key(), self.values())


class PendingJaggedTensors(Mapping[str, JaggedTensor]):
    """The dict of a sequence collection's answers, fetched when one of them is first read, or by `wait()`."""

    def __init__(self, names: list[str], finish: Callable[[], dict[str, JaggedTensor]]) -> None:
        self._names = names
        self._finish = finish
        self._answer: dict[str, JaggedTensor] | None = None

    def wait(self) -> dict[str, JaggedTensor]:
        if self._answer is None:
            with span("output_dist"):
                self._answer = self._finish()
        return self._answer

    def __getitem__(self, name: str) -> JaggedTensor:
        return self.wait()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        state = "still on its way" if self._answer is None else "arrived"
        return f"PendingJaggedTensors({self._names}, {state})"
