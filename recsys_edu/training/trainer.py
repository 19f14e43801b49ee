"""Trainer: a loop over steps with evaluation, checkpoints, resuming, early stopping, and a progress bar.

    schedule = Schedule(checkpoint_every=500, evaluate_every=2000)
    trainer = Trainer(model, optimizer, batches_from, test_batches, out=Path("run"), schedule=schedule)
    trainer.resume()                         # where the last checkpoint in run/ left off, if there is one
    trainer.fit(last_step=10_000)            # {"auc": 0.79, "ne": 0.81}

What a run is at a step is its weights, its optimizer's state, and the step's number. The data's position follows from
the number: `batches_from(step)` are the batches after that step. So a run that was killed goes on from its checkpoint
to the same losses, bit for bit, as one that was left alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_edu.distributed.checkpoint import load_checkpoint, save_checkpoint
from recsys_edu.distributed.exchange import gather_objects
from recsys_edu.distributed.train_pipeline import (
    DataLoadingThread,
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from recsys_edu.metrics.auc import AUCMetric
from recsys_edu.metrics.metrics_config import RecTaskInfo
from recsys_edu.metrics.ne import NEMetric
from recsys_edu.optim.keyed import KeyedOptimizer
from recsys_edu.training.reports import Reports, check_tensorboard, make_writer, somebody_watches
from recsys_edu.training.run_folder import RunFolder

PIPELINES = {
    "sparse-dist": TrainPipelineSparseDist,
    "prefetch": PrefetchTrainPipelineSparseDist,
    "base": TrainPipelineBase,
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Schedule:
    """How often things happen, in steps; 0: only at the end.

    log_every: one look at the losses (a wait for the device). keep: checkpoints to keep. patience: stop after so many
    evaluations without a better normalised entropy (None: never); the best evaluation's checkpoint is kept as well.

    Raises:
        ValueError: a negative number, or 0 for log_every, keep or patience.
    """

    checkpoint_every: int = 0
    evaluate_every: int = 0
    log_every: int = 10
    keep: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        least = {"checkpoint_every": 0, "evaluate_every": 0, "log_every": 1, "keep": 1, "patience": 1}
        for name, at_least in least.items():
            value = getattr(self, name)
            if value is not None and value < at_least:
                raise ValueError(f"Schedule: {name} is {value}, expected {at_least} or more")


class Trainer:
    """Trains a click-through model on this rank's batches; with several ranks all of them do the same.

    An interrupt or an error leaves `fit` with everything closed. `fit` may be called again, and goes on after the last
    complete step; where the interrupt hit the middle of an update, `resume()` takes the last checkpoint instead.

    Args:
        model: batch to `(loss, (loss, logits, labels))`, as DLRMTrain; sharded or not.
        optimizer: keyed, so that checkpoints go by names. Its gradients are set to None, not to zero: over kept
            gradients DDP divides, over fresh ones it multiplies by 1 / W, and a resumed run begins with fresh ones.
        batches_from: step to an iterator of the batches that follow it, endless or not.
        test_batches: makes an iterator of the batches to evaluate on; as many on every rank.
        device: where the model is.
        out: folder for metrics.jsonl and checkpoints, the same one on every host; None: nothing is kept.
        schedule: how often what happens.
        pipeline: one of PIPELINES; the results are the same to the bit.
        data: facts that a checkpoint's run must share with this one, e.g. {"dataset": "movielens", "seed": "0"}.
        steps_per_epoch: for the progress bar.
        load_ahead: make batches in a thread of their own (worth it where there are more cores than ranks).
        tensorboard: log to `out`/tensorboard too.
        progress: show a progress bar on rank 0; default: where somebody would see it.

    Raises:
        ValueError: an unknown pipeline; TensorBoard or patience without `out`.
        ImportError: TensorBoard is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: KeyedOptimizer,
        batches_from: Callable[[int], Iterator[Any]],
        test_batches: Callable[[], Iterator[Any]] | None = None,
        *,
        device: torch.device = CPU,
        out: Path | None = None,
        schedule: Schedule | None = None,
        pipeline: str = "sparse-dist",
        data: Mapping[str, str] | None = None,
        steps_per_epoch: int | None = None,
        load_ahead: bool = False,
        tensorboard: bool = False,
        progress: bool | None = None,
    ) -> None:
        if pipeline not in PIPELINES:
            raise ValueError(f"pipeline {pipeline!r}: expected one of {', '.join(PIPELINES)}")
        schedule = schedule or Schedule()
        if out is None and (tensorboard or schedule.patience is not None):
            raise ValueError("TensorBoard logging and early stopping keep files: give the trainer a folder, `out`")
        if tensorboard:
            check_tensorboard()
        self.model, self.optimizer, self.device, self.schedule = model, optimizer, device, schedule
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._group = dist.group.WORLD if dist.is_initialized() else None
        self._batches_from, self._test_batches = batches_from, test_batches
        self._pipeline, self._load_ahead, self._steps_per_epoch = PIPELINES[pipeline], load_ahead, steps_per_epoch
        self._data, self._tensorboard = dict(data or {}), tensorboard
        watched = somebody_watches(self.world_size) if progress is None else progress
        self._progress = gather_objects(watched, self._group)[0]  # rank 0 decides for all: they score windows together
        self.folder = RunFolder(out, self.rank)
        self.step = 0
        """Steps that are complete."""
        self.scores: dict[str, float] = {}
        """Of the last evaluation; `evaluated_step` says when that was."""
        self.evaluated_step = self.best_step = 0
        self.best_ne, self._evaluations_since = float("inf"), 0

    # ------------------------------------------------------------ checkpoints

    def resume(self, step: int | None = None) -> int:
        """Go back to the last complete checkpoint, or that of `step`; returns its step, 0 where there is none.

        Raises:
            ValueError: the checkpoint is of a run on other data.
            CheckpointError: there is none of that step, or it is damaged or of another model.
        """
        path = self.folder.checkpoint(step) if step is not None else next(reversed(self.folder.checkpoints()), None)
        if path is not None:
            saved = load_checkpoint(path, self.model, self.optimizer)
            if saved["data"] != self._data:
                different = _differences(saved["data"], self._data)
                raise ValueError(f"{path} is of a run on other data: {different}. Take another folder for this one")
            self.step, self.scores = saved["step"], saved.get("scores", {})
            self.evaluated_step, self.best_step = saved.get("evaluated_step", 0), saved.get("best_step", 0)
            self.best_ne, self._evaluations_since = saved.get("best_ne", float("inf")), saved.get("since", 0)
        self.folder.cut_after(self.step)
        return self.step

    def save(self) -> None:
        """A checkpoint of this step; older ones than the last few are deleted."""
        if self.folder.path is None:
            return
        facts = {"step": self.step, "data": self._data, "scores": self.scores, "evaluated_step": self.evaluated_step}
        facts |= {"best_step": self.best_step, "best_ne": self.best_ne, "since": self._evaluations_since}
        save_checkpoint(self.folder.checkpoint(self.step), self.model, self.optimizer, facts)
        self.folder.drop_old(self.schedule.keep, self.best_step if self.schedule.patience is not None else None)

    # ------------------------------------------------------------ training

    @property
    def stopped_early(self) -> bool:
        patience = self.schedule.patience
        return patience is not None and self._evaluations_since >= patience

    def fit(self, last_step: int) -> dict[str, float]:
        """Train until `last_step`, the end of the batches, or early stopping; then evaluate and save.

        Returns the last evaluation's scores, {"auc": ..., "ne": ...}, the same on every rank.
        """
        first_step = self.step
        writer = None
        if self._tensorboard and self.rank == 0:
            writer = make_writer(self.folder.path / "tensorboard", first_step)
        bar = self._progress and self.rank == 0 and first_step < last_step
        reports = Reports(bar, writer, first_step, last_step, self._steps_per_epoch)
        pipeline = self._pipeline(self.model, _FreshGradients(self.optimizer), self.device)
        batches = itertools.islice(self._batches_from(first_step), max(last_step - first_step, 0))
        loader = DataLoadingThread(self.device, batches, to_device_non_blocking=True) if self._load_ahead else None
        try:
            with loader or nullcontext(batches) as source:
                self._run(pipeline, source, last_step, reports)
            self._finish(last_step, first_step, reports)
        finally:
            reports.close()
            if hasattr(pipeline, "detach"):
                pipeline.detach()
        return self.scores

    def _run(self, pipeline: Any, batches: Iterator[Any], last_step: int, reports: Reports) -> None:
        self.model.train()
        window = _Window(self.device, scored=self._progress or self._tensorboard)
        while self.step < last_step and not self.stopped_early:
            try:
                loss, logits, labels = pipeline.progress(batches)
            except StopIteration:
                break
            self.step += 1
            window.add(loss, logits, labels)
            is_last = self.step == last_step
            save, evaluate = self._is_due(self.schedule.checkpoint_every), self._is_due(self.schedule.evaluate_every)
            if not (save or evaluate or is_last or len(window) == self.schedule.log_every):
                continue
            self._log(window, reports)
            if evaluate and not is_last:
                save |= self._evaluate_and_judge(reports)
            if save and not is_last:
                self.save()
            window.clear()  # its clock starts anew: samples/s are those of training
        if len(window):
            self._log(window, reports)

    def _finish(self, last_step: int, first_step: int, reports: Reports) -> None:
        if self._test_batches is not None and (self.evaluated_step != self.step or not self.scores):
            self._evaluate_and_judge(reports)
        if self.step > first_step:
            self.save()

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _log(self, window: _Window, reports: Reports) -> None:
        losses = window.losses(self._group)
        first = self.step - len(losses) + 1
        self.folder.write([{"step": first + index, "loss": loss} for index, loss in enumerate(losses)])
        if window.scored:
            numbers = {"samples/s": window.rate(self.world_size), "loss": sum(losses) / len(losses)}
            reports.show(self.step, {**numbers, **click_scores(window.examples(), self.device)}, "train")

    # ------------------------------------------------------------ evaluation

    def evaluate(self) -> dict[str, float]:
        """AUC and normalised entropy over the test batches of all ranks, the same on every rank."""
        if self._test_batches is None:
            raise ValueError("this trainer was given no test_batches")
        was_training = self.model.training
        self.model.eval()
        pipeline = EvalPipelineSparseDist(self.model, self.optimizer, self.device)
        try:
            return click_scores(_evaluated(pipeline, self._test_batches()), self.device)
        finally:
            pipeline.detach()
            self.model.train(was_training)

    def _evaluate_and_judge(self, reports: Reports) -> bool:
        """Evaluate; True where the scores are the best so far and are to be kept for early stopping."""
        if self._test_batches is None:
            return False
        self.scores, self.evaluated_step = self.evaluate(), self.step
        self.folder.write([{"step": self.step, **self.scores}])
        reports.show(self.step, self.scores, "test")
        if self.scores["ne"] < self.best_ne:
            self.best_ne, self.best_step, self._evaluations_since = self.scores["ne"], self.step, 0
            return self.schedule.patience is not None
        self._evaluations_since += 1
        return False


def _differences(saved: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """
    >>> _differences({"dataset": "criteo", "seed": "0"}, {"dataset": "criteo", "seed": "1"})
    "its seed is '0', this run's is '1'"
    """
    names = [name for name in {**saved, **mine} if saved.get(name) != mine.get(name)]
    return "; ".join(f"its {name} is {saved.get(name)!r}, this run's is {mine.get(name)!r}" for name in names)


@dataclass(frozen=True)
class _FreshGradients:
    """The optimizer as pipelines call it; see Trainer's `optimizer`."""

    optimizer: KeyedOptimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()


class _Window:
    """The steps since the last look at them; tensors stay on the device until then."""

    def __init__(self, device: torch.device, scored: bool) -> None:
        self.scored, self._device = scored, device
        self.clear()

    def __len__(self) -> int:
        return len(self._losses)

    def clear(self) -> None:
        self._losses: list[Tensor] = []
        self._examples: list[tuple[Tensor, Tensor]] = []
        self._num_examples, self._begun = 0, time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._losses.append(loss.detach())
        self._num_examples += len(labels)
        if self.scored:
            self._examples.append((logits.detach(), labels))

    def losses(self, group: dist.ProcessGroup | None) -> list[float]:
        """One per step: the mean over all ranks' slices."""
        values = torch.stack(self._losses).double()
        if group is not None:
            dist.all_reduce(values, group=group)
            values /= dist.get_world_size(group)
        return values.tolist()  # host sync: to write and show them

    def rate(self, world_size: int) -> float:
        """Examples per second, of all ranks."""
        return self._num_examples * world_size / max(time.perf_counter() - self._begun, 1e-9)

    def examples(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.cat([logits for logits, _ in self._examples]), torch.cat([labels for _, labels in self._examples])


def _evaluated(pipeline: EvalPipelineSparseDist, batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        try:
            _, logits, labels = pipeline.progress(batches)
        except StopIteration:
            return
        yield logits, labels


@torch.no_grad()
def click_scores(examples: Iterable[tuple[Tensor, Tensor]], device: torch.device = CPU) -> dict[str, float]:
    """AUC and normalised entropy of (logits, labels), over all ranks and the same on every rank.

    >>> scores = click_scores([(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))])
    >>> scores["auc"], round(scores["ne"], 3)
    (1.0, 0.741)
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options = {"tasks": [RecTaskInfo(name="click")], "window_size": 2**40, "compute_on_all_ranks": True}
    metrics = [metric(world_size, rank, batch_size=1, **options).to(device) for metric in (AUCMetric, NEMetric)]
    for logits, labels in examples:
        for metric in metrics:
            metric.update(predictions={"click": logits.sigmoid()}, labels={"click": labels}, weights=None)
    values = {key: float(value) for metric in metrics for key, value in metric.compute().items()}
    return {"auc": values["auc-click|window_auc"], "ne": values["ne-click|lifetime_ne"]}
