"""Each distinct id travels once: the same answers and the same training as without."""

from __future__ import annotations

import pytest
import torch
from engine_cases import TYPES, World, batches_of_step, collection, plan_of, sequence_tables

from recsys_edu.distributed.embedding import EmbeddingCollectionSharder
from recsys_edu.distributed.index_dedup import distinct_ids
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.distributed.types import ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@pytest.mark.parametrize("optimizer", ["dense", "sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("kind", TYPES)
def test_trains_as_the_unsharded_collection(kind: str, optimizer: str) -> None:
    tables = sequence_tables()
    world = World(collection(tables), lambda module: plan_of(module, kind, 4, 2), 4, optimizer, use_index_dedup=True)
    for step in range(3):
        world.step(batches_of_step(tables, 4, step))
    world.compare_weights()


def test_fewer_ids_and_rows_travel() -> None:
    table = EmbeddingConfig(num_embeddings=4, embedding_dim=8, name="t", feature_names=["f"])
    batch = KeyedJaggedTensor(["f"], torch.tensor([3] * 50 + [0] * 50), lengths=torch.tensor([60, 0, 40]))
    ids = {}
    for dedup in (False, True):
        module = EmbeddingCollection([table])
        ranks = simulate(module, plan_of(module, "row_wise", 2, 2), 2, use_index_dedup=dedup)
        for rank in ranks:
            rank.shards.exchange.log = []
        answers = forward_all(ranks, [batch, batch])
        for answer in answers:
            assert answer["f"].lengths().tolist() == [60, 0, 40]
            assert torch.equal(answer["f"].values(), module.embeddings["t"].weight[batch.values()])
        sent = {record.label: sum(record.bytes_W) for record in ranks[0].shards.exchange.log}
        ids[dedup] = sent["sequence embeddings"]
    # Rank 0 holds the rows of ids 0 and 1: 50 rows of each batch without, one with.
    assert ids[False] == 50 * ids[True] > 0


def test_indices_are_those_of_the_batch() -> None:
    module = EmbeddingCollection([EmbeddingConfig(5, 4, "t", feature_names=["f", "g"])], need_indices=True)
    batch = KeyedJaggedTensor(["g", "f"], torch.tensor([4, 4, 1, 1, 0]), lengths=torch.tensor([2, 1, 0, 2]))
    (answer,) = forward_all(simulate(module, plan_of(module, "row_wise", 1, 1), 1, use_index_dedup=True), [batch])
    assert answer["g"].weights().tolist() == [4, 4, 1]
    assert answer["f"].weights().tolist() == [1, 0]
    assert torch.equal(answer["f"].values(), module.embeddings["t"].weight[[1, 0]])


def test_bad_batches_are_refused_in_the_same_words() -> None:
    module = EmbeddingCollection([EmbeddingConfig(5, 4, "t", feature_names=["f"])])
    good = KeyedJaggedTensor(["f"], torch.tensor([1, 1]), lengths=torch.tensor([2]))
    for values, lengths, error in (([9, 9], [2], IndexError), ([1, 1], [3], ValueError)):
        bad, words = KeyedJaggedTensor(["f"], torch.tensor(values), lengths=torch.tensor(lengths)), []
        for dedup in (False, True):
            ranks = simulate(module, plan_of(module, "row_wise", 2, 2), 2, use_index_dedup=dedup)
            with pytest.raises(error) as raised:
                forward_all(ranks, [good, bad])
            words.append(str(raised.value))
        assert words[0] == words[1]


def test_nothing_to_repeat() -> None:
    empty = KeyedJaggedTensor(["f", "g"], torch.empty(0, dtype=torch.int64), lengths=torch.zeros(6, dtype=torch.int64))
    distinct, repeats = distinct_ids(empty)
    assert distinct.lengths().tolist() == [0, 0]
    assert [place.numel() for place in repeats.place_F] == [0, 0]


def test_the_sharder_hands_it_on() -> None:
    module = EmbeddingCollection([EmbeddingConfig(5, 4, "t", feature_names=["f"])])
    plan = plan_of(module, "row_wise", 1, 1)
    for dedup in (False, True):
        sharder = EmbeddingCollectionSharder(use_index_dedup=dedup)
        sharded = sharder.shard(module, plan, ShardingEnv.from_local(1, 0))
        batch = KeyedJaggedTensor(["f"], torch.tensor([1, 1, 1]), lengths=torch.tensor([3]))
        assert sharded.start_input(batch).kjt.values().numel() == (1 if dedup else 3)
