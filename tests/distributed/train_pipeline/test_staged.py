"""Stages of the user's own, and moving batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pipeline_cases import make_batches

from recsys_edu.distributed.train_pipeline import PipelineStage, StagedTrainPipeline, TrainPipeline, get_h2d_func


def stages(log: list[Any], count: int = 3) -> list[PipelineStage]:
    def run(number: int) -> Any:
        def runnable(batch: int) -> int:
            log.append((number, batch))
            if batch == 99 and number == 1:
                raise ArithmeticError("99")
            return batch

        return runnable

    return [
        PipelineStage(
            f"stage {k}",
            run(k),
            None,
            fill_callback=lambda k=k: log.append(f"filled {k}"),
            data_exhausted_callback=lambda k=k: log.append(f"exhausted {k}"),
        )
        for k in range(count)
    ]


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_every_batch_goes_through_every_stage_once(num_batches: int, num_stages: int) -> None:
    log: list[Any] = []
    pipeline = StagedTrainPipeline(stages(log, num_stages))
    batches = iter(range(10, 10 + num_batches))
    outputs = [pipeline.progress(batches) for _ in range(num_batches + 2)]
    assert outputs == [*range(10, 10 + num_batches), None, None]
    runs = [entry for entry in log if isinstance(entry, tuple)]
    assert sorted(runs) == [(stage, batch) for stage in range(num_stages) for batch in range(10, 10 + num_batches)]
    assert isinstance(pipeline, TrainPipeline) and pipeline.num_stages == num_stages
    again = iter([5])
    assert [pipeline.progress(again), pipeline.progress(again)] == [5, None]


def test_stages_run_ahead() -> None:
    log: list[Any] = []
    pipeline = StagedTrainPipeline(stages(log))
    batches = iter(range(10))
    assert pipeline.progress(batches) == 0
    assert {(2, 1), (1, 2), (0, 3)} <= set(log) and (0, 4) not in log
    assert {"filled 0", "filled 1", "filled 2"} <= set(log)
    log.clear()
    assert pipeline.progress(batches) == 1
    assert log == [(2, 2), (1, 3), (0, 4)]


def test_an_error_costs_its_batch_and_comes_when_that_is_due() -> None:
    pipeline = StagedTrainPipeline(stages([]))
    batches = iter([1, 99, 2])
    assert pipeline.progress(batches) == 1
    with pytest.raises(ArithmeticError) as caught:
        pipeline.progress(batches)
    assert caught.value.__notes__ == ["in stage 1, 'stage 1', of a StagedTrainPipeline"]
    assert [pipeline.progress(batches), pipeline.progress(batches)] == [2, None]


def test_a_flush_finishes_what_is_inside_and_then_draws_again() -> None:
    log: list[Any] = []
    pipeline = StagedTrainPipeline(stages([]), on_flush_end=lambda: log.append("end"))
    batches = iter(range(8))
    assert pipeline.progress(batches) == 0
    pipeline.set_flush(True)
    assert [pipeline.progress(batches) for _ in range(3)] == [1, 2, 3] and log == []
    assert pipeline.progress(batches) == 4 and log == ["end"]
    assert [pipeline.progress(batches) for _ in range(4)] == [5, 6, 7, None]


def test_stages_are_needed() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        StagedTrainPipeline([])


class Pair(NamedTuple):
    left: Any
    right: Any


def test_everything_in_a_batch_is_moved() -> None:
    """To the meta device, which every machine has."""
    meta = torch.device("meta")
    batch = {"pair": Pair(torch.ones(2), [make_batches(0, 1)[0]]), "name": "x"}
    moved = get_h2d_func(batch, meta)
    assert moved["name"] == "x" and isinstance(moved["pair"], Pair)
    inner = moved["pair"].right[0]
    for tensor in (moved["pair"].left, inner.dense_features, inner.labels, inner.sparse_features.values()):
        assert tensor.device == meta
