"""What a pipeline is, and the simplest one: the next batch is copied while the current one is computed.

Counterpart: torchrec.distributed.train_pipeline.train_pipelines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch
from torch import Tensor, nn

from recsys_edu.distributed.spans import span
from recsys_edu.distributed.train_pipeline.feed import Feed, wait_for
from recsys_edu.distributed.train_pipeline.pipeline_context import In, Out, TrainPipelineContext


class TrainPipeline(ABC, Generic[In, Out]):
    """Something that makes one step of training at a time. Counterpart: TorchRec's class of this name."""

    @abstractmethod
    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        """One step; returns the model's output.

        Raises:
            StopIteration: all batches are done.
        """

    def sync_embeddings(
        self, model: nn.Module, interval_batches: int | None, context: TrainPipelineContext | None = None
    ) -> None:
        """After every `interval_batches` batches average the copies of a DMPCollection; nothing for other models."""
        if interval_batches is None or context is None or context.index is None or not hasattr(model, "sync"):
            return
        if (context.index + 1) % interval_batches == 0:
            model.sync()

    def reset(self) -> None:
        """Forget the batches drawn ahead."""


class TrainPipelineBase(TrainPipeline[In, Out]):
    """Copies the next batch to the device while the current one is computed.

    >>> pipeline = TrainPipelineBase(model, optimizer, torch.device("cpu"))                # doctest: +SKIP
    >>> batches = iter(loader)                                                             # doctest: +SKIP
    >>> while True:                                                                        # doctest: +SKIP
    ...     try:
    ...         output = pipeline.progress(batches)
    ...     except StopIteration:
    ...         break

    Args:
        model: batch to (loss, output). The loss is a tensor, summed if it has several numbers; a list of them; or None,
            and then this step trains nothing. In evaluation mode it may return the output alone.
        optimizer: `zero_grad` and `step` are called once per step in training mode. To accumulate gradients pass an
            object whose `zero_grad` and `step` do so.
        device: where batches go.
        custom_model_fwd: called with the batch in place of `model`.
        enable_inplace_copy_batch: accepted for TorchRec's callers; copies are the same either way.

    Raises:
        Exception: (progress) what the iterator raised, when that batch's turn comes; the next call goes on after it.

    Counterpart: torchrec.distributed.train_pipeline.train_pipelines.TrainPipelineBase.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        custom_model_fwd: Callable[[In], tuple[Tensor, Out]] | None = None,
        enable_inplace_copy_batch: bool = False,
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._model_fwd = custom_model_fwd or model
        self._feed = Feed(device)

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        self._feed.fill(dataloader_iter, 1)
        batch, context = self._feed.queue[0]
        if isinstance(context.absent, StopIteration):
            raise StopIteration
        self._feed.queue.popleft()
        if context.absent is not None:
            raise context.absent
        if self._model.training:
            self._optimizer.zero_grad()
        self._feed.fill(dataloader_iter, 1)
        wait_for(batch, context, self._device)
        with span("forward"):
            loss, output = loss_and_output(self._model_fwd(batch), self._model.training)
        train_on(loss, self._model, self._optimizer)
        return output

    def reset(self) -> None:
        self._feed.clear()


def loss_and_output(answer: Any, training: bool) -> tuple[Any, Any]:
    """What a model returned, as (loss, output)."""
    if isinstance(answer, tuple) and len(answer) == 2:
        return answer
    if training:
        raise TypeError(
            f"in training mode a pipeline's model returns (loss, output), not {type(answer).__name__}: wrap it "
            "(see DLRMTrain), or give custom_model_fwd"
        )
    return None, answer


def train_on(loss: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Backward and the optimizer's step, in training mode and where there is a loss."""
    if not model.training or loss is None:
        return
    if not isinstance(loss, Tensor):
        loss = torch.stack([part.sum() for part in loss])
    with span("backward"):
        (loss if loss.dim() == 0 else loss.sum()).backward()
    with span("optimizer"):
        optimizer.step()
