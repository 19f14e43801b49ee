"""Managed collision against a dictionary and a sort, on random streams of ids."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from recsys_edu.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
    average_threshold_filter,
    probabilistic_threshold_filter,
)
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

CPU = torch.device("cpu")
ROWS = 4  # three ids own one, the last is shared
SCORES = {
    LFU_EvictionPolicy: lambda now, count, last: count,
    LRU_EvictionPolicy: lambda now, count, last: last,
    DistanceLFU_EvictionPolicy: lambda now, count, last: count / (now - last + 1),
}


def jagged(ids: list[int]) -> JaggedTensor:
    return JaggedTensor(torch.tensor(ids, dtype=torch.int64), lengths=torch.tensor([len(ids)]))


class ByHand:
    """Owners in a dictionary: id -> [row, times seen, last batch]."""

    def __init__(self, score, interval: int) -> None:
        self.score, self.interval, self.owners, self.history, self.now = score, interval, {}, [], 0

    def see(self, ids: list[int]) -> set[int]:
        """Rows that changed owners."""
        self.now += 1
        self.history += [(i, self.now) for i in ids]
        if self.now % self.interval:
            return set()
        known = {i: list(entry) for i, entry in self.owners.items()}
        for i, batch in self.history:
            row, count, _ = known.get(i, [None, 0, 0])
            known[i] = [row, count + 1, batch]
        self.history = []
        order = sorted(known, key=lambda i: (-self.score(self.now, *known[i][1:]), known[i][0] is None, i))
        self.owners = {i: known[i] for i in order[: ROWS - 1]}
        free = sorted(set(range(ROWS - 1)) - {entry[0] for entry in self.owners.values()})
        given = set()
        for entry in self.owners.values():
            if entry[0] is None:
                entry[0] = free.pop(0)
                given.add(entry[0])
        return given


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(SCORES)),
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 8).map(lambda i: i * 10**17), max_size=5), max_size=12),
)
def test_rows_and_evictions_equal_a_dictionary(policy, interval, stream):
    module = MCHManagedCollisionModule(ROWS, CPU, policy(), interval)
    by_hand = ByHand(SCORES[policy], interval)
    for ids in stream:
        given_by_hand = by_hand.see(ids)
        rows = module({"f": jagged(ids)})["f"].values().tolist()
        assert rows == [by_hand.owners[i][0] if i in by_hand.owners else ROWS - 1 for i in ids]
        evicted = module.evict()
        assert (set() if evicted is None else set(evicted.tolist())) == given_by_hand
        assert module.open_slots().item() == ROWS - 1 - len(by_hand.owners)
    state = copy.deepcopy(module.state_dict())
    other = MCHManagedCollisionModule(ROWS, CPU, policy(), interval).eval()
    other.load_state_dict(state)
    everything = jagged([i * 10**17 for i in range(9)])
    assert torch.equal(other({"f": everything})["f"].values(), module.eval()({"f": everything})["f"].values())


def test_eval_mode_counts_nothing():
    module = MCHManagedCollisionModule(ROWS, CPU, LFU_EvictionPolicy(), 1).eval()
    assert module({"f": jagged([5, 5])})["f"].values().tolist() == [ROWS - 1] * 2
    assert module.evict() is None


def test_rare_ids_are_kept_out_by_a_filter():
    module = MCHManagedCollisionModule(ROWS, CPU, LFU_EvictionPolicy(average_threshold_filter), 1)
    rows = module({"f": jagged([1, 2, 3, 3, 3])})["f"].values().tolist()
    assert rows == [ROWS - 1, ROWS - 1, 0, 0, 0]
    torch.manual_seed(0)
    counts = torch.full((20_000,), 30)
    share = probabilistic_threshold_filter(counts, 0.01)[0].float().mean().item()
    assert share == pytest.approx(1 - 0.99**30, abs=0.02)


@pytest.mark.parametrize("pooled", [True, False])
def test_new_owners_get_new_rows_and_gradients_reach_the_table(pooled):
    config = EmbeddingBagConfig if pooled else EmbeddingConfig
    tables = [config(name="film", num_embeddings=ROWS, embedding_dim=4, feature_names=["a", "b"])]
    embeddings = EmbeddingBagCollection(tables) if pooled else EmbeddingCollection(tables)
    managed = {"film": MCHManagedCollisionModule(ROWS, CPU, LRU_EvictionPolicy(), 1)}
    collection = ManagedCollisionCollection(managed, tables)
    combined = ManagedCollisionEmbeddingBagCollection if pooled else ManagedCollisionEmbeddingCollection
    module = combined(embeddings, collection, return_remapped_features=True)
    table = (embeddings.embedding_bags if pooled else embeddings.embeddings)["film"].weight

    def run(ids: list[int]):
        return module(KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor(ids), torch.tensor([2, 1])))

    run([100, 200, 300])
    with torch.no_grad():
        table.fill_(50.0)
    answer, remapped = run([400, 200, 300])  # 100 loses its row
    row = remapped["a"].values()[0].item()
    changed = [r for r in range(ROWS) if not torch.equal(table[r], torch.full((4,), 50.0))]
    assert changed == [row] and table[row].abs().max() <= 0.5
    assert remapped.keys() == ["a", "b"]
    (answer["b"] if pooled else answer["b"].values()).sum().backward()
    assert table.grad.sum() == 4


def test_bad_arguments():
    tables = [EmbeddingBagConfig(name="film", num_embeddings=9, embedding_dim=4, feature_names=["a"])]
    module = MCHManagedCollisionModule(ROWS, CPU, LRU_EvictionPolicy(), 1)
    with pytest.raises(ValueError, match="has 9 rows, its module gives 4"):
        ManagedCollisionCollection({"film": module}, tables)
    with pytest.raises(ValueError, match="must be equal"):
        ManagedCollisionCollection({"user": module}, tables)
    with pytest.raises(ValueError, match="zch_size has to be at least 2"):
        MCHManagedCollisionModule(1, CPU, LRU_EvictionPolicy(), 1)
