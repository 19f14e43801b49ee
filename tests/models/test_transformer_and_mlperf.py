"""The transformer interaction, and MLPerf's configuration."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.models.experimental.transformerdlrm import DLRM_Transformer, InteractionTransformerArch
from recsys_edu.models.mlperf import DLRMDCNv2Config, dlrm_dcnv2
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


def test_transformer_interaction_sees_every_vector():
    torch.manual_seed(0)
    module = InteractionTransformerArch(2, 8, nhead=2, ntransformer_layers=1).eval()
    dense, sparse = torch.randn(3, 8), torch.randn(3, 2, 8)
    tokens = torch.cat([dense.unsqueeze(1), sparse], dim=1)
    expected = module.interarch_TransformerEncoder(tokens).reshape(3, -1)
    torch.testing.assert_close(module(dense, sparse), expected)
    assert torch.equal(InteractionTransformerArch(0, 8, 2, 1)(dense, sparse[:, :0]), dense)
    with pytest.raises(ValueError, match="multiple of nhead"):
        InteractionTransformerArch(2, 6, nhead=4)


def test_transformer_dlrm_trains():
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=9, embedding_dim=8, feature_names=[f"f{i}"]) for i in (0, 1)
    ]
    model = DLRM_Transformer(EmbeddingBagCollection(tables), 4, [8], [8, 1], nhead=2, ntransformer_layers=1)
    kjt = KeyedJaggedTensor.from_lengths_sync(["f0", "f1"], torch.tensor([1, 2, 3]), torch.tensor([1, 0, 1, 1]))
    logits = model(torch.randn(2, 4), kjt)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mlperf_configuration_and_a_scaled_step():
    config = DLRMDCNv2Config()
    assert len(config.num_embeddings_per_feature) == len(config.multi_hot_sizes) == 26
    assert sum(config.num_embeddings_per_feature) == 204_184_588
    assert sum(config.multi_hot_sizes) == 214
    assert config.table_bytes() == 204_184_588 * 128 * 4
    small = config.scaled(50)
    model = dlrm_dcnv2(small)
    lengths = torch.tensor([size for size in small.multi_hot_sizes for _ in range(2)])
    rows = torch.tensor(small.num_embeddings_per_feature).repeat_interleave(2).repeat_interleave(lengths)
    features = [table.feature_names[0] for table in small.tables()]
    kjt = KeyedJaggedTensor.from_lengths_sync(features, torch.randint(0, 10**6, rows.shape) % rows, lengths)
    model(torch.randn(2, 13), kjt).sum().backward()
    assert model.over_arch.model[0]._mlp[0]._linear.weight.shape == (1024, 3456)
    with pytest.raises(ValueError, match="max_rows"):
        config.scaled(0)
