"""DLRM and its parts: shapes, values by hand, errors, and that the whole thing learns."""

import pytest
import torch
from torch import nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.models.dlrm import (
    DLRM,
    DLRM_DCN,
    DenseArch,
    DLRM_Projection,
    DLRMTrain,
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
    OverArch,
    SparseArch,
    choose,
)
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.fused_embedding_modules import fuse_embedding_optimizer
from recsys_edu.optim import RowWiseAdagrad, apply_optimizer_in_backward, in_backward_optimizer_filter
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

NUM_DENSE, ROWS, DIM = 3, 20, 8
FEATURES = ("user", "film", "genre")


def tables(dims: tuple[int, ...] = (DIM, DIM, DIM), device: str = "cpu") -> EmbeddingBagCollection:
    configs = [EmbeddingBagConfig(ROWS, dim, f"t_{name}", feature_names=[name]) for name, dim in zip(FEATURES, dims)]
    return EmbeddingBagCollection(configs, device=torch.device(device))


def random_batch(batch_size: int = 16) -> Batch:
    lengths = torch.randint(0, 4, (len(FEATURES) * batch_size,))
    ids = torch.randint(0, ROWS, (int(lengths.sum()),))
    return Batch(
        dense_features=torch.randn(batch_size, NUM_DENSE),
        sparse_features=KeyedJaggedTensor(list(FEATURES), ids, lengths=lengths),
        labels=torch.randint(0, 2, (batch_size,)),
    )


def models() -> dict[str, DLRM]:
    return {
        "dot": DLRM(tables(), NUM_DENSE, [16, DIM], [16, 1]),
        "dcn": DLRM_DCN(tables(), NUM_DENSE, [16, DIM], [16, 1], dcn_num_layers=2, dcn_low_rank_dim=3),
        "projection": DLRM_Projection(tables(), NUM_DENSE, [16, DIM], [16, 1], [2 * DIM], [4, 3 * DIM]),
    }


@pytest.mark.parametrize("n, k, ways", [(4, 2, 6), (2, 4, 0), (3, -1, 0), (0, 0, 1), (-1, 2, 0), (27, 2, 351)])
def test_choose(n: int, k: int, ways: int) -> None:
    assert choose(n, k) == ways


def test_interaction_is_all_pairwise_dot_products() -> None:
    dense, sparse = torch.randn(2, DIM), torch.randn(2, 3, DIM)
    out = InteractionArch(3)(dense, sparse)
    vectors = [dense, sparse[:, 0], sparse[:, 1], sparse[:, 2]]
    pairs = [(vectors[i] * vectors[j]).sum(dim=1) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(out, torch.cat([dense, torch.stack(pairs, dim=1)], dim=1))
    assert torch.equal(InteractionArch(0)(dense, torch.empty(2, 0, DIM)), dense)
    assert list(InteractionArch(3).state_dict()) == []


def test_other_interactions() -> None:
    dense, sparse = torch.randn(2, DIM), torch.randn(2, 3, DIM)
    flat = torch.cat([dense, sparse.flatten(1)], dim=1)
    assert torch.equal(InteractionDCNArch(3, nn.Identity())(dense, sparse), flat)
    left, right = nn.Linear(4 * DIM, 2 * DIM), nn.Linear(4 * DIM, 3 * DIM)
    out = InteractionProjectionArch(3, left, right)(dense, sparse)
    products = left(flat).view(2, 2, DIM) @ right(flat).view(2, DIM, 3)
    torch.testing.assert_close(out, torch.cat([dense, products.flatten(1)], dim=1))


def test_parts_shapes_and_names() -> None:
    sparse = SparseArch(tables())
    batch = random_batch()
    assert sparse(batch.sparse_features).shape == (16, 3, DIM) and sparse.sparse_feature_names == list(FEATURES)
    pooled = sparse.embedding_bag_collection(batch.sparse_features)
    assert torch.equal(sparse(batch.sparse_features)[:, 1], pooled["film"])
    assert DenseArch(NUM_DENSE, [5, DIM])(batch.dense_features).min() >= 0
    over = OverArch(4, [6, 1])
    assert list(over.state_dict()) == [
        "model.0._mlp.0._linear.weight",
        "model.0._mlp.0._linear.bias",
        "model.1.weight",
        "model.1.bias",
    ]


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
def test_every_model_gives_logits_and_every_parameter_a_gradient(kind: str) -> None:
    model = DLRMTrain(models()[kind])
    batch = random_batch()
    loss, (detached, logits, labels) = model(batch)
    assert logits.shape == (16,) and not detached.requires_grad and not logits.requires_grad
    assert torch.equal(labels, batch.labels) and torch.equal(detached, loss.detach())
    expected = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert silent == []


@pytest.mark.parametrize("kind", ["dot", "dcn", "projection"])
def test_every_model_learns_a_small_batch_by_heart(kind: str) -> None:
    model = DLRMTrain(models()[kind])
    batch = random_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_tables_trained_in_backward_fused_or_hooked_give_the_same_model() -> None:
    hooked, batch = models()["dot"], random_batch()
    fused = models()["dot"]
    fused.load_state_dict(hooked.state_dict())
    apply_optimizer_in_backward(RowWiseAdagrad, hooked.sparse_arch.parameters(), {"lr": 0.1})
    fuse_embedding_optimizer(fused, RowWiseAdagrad, {"lr": 0.1}, torch.device("cpu"))
    for model in (hooked, fused):
        train = DLRMTrain(model)
        dense = torch.optim.SGD([p for _, p in in_backward_optimizer_filter(train.named_parameters())], lr=0.1)
        for _ in range(3):
            dense.zero_grad()
            train(batch)[0].backward()
            dense.step()
    for name, weight in hooked.state_dict().items():
        torch.testing.assert_close(weight, fused.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_tables_may_be_on_meta() -> None:
    model = DLRM(tables(device="meta"), NUM_DENSE, [16, DIM], [16, 1], dense_device=torch.device("cpu"))
    assert model.sparse_arch.embedding_bag_collection.device.type == "meta"
    assert {p.device.type for p in model.dense_arch.parameters()} == {"cpu"}


def test_whole_model_on_meta_then_memory() -> None:
    model = DLRM(tables(device="meta"), NUM_DENSE, [16, DIM], [16, 1], dense_device=torch.device("meta"))
    source = models()["dot"]
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    batch = random_batch()
    torch.testing.assert_close(
        model(batch.dense_features, batch.sparse_features), source(batch.dense_features, batch.sparse_features)
    )


def test_model_can_be_traced() -> None:
    model, batch = models()["dot"], random_batch()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(
        traced(batch.dense_features, batch.sparse_features), model(batch.dense_features, batch.sparse_features)
    )


def test_construction_errors() -> None:
    with pytest.raises(AssertionError, match="At least one embedding bag"):
        DLRM(EmbeddingBagCollection([]), NUM_DENSE, [DIM], [4, 1])
    with pytest.raises(AssertionError, match=r"same dimension.*'t_film': 4"):
        DLRM(tables((8, 4, 8)), NUM_DENSE, [DIM], [4, 1])
    for make in (
        lambda: DLRM(tables(), NUM_DENSE, [7], [4, 1]),
        lambda: DLRM_DCN(tables(), NUM_DENSE, [7], [4, 1], 2, 3),
        lambda: DLRM_Projection(tables(), NUM_DENSE, [7], [4, 1], [DIM], [DIM]),
    ):
        with pytest.raises(ValueError, match=r"dimension \(8\) and final dense arch layer size \(7\) must match"):
            make()
    with pytest.raises(ValueError, match="branch2 layer size \\(9\\) is not a multiple"):
        DLRM_Projection(tables(), NUM_DENSE, [DIM], [4, 1], [DIM], [9])
    with pytest.raises(ValueError, match="multiple layers"):
        DLRM(tables(), NUM_DENSE, [DIM], [1])


def test_dense_features_that_do_not_fit_are_refused() -> None:
    model, batch = DLRM(tables(), NUM_DENSE, [DIM], [4, 1]), random_batch()
    with pytest.raises(ValueError, match=rf"expected \[batch, {NUM_DENSE}\]"):
        model(batch.dense_features[:, 1:], batch.sparse_features)
    with pytest.raises(ValueError, match="a batch has one row of each per example"):
        model(batch.dense_features[1:], batch.sparse_features)
