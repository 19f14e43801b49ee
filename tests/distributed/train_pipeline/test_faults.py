"""Failing loaders, bad batches, unequal numbers of batches, errors in the model: who learns what, and what stays."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pipeline_cases import (
    CPU,
    FEATURES,
    ROWS,
    assert_all_equal,
    assert_same,
    failing,
    keep_losses,
    make_batches,
    make_kjt,
    make_model,
    plain_loop,
    run_to_end,
    steps_and_errors,
    weights_of,
)

from recsys_edu.distributed.train_pipeline import (
    DataLoadingThread,
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


def with_bad_id(batches: list[Any], at: int) -> list[Any]:
    good = batches[at].sparse_features
    values = good.values().clone()
    values[0] = ROWS
    batches[at].sparse_features = KeyedJaggedTensor(FEATURES, values, lengths=good.lengths(), stride=good.stride())
    return batches


def one_rank_fails(rank: int, world_size: int, group, fault: str, at: int, threaded: bool) -> list[str]:
    batches = make_batches(rank, 5, last=4)
    unlucky = rank == 1
    iterator = iter(batches)
    if unlucky and fault == "loader":
        iterator = failing(batches, at)
    if unlucky and fault == "id":
        iterator = iter(with_bad_id(batches, at))
    if unlucky and fault == "keys":
        batches[at].sparse_features = make_kjt(FEATURES[1:], 4, torch.Generator())
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses))
    if threaded:
        with DataLoadingThread(CPU, iterator, to_device_non_blocking=True) as loader:
            found = steps_and_errors(pipeline, loader)
        assert not loader.is_alive()
    else:
        found = steps_and_errors(pipeline, iterator)
    # the batches that trained, trained as if the other had never been
    plain, optimizer = make_model("dlrm", world_size)
    kept = [batch for index, batch in enumerate(make_batches(rank, 5, last=4)) if index != at]
    assert_all_equal(losses, plain_loop(plain, optimizer, kept[: len(losses)]))
    assert_same(weights_of(model), weights_of(plain))
    return found


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_loader_that_fails_on_one_rank_stops_that_batch_on_all(ranks, at: int) -> None:
    found = ranks.run(one_rank_fails, 2, "loader", at, False)
    for outcomes in found:
        assert [outcome == "step" for outcome in outcomes] == [index != at for index in range(5)]
        assert "rank 1: OSError: the disk is gone" in outcomes[at]
    assert found[1][at].startswith("OSError")
    assert found[0][at].startswith("RuntimeError: no rank trained on batch")


def test_bad_ids_stop_their_batch_on_all_ranks(ranks) -> None:
    for outcomes in ranks.run(one_rank_fails, 2, "id", 2, False):
        assert [outcome == "step" for outcome in outcomes] == [True, True, False, True, True]
        assert outcomes[2].startswith(f"IndexError: rank 1: feature 'f0' has id {ROWS}")


def test_a_batch_that_one_rank_cannot_route_stops_on_all_ranks(ranks) -> None:
    for outcomes in ranks.run(one_rank_fails, 2, "keys", 2, False):
        assert [outcome == "step" for outcome in outcomes] == [True, True, False, True, True]
        assert "rank 1: " in outcomes[2] and "f0" in outcomes[2]


def test_an_error_in_the_loader_thread_is_raised_with_cause_and_rank(ranks) -> None:
    # the thread ends with the error, so rank 1 has no more batches, which rank 0 is told for each that it still has
    found = ranks.run(one_rank_fails, 2, "loader", 2, True)
    for outcomes in found:
        assert outcomes[:2] == ["step", "step"] and "rank 1: OSError: the disk is gone" in outcomes[2]
        assert all("ranks [1] have no batch" in outcome for outcome in outcomes[3:])
        assert len(outcomes) == 5


def unequal_numbers(rank: int, world_size: int, group, counts: list[int]) -> list[str]:
    model, optimizer = make_model("dlrm", world_size)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    return steps_and_errors(pipeline, iter(make_batches(rank, counts[rank], last=4)))


@pytest.mark.parametrize("counts", [[3, 2], [1, 3], [0, 1]])
def test_unequal_numbers_of_batches_are_said_and_do_not_hang(ranks, counts: list[int]) -> None:
    common = min(counts)
    short = counts.index(common)
    for outcomes in ranks.run(unequal_numbers, 2, counts):
        assert outcomes[:common] == ["step"] * common
        assert f"ranks [{short}] have no batch" in outcomes[common] and "same number of batches" in outcomes[common]


def model_fails(rank: int, world_size: int, group) -> None:
    """An error inside the model closes the pipeline on many ranks; reset opens it, batches ahead are dropped."""
    model, optimizer = make_model("dlrm", world_size)
    calls = []

    def forward(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise ArithmeticError("out of range")
        return model(batch)

    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=forward)
    batches = iter(make_batches(rank, 8))
    pipeline.progress(batches), pipeline.progress(batches)
    with pytest.raises(ArithmeticError):
        pipeline.progress(batches)
    if world_size > 1:
        with pytest.raises(RuntimeError, match=r"closed by an error: ArithmeticError.*reset\(\) on every rank"):
            pipeline.progress(batches)
        pipeline.reset()
        assert run_to_end(pipeline, batches) == 3  # 0, 1 trained, 2 failed, 3 and 4 were in the pipeline
    else:
        assert run_to_end(pipeline, batches) == 5  # alone, only the batch that failed is lost


def test_an_error_in_the_model_closes_the_pipeline_until_reset(ranks) -> None:
    ranks.run(model_fails, 2)


def test_one_process_goes_on_after_an_error_in_the_model() -> None:
    model_fails(0, 1, None)


def test_interrupt_while_loading_loses_nothing() -> None:
    model, optimizer = make_model("dlrm", 1)
    batches = make_batches(0, 5)
    losses: list = []
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses))

    class Interrupted:
        position, raised = 0, False

        def __iter__(self):
            return self

        def __next__(self):
            if self.position == 3 and not self.raised:
                self.raised = True
                raise KeyboardInterrupt
            if self.position == len(batches):
                raise StopIteration
            self.position += 1
            return batches[self.position - 1]

    iterator = Interrupted()
    pipeline.progress(iterator)
    with pytest.raises(KeyboardInterrupt):
        pipeline.progress(iterator)
    assert run_to_end(pipeline, iterator) == 4
    plain, optimizer = make_model("dlrm", 1)
    assert_all_equal(losses, plain_loop(plain, optimizer, batches))
    assert_same(weights_of(model), weights_of(plain))


def interrupted(rank: int, world_size: int, group, where: str) -> dict[str, torch.Tensor]:
    """Ctrl-C on all ranks, as a notebook's interrupt is: while loading, or in the middle of a step."""
    model, optimizer = make_model("dlrm", world_size)
    calls = []

    def forward(batch: Any) -> Any:
        calls.append(batch)
        if where == "model" and len(calls) == 3:
            raise KeyboardInterrupt
        return model(batch)

    def load() -> Iterator[Any]:
        for index, batch in enumerate(make_batches(rank, 8)):
            if where == "loader" and index == 4:
                raise KeyboardInterrupt
            yield batch

    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=forward)
    loader = DataLoadingThread(CPU, load(), to_device_non_blocking=True)
    with loader, pytest.raises(KeyboardInterrupt):
        run_to_end(pipeline, loader)
    assert not loader.is_alive()
    with pytest.raises(RuntimeError, match="closed by an error: KeyboardInterrupt"):
        pipeline.progress(iter([]))
    pipeline.reset()
    assert run_to_end(pipeline, iter(make_batches(rank, 3))) == 3
    return weights_of(model)


@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_interrupt_leaves_no_thread_and_reset_opens_the_pipeline(ranks, where: str) -> None:
    first, second = ranks.run(interrupted, 2, where)
    copied = [name for name in first if "over_arch" in name]
    assert copied and all(torch.equal(first[name], second[name]) for name in copied)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send itself SIGINT")
def test_ctrl_c_in_the_midst_of_progress_leaves_no_thread_and_a_pipeline_that_goes_on() -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    before = set(threading.enumerate())
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    endless = itertools.cycle(make_batches(0, 3))
    with pytest.raises(KeyboardInterrupt), DataLoadingThread(CPU, endless, to_device_non_blocking=True) as loader:
        interrupt.start()
        while True:
            pipeline.progress(loader)
    interrupt.join()
    assert set(threading.enumerate()) == before
    drawn_ahead = run_to_end(pipeline, iter([]))
    assert drawn_ahead <= 3 and run_to_end(pipeline, iter(make_batches(0, 4))) == 4


@pytest.mark.parametrize("kind", [TrainPipelineBase, TrainPipelineSparseDist, EvalPipelineSparseDist])
def test_alone_a_failing_loader_costs_one_batch(kind) -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = kind(model, optimizer, CPU)
    outcomes = steps_and_errors(pipeline, failing(make_batches(0, 4), 1))
    assert [outcome == "step" for outcome in outcomes] == [True, False, True, True]
    assert outcomes[1].startswith("OSError: the disk is gone")


def test_loader_thread_stops_while_its_buffer_is_full() -> None:
    loader = DataLoadingThread(CPU, iter(make_batches(0, 9)), to_device_non_blocking=True)
    loader.start()
    assert loader.get_next_batch() is not None
    loader.stop()
    assert not loader.is_alive()


def test_loader_thread_end_and_errors() -> None:
    with DataLoadingThread(CPU, iter([torch.ones(1)]), to_device_non_blocking=True) as loader:
        assert loader.get_next_batch().tolist() == [1.0]
        assert loader.get_next_batch() is None and loader.get_next_batch() is None
        with pytest.raises(StopIteration):
            loader.get_next_batch(none_throws=True)
    with DataLoadingThread(CPU, failing([1, 2], 1), to_device_non_blocking=True) as loader:
        assert loader.get_next_batch() == 1
        with pytest.raises(OSError, match="the disk is gone"):
            loader.get_next_batch()
        assert loader.get_next_batch() is None
    with pytest.raises(RuntimeError, match=r"call start\(\)"):
        DataLoadingThread(CPU, iter([1]), to_device_non_blocking=True).get_next_batch()
