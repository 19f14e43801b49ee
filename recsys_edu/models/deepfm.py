"""DeepFM, a factorization machine and a deep network on the same embeddings (arXiv:1703.04247).

dense  [B, I] --- DenseArch ---- [B, D] --+-- deep network -- [B, H] --+
sparse KJT ------ SparseArch --- F x D ---+-- FM ------------ [B, 1] --+-- OverArch -- probability [B, 1]
                                          +-- dense --------- [B, D] --+
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from recsys_edu.models.model_input import ModelInput
from recsys_edu.modules.deepfm import DeepFM, FactorizationMachine
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class SparseArch(nn.Module):
    """The embedding tables: KJT to KeyedTensor. Counterpart: torchrec.models.deepfm.SparseArch."""

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.embedding_bag_collection(features)


class DenseArch(nn.Module):
    """Two ReLU layers, `in_features -> hidden_layer_size -> embedding_dim`.

    Counterpart: torchrec.models.deepfm.DenseArch.
    """

    def __init__(self, in_features: int, hidden_layer_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(in_features, hidden_layer_size), nn.ReLU(), nn.Linear(hidden_layer_size, embedding_dim), nn.ReLU()
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model(features)


class FMInteractionArch(nn.Module):
    """Dense vector, deep network's output and FM's output side by side: `[B, D + deep_fm_dimension + 1]`.

    `fm_in_features` is the width of the dense vector and all embeddings together.

    Counterpart: torchrec.models.deepfm.FMInteractionArch.
    """

    def __init__(self, fm_in_features: int, sparse_feature_names: list[str], deep_fm_dimension: int) -> None:
        super().__init__()
        self.sparse_feature_names = sparse_feature_names
        self.deep_fm = DeepFM(nn.Sequential(nn.Linear(fm_in_features, deep_fm_dimension), nn.ReLU()))
        self.fm = FactorizationMachine()

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedTensor) -> torch.Tensor:
        if not self.sparse_feature_names:
            return dense_features
        vectors = [dense_features, *(sparse_features[name] for name in self.sparse_feature_names)]
        return torch.cat([dense_features, self.deep_fm(vectors), self.fm(vectors)], dim=1)


class OverArch(nn.Module):
    """Linear to one number, and a sigmoid. Counterpart: torchrec.models.deepfm.OverArch."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(in_features, 1), nn.Sigmoid())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model(features)


class SimpleDeepFMNN(nn.Module):
    """DeepFM: dense `[B, num_dense_features]` and a KJT to probabilities `[B, 1]`.

    Raises:
        AssertionError: no tables, or tables of different embedding_dim.

    Counterpart: torchrec.models.deepfm.SimpleDeepFMNN.
    """

    def __init__(
        self,
        num_dense_features: int,
        embedding_bag_collection: EmbeddingBagCollection,
        hidden_layer_size: int,
        deep_fm_dimension: int,
    ) -> None:
        super().__init__()
        configs = embedding_bag_collection.embedding_bag_configs()
        assert configs, "At least one embedding bag is required"
        dims = {config.name: config.embedding_dim for config in configs}
        assert len(set(dims.values())) == 1, f"All EmbeddingBagConfigs must have the same dimension, got {dims}"
        embedding_dim = configs[0].embedding_dim
        names = [name for table_names in get_embedding_names_by_table(configs) for name in table_names]
        self.sparse_arch = SparseArch(embedding_bag_collection)
        self.dense_arch = DenseArch(num_dense_features, hidden_layer_size, embedding_dim)
        self.inter_arch = FMInteractionArch((len(names) + 1) * embedding_dim, names, deep_fm_dimension)
        self.over_arch = OverArch(embedding_dim + deep_fm_dimension + 1)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        embedded_sparse = self.sparse_arch(sparse_features)
        embedded_dense = self.dense_arch(dense_features)
        return self.over_arch(self.inter_arch(embedded_dense, embedded_sparse))


class SimpleDeepFMNNWrapper(SimpleDeepFMNN):
    """DeepFM on a ModelInput: `(loss, probabilities [B, 1])` in training mode, the probabilities in evaluation mode.

    The loss is the binary cross-entropy of the probabilities; TorchRec takes them for logits there, which is a second
    sigmoid. `float_features` and `idlist_features` are read.

    Raises:
        ValueError: (forward) an input without idlist_features.

    Counterpart: torchrec.models.deepfm.SimpleDeepFMNNWrapper.
    """

    def forward(self, model_input: ModelInput) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        probabilities = super().forward(model_input.float_features, model_input.required_ids())
        if not self.training:
            return probabilities
        return F.binary_cross_entropy(probabilities.squeeze(-1), model_input.label.float()), probabilities
