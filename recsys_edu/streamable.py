"""What a training pipeline asks of a batch: move to a device, and tell CUDA which stream uses it.

Counterpart: torchrec.streamable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Multistreamable(ABC):
    """An object that holds tensors which more than one CUDA stream touches."""

    @abstractmethod
    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor held from being reused before `stream` is done with it."""


class Pipelineable(Multistreamable):
    """A batch that a pipeline can copy to its device while it computes on the batch before."""

    @abstractmethod
    def to(self, device: torch.device, non_blocking: bool) -> Pipelineable:
        """The same batch on `device`; `non_blocking` lets a copy from pinned memory run beside other work."""
