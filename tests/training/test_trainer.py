"""Trainer: the plain loop to the bit, resuming at any step, early stopping, evaluation, reports."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_edu.datasets.utils import Batch
from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.checkpoint import CheckpointError
from recsys_edu.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from recsys_edu.optim.optimizers import in_backward_optimizer_filter
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.training import PIPELINES, Schedule, Trainer, click_scores

STEPS, BATCH, ROWS = 9, 24, 30
FEATURES = ["user", "film", "genre"]
GENERATORS = [plans.row_wise(), plans.column_wise(), plans.data_parallel()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """This rank's slice of a step's batch; clicks follow the film, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ROWS, (len(FEATURES), BATCH), generator=generator)
    labels = (ids[1] % 3 == 0).long()
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    ids = ids[:, mine]
    kjt = KeyedJaggedTensor(FEATURES, ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.long))
    return Batch(torch.rand(BATCH, 4, generator=generator)[mine], kjt, labels[mine])


def make_trainer(rank: int = 0, world_size: int = 1, lr: float = 0.3, num_test: int = 2, **options: Any) -> Trainer:
    torch.manual_seed(rank)
    names = ["t_" + feature for feature in FEATURES]
    tables = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=24, feature_names=[feature])
            for name, feature in zip(names, FEATURES)
        ]
    )
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": lr})
    model = DLRMTrain(DLRM(tables, 4, [16, 24], [16, 1]))
    plan = plans.construct_module_sharding_plan(
        tables, dict(zip(names, GENERATORS)), local_size=world_size, world_size=world_size, device_type="cpu"
    )
    parallel = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan({"model.sparse_arch.embedding_bag_collection": plan}),
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True),
    )
    dense = dict(in_backward_optimizer_filter(parallel.named_parameters()))
    wrapped = KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adagrad(params, lr=0.05))

    def batches_from(step: int) -> Iterator[Batch]:
        while True:
            step += 1
            yield batch_of(step, rank, world_size)

    def test_batches() -> Iterator[Batch]:
        return (batch_of(1000 + index, rank, world_size) for index in range(num_test))

    options = {"progress": False, "data": {"seed": "0"}} | options
    optimizer = CombinedOptimizer([parallel.fused_optimizer, wrapped])
    return Trainer(parallel, optimizer, batches_from, test_batches, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain_losses(num_steps: int) -> list[float]:
    """The loop written out, on a model of the same seed."""
    trainer = make_trainer()
    losses = []
    for step in range(1, num_steps + 1):
        loss, _ = trainer.model(batch_of(step))
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("pipeline", list(PIPELINES))
@pytest.mark.parametrize("load_ahead", [False, True])
def test_losses_are_the_plain_loops(tmp_path, pipeline: str, load_ahead: bool) -> None:
    trainer = make_trainer(out=tmp_path, pipeline=pipeline, load_ahead=load_ahead, schedule=Schedule(evaluate_every=4))
    scores = trainer.fit(STEPS)
    found = lines(tmp_path)
    assert [line["loss"] for line in found if "loss" in line] == plain_losses(STEPS)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in found if "ne" in line] == [4, 8, 9]
    assert {"step": STEPS, **scores} == found[-1]
    assert "DataLoadingThread" not in {thread.name for thread in threading.enumerate()}


def test_it_learns() -> None:
    trainer = make_trainer(num_test=20)
    before = trainer.evaluate()
    after = trainer.fit(120)
    assert before["ne"] > 0.95 and after["ne"] < 0.6 and after["auc"] > 0.9
    assert trainer.step == 120 and trainer.evaluated_step == 120


@pytest.mark.parametrize("killed_after", [1, 4, 5, 8])
def test_a_run_that_was_cut_off_resumes_to_the_same_losses(tmp_path, killed_after: int) -> None:
    options = {"schedule": Schedule(checkpoint_every=3, evaluate_every=2, log_every=2)}
    whole = make_trainer(out=tmp_path / "whole", **options).fit(STEPS)

    cut = make_trainer(out=tmp_path / "cut", **options)
    batches_from = cut._batches_from
    cut._batches_from = lambda step: _interrupted(batches_from(step), killed_after)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(STEPS)
    fresh = make_trainer(out=tmp_path / "cut", **options)
    # batches are drawn one or two ahead of the step they are trained in
    assert fresh.resume() in (0, 3, 6) and fresh.resume() <= killed_after
    assert fresh.fit(STEPS) == whole
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def _interrupted(batches: Iterator[Batch], after: int) -> Iterator[Batch]:
    for index, batch in enumerate(batches):
        if index == after:
            raise KeyboardInterrupt
        yield batch


def cut_and_resumed(rank: int, world_size: int, group, folder: str, cut_at: int) -> dict[str, float]:
    options = {"out": Path(folder), "schedule": Schedule(checkpoint_every=2, evaluate_every=3, log_every=2)}
    if cut_at:
        make_trainer(rank, world_size, **options).fit(cut_at)  # its end is a checkpoint, like a kill just after one
    trainer = make_trainer(rank, world_size, **options)
    assert trainer.resume() == cut_at
    return trainer.fit(STEPS)


def test_three_ranks_resume_to_the_same_losses(ranks, tmp_path) -> None:
    scores = [ranks.run(cut_and_resumed, 3, str(tmp_path / str(cut_at)), cut_at) for cut_at in (0, 3, 6)]
    assert all(score == scores[0][0] for per_rank in scores for score in per_rank)
    losses = [[line for line in lines(tmp_path / str(cut_at)) if "loss" in line] for cut_at in (0, 3, 6)]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == STEPS


def test_two_ranks_learn_and_agree(ranks) -> None:
    scores = ranks.run(two_ranks, 2)
    assert scores[0] == scores[1] and scores[0]["auc"] > 0.9


def two_ranks(rank: int, world_size: int, group) -> dict[str, float]:
    return make_trainer(rank, world_size, num_test=20).fit(120)


def test_a_finished_run_is_not_repeated(tmp_path) -> None:
    first = make_trainer(out=tmp_path).fit(5)
    again = make_trainer(out=tmp_path)
    assert again.resume() == 5
    written = (tmp_path / "metrics.jsonl").read_text()
    assert again.fit(5) == first
    assert (tmp_path / "metrics.jsonl").read_text() == written
    longer = again.fit(7)
    assert again.step == 7 and [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 8))
    assert longer == make_trainer().fit(7)


def test_early_stopping_keeps_the_best(tmp_path) -> None:
    schedule = Schedule(evaluate_every=2, patience=2, keep=1)
    trainer = make_trainer(lr=3.0, out=tmp_path, schedule=schedule)
    turns = iter([0.9, 0.7, 0.8, 0.75, 0.1])
    trainer.evaluate = lambda: {"auc": 0.5, "ne": next(turns)}
    trainer.fit(100)
    assert trainer.stopped_early and trainer.step == 8 and trainer.best_step == 4 and trainer.best_ne == 0.7
    assert {path.name for path in trainer.folder.checkpoints()} == {"step_4", "step_8"}
    again = make_trainer(lr=3.0, out=tmp_path, schedule=schedule)
    assert again.resume() == 8 and again.stopped_early
    assert again.fit(100) == {"auc": 0.5, "ne": 0.75} and again.step == 8
    assert again.resume(4) == 4 and not again.stopped_early


def test_a_resumed_run_stops_early_at_the_same_step(tmp_path) -> None:
    options = {"schedule": Schedule(evaluate_every=1, patience=3, checkpoint_every=1, keep=99), "lr": 5.0}
    whole = make_trainer(out=tmp_path / "whole", **options)
    whole.fit(60)
    assert whole.stopped_early
    cut = make_trainer(out=tmp_path / "cut", **options)
    cut.fit(whole.step - 2)
    resumed = make_trainer(out=tmp_path / "cut", **options)
    resumed.resume()
    resumed.fit(60)
    assert (resumed.step, resumed.best_step, resumed.scores) == (whole.step, whole.best_step, whole.scores)


def test_batches_may_end_before_the_last_step(tmp_path) -> None:
    trainer = make_trainer(out=tmp_path, schedule=Schedule(log_every=4))
    endless = trainer._batches_from
    trainer._batches_from = lambda step: (batch for batch, _ in zip(endless(step), range(6)))
    trainer.fit(100)
    assert trainer.step == 6 and [path.name for path in trainer.folder.checkpoints()] == ["step_6"]
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_a_batch_closes_everything_and_fit_goes_on(tmp_path) -> None:
    trainer = make_trainer(out=tmp_path, load_ahead=True, schedule=Schedule(log_every=1))
    good = trainer._batches_from

    def broken(step: int) -> Iterator[Batch]:
        for index, batch in enumerate(good(step)):
            if index == 3:
                raise OSError("the disk is gone")
            yield batch

    trainer._batches_from = broken
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(STEPS)
    assert trainer.step == 3 and "DataLoadingThread" not in {thread.name for thread in threading.enumerate()}
    assert not trainer.model.module.model.sparse_arch.embedding_bag_collection._forward_pre_hooks
    trainer._batches_from = good
    trainer.fit(STEPS)
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line] == plain_losses(STEPS)


def test_checkpoints_of_other_data_are_refused(tmp_path) -> None:
    make_trainer(out=tmp_path).fit(2)
    with pytest.raises(ValueError, match="a run on other data: its seed is '0', this run's is '1'"):
        make_trainer(out=tmp_path, data={"seed": "1"}).resume()
    with pytest.raises(CheckpointError):
        make_trainer(out=tmp_path).resume(step=1)


def test_the_bar_shows_what_is_logged(capsys) -> None:
    trainer = make_trainer(progress=True, steps_per_epoch=6, schedule=Schedule(evaluate_every=6, log_every=3))
    scores = trainer.fit(STEPS)
    shown = capsys.readouterr().err + capsys.readouterr().out
    assert "samples/s" in shown and "auc" in shown and "ne" in shown and "epoch 2" in shown
    assert f"{STEPS}/{STEPS}" in shown and scores == make_trainer().fit(STEPS)


def test_tensorboard_is_asked_for_in_words(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="give the trainer a folder"):
        make_trainer(tensorboard=True)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            make_trainer(tensorboard=True, out=tmp_path)
    else:
        make_trainer(tensorboard=True, out=tmp_path, schedule=Schedule(log_every=2)).fit(4)
        assert list((tmp_path / "tensorboard").glob("events*"))


def test_curves_get_every_number(tmp_path, monkeypatch) -> None:
    drawn: list[tuple[str, int]] = []

    class Writer:
        def add_scalar(self, name: str, number: float, step: int) -> None:
            assert isinstance(number, float)
            drawn.append((name, step))

        def close(self) -> None:
            drawn.append(("closed", 0))

    monkeypatch.setattr("recsys_edu.training.trainer.check_tensorboard", lambda: None)
    monkeypatch.setattr("recsys_edu.training.trainer.make_writer", lambda folder, first_step: Writer())
    make_trainer(tensorboard=True, out=tmp_path, schedule=Schedule(log_every=2)).fit(4)
    train = [("train/samples per s", "train/loss", "train/auc", "train/ne"), ("test/auc", "test/ne")]
    expected = [(name, step) for step in (2, 4) for name in train[0]] + [(name, 4) for name in train[1]]
    assert drawn == [*expected, ("closed", 0)]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="'warp': expected one of sparse-dist, prefetch, base"):
        make_trainer(pipeline="warp")
    with pytest.raises(ValueError, match="give the trainer a folder"):
        make_trainer(schedule=Schedule(patience=2))


@pytest.mark.parametrize(
    "name, value", [("log_every", 0), ("keep", 0), ("patience", 0), ("evaluate_every", -1), ("checkpoint_every", -5)]
)
def test_a_schedule_that_cannot_be_kept_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected [01] or more"):
        Schedule(**{name: value})


def test_scores_of_nothing_learnt() -> None:
    scores = click_scores([(torch.zeros(10), torch.arange(10) % 2)])
    assert scores == {"auc": 0.5, "ne": pytest.approx(1.0)}
