"""Training pipelines: while batch i is computed, later batches are copied and their ids exchanged.

    progress(iterator)      TrainPipelineBase       TrainPipelineSparseDist
      batch i               compute                 compute
      batch i + 1           copy                    exchange ids: sizes beside forward i, ids beside backward i
      batch i + 2                                   copy

Only what does not depend on weights runs ahead. Rows of batch i + 1 are looked up after the update of batch i, so
losses and weights are those of the plain loop, bit for bit:

    for batch in batches:
        optimizer.zero_grad(); loss, output = model(batch); loss.backward(); optimizer.step()

`progress` returns `output` and raises StopIteration at the end. In evaluation mode (`model.eval()`) it computes forward
only. How modules get their flights: input_flights.py.

Counterpart: torchrec.distributed.train_pipeline.train_pipelines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed.spans import span
from recsys_edu.distributed.train_pipeline.base import TrainPipeline, TrainPipelineBase, loss_and_output, train_on
from recsys_edu.distributed.train_pipeline.compiled import TorchCompileConfig, TrainPipelinePT2
from recsys_edu.distributed.train_pipeline.feed import Feed, wait_for
from recsys_edu.distributed.train_pipeline.input_flights import InputFlights
from recsys_edu.distributed.train_pipeline.pipeline_context import In, Out, TrainPipelineContext
from recsys_edu.distributed.train_pipeline.pipeline_stage import PipelineStage
from recsys_edu.distributed.train_pipeline.staged import StagedTrainPipeline

__all__ = [
    "EvalPipelineSparseDist",
    "PipelineStage",
    "PrefetchTrainPipelineSparseDist",
    "StagedTrainPipeline",
    "TorchCompileConfig",
    "TrainPipeline",
    "TrainPipelineBase",
    "TrainPipelineContext",
    "TrainPipelinePT2",
    "TrainPipelineSparseDist",
]


TrainPipeline.register(StagedTrainPipeline)


class TrainPipelineSparseDist(TrainPipeline[In, Out]):
    """Exchanges the ids of the next batch, and copies the one after, while the current batch is computed.

    >>> pipeline = TrainPipelineSparseDist(DistributedModelParallel(model), optimizer, device)   # doctest: +SKIP
    >>> output = pipeline.progress(batches)                                                      # doctest: +SKIP

    The first batch runs unpipelined and shows which of its parts feeds which sharded module (input_flights.py). What
    cannot be pipelined is named in one warning and runs as without a pipeline.

    Args:
        model, optimizer, device, custom_model_fwd: as TrainPipelineBase's.
        execute_all_batches: at the iterator's end compute what is in the pipeline; otherwise drop the last two batches.
        apply_jit: refused.
        context_type: TrainPipelineContext or a subclass.
        pipeline_postproc: accepted; what a model does to a KeyedJaggedTensor before the lookup runs in the model.
        dmp_collection_sync_interval_batches: a DMPCollection is synchronised after this many batches; None: never.
        enqueue_batch_after_forward: draw the next batch after forward rather than before.
        enable_inplace_copy_batch, free_features_storage_early, clear_data_dist_inputs: accepted; memory is the same.

    Raises:
        Exception: (progress) a batch that the iterator did not give, or that has a bad id, on any rank: on every rank,
            with cause and rank, when its turn comes. Earlier batches have trained, the next call goes on after it.
        RuntimeError: (progress) ranks have unequal numbers of batches; or the pipeline was closed. An error in the
            model's forward or backward closes it where there are several ranks, since they may have stopped at
            different points; `reset()` on every rank opens it. One rank alone just goes on with the next batch.

    With `execute_all_batches=False` the end is not agreed upon: ranks then need equal numbers of batches.

    Counterpart: torchrec.distributed.train_pipeline.train_pipelines.TrainPipelineSparseDist.
    """

    _num_ahead = 1  # batches whose ids are exchanged while one is computed

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        execute_all_batches: bool = True,
        apply_jit: bool = False,
        context_type: type[TrainPipelineContext] = TrainPipelineContext,
        pipeline_postproc: bool = False,
        custom_model_fwd: Callable[[In | None], tuple[Tensor, Out]] | None = None,
        dmp_collection_sync_interval_batches: int | None = 1,
        enqueue_batch_after_forward: bool = False,
        enable_inplace_copy_batch: bool = False,
        free_features_storage_early: bool = False,
        clear_data_dist_inputs: bool = False,
    ) -> None:
        if apply_jit:
            raise NotImplementedError("apply_jit: models are not scripted here; leave it False")
        self._model, self._optimizer, self._device = model, optimizer, device
        self._custom_model_fwd = custom_model_fwd
        self._execute_all_batches, self._after_forward = execute_all_batches, enqueue_batch_after_forward
        self._sync_interval = dmp_collection_sync_interval_batches
        self._feed = Feed(device, context_type)
        self._flights: InputFlights | None = None
        self._closed_by: str | None = None
        self.attach(model)

    # ------------------------------------------------------------ one step

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        if self._closed_by is not None:
            raise RuntimeError(
                f"this pipeline was closed by an error: {self._closed_by}. Ranks may have stopped at different points. "
                "Call reset() on every rank to go on with fresh batches. Where the connection is gone too, make the "
                "model and the pipeline anew; where a rank is gone, start the ranks anew"
            )
        if self._flights is None:
            self.attach(self._model)
        try:
            self.fill_pipeline(dataloader_iter)
            failure = self._failure_of_first()
            if failure is None:
                return self._step(dataloader_iter)
        except BaseException as error:
            self._abandon(error)
            raise
        raise failure  # the same on every rank, with nothing under way

    def fill_pipeline(self, dataloader_iter: Iterator[In]) -> None:
        """Draw as many batches as the next step needs."""
        if self._execute_all_batches:
            self._feed.fill(dataloader_iter, 1 + self._num_ahead)
            return
        self._feed.fill(dataloader_iter, 2 + self._num_ahead)
        if self._feed.ends:
            end = self._feed.queue[-1]
            end[1].ended_everywhere = True
            self._feed.queue = deque([end])

    def _failure_of_first(self) -> Exception | None:
        """What to raise in place of computing the first batch; it is known to all ranks, and the batch is dropped."""
        batch, context = self._feed.queue[0]
        if not context.ended_everywhere:
            if not self._flights.routes:
                self._flights.agree(context)
            elif context.failure is None:
                self.start_sparse_data_dist(batch, context)
                self.wait_sparse_data_dist(context)
        failure = context.failure or context.absent
        if isinstance(failure, StopIteration):
            return StopIteration()
        if failure is not None:
            self.dequeue_batch()
        return failure

    def _step(self, dataloader_iter: Iterator[In]) -> Out:
        training = self._model.training
        if training:
            self._optimizer.zero_grad()
        ahead = list(self._feed.queue)[1 : 1 + self._num_ahead]
        for batch, context in ahead:
            self.start_sparse_data_dist(batch, context)
        if not self._after_forward:
            self.enqueue_batch(dataloader_iter)
        batch, context = self._feed.queue[0]
        self.dequeue_batch()
        loss, output = self._forward(batch, context)
        if self._after_forward:
            self.enqueue_batch(dataloader_iter)
        for _, later in ahead:
            self.wait_sparse_data_dist(later)
        self._train_on(loss)
        if training:
            self.sync_embeddings(self._model, self._sync_interval, context)
        return output

    def _forward(self, batch: In, context: TrainPipelineContext) -> tuple[Any, Out]:
        wait_for(batch, context, self._device)
        watching = self._flights.watch(batch) if self._flights.routes is None else nullcontext()
        with span("forward"), watching, self._flights.hand_over(context):
            answer = (self._custom_model_fwd or self._model)(batch)
        return loss_and_output(answer, self._model.training)

    def _train_on(self, loss: Any) -> None:
        train_on(loss, self._model, self._optimizer)

    # ------------------------------------------------------------ its parts

    def enqueue_batch(self, dataloader_iter: Iterator[In]) -> bool:
        """Draw one more batch; False at the end."""
        if not self._feed.ends:
            self._feed.queue.append(self.copy_batch_to_gpu(dataloader_iter))
        return not self._feed.ends

    def dequeue_batch(self) -> None:
        """Drop the first batch."""
        self._feed.queue.popleft()

    def copy_batch_to_gpu(self, dataloader_iter: Iterator[In]) -> tuple[In | None, TrainPipelineContext]:
        """The next batch on its way to the device, and its context (which says why where there is no batch)."""
        return self._feed.draw(dataloader_iter)

    def start_sparse_data_dist(self, batch: In | None, context: TrainPipelineContext) -> None:
        """Route the ids of a batch and tell every rank how many are coming, unless done."""
        if not context.started and self._flights.routes is not None:
            self._flights.start(batch, context)

    def wait_sparse_data_dist(self, context: TrainPipelineContext) -> None:
        """Learn how many ids are coming, and send ours, unless done."""
        if context.input_dist_splits_requests:
            self._flights.exchange(context)

    # ------------------------------------------------------------ ends and errors

    def detach(self) -> nn.Module:
        """The model without the pipeline's hooks. Batches drawn ahead stay for when it is attached again."""
        if self._flights is not None:
            self._flights.remove()
            self._drop_flights()
            self._flights = None
        return self._model

    def attach(self, model: nn.Module | None = None, sparse_dist: bool = True) -> None:
        """Hook the pipeline to `model` (default: the one it had), whose first batch then runs unpipelined.

        Call it on all ranks together, also after `DistributedModelParallel.reshard`, which replaces sharded modules.
        With `sparse_dist=False` nothing is exchanged ahead until the next call.
        """
        self.detach()
        self._model = model if model is not None else self._model
        self._flights = InputFlights(self._model, self._device)
        if not sparse_dist:
            self._flights.routes = []

    def reset(self) -> None:
        """Drop the batches drawn ahead and forget the iterator; opens a closed pipeline. Call it on all ranks."""
        self._drop_flights()
        self._feed.clear()
        self._closed_by = None

    def _abandon(self, error: BaseException) -> None:
        """After an error somewhere in a step: nothing half-done stays."""
        if self._flights is not None and self._flights.world_size > 1:
            self._closed_by = f"{type(error).__name__}: {error}"
            self._feed.clear()
        self._drop_flights()

    def _drop_flights(self) -> None:
        for _, context in self._feed.queue:
            context.drop_flights()


class PrefetchTrainPipelineSparseDist(TrainPipelineSparseDist[In, Out]):
    """TrainPipelineSparseDist with the ids exchanged two batches ahead.

    In TorchRec the batch in between is looked up in a cache before its turn. Tables have no cache here, so what is left
    is the longer lead: an exchange has two steps' time to arrive. It helps where the network takes longer than half a
    step. Arguments as TrainPipelineSparseDist's; `execute_all_batches=False` drops the last three batches.

    Counterpart: torchrec.distributed.train_pipeline.train_pipelines.PrefetchTrainPipelineSparseDist.
    """

    _num_ahead = 2

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        execute_all_batches: bool = True,
        apply_jit: bool = False,
        pipeline_postproc: bool = True,
        custom_model_fwd: Callable[[In | None], tuple[Tensor, Out]] | None = None,
        enable_inplace_copy_batch: bool = False,
        free_features_storage_early: bool = False,
        clear_data_dist_inputs: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            device,
            execute_all_batches,
            apply_jit,
            pipeline_postproc=pipeline_postproc,
            custom_model_fwd=custom_model_fwd,
            enable_inplace_copy_batch=enable_inplace_copy_batch,
            free_features_storage_early=free_features_storage_early,
            clear_data_dist_inputs=clear_data_dist_inputs,
        )


class EvalPipelineSparseDist(TrainPipelineSparseDist[In, Out]):
    """TrainPipelineSparseDist that computes forward only, without gradients; the optimizer is never called.

    Modules stay in the mode they are in: call `model.eval()` for dropout and the like.

    Counterpart: torchrec.distributed.train_pipeline.train_pipelines.EvalPipelineSparseDist.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        apply_jit: bool = False,
        pipeline_postproc: bool = False,
        enable_inplace_copy_batch: bool = False,
        free_features_storage_early: bool = False,
        clear_data_dist_inputs: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            device,
            apply_jit=apply_jit,
            pipeline_postproc=pipeline_postproc,
            enable_inplace_copy_batch=enable_inplace_copy_batch,
            free_features_storage_early=free_features_storage_early,
            clear_data_dist_inputs=clear_data_dist_inputs,
        )

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        with torch.no_grad():
            return super().progress(dataloader_iter)

    def _step(self, dataloader_iter: Iterator[In]) -> Out:
        ahead = list(self._feed.queue)[1 : 1 + self._num_ahead]
        for batch, context in ahead:
            self.start_sparse_data_dist(batch, context)
        self.enqueue_batch(dataloader_iter)
        batch, context = self._feed.queue[0]
        self.dequeue_batch()
        _, output = self._forward(batch, context)
        for _, later in ahead:
            self.wait_sparse_data_dist(later)
        return output
