"""TrainPipelinePT2: compiles once, at its step, and trains what the plain loop trains."""

from __future__ import annotations

import logging

import pytest
import torch
from pipeline_cases import CPU, dlrm, make_batches, make_model, plain_loop

from recsys_edu.distributed.train_pipeline import TorchCompileConfig, TrainPipelinePT2

EAGER = TorchCompileConfig(backend="eager", compile_on_iter=2)  # dynamo without inductor, which needs a C++ compiler


@pytest.fixture(autouse=True)
def fresh_dynamo():
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(sharded: bool):
    if sharded:
        return make_model("dlrm", 1)
    torch.manual_seed(0)
    model = dlrm()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("sharded", [False, True])
def test_compiled_steps_learn_the_same(sharded: bool) -> None:
    batches, seen = make_batches(0, 5, last=None), []
    model, optimizer = make(sharded)
    pipeline = TrainPipelinePT2(
        model, optimizer, CPU, EAGER, lambda m: seen.append(("before", m)), lambda m: seen.append(("after", m))
    )
    source, losses = iter(batches), []
    for step in range(len(batches)):
        losses.append(pipeline.progress(source)[0])
        assert len(seen) == (2 if step >= 2 else 0)
    assert seen == [("before", model), ("after", model)] and model._compiled_call_impl is not None
    with pytest.raises(StopIteration):
        pipeline.progress(source)
    plain = plain_loop(*make(sharded), batches)
    torch.testing.assert_close(torch.stack(losses), torch.stack(plain))


def test_batches_can_be_changed_on_the_way() -> None:
    model, optimizer = make(False)
    seen = []

    def note(batch):
        seen.append(batch)
        return batch

    never = TorchCompileConfig(compile_on_iter=99)
    pipeline = TrainPipelinePT2(model, optimizer, CPU, never, input_transformer=note)
    source = iter(make_batches(0, 2))
    pipeline.progress(source), pipeline.progress(source)
    assert len(seen) == 2 and model._compiled_call_impl is None
