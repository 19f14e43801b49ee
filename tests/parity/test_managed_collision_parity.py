"""Managed collision and pools beside TorchRec's, where that is installed.

Its hashed kind only reads on a CPU: tables filled here are read there.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("torchrec")

PACKAGES = ("recsys_edu", "torchrec")
CPU = torch.device("cpu")


def part(package: str, path: str):
    return importlib.import_module(f"{package}.{path}")


def jagged(package: str, ids: list[int]):
    return part(package, "sparse.jagged_tensor").JaggedTensor(torch.tensor(ids), lengths=torch.tensor([len(ids)]))


POLICIES = ["LFU_EvictionPolicy", "LRU_EvictionPolicy", "DistanceLFU_EvictionPolicy"]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_ids_own_rows(policy: str):
    owners, states = [], []
    for package in PACKAGES:
        mc = part(package, "modules.mc_modules")
        module = mc.MCHManagedCollisionModule(5, CPU, getattr(mc, policy)(), 2)
        generator = torch.Generator().manual_seed(2)
        for step in range(12):
            # the i-th id comes i times as often, and rare ones come in some batches only: no ties
            ids = [10**12 + i for i in range(9) for _ in range(i * i + 1) if i > 5 or (step + i) % 3 == 0]
            order = torch.randperm(len(ids), generator=generator).tolist()
            module.profile({"f": jagged(package, [ids[place] for place in order])})
        states.append(module.state_dict())
        owned = module._mch_sorted_raw_ids[module._mch_sorted_raw_ids < torch.iinfo(torch.int64).max]
        owners.append(set(owned.tolist()))
    assert set(states[0]) == set(states[1])
    assert len(owners[0]) == 4
    if policy == "LFU_EvictionPolicy":  # only its scores are all different
        assert owners[0] == owners[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_of_torchrec_is_read_the_same_way(policy: str):
    modules = []
    for package in PACKAGES:
        mc = part(package, "modules.mc_modules")
        modules.append(mc.MCHManagedCollisionModule(6, CPU, getattr(mc, policy)(), 1, output_global_offset=20))
    ours, theirs = modules
    for step in range(3):
        theirs.profile({"f": jagged("torchrec", [step * 7 + i for i in range(4)])})
    ours.load_state_dict(theirs.state_dict())
    ours.validate_state()
    asked = list(range(25))
    theirs.eval()
    expected = theirs.remap({"f": jagged("torchrec", asked)})["f"].values()
    assert torch.equal(ours.eval().remap({"f": jagged("recsys_edu", asked)})["f"].values(), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"input_hash_size": 4000}, {"percent_reserved_slots": 20, "opt_in_prob": 100}]
)
def test_hashed_tables_filled_here_are_read_there(settings: dict):
    ours = part("recsys_edu", "modules.hash_mc_modules").HashZchManagedCollisionModule(
        80, CPU, 4, max_probe=6, **settings
    )
    torch.manual_seed(1)
    ids = torch.randint(4000, (60,)).tolist()
    ours({"f": jagged("recsys_edu", ids)})
    theirs = part("torchrec", "modules.hash_mc_modules").HashZchManagedCollisionModule(
        80, CPU, 4, max_probe=6, is_inference=True, **settings
    )
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    asked = ids + torch.randint(4000, (100,)).tolist()
    rows = ours.eval()({"f": jagged("recsys_edu", asked)})["f"].values()
    expected = theirs.eval()({"f": jagged("torchrec", asked)})["f"].values()
    assert torch.equal(rows, expected)
    assert (ours.output_size(), ours.buckets(), ours.input_size()) == (
        theirs.output_size(),
        theirs.buckets(),
        theirs.input_size(),
    )
    assert ours.get_reserved_slots_per_bucket() == theirs.get_reserved_slots_per_bucket()


def test_hours_to_live():
    answers = []
    for package in PACKAGES:
        evictions = part(package, "modules.hash_mc_evictions")
        name, config = evictions.HashZchEvictionPolicyName, evictions.HashZchEvictionConfig
        single = evictions.HashZchEvictionModule(name.SINGLE_TTL_EVICTION, CPU, config(["f"], single_ttl=24))
        until, now = single(jagged(package, [5, 6]))
        assert until.dtype is torch.int32
        answers.append((until - now).tolist())
        kernels = [evictions.get_kernel_from_policy(each) for each in (None, *name)]
        answers[-1] += kernels
    assert answers[0] == answers[1]


def test_pools_have_the_same_state_and_answers():
    answers = []
    for package in PACKAGES:
        rows = part(package, "modules.tensor_pool").TensorPool(6, 3, torch.float32, device=CPU)
        rows.update(torch.tensor([4, 1]), torch.arange(6.0).view(2, 3))
        bags = part(package, "modules.keyed_jagged_tensor_pool").KeyedJaggedTensorPool(
            6, {"a": 2, "b": 3}, torch.int32, device=CPU
        )
        kjt = part(package, "sparse.jagged_tensor").KeyedJaggedTensor(
            ["a", "b"],
            torch.arange(6, dtype=torch.int32),
            lengths=torch.tensor([0, 2, 3, 1], dtype=torch.int32),
        )
        bags.update(torch.tensor([2, 0]), kjt)
        found = bags.lookup(torch.tensor([0, 3, 2, 2]))
        answers.append(
            [rows.lookup(torch.tensor([1, 0, 4])), found.lengths(), found.values()]
            + [value for module in (rows, bags) for _, value in sorted(module.state_dict().items())]
        )
        assert found.keys() == ["a", "b"]
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype is theirs.dtype
