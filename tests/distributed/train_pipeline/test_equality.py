"""Pipelined equals unpipelined, to the bit, on real ranks."""

from __future__ import annotations

import pytest
from pipeline_cases import (
    CPU,
    assert_all_equal,
    assert_same,
    keep_losses,
    make_batches,
    make_model,
    plain_loop,
    run_to_end,
    two_kjt_batches,
    weights_of,
)

from recsys_edu.distributed.train_pipeline import (
    DataLoadingThread,
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

PIPELINES = {
    "base": TrainPipelineBase,
    "sparse_dist": TrainPipelineSparseDist,
    "prefetch": PrefetchTrainPipelineSparseDist,
}


def batches_for(name: str, rank: int, count: int) -> list:
    return two_kjt_batches(rank, count) if name == "two" else make_batches(rank, count)


def train_both_ways(rank: int, world_size: int, group, name: str, kinds: list[str], count: int, threaded: bool):
    """Every pipeline against the plain loop; number of flights that were handed over."""
    plain, optimizer = make_model(name, world_size)
    expected = plain_loop(plain, optimizer, batches_for(name, rank, count))
    for kind in kinds:
        model, optimizer = make_model(name, world_size)
        losses: list = []
        pipeline = PIPELINES[kind](model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses))
        batches = iter(batches_for(name, rank, count))
        if threaded:
            with DataLoadingThread(CPU, batches, to_device_non_blocking=True) as loader:
                assert run_to_end(pipeline, loader) == count
            assert not loader.is_alive()
        else:
            assert run_to_end(pipeline, batches) == count
        assert_all_equal(losses, expected)
        assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("name", ["dlrm", "sequence", "two"])
def test_losses_and_weights_are_the_plain_loops(ranks, name: str) -> None:
    ranks.run(train_both_ways, 2, name, list(PIPELINES), 5, False)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_iterators(ranks, count: int) -> None:
    ranks.run(train_both_ways, 2, "dlrm", list(PIPELINES), count, False)


def test_a_loader_thread_changes_nothing(ranks) -> None:
    ranks.run(train_both_ways, 2, "dlrm", ["base", "sparse_dist"], 4, True)


def test_one_process() -> None:
    train_both_ways(0, 1, None, "two", list(PIPELINES), 4, False)


def evaluate(rank: int, world_size: int, group) -> None:
    """Evaluation equals the plain forward, touches no weight, and takes turns with training."""
    model, optimizer = make_model("dlrm", world_size)
    plain, plain_optimizer = make_model("dlrm", world_size)
    before = weights_of(model)
    batches = make_batches(rank, 4)
    model.eval(), plain.eval()
    evaluation = EvalPipelineSparseDist(model, optimizer, CPU)
    iterator = iter(batches)
    outputs = [evaluation.progress(iterator) for _ in batches]
    with pytest.raises(StopIteration):
        evaluation.progress(iterator)
    assert not any(logits.requires_grad for _, logits, _ in outputs)
    assert_all_equal([loss for loss, _, _ in outputs], plain_loop(plain, plain_optimizer, batches))
    assert_same(weights_of(model), before)
    # one training pipeline, switched between modes in the middle of its batches
    losses: list = []
    training = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses))
    iterator, expected = iter(batches), []
    for index, batch in enumerate(batches):
        for each in (model, plain):
            each.train(index % 2 == 0)
        training.progress(iterator)
        expected += plain_loop(plain, plain_optimizer, [batch])
        if index == 1:
            second = iter(batches[:1])
            evaluation.progress(second)  # another pipeline on the same model, while this one has flights under way
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))


def test_evaluation_and_switching_modes(ranks) -> None:
    ranks.run(evaluate, 2)
