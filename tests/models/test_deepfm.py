"""DeepFM and its halves."""

import pytest
import torch
from torch import nn

from recsys_edu.models.deepfm import FMInteractionArch, SimpleDeepFMNN
from recsys_edu.modules.deepfm import DeepFM, FactorizationMachine
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.regroup import KTRegroupAsDict
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from recsys_edu.types import DataType


def tables(dims: tuple[int, ...] = (4, 4)) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        [EmbeddingBagConfig(10, dim, f"t{i}", feature_names=[f"f{i}"]) for i, dim in enumerate(dims)]
    )


def test_factorization_machine_is_the_sum_of_pairwise_products() -> None:
    parts = [torch.randn(3, 2), torch.randn(3, 2, 2)]
    flat = torch.cat([part.flatten(1) for part in parts], dim=1)
    pairs = sum(flat[:, i] * flat[:, j] for i in range(6) for j in range(i + 1, 6))
    torch.testing.assert_close(FactorizationMachine()(parts), pairs.unsqueeze(1))
    assert torch.equal(DeepFM(nn.Identity())(parts), flat)


def test_deepfm_learns_a_small_batch_by_heart() -> None:
    model = SimpleDeepFMNN(3, tables(), hidden_layer_size=16, deep_fm_dimension=8)
    ids = KeyedJaggedTensor(["f1", "f0"], torch.randint(0, 10, (16,)), lengths=torch.ones(16, dtype=torch.int64))
    dense, labels = torch.randn(8, 3), torch.randint(0, 2, (8, 1)).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        probabilities = model(dense, ids)
        loss = nn.functional.binary_cross_entropy(probabilities, labels)
        loss.backward()
        optimizer.step()
    assert probabilities.shape == (8, 1) and loss.item() < 0.05
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(dense, ids), model(dense, ids))


def test_interaction_width_and_errors() -> None:
    pooled = KeyedTensor(["f0", "f1"], [4, 4], torch.randn(2, 8))
    assert FMInteractionArch(12, ["f0", "f1"], 5)(torch.randn(2, 4), pooled).shape == (2, 4 + 5 + 1)
    with pytest.raises(AssertionError, match="same dimension"):
        SimpleDeepFMNN(3, tables((4, 8)), 5, 6)
    with pytest.raises(AssertionError, match="At least one"):
        SimpleDeepFMNN(3, tables(()), 5, 6)


def test_regroup_as_dict() -> None:
    left = KeyedTensor(["a", "b"], [1, 2], torch.arange(6.0).view(2, 3))
    right = KeyedTensor(["c"], [2], torch.arange(4.0).view(2, 2))
    module = KTRegroupAsDict([["a", "c"], ["b"], ["b"]], ["x", "y", "z"])
    for run in (module, torch.fx.symbolic_trace(module)):
        out = run([left, right])
        assert out["x"].tolist() == [[0, 0, 1], [3, 2, 3]] and out["y"].tolist() == out["z"].tolist() == [
            [1, 2],
            [4, 5],
        ]
    cast = KTRegroupAsDict([["a"]], ["x"], emb_dtype=DataType.FP16)([left])
    assert cast["x"].dtype == torch.float16
    module.clear_cache()
    with pytest.raises(AssertionError, match="got 1 and 2"):
        KTRegroupAsDict([["a"], ["b"]], ["x"])
    with pytest.raises(KeyError, match="no KeyedTensor has key 'q'"):
        KTRegroupAsDict([["q"]], ["x"])([left])
