"""What progress promises: order, ends, losses, iterators, attaching, and what cannot be pipelined."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pipeline_cases import (
    CPU,
    FEATURES,
    EveryOther,
    assert_all_equal,
    assert_same,
    keep_losses,
    make_batches,
    make_kjt,
    make_model,
    plain_loop,
    run_to_end,
    two_kjt_batches,
    weights_of,
)
from torch import nn

from recsys_edu.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipeline,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from recsys_edu.distributed.train_pipeline.input_flights import at, find_kjts
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ALL = [TrainPipelineBase, TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist]


def numbered(count: int) -> list[Any]:
    """Batches whose labels' length tells them apart: batch i has i + 1 examples."""
    return [make_batches(0, 1, last=index + 1)[0] for index in range(count)]


def sizes(outputs: list[Any]) -> list[int]:
    return [len(labels) for _, _, labels in outputs]


def order_of_exchanges(rank: int, world_size: int, group, kind: type) -> list[str]:
    model, optimizer = make_model("dlrm", world_size)
    pipeline = kind(model, optimizer, CPU)
    batches = iter(make_batches(rank, 6))
    pipeline.progress(batches), pipeline.progress(batches)
    exchange = model.module.model.sparse_arch.embedding_bag_collection.shards.exchange
    exchange.log = []
    pipeline.progress(batches)
    return [record.label for record in exchange.log if "copies" not in record.label]


def test_ids_of_the_next_batch_travel_during_this_one(ranks) -> None:
    during = {kind: ranks.run(order_of_exchanges, 2, kind)[0] for kind in (TrainPipelineBase, TrainPipelineSparseDist)}
    lookup = ["pooled embeddings"]
    back = ["gradients of pooled"]
    without = [label for label in during[TrainPipelineBase] if "gradient" not in label]
    assert without[:3] == ["sizes", "lengths and ids", *lookup]
    ahead = during[TrainPipelineSparseDist]
    assert ahead[0] == "sizes" and ahead.index(lookup[0]) < ahead.index("lengths and ids")
    assert all(ahead.index("lengths and ids") < index for index, label in enumerate(ahead) if label.startswith(back[0]))
    assert sorted(ahead) == sorted(during[TrainPipelineBase])


@pytest.mark.parametrize("kind, dropped", [(TrainPipelineSparseDist, 2), (PrefetchTrainPipelineSparseDist, 3)])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_execute_all_batches_false_drops_what_is_in_the_pipeline(kind, dropped: int, count: int) -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = kind(model, optimizer, CPU, execute_all_batches=False)
    assert run_to_end(pipeline, iter(numbered(count))) == max(count - dropped, 0)


@pytest.mark.parametrize("kind", ALL)
def test_a_new_iterator_follows_what_is_left_of_the_old_one(kind) -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = kind(model, optimizer, CPU)
    first, second = iter(numbered(5)), iter(numbered(9)[5:])
    outputs = [pipeline.progress(first) for _ in range(2)]
    drawn = 5 - len(list(first))
    outputs += [pipeline.progress(second) for _ in range(drawn - 2 + 4)]
    assert sizes(outputs) == [*range(1, drawn + 1), 6, 7, 8, 9]
    for _ in range(2):
        with pytest.raises(StopIteration):
            pipeline.progress(second)
    third = iter(numbered(2))
    assert sizes([pipeline.progress(third) for _ in range(2)]) == [1, 2]


@pytest.mark.parametrize("kind", ALL)
def test_reset_drops_batches_drawn_ahead(kind) -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = kind(model, optimizer, CPU)
    pipeline.progress(iter(numbered(5)))
    pipeline.reset()
    assert sizes([pipeline.progress(iter(numbered(1)))]) == [1]


def test_detach_and_attach_keep_the_batches() -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    collection = model.module.model.sparse_arch.embedding_bag_collection
    batches = iter(numbered(6))
    outputs = [pipeline.progress(batches) for _ in range(2)]
    assert len(collection._forward_pre_hooks) == 1
    assert pipeline.detach() is model
    assert len(collection._forward_pre_hooks) == 0
    model(numbered(1)[0])
    pipeline.attach()
    outputs.append(pipeline.progress(batches))
    pipeline.detach()
    outputs.append(pipeline.progress(batches))  # attaches by itself
    other, _ = make_model("dlrm", 1)
    pipeline.attach(other)
    outputs += [pipeline.progress(batches) for _ in range(2)]
    assert sizes(outputs) == [1, 2, 3, 4, 5, 6]
    assert len(collection._forward_pre_hooks) == 0


@pytest.mark.parametrize("kind", ALL)
def test_losses_that_are_none_or_many(kind) -> None:
    """None trains nothing in that step; several numbers are summed."""
    batches = make_batches(0, 4)
    model, optimizer = make_model("dlrm", 1)
    steps = []

    def forward(batch: Any) -> Any:
        loss, output = model(batch)
        steps.append(loss)
        return [None, [loss, loss], torch.stack([loss, loss]), loss][len(steps) - 1], output

    pipeline = kind(model, optimizer, CPU, custom_model_fwd=forward)
    start = weights_of(model)
    iterator = iter(batches)
    pipeline.progress(iterator)
    assert_same(weights_of(model), start)
    assert run_to_end(pipeline, iterator) == 3
    plain, plain_optimizer = make_model("dlrm", 1)
    for batch, factor in zip(batches[1:], (2, 2, 1)):
        plain_optimizer.zero_grad()
        (factor * plain(batch)[0]).backward()
        plain_optimizer.step()
    actual, expected = weights_of(model), weights_of(plain)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_gradient_accumulation_by_the_optimizer() -> None:
    """Two batches per step, through an object in the optimizer's place."""

    results = []
    for kind in (None, *ALL):
        model, optimizer = make_model("dlrm", 1)
        accumulating = EveryOther(optimizer)
        if kind is None:
            plain_loop(model, accumulating, make_batches(0, 6))
        else:
            run_to_end(kind(model, accumulating, CPU), iter(make_batches(0, 6)))
        results.append(weights_of(model))
    for result in results[1:]:
        assert_same(result, results[0])


def test_tables_without_an_optimizer_in_backward() -> None:
    results = []
    for kind in (None, *ALL):
        model, optimizer = make_model("dlrm", 1, fused=False)
        if kind is None:
            plain_loop(model, optimizer, make_batches(0, 4))
        else:
            run_to_end(kind(model, optimizer, CPU), iter(make_batches(0, 4)))
        results.append(weights_of(model))
    for result in results[1:]:
        assert_same(result, results[0])


def test_drawing_after_forward_gives_the_same() -> None:
    model, optimizer = make_model("dlrm", 1)
    losses: list = []
    pipeline = TrainPipelineSparseDist(
        model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses), enqueue_batch_after_forward=True
    )
    assert run_to_end(pipeline, iter(make_batches(0, 4))) == 4
    assert_all_equal(losses, plain_loop(*make_model("dlrm", 1), make_batches(0, 4)))


def test_a_model_that_returns_no_pair() -> None:
    model, optimizer = make_model("dlrm", 1)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=lambda batch: model(batch)[1][1])
    with pytest.raises(TypeError, match=r"returns \(loss, output\), not Tensor"):
        pipeline.progress(iter(numbered(1)))
    model.eval()
    assert pipeline.progress(iter(numbered(1))).shape == (1,)


def test_the_pipelines_are_train_pipelines() -> None:
    assert all(issubclass(kind, TrainPipeline) for kind in ALL)
    model, optimizer = make_model("dlrm", 1)
    with pytest.raises(NotImplementedError, match="apply_jit"):
        TrainPipelineSparseDist(model, optimizer, CPU, apply_jit=True)


# ---------------------------------------------------------------- what feeds what


def test_a_batch_is_searched_for_its_kjts() -> None:
    batch = two_kjt_batches(0, 1)[0]
    places = find_kjts(batch)
    assert places[id(batch.inner.ids)] == (("attribute", "inner"), ("attribute", "ids"))
    assert places[id(batch.more["ids"][0])] == (("attribute", "more"), ("item", "ids"), ("item", 0))
    assert len(places) == 2
    for kjt in (batch.inner.ids, batch.more["ids"][0]):
        assert at(batch, places[id(kjt)]) is kjt
    assert at(batch, (("attribute", "absent"), ("item", 3))) is None
    assert find_kjts(batch.inner.ids) == {id(batch.inner.ids): ()}


def test_a_batch_that_holds_itself_is_searched_once() -> None:
    kjt = make_kjt(FEATURES, 2, torch.Generator())
    batch: dict[str, Any] = {"x": kjt}
    batch["self"] = batch
    assert find_kjts(batch) == {id(kjt): (("item", "x"),)}


class MadeInside(nn.Module):
    """Its second call gets a KeyedJaggedTensor that it makes itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Any:
        kjt = batch.sparse_features
        reversed_ids = KeyedJaggedTensor(kjt.keys(), 19 - kjt.values(), lengths=kjt.lengths(), stride=kjt.stride())
        batch = type(batch)(batch.dense_features, reversed_ids, batch.labels)
        return self.inner(batch)


def made_inside(rank: int, world_size: int, group, kind: type) -> list[str]:
    plain, optimizer = make_model("dlrm", world_size)
    expected = plain_loop(MadeInside(plain), optimizer, make_batches(rank, 4))
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    inside = MadeInside(model)
    pipeline = kind(inside, optimizer, CPU, custom_model_fwd=keep_losses(inside, losses))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_to_end(pipeline, iter(make_batches(rank, 4))) == 4
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))
    return [str(warning.message) for warning in caught if "pipelined" in str(warning.message)]


def test_what_cannot_be_pipelined_is_said_once_and_right(ranks) -> None:
    said = ranks.run(made_inside, 2, TrainPipelineSparseDist)
    assert len(said[0]) == 1 and said[1] == []
    assert "embedding_bag_collection' gets a KeyedJaggedTensor that is no part of the batch" in said[0][0]


@dataclass
class Sometimes:
    """A batch in which one KeyedJaggedTensor may be missing."""

    always: KeyedJaggedTensor
    sometimes: KeyedJaggedTensor | None

    def to(self, device: torch.device, non_blocking: bool = False) -> Sometimes:
        return self


class SometimesModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Sometimes) -> Any:
        ids = batch.always if batch.sometimes is None else batch.sometimes
        return self.inner(type(make_batches(0, 1)[0])(torch.ones(ids.stride(), 3), ids, torch.ones(ids.stride())))


def sometimes_missing(rank: int, world_size: int, group) -> None:
    """Batches without the part that the first one had: no flight for them, and the same losses."""
    generator = torch.Generator().manual_seed(rank)
    kjts = [make_kjt(FEATURES, 2, generator) for _ in range(10)]
    batches = [Sometimes(kjts[2 * i], kjts[2 * i + 1] if i in (0, 1, 3) else None) for i in range(5)]
    plain, optimizer = make_model("dlrm", world_size)
    expected = plain_loop(SometimesModel(plain), optimizer, batches)
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    wrapped = SometimesModel(model)
    pipeline = TrainPipelineSparseDist(wrapped, optimizer, CPU, custom_model_fwd=keep_losses(wrapped, losses))
    assert run_to_end(pipeline, iter(batches)) == 5
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))


def test_batches_that_lack_a_part_run_unpipelined(ranks) -> None:
    ranks.run(sometimes_missing, 2)


def test_no_warning_where_all_is_pipelined() -> None:
    model, optimizer = make_model("two", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_to_end(TrainPipelineSparseDist(model, optimizer, CPU), iter(two_kjt_batches(0, 2))) == 2
