"""Hashed managed collision against loops over a list, on random streams of ids; the hash against FBGEMM's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.modules import hash_mc_evictions
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.hash_mc_evictions import HashZchEvictionConfig, HashZchEvictionModule, HashZchEvictionPolicyName
from recsys_edu.modules.hash_mc_modules import HashZchManagedCollisionModule
from recsys_edu.modules.mc_adapter import McEmbeddingBagCollectionAdapter, McEmbeddingCollectionAdapter
from recsys_edu.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from recsys_edu.modules.mc_modules import ManagedCollisionCollection
from recsys_edu.modules.zero_collision_hash import murmur_hash3, unsigned_remainder
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

CPU = torch.device("cpu")
BUCKETS, ROWS, PROBES = 2, 12, 4
TTL, LRU = HashZchEvictionPolicyName.SINGLE_TTL_EVICTION, HashZchEvictionPolicyName.LRU_EVICTION
PER_FEATURE = HashZchEvictionPolicyName.PER_FEATURE_TTL_EVICTION
HOURS = {"f": 2, "g": 5}


def jagged(ids: list[int]) -> JaggedTensor:
    return JaggedTensor(torch.tensor(ids, dtype=torch.int64), lengths=torch.tensor([len(ids)]))


def config_of(policy) -> HashZchEvictionConfig | None:
    if policy is PER_FEATURE:
        return HashZchEvictionConfig(list(HOURS), per_feature_ttl=list(HOURS.values()))
    return HashZchEvictionConfig(list(HOURS), single_ttl=3) if policy is TTL else None


class ByHand:
    """One list of [id, until] or None per bucket, and nothing but loops."""

    def __init__(self, policy) -> None:
        self.policy, self.tables = policy, [[None] * (ROWS // BUCKETS) for _ in range(BUCKETS)]

    def path(self, number: int) -> tuple[list, list[int]]:
        table = self.tables[number % BUCKETS]
        home = int(unsigned_remainder(murmur_hash3(torch.tensor([number])), torch.tensor([len(table)])))
        return table, [(home + probe) % len(table) for probe in range(PROBES)]

    def until(self, now: int, feature: str) -> int:
        return now + {TTL: 3, LRU: 0, PER_FEATURE: HOURS[feature], None: 0}[self.policy]

    def slot(self, number: int) -> int | None:
        table, path = self.path(number)
        return next((slot for slot in path if table[slot] is not None and table[slot][0] == number), None)

    def see(self, batch: dict[str, list[int]], now: int) -> tuple[list[int], set[int]]:
        """Rows in the order of the ids, and those that changed their owner."""
        until: dict[int, int] = {}
        for feature, ids in batch.items():
            for number in ids:
                until[number] = max(until.get(number, -1), self.until(now, feature))
        for probe in range(PROBES):  # round by round, in each the first of the batch wins
            for number in until:
                table, path = self.path(number)
                taken_now = table[path[probe]] is not None
                if self.slot(number) is None and not taken_now:
                    table[path[probe]] = [number, -1]
        for number, hour in until.items():
            if (slot := self.slot(number)) is not None:
                entry = self.path(number)[0][slot]
                entry[1] = max(entry[1], hour)
        changed = set() if self.policy is None else self.replace(until, now)
        size, rows = ROWS // BUCKETS, []
        for number in [number for ids in batch.values() for number in ids]:
            slot = self.slot(number)
            rows.append(number % BUCKETS * size + (self.path(number)[1][0] if slot is None else slot))
        return rows, changed

    def replace(self, until: dict[int, int], now: int) -> set[int]:
        threshold, changed = max(until.values(), default=0) if self.policy is LRU else now, set()
        while True:
            wanted: dict[tuple[int, int], int] = {}
            for number in until:
                if self.slot(number) is None:
                    table, path = self.path(number)
                    slot = min(path, key=lambda s: (table[s][1], path.index(s)))
                    if table[slot][1] < threshold:
                        wanted.setdefault((number % BUCKETS, slot), number)
            if not wanted:
                return changed
            for (bucket, slot), number in wanted.items():
                self.tables[bucket][slot] = [number, until[number]]
                changed.add(bucket * (ROWS // BUCKETS) + slot)


ids_of_a_batch = st.lists(st.integers(0, 30).map(lambda i: i * 10**15 + i % 2), max_size=7)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([None, TTL, PER_FEATURE, LRU]),
    st.lists(st.tuples(ids_of_a_batch, ids_of_a_batch, st.integers(0, 2)), max_size=10),
)
def test_rows_and_evictions_equal_loops(policy, stream):
    module = HashZchManagedCollisionModule(
        ROWS, CPU, BUCKETS, PROBES, eviction_policy_name=policy, eviction_config=config_of(policy)
    )
    by_hand, now = ByHand(policy), 1000
    with pytest.MonkeyPatch.context() as patch:
        for f, g, hours in stream:
            now += hours
            patch.setattr(hash_mc_evictions, "hours_now", lambda now=now: now)
            rows, changed = by_hand.see({"f": f, "g": g}, now)
            remapped = module({"f": jagged(f), "g": jagged(g)})
            assert [*remapped["f"].values().tolist(), *remapped["g"].values().tolist()] == rows
            evicted = module.evict()
            assert (set() if evicted is None else set(evicted.tolist())) == changed
            free = sum(entry is None for table in by_hand.tables for entry in table)
            assert module.open_slots().tolist() == [free]
            module.validate_state()
    everything = [i * 10**15 + i % 2 for i in range(31)]
    expected = module.eval()({"f": jagged(everything)})["f"].values()
    parts = [module.rebuild_with_output_id_range((b * 6, b * 6 + 6)) for b in range(BUCKETS)]
    for bucket, part in enumerate(parts):  # a part answers for its buckets what the whole answers
        mine = [i % 2 == bucket for i in everything]
        ids = [i for i, is_mine in zip(everything, mine) if is_mine]
        assert torch.equal(part({"f": jagged(ids)})["f"].values(), expected[torch.tensor(mine)])
        assert part.output_size() == 6 and part.home_rows(torch.tensor(ids[:1])).tolist() == [bucket * 6]


def test_eval_mode_and_inference_give_no_rows_away():
    module = HashZchManagedCollisionModule(ROWS, CPU, BUCKETS)
    module.reset_inference_mode()
    module({"f": jagged([5, 6])})
    module.eval().reset_training_mode()
    module({"f": jagged([5, 6])})
    assert module.open_slots().tolist() == [ROWS]
    module.train()({"f": jagged([5, 6])})
    assert module.open_slots().tolist() == [ROWS - 2]


def test_ids_without_a_row_are_dropped_or_share_the_reserved_rows():
    full = list(range(100))
    drops = HashZchManagedCollisionModule(8, CPU, 1, max_probe=8, disable_fallback=True)
    drops({"f": jagged(full[:8])})
    features = {"f": JaggedTensor(torch.tensor([50, 3, 60, 4]), torch.tensor([1.0, 2, 3, 4]), torch.tensor([3, 1]))}
    answer = drops(features)["f"]
    assert answer.lengths().tolist() == [1, 1] and answer.weights().tolist() == [2.0, 4.0]
    assert (drops(features, mutate_miss_lengths=False)["f"].values() < 0).tolist() == [True, False, True, False]
    reserves = HashZchManagedCollisionModule(20, CPU, 2, max_probe=10, percent_reserved_slots=20)
    rows = reserves({"f": jagged(full)})["f"].values()
    assert reserves.get_reserved_slots_per_bucket() == 2 and reserves.open_slots().tolist() == [0]
    shared = {8, 9, 18, 19}
    assert set(rows.tolist()) == set(range(20)) and sum(r in shared for r in rows.tolist()) == 100 - 16
    nobody = HashZchManagedCollisionModule(20, CPU, 2, opt_in_prob=0)
    nobody({"f": jagged(full)})
    assert nobody.open_slots().tolist() == [20]
    torch.manual_seed(0)
    half = HashZchManagedCollisionModule(20_000, CPU, 2, opt_in_prob=50)
    half({"f": jagged(list(range(2000)))})
    assert half.open_slots().item() == pytest.approx(19_000, abs=100)


def test_a_new_owner_begins_with_a_new_row(monkeypatch):
    tables = [EmbeddingBagConfig(name="film", num_embeddings=4, embedding_dim=4, feature_names=["a"])]
    managed = HashZchManagedCollisionModule(4, CPU, 1, eviction_policy_name=LRU)
    module = ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables), ManagedCollisionCollection({"film": managed}, tables), True
    )
    table = module._embedding_module.embedding_bags["film"].weight

    def run(ids: list[int]) -> list[int]:
        return module(KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor(ids), torch.tensor([len(ids)])))[1]

    monkeypatch.setattr(hash_mc_evictions, "hours_now", lambda: 10)
    run([100, 200, 300, 400])
    with torch.no_grad():
        table.fill_(50.0)
    monkeypatch.setattr(hash_mc_evictions, "hours_now", lambda: 11)
    run([100, 200, 300])
    row = run([500])["a"].values().item()
    changed = (table != 50).all(1).nonzero().flatten().tolist()
    assert changed == [row] and table[row].abs().max() <= 0.5


@pytest.mark.skipif(not fbgemm_status().available, reason="FBGEMM is not here")
def test_reads_what_fbgemm_reads():
    torch.manual_seed(3)
    ids = torch.cat([torch.arange(200), torch.randint(-(2**62), 2**62, (200,))])
    module = HashZchManagedCollisionModule(300, CPU, 3, max_probe=20)
    module({"f": jagged(ids.tolist())})
    module.eval()
    asked = torch.cat([ids, torch.randint(0, 2**40, (300,))])
    for drop in (False, True):
        expected, _ = torch.ops.fbgemm.zero_collision_hash(
            input=asked,
            identities=module._hash_zch_identities,
            max_probe=20,
            circular_probe=True,
            exp_hours=-1,
            readonly=True,
            local_sizes=torch.full_like(asked, 100),
            offsets=asked % 3 * 100,
            disable_fallback=drop,
        )
        module._disable_fallback = drop
        rows = module({"f": jagged(asked.tolist())}, mutate_miss_lengths=False)["f"].values()
        assert torch.equal(rows, expected) and (rows < 0).sum() == (400 if drop else 0)


def test_bad_arguments_and_ids_change_nothing():
    for arguments in [{"zch_size": 7}, {"max_probe": 0}, {"output_segments": [0, 3, 5, 8]}, {"end_bucket": 0}]:
        with pytest.raises(ValueError, match=r"do not divide|output_segments have to name"):
            HashZchManagedCollisionModule(**({"zch_size": 8, "device": CPU, "total_num_buckets": 2} | arguments))
    with pytest.raises(NotImplementedError, match="track_id_freq"):
        HashZchManagedCollisionModule(8, CPU, 2, track_id_freq=True)
    with pytest.raises(ValueError, match="needs an eviction_config"):
        HashZchManagedCollisionModule(8, CPU, 2, eviction_policy_name=TTL)
    with pytest.raises(ValueError, match="single_ttl has to be given"):
        HashZchEvictionModule(TTL, CPU, HashZchEvictionConfig(["f"]))(jagged([1]))
    module = HashZchManagedCollisionModule(8, CPU, 2, input_hash_size=100)
    module({"f": jagged([3, 99])})
    before = copy.deepcopy(module.state_dict())
    for bad in (-1, 100):
        with pytest.raises(ValueError, match=f"id {bad} has no place"):
            module({"f": jagged([5, bad])})
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match="cut a bucket"):
        module.rebuild_with_output_id_range((0, 3))
    module._hash_zch_identities[0] = 99
    with pytest.raises(ValueError, match="row 0 belongs to id 99"):
        module.validate_state()
    part = module.rebuild_with_output_id_range((4, 8))
    with pytest.raises(ValueError, match="id 3 has no place in buckets 1 to 1"):
        part({"f": jagged([3])})


@pytest.mark.parametrize("method", ["mpzch", "sort_zch"])
def test_adapters_answer_like_plain_collections(method):
    adapters = [(McEmbeddingBagCollectionAdapter, EmbeddingBagConfig), (McEmbeddingCollectionAdapter, EmbeddingConfig)]
    for adapter, config in adapters:
        tables = [config(name="t", num_embeddings=160, embedding_dim=4, feature_names=["a", "b"])]
        module = adapter(tables, 2**62, CPU, world_size=1, zch_method=method)
        kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.arange(5) * 10**18, torch.tensor([2, 0, 2, 1]))
        answer = module(kjt)
        weight = next(module.parameters())
        rows = answer["a"] if config is EmbeddingBagConfig else answer["a"].values()
        assert rows.shape == (2, 4) and weight.shape == (160, 4) and module.embedding_bag_configs() == tables
        rows.sum().backward()
        assert weight.grad.count_nonzero() == 8
    with pytest.raises(ValueError, match="zch_method has to be"):
        McEmbeddingCollectionAdapter(tables, 2**62, CPU, world_size=1, zch_method="other")
