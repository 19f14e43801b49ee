"""What other files show on one process, on real ranks: ends, iterators, accumulation, resharding, copies, faults."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pipeline_cases import (
    CPU,
    NUM_TABLES,
    EveryOther,
    TwoKjts,
    assert_all_equal,
    assert_same,
    bags,
    failing,
    keep_losses,
    make_batches,
    make_kjt,
    make_model,
    plain_loop,
    run_to_end,
    steps_and_errors,
    two_kjt_batches,
    weights_of,
)
from torch import nn

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.collection_2d import DMPCollection
from recsys_edu.distributed.train_pipeline import (
    DataLoadingThread,
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

AHEAD = [TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist]
ALL = [TrainPipelineBase, *AHEAD]
PATH = "model.sparse_arch.embedding_bag_collection"
pytestmark = pytest.mark.ranks


def accumulate(rank: int, world_size: int, group, kind: type) -> None:
    plain, optimizer = make_model("dlrm", world_size)
    expected = plain_loop(plain, EveryOther(optimizer), make_batches(rank, 6))
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    pipeline = kind(model, EveryOther(optimizer), CPU, custom_model_fwd=keep_losses(model, losses))
    assert run_to_end(pipeline, iter(make_batches(rank, 6))) == 6
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("kind", ALL)
def test_gradient_accumulation(ranks, kind: type) -> None:
    ranks.run(accumulate, 2, kind)


def several_iterators(rank: int, world_size: int, group, kind: type) -> None:
    """An iterator is left in the middle; the next one follows what was drawn from it, and so on to an empty one."""
    parts = [make_batches(rank, count) for count in (4, 1, 3)]
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    pipeline = kind(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses))
    first = iter(parts[0])
    pipeline.progress(first), pipeline.progress(first)
    left = len(list(first))  # never drawn
    for part in (iter(parts[1]), iter([]), iter(parts[2])):
        run_to_end(pipeline, part)
    plain, optimizer = make_model("dlrm", world_size)
    expected = plain_loop(plain, optimizer, [*parts[0][: 4 - left], *parts[1], *parts[2]])
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("kind", ALL)
def test_changing_the_iterator(ranks, kind: type) -> None:
    ranks.run(several_iterators, 2, kind)


def dropped_at_the_end(rank: int, world_size: int, group, kind: type, dropped: int) -> None:
    model, optimizer = make_model("dlrm", world_size)
    losses: list = []
    pipeline = kind(model, optimizer, CPU, execute_all_batches=False, custom_model_fwd=keep_losses(model, losses))
    batches = make_batches(rank, 6)
    assert run_to_end(pipeline, iter(batches)) == 6 - dropped
    assert run_to_end(pipeline, iter(batches)) == 6 - dropped
    plain, optimizer = make_model("dlrm", world_size)
    assert_all_equal(losses, plain_loop(plain, optimizer, 2 * batches[: 6 - dropped]))
    assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("kind, dropped", [(TrainPipelineSparseDist, 2), (PrefetchTrainPipelineSparseDist, 3)])
def test_execute_all_batches_false(ranks, kind: type, dropped: int) -> None:
    ranks.run(dropped_at_the_end, 2, kind, dropped)


def reshard_on_the_way(rank: int, world_size: int, group, kind: type, piped: bool) -> list[torch.Tensor]:
    """Other plans after the third batch; batches that were drawn ahead stay."""
    model, optimizer = make_model("dlrm", world_size)
    collection = bags()
    makers = {f"t{i}": plans.row_wise() if i % 2 else plans.table_wise(rank=0) for i in range(NUM_TABLES - 1)}
    makers[f"t{NUM_TABLES - 1}"] = plans.data_parallel()
    plan = plans.construct_module_sharding_plan(collection, makers, local_size=world_size, world_size=world_size)
    losses: list = []
    batches = make_batches(rank, 7)
    if not piped:
        losses += plain_loop(model, optimizer, batches[:3])
        model.reshard({PATH: (0.0, plan)})
        return [*losses, *plain_loop(model, optimizer, batches[3:])]
    pipeline, source = kind(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses)), iter(batches)
    for _ in range(3):
        pipeline.progress(source)
    pipeline.detach()
    model.reshard({PATH: (0.0, plan)})
    pipeline.attach()
    assert run_to_end(pipeline, source) == 4
    return losses


@pytest.mark.parametrize("kind", AHEAD)
def test_attaching_to_other_modules_after_resharding(ranks, kind: type) -> None:
    expected, actual = (ranks.run(reshard_on_the_way, 2, kind, piped) for piped in (False, True))
    for mine, theirs in zip(actual, expected):
        assert_all_equal(mine, theirs)


# ---------------------------------------------------------------- what is pipelined, and what is not


class OneOfTwo(nn.Module):
    """Processes what its second collection gets; the first one gets a part of the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: TwoKjts) -> Any:
        kjt = batch.more["ids"][0]
        shifted = KeyedJaggedTensor(kjt.keys(), (kjt.values() + 1) % 20, lengths=kjt.lengths(), stride=kjt.stride())
        return self.inner(TwoKjts(batch.inner, {"ids": (shifted, batch.more["ids"][1])}))


def partly_pipelined(rank: int, world_size: int, group, kind: type) -> tuple[list[str], list[str]]:
    plain, optimizer = make_model("two", world_size)
    expected = plain_loop(OneOfTwo(plain), optimizer, two_kjt_batches(rank, 5))
    model, optimizer = make_model("two", world_size)
    losses: list = []
    wrapped = OneOfTwo(model)
    pipeline = kind(wrapped, optimizer, CPU, custom_model_fwd=keep_losses(wrapped, losses))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_to_end(pipeline, iter(two_kjt_batches(rank, 5))) == 5
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))
    ahead = [name for name, _, _ in pipeline._flights.routes]
    return [str(each.message) for each in caught if "pipelined" in str(each.message)], ahead


@pytest.mark.parametrize("kind", AHEAD)
def test_processing_before_one_module_leaves_the_other_calls_pipelined(ranks, kind: type) -> None:
    (said, ahead), (other, _) = ranks.run(partly_pipelined, 2, kind)
    assert len(said) == 1 and other == []
    assert "first' gets a KeyedJaggedTensor that is no part" in said[0] and "second' gets" in said[0]
    assert len(ahead) == 1 and ahead[0].endswith("first[0]")


# ---------------------------------------------------------------- copies of the tables in groups of ranks


def copies(rank: int, world_size: int, group) -> Any:
    """DLRM whose tables are cut over pairs of ranks, with a copy in each pair."""
    torch.manual_seed(0)
    model = DLRMTrain(DLRM(bags(), 3, [16, 8], [16, 1]))
    collection = model.get_submodule(PATH)
    makers = {f"t{i}": plans.row_wise() if i % 2 else plans.table_wise(rank=i % 4 // 2) for i in range(NUM_TABLES)}
    plan = plans.construct_module_sharding_plan(collection, makers, local_size=2, world_size=2, device_type="cpu")
    parallel = DMPCollection(model, CPU, ShardingPlan({PATH: plan}), world_size, 2, group)
    return parallel, torch.optim.SGD([p for _, p in parallel.bare_named_parameters()], lr=0.1)


def train_copies(rank: int, world_size: int, group, every: int | None) -> None:
    plain, optimizer = copies(rank, world_size, group)
    expected = []
    for index, batch in enumerate(make_batches(rank, 5)):
        expected += plain_loop(plain, optimizer, [batch])
        if every is not None and (index + 1) % every == 0:
            plain.sync()
    model, optimizer = copies(rank, world_size, group)
    losses: list = []
    pipeline = TrainPipelineSparseDist(
        model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses), dmp_collection_sync_interval_batches=every
    )
    assert run_to_end(pipeline, iter(make_batches(rank, 5))) == 5
    assert_all_equal(losses, expected)
    assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("every", [1, 2, None])
def test_copies_are_synchronised_as_in_the_plain_loop(ranks, every: int | None) -> None:
    ranks.run(train_copies, 4, every)


def one_copy_fails(rank: int, world_size: int, group, kind: type) -> list[str]:
    model, optimizer = copies(rank, world_size, group)
    pipeline = kind(model, optimizer, CPU)
    return steps_and_errors(
        pipeline, failing(make_batches(rank, 5, last=4), 2) if rank == 3 else make_batches(rank, 5, last=4)
    )


@pytest.mark.parametrize("kind", AHEAD)
def test_a_loader_that_fails_in_one_group_stops_the_batch_in_all(ranks, kind: type) -> None:
    for found in ranks.run(one_copy_fails, 4, kind):
        assert [each == "step" for each in found] == [True, True, False, True, True]
        assert found[2].count("rank 3: OSError: the disk is gone") == 1


def copies_end(rank: int, world_size: int, group, kind: type, counts: list[int]) -> list[str]:
    model, optimizer = copies(rank, world_size, group)
    return steps_and_errors(kind(model, optimizer, CPU), make_batches(rank, counts[rank], last=4))


@pytest.mark.parametrize("kind", AHEAD)
@pytest.mark.parametrize("counts", [[3, 2, 3, 2], [3, 3, 3, 2]])
def test_a_group_or_a_rank_with_fewer_batches_is_named(ranks, kind: type, counts: list[int]) -> None:
    short = [rank for rank, count in enumerate(counts) if count == 2]
    for found in ranks.run(copies_end, 4, kind, counts):
        assert found[:2] == ["step", "step"] and "have no batch" in found[2] and len(found) == 3
        assert f"ranks {short} have no batch" in found[2]


# ---------------------------------------------------------------- faults


def a_rank_fails(rank: int, world_size: int, group, kind: type, at: int) -> list[str]:
    model, optimizer = make_model("dlrm", world_size)
    batches = make_batches(rank, 6, last=4)
    return steps_and_errors(kind(model, optimizer, CPU), failing(batches, at) if rank == 1 else batches)


@pytest.mark.parametrize("kind", [PrefetchTrainPipelineSparseDist, EvalPipelineSparseDist])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failing_loader_stops_its_batch_on_all_ranks(ranks, kind: type, at: int) -> None:
    for found in ranks.run(a_rank_fails, 2, kind, at):
        assert [each == "step" for each in found] == [index != at for index in range(6)]
        assert "rank 1: OSError: the disk is gone" in found[at]


def unequal(rank: int, world_size: int, group, kind: type, counts: list[int]) -> list[str]:
    model, optimizer = make_model("dlrm", world_size)
    return steps_and_errors(kind(model, optimizer, CPU), make_batches(rank, counts[rank], last=4))


@pytest.mark.parametrize("kind", [PrefetchTrainPipelineSparseDist, EvalPipelineSparseDist])
@pytest.mark.parametrize("counts", [[3, 2], [1, 4], [0, 1]])
def test_unequal_numbers_of_batches(ranks, kind: type, counts: list[int]) -> None:
    common, short = min(counts), counts.index(min(counts))
    for found in ranks.run(unequal, 2, kind, counts):
        assert found[:common] == ["step"] * common and f"ranks [{short}] have no batch" in found[common]


def threaded(rank: int, world_size: int, group, kind: type) -> None:
    """A loader thread under every pipeline, and one that is stopped half-way."""
    plain, optimizer = make_model("dlrm", world_size)
    batches = make_batches(rank, 4)
    is_training = kind is not EvalPipelineSparseDist
    plain.train(is_training)
    expected = plain_loop(plain, optimizer, batches)
    model, optimizer = make_model("dlrm", world_size)
    model.train(is_training)
    pipeline, outputs = kind(model, optimizer, CPU), []
    with DataLoadingThread(CPU, iter(batches), to_device_non_blocking=True) as loader:
        outputs += [pipeline.progress(loader) for _ in range(2)]
    assert not loader.is_alive()
    drawn = 0
    while True:
        try:
            outputs.append(pipeline.progress(loader))  # what was drawn is computed, then it ends
            drawn += 1
        except StopIteration:
            break
    assert drawn <= 2
    assert_all_equal([loss for loss, _, _ in outputs], expected[: len(outputs)])


@pytest.mark.parametrize("kind", [*AHEAD, EvalPipelineSparseDist])
def test_a_loader_thread_that_is_stopped_ends_the_batches(ranks, kind: type) -> None:
    ranks.run(threaded, 2, kind)


def test_kjts_of_unequal_batch_sizes_on_the_ranks(ranks) -> None:
    ranks.run(unequal_sizes, 2)


def unequal_sizes(rank: int, world_size: int, group) -> None:
    """The last partial batch need not be as small on every rank."""

    def batches() -> list[Any]:
        found = make_batches(rank, 4, batch_size=4, last=1 + 2 * rank)
        found[1].sparse_features = make_kjt(found[1].sparse_features.keys(), 4, torch.Generator(), longest=0)  # no ids
        return found

    plain, optimizer = make_model("dlrm", world_size)
    expected = plain_loop(plain, optimizer, batches())
    for kind in ALL:
        model, optimizer = make_model("dlrm", world_size)
        losses: list = []
        assert (
            run_to_end(kind(model, optimizer, CPU, custom_model_fwd=keep_losses(model, losses)), iter(batches())) == 4
        )
        assert_all_equal(losses, expected)
        assert_same(weights_of(model), weights_of(plain))


def nothing_pipelined_fails(rank: int, world_size: int, group) -> list[str]:
    """A model that processes all ids itself, and a loader that fails: other ranks learn it all the same."""
    model, optimizer = make_model("dlrm", world_size)

    def forward(batch: Any) -> Any:
        kjt = batch.sparse_features
        copy = KeyedJaggedTensor(kjt.keys(), kjt.values().clone(), lengths=kjt.lengths(), stride=kjt.stride())
        return model(type(batch)(batch.dense_features, copy, batch.labels))

    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, custom_model_fwd=forward)
    batches = make_batches(rank, 5, last=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return steps_and_errors(pipeline, failing(batches, 3) if rank == 1 else batches)


def test_a_failing_loader_is_told_where_nothing_is_pipelined(ranks) -> None:
    for found in ranks.run(nothing_pipelined_fails, 2):
        assert [each == "step" for each in found] == [True, True, True, False, True]
        assert "rank 1: OSError: the disk is gone" in found[3]


def bad_lengths(rank: int, world_size: int, group) -> list[str]:
    model, optimizer = make_model("dlrm", world_size)
    batches = make_batches(rank, 5, last=4)
    if rank == 1:
        good = batches[2].sparse_features
        lengths = good.lengths().clone()
        lengths[0] -= 9
        batches[2].sparse_features = KeyedJaggedTensor(good.keys(), good.values(), lengths=lengths, stride=4)
    return steps_and_errors(TrainPipelineSparseDist(model, optimizer, CPU), batches)


def test_bad_lengths_stop_their_batch_on_all_ranks(ranks) -> None:
    for found in ranks.run(bad_lengths, 2):
        assert [each == "step" for each in found] == [True, True, False, True, True], found
        assert "rank 1" in found[2]
