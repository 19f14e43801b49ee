"""A training example batch with two kinds of sparse features, as the wrapped models take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.streamable import Pipelineable


@dataclass
class ModelInput(Pipelineable):
    """B examples: dense features, lists of ids, lists of ids with a score each, and labels.

        float_features     [B, I] float32
        idlist_features    KeyedJaggedTensor of stride B without weights, or None
        idscore_features   KeyedJaggedTensor of stride B, the weights are the scores, or None
        label              [B] of 0 and 1

    `recsys_edu.datasets.utils.Batch` is the plainer form, with one KeyedJaggedTensor.

    Counterpart: torchrec.distributed.test_utils.model_input.ModelInput, without its generators of random input.
    """

    float_features: torch.Tensor
    idlist_features: KeyedJaggedTensor | None
    idscore_features: KeyedJaggedTensor | None
    label: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> ModelInput:
        """An input whose parts are on `device`."""
        parts = (None if part is None else part.to(device=device, non_blocking=non_blocking) for part in self._parts())
        return ModelInput(*parts)

    def pin_memory(self) -> ModelInput:
        """An input in page-locked host memory, from which copies to a GPU can overlap with computation."""
        return ModelInput(*(None if part is None else part.pin_memory() for part in self._parts()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, so that their memory is not reused too early."""
        for part in self._parts():
            if part is not None:
                part.record_stream(stream)

    def size_in_bytes(self) -> int:
        """Bytes of the tensors held."""
        sparse = sum(part.size_in_bytes() for part in (self.idlist_features, self.idscore_features) if part is not None)
        return sparse + sum(part.numel() * part.element_size() for part in (self.float_features, self.label))

    def required_ids(self) -> KeyedJaggedTensor:
        """The id lists; ValueError where there are none."""
        if self.idlist_features is None:
            raise ValueError("this model looks up ModelInput.idlist_features, which is None")
        return self.idlist_features

    def _parts(self) -> tuple[torch.Tensor | KeyedJaggedTensor | None, ...]:
        return self.float_features, self.idlist_features, self.idscore_features, self.label
