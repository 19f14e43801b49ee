"""Quantised collections against TorchRec's: answers, and state dicts that load across."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchrec")

import torchrec.modules.embedding_configs as their_configs
import torchrec.modules.embedding_modules as their_modules
from torchrec.inference.modules import quantize_embeddings as their_quantize
from torchrec.quant.embedding_modules import EmbeddingCollection as TheirQuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TheirKJT

import recsys_edu.modules.embedding_configs as our_configs
import recsys_edu.modules.embedding_modules as our_modules
from recsys_edu.inference.modules import quantize_embeddings
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

# What TorchRec's CPU path takes: it cannot quantise NFP8, and int2 only where a row's codes fill 16 bits.
DTYPES = [torch.int8, torch.qint8, torch.quint4x2, torch.quint2x4, torch.float16, torch.float32]
DIM = 16


def model_of(modules, configs, pooled: bool, weighted: bool) -> nn.Module:
    sizes = [("a", 12, ["f"], "SUM"), ("b", 7, ["g", "h"], "MEAN"), ("c", 9, ["f"], "SUM")]
    torch.manual_seed(0)
    model = nn.Module()
    if pooled:
        tables = [
            configs.EmbeddingBagConfig(
                num_embeddings=rows, embedding_dim=DIM, name=n, feature_names=f, pooling=configs.PoolingType(pooling)
            )
            for n, rows, f, pooling in sizes
        ]
        model.collection = modules.EmbeddingBagCollection(tables=tables, is_weighted=weighted)
    else:
        tables = [
            configs.EmbeddingConfig(num_embeddings=rows, embedding_dim=DIM, name=n, feature_names=f)
            for n, rows, f, _ in sizes
        ]
        model.collection = modules.EmbeddingCollection(tables=tables, need_indices=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
            weight[2], weight[3] = 0, 0.25
    return model


def features(kind, weighted: bool):
    lengths = torch.tensor([2, 0, 1, 1, 0, 3, 2, 2, 0])
    weights = torch.linspace(0.1, 1.5, 11) if weighted else None
    ids = torch.tensor([0, 1, 3, 4, 5, 6, 2, 3, 4, 5, 1])
    return kind(keys=["f", "g", "h"], values=ids, weights=weights, lengths=lengths)


def both(pooled: bool, weighted: bool, dtype: torch.dtype, **options) -> tuple[nn.Module, nn.Module]:
    ours = quantize_embeddings(model_of(our_modules, our_configs, pooled, weighted), dtype, inplace=True, **options)
    # By default TorchRec's function leaves sequence collections as they are; ours does not.
    mapping = {their_modules.EmbeddingCollection: TheirQuantEmbeddingCollection}
    theirs = their_quantize(
        model_of(their_modules, their_configs, pooled, weighted),
        dtype=dtype,
        inplace=False,
        additional_qconfig_spec_keys=list(mapping),
        additional_mapping=mapping,
        **options,
    )
    return ours, theirs


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "elem", tensor).view(torch.uint8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_answers(dtype: torch.dtype, weighted: bool) -> None:
    ours, theirs = both(True, weighted, dtype)
    answer = ours.collection(features(KeyedJaggedTensor, weighted)).to_dict()
    expected = theirs.collection(features(TheirKJT, weighted)).to_dict()
    assert answer.keys() == expected.keys()
    for name, block in expected.items():  # by name: TorchRec's order follows its grouping of tables
        torch.testing.assert_close(answer[name], block, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_answers(dtype: torch.dtype) -> None:
    ours, theirs = both(False, False, dtype)
    answer = ours.collection(features(KeyedJaggedTensor, False))
    expected = theirs.collection(features(TheirKJT, False))
    assert answer.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.equal(answer[name].values(), part.values())
        assert torch.equal(answer[name].lengths(), part.lengths().to(answer[name].lengths().dtype))
        assert torch.equal(answer[name].weights(), part.weights().to(answer[name].weights().dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dicts_are_equal_and_load_across(dtype: torch.dtype) -> None:
    ours, theirs = both(True, False, dtype)
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert our_state.keys() == their_state.keys()
    for key, rows in their_state.items():
        given = plain(rows).reshape(our_state[key].shape[0], -1)
        assert our_state[key].shape == given.shape, key
        # Where a row's smallest number is zero, FBGEMM's bias may be -0.0.
        differs = (our_state[key] != given).nonzero()
        assert all(given[row, column] == 128 and column == 3 for row, column in differs.tolist()), key
    before = ours.collection(features(KeyedJaggedTensor, False)).values()
    for table in ours.collection.embedding_bags.values():
        table.fill(torch.zeros_like(table.weight))
    ours.load_state_dict(their_state)
    assert torch.equal(ours.collection(features(KeyedJaggedTensor, False)).values(), before)


def test_types_per_table_and_half_precision_answers() -> None:
    options = {"per_table_weight_dtype": {"b": torch.quint4x2}, "output_dtype": torch.float16}
    ours, theirs = both(True, False, torch.qint8, **options)
    answer = ours.collection(features(KeyedJaggedTensor, False)).to_dict()
    expected = theirs.collection(features(TheirKJT, False)).to_dict()
    for name, block in expected.items():
        assert answer[name].dtype == block.dtype == torch.float16
        torch.testing.assert_close(answer[name], block, rtol=2e-3, atol=2e-3)
    kinds = {config.name: config.data_type.value for config in ours.collection.embedding_bag_configs()}
    assert kinds == {c.name: c.data_type.value for c in theirs.collection.embedding_bag_configs()}
