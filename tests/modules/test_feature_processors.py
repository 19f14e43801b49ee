"""Feature processors, towers and lazy modules against loops over bags."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recsys_edu.modules import feature_processor
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection, tower_input_params
from recsys_edu.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from recsys_edu.modules.fp_embedding_modules import (
    FeatureProcessedEmbeddingBagCollection,
    apply_feature_processors_to_kjt,
)
from recsys_edu.modules.lazy_extension import LazyModuleExtensionMixin, lazy_apply
from recsys_edu.modules.regroup import KTRegroupAsDict, PermuteMultiEmbedding
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

LONGEST = 5


@st.composite
def batches(draw):
    """Two features of bags of up to LONGEST ids, empty ones too, as lists and as a KeyedJaggedTensor."""
    size = draw(st.integers(0, 4))
    bags = {
        key: [draw(st.lists(st.integers(0, 9), max_size=LONGEST)) for _ in range(size)] for key in ("seen", "liked")
    }
    flat = [bag for key in bags for bag in bags[key]]
    lengths = torch.tensor([len(bag) for bag in flat], dtype=torch.int64)
    values = torch.tensor([value for bag in flat for value in bag], dtype=torch.int64)
    return bags, KeyedJaggedTensor(list(bags), values, lengths=lengths, stride=size)


def collection(features=("seen", "liked"), weighted=True) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(num_embeddings=10, embedding_dim=4, name="film", feature_names=list(features))]
    return EmbeddingBagCollection(tables, is_weighted=weighted)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_position_weights_equal_a_loop_over_bags(batch):
    bags, kjt = batch
    module = PositionWeightedModuleCollection({"seen": LONGEST, "liked": LONGEST})
    with torch.no_grad():
        module.position_weights["seen"].copy_(torch.arange(LONGEST))
        module.position_weights["liked"].copy_(10 + torch.arange(LONGEST))
    first = {"seen": 0.0, "liked": 10.0}
    by_hand = [first[key] + place for key in bags for bag in bags[key] for place in range(len(bag))]
    assert module(kjt).weights().tolist() == by_hand
    older = feature_processor.PositionWeightedModule({"seen": LONGEST, "liked": LONGEST})
    older.load_state_dict(module.state_dict())
    assert [w for key in bags for w in older(kjt.to_dict())[key].weights().tolist()] == by_hand
    grouped = feature_processor.PositionWeightedProcessor({"liked": LONGEST})
    grouped.load_state_dict({"position_weights.liked": module.position_weights["liked"]})
    assert grouped(kjt).keys() == ["liked"]
    assert grouped(kjt).weights().tolist() == [w for w in by_hand if w >= 10]


def test_gradient_of_a_position_is_the_sum_over_bags():
    module = PositionWeightedModule(3)
    jt = JaggedTensor(torch.tensor([7, 2, 9, 4]), lengths=torch.tensor([3, 0, 1]))
    (module(jt).weights() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert module.position_weight.grad.tolist() == [5.0, 2.0, 3.0]


def test_a_bag_longer_than_the_weights_says_so():
    kjt = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.arange(4), torch.tensor([4]))
    with pytest.raises(IndexError, match="'seen' has a bag of 4 ids, but position weights for 3"):
        PositionWeightedModuleCollection({"seen": 3})(kjt)
    with pytest.raises(KeyError, match="no position weights for the features"):
        PositionWeightedModuleCollection({"liked": 3})(kjt)
    with pytest.raises(ValueError, match="max length of at least 1"):
        PositionWeightedModuleCollection({"liked": 0})


def test_copy_keeps_parameters_registered_and_apart():
    module = PositionWeightedModuleCollection({"seen": 3})
    copied = module.copy(torch.device("cpu"))
    with torch.no_grad():
        copied.position_weights["seen"].fill_(7)
    assert module.position_weights["seen"].tolist() == [1, 1, 1]
    assert copied.position_weights_dict["seen"] is copied.position_weights["seen"]
    module.load_state_dict(copied.state_dict())
    assert module.position_weights_dict["seen"].tolist() == [7, 7, 7]


@settings(max_examples=30, deadline=None)
@given(batches())
def test_processed_collection_equals_a_loop(batch):
    bags, kjt = batch
    ebc = collection()
    module = FeatureProcessedEmbeddingBagCollection(
        ebc, {"seen": PositionWeightedModule(LONGEST), "liked": PositionWeightedModule(LONGEST)}
    )
    weight_M = torch.linspace(1, 2, LONGEST)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "position" in name:
                parameter.copy_(weight_M)
    table = ebc.embedding_bags["film"].weight.detach()
    answer = module(kjt)
    for key in bags:
        assert answer[key].shape == (len(bags[key]), 4)
        for row, bag in zip(answer[key], bags[key]):
            by_hand = sum((weight_M[place] * table[value] for place, value in enumerate(bag)), torch.zeros(4))
            torch.testing.assert_close(row, by_hand)


def test_processed_collection_ignores_features_without_a_table_and_checks_its_parts():
    processors = {"seen": PositionWeightedModule(3)}
    module = FeatureProcessedEmbeddingBagCollection(collection(["seen"]), processors)
    kjt = KeyedJaggedTensor.from_lengths_sync(["other", "seen"], torch.tensor([99, 1]), torch.tensor([1, 1]))
    assert module(kjt).keys() == ["seen"]
    assert module.split()[1].is_weighted()
    with pytest.raises(AssertionError, match="is_weighted=True"):
        FeatureProcessedEmbeddingBagCollection(collection(["seen"], weighted=False), processors)
    with pytest.raises(AssertionError, match=r"missing \['liked'\]"):
        FeatureProcessedEmbeddingBagCollection(collection(), processors)
    with pytest.raises(KeyError, match="no features"):
        module(KeyedJaggedTensor.from_lengths_sync(["other"], torch.tensor([9]), torch.tensor([1])))


def test_variable_batch_sizes_are_kept():
    kjt = KeyedJaggedTensor(
        ["seen", "liked"],
        torch.arange(4),
        lengths=torch.tensor([2, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=(["seen", "liked"], torch.tensor([[0, 1], [0, 0]])),
    )
    processed = apply_feature_processors_to_kjt(kjt, {"seen": PositionWeightedModule(3)})
    assert processed.stride_per_key() == [2, 1]
    module = FeatureProcessedEmbeddingBagCollection(
        collection(), PositionWeightedModuleCollection({"seen": 3, "liked": 3})
    )
    assert module(kjt)["liked"].shape == (2, 4)


class Total(nn.Module):
    def forward(self, pooled):
        return pooled.values().sum(dim=1, keepdim=True)


class Both(nn.Module):
    def forward(self, features, weighted_features):
        return KeyedTensor(["x"], [1], features.lengths().reshape(-1, 1) + weighted_features.weights().reshape(-1, 1))


def test_towers_get_what_they_take():
    plain, weighted = collection(["seen"], weighted=False), collection(["seen"])
    assert tower_input_params(plain) == (True, False)
    assert tower_input_params(weighted) == (False, True)
    assert tower_input_params(Both()) == (True, True)
    towers = EmbeddingTowerCollection([EmbeddingTower(m, Total()) for m in (plain, weighted, Both())])
    kjt = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([1, 2]), torch.tensor([1, 1]))
    heavy = KeyedJaggedTensor.from_lengths_sync(
        ["seen"], torch.tensor([1, 2]), torch.tensor([1, 1]), weights=torch.tensor([2.0, 3.0])
    )
    table = plain.embedding_bags["film"].weight.detach()
    sums = table[[1, 2]].sum(dim=1)
    by_hand = torch.stack([sums, sums * torch.tensor([2.0, 3.0]), torch.tensor([3.0, 4.0])], dim=1)
    torch.testing.assert_close(towers(kjt, heavy), by_hand)
    with pytest.raises(ValueError, match="tower 1 takes weighted_features"):
        towers(kjt)


class LazyScale(LazyModuleExtensionMixin, nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        self.weight = nn.UninitializedParameter()

    def initialize_parameters(self, input, width=None) -> None:
        with torch.no_grad():
            self.weight.materialize((1, input.shape[-1]))
            self.weight.fill_(2.0)


def test_lazy_modules_refuse_apply_until_their_first_forward_and_take_keywords():
    model = nn.Sequential(LazyScale())
    with pytest.raises(RuntimeError, match="has not been initialized"):
        model[0].apply(lambda m: None)
    seen = []
    lazy_apply(model, lambda m: seen.append(type(m).__name__))
    assert seen == []
    assert model[0](input=torch.ones(1, 3)).item() == 6.0
    assert seen == []  # the hook sits on the outer module
    model(torch.ones(1, 3))
    model(torch.ones(1, 3))
    assert seen == ["LazyScale", "Sequential"]
    model[0].apply(lambda m: nn.init.zeros_(m.weight))
    assert model(torch.ones(1, 3)).item() == 0.0


def test_permute_by_columns_and_by_tensors_equal_regroup():
    pooled = [
        KeyedTensor(["a", "b"], [1, 2], torch.arange(6.0).reshape(2, 3)),
        KeyedTensor(["c"], [2], 10 + torch.arange(4.0).reshape(2, 2)),
    ]
    groups = [["c", "a"], ["b", "c"]]
    module = PermuteMultiEmbedding(groups)
    with pytest.raises(RuntimeError, match="set_columns"):
        module([kt.values() for kt in pooled])
    module.set_columns([list(zip(kt.keys(), kt.length_per_key())) for kt in pooled])
    expected = list(KTRegroupAsDict(groups, ["x", "y"])(pooled).values())
    copied = PermuteMultiEmbedding(groups)
    copied.init_tensors(module._permute, module._in_shapes, module._out_shapes, module._out_lengths)
    for outputs in (module([kt.values() for kt in pooled]), copied([kt.values() for kt in pooled])):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
    with pytest.raises(KeyError, match="group 0 names 'z'"):
        PermuteMultiEmbedding([["z"]]).set_columns([[("a", 1)]])
