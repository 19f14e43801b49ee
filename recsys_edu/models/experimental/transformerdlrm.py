"""DLRM with a transformer encoder in place of the pairwise dot products.

    dense [B, D], sparse [B, F, D]  ->  F + 1 tokens  ->  transformer encoder  ->  [B, (F + 1) * D]

Every vector attends to every other, so the interaction is learnt and not fixed to dot products; it costs
O((F + 1)^2 * D) per layer, as the dot products do, with a larger factor.

Counterpart: torchrec.models.experimental.transformerdlrm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys_edu.models.dlrm import DLRM, OverArch
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection


class InteractionTransformerArch(nn.Module):
    """A transformer encoder over the dense vector and the F sparse ones.

    >>> InteractionTransformerArch(2, 8, nhead=2, ntransformer_layers=1)(torch.zeros(3, 8), torch.zeros(3, 2, 8)).shape
    torch.Size([3, 24])

    Without sparse features the dense vector comes back. The child is `interarch_TransformerEncoder`.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `nhead`.

    Counterpart: torchrec.models.experimental.transformerdlrm.InteractionTransformerArch.
    """

    def __init__(
        self, num_sparse_features: int, embedding_dim: int, nhead: int = 8, ntransformer_layers: int = 4
    ) -> None:
        super().__init__()
        if embedding_dim % nhead:
            raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of nhead {nhead}")
        self.F, self.D = num_sparse_features, embedding_dim
        layer = nn.TransformerEncoderLayer(d_model=embedding_dim, nhead=nhead, batch_first=True)
        norm = nn.LayerNorm(embedding_dim)
        self.interarch_TransformerEncoder = nn.TransformerEncoder(layer, ntransformer_layers, norm=norm)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        if self.F == 0:
            return dense_features
        tokens = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        return self.interarch_TransformerEncoder(tokens).flatten(1)


class DLRM_Transformer(DLRM):
    """DLRM with that interaction; arguments, children and errors otherwise as DLRM's.

    Counterpart: torchrec.models.experimental.transformerdlrm.DLRM_Transformer.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        nhead: int = 8,
        ntransformer_layers: int = 4,
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__(
            embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device
        )
        dim, features = dense_arch_layer_sizes[-1], len(self.sparse_arch.sparse_feature_names)
        interaction = InteractionTransformerArch(features, dim, nhead, ntransformer_layers)
        self.inter_arch = interaction.to(dense_device) if dense_device is not None else interaction
        self.over_arch = OverArch((features + 1) * dim, over_arch_layer_sizes, device=dense_device)
