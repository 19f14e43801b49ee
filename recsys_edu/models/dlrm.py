"""DLRM, the deep learning recommendation model (Naumov et al., arXiv:1906.00091).

    dense  [B, I] --- DenseArch (MLP) ------------ [B, D] --+
                                                            +-- InteractionArch -- OverArch (MLP) -- logit [B, 1]
    sparse KJT ------ SparseArch (tables) ---- [B, F, D] ---+

Shapes: B batch, I dense inputs, F sparse features, V = F + 1 vectors, D columns, P = V * F / 2 pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.models.model_input import ModelInput
from recsys_edu.modules.crossnet import LowRankCrossNet
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from recsys_edu.modules.mlp import MLP
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


def choose(n: int, k: int) -> int:
    """How many ways to pick k of n; 0 where there are none.

    >>> choose(4, 2), choose(2, 4)
    (6, 0)
    """
    if not 0 <= k <= n:
        return 0
    ways = 1
    for step in range(1, min(k, n - k) + 1):
        ways = ways * (n - step + 1) // step
    return ways


class SparseArch(nn.Module):
    """The embedding tables: ids in, one vector per example and feature out.

    Forward: KJT to `[B, F, D]`, features in the collection's order.

    Raises:
        AssertionError: no tables, or tables of different embedding_dim.

    Counterpart: torchrec.models.dlrm.SparseArch.
    """

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.D = _common_dim(embedding_bag_collection)
        names = get_embedding_names_by_table(embedding_bag_collection.embedding_bag_configs())
        self._sparse_feature_names = [name for table_names in names for name in table_names]
        self.F = len(self._sparse_feature_names)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.stack(self.embedding_bag_collection(features))

    def stack(self, embeddings: KeyedTensor) -> torch.Tensor:
        """The collection's answer as `[B, F, D]`; waits for it where it is still on its way."""
        return embeddings.values().reshape(-1, self.F, self.D)

    @property
    def sparse_feature_names(self) -> list[str]:
        """Feature names in output order."""
        return self._sparse_feature_names


class DenseArch(nn.Module):
    """The bottom MLP, which brings the dense inputs to the width of an embedding: `[B, I]` to `[B, D]`.

    Counterpart: torchrec.models.dlrm.DenseArch.
    """

    def __init__(self, in_features: int, layer_sizes: list[int], device: torch.device | None = None) -> None:
        super().__init__()
        self.model = MLP(in_features, layer_sizes, bias=True, activation="relu", device=device)
        self._in_features = in_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_dense_features(features, self._in_features)
        return self.model(features)


def check_dense_features(features: torch.Tensor, expected: int) -> None:
    """Refuse dense features of another width than the model was built for.

    Raises:
        ValueError: naming both widths.
    """
    if features.dim() != 2 or features.shape[1] != expected:
        raise ValueError(
            f"dense_features is {list(features.shape)}, expected [batch, {expected}]: the model was built with "
            f"dense_in_features={expected}"
        )


def check_same_batch(dense_features: torch.Tensor, sparse_features: torch.Tensor) -> None:
    """Refuse dense and sparse features of different batches.

    Raises:
        ValueError: naming both sizes.
    """
    if dense_features.shape[0] != sparse_features.shape[0]:
        raise ValueError(
            f"dense_features holds {dense_features.shape[0]} examples and sparse_features "
            f"{sparse_features.shape[0]}; a batch has one row of each per example"
        )


torch.fx.wrap("check_dense_features")  # a trace cannot compare shapes; it keeps the calls
torch.fx.wrap("check_same_batch")


class InteractionArch(nn.Module):
    """The dense vector, and how much each pair of vectors agrees.

        vectors    dense, f1, f2                       F = 2
        pairs      dense.f1, dense.f2, f1.f2           C(3, 2) = 3 dot products
        output     [dense | pairs]                     [B, D + 3]

    Forward: dense `[B, D]` and sparse `[B, F, D]` to `[B, D + C(F + 1, 2)]`; without sparse features the
    dense vector alone.

    Counterpart: torchrec.models.dlrm.InteractionArch.
    """

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__()
        self.F = num_sparse_features

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        if self.F <= 0:
            return dense_features
        check_same_batch(dense_features, sparse_features)
        vectors_BVD = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
        return torch.cat((dense_features, pair_products(vectors_BVD)), dim=1)


def pair_products(vectors_BVD: torch.Tensor) -> torch.Tensor:
    """The dot product of every pair i < j of an example's vectors, [B, P].

    >>> pair_products(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]]))          # 0.1, 0.2, 1.2
    tensor([[2., 0., 3.]])
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _PairProducts.apply(vectors_BVD)
    return _pair_products(vectors_BVD)


torch.fx.wrap("pair_products")  # a trace keeps it as one call: which way it goes is known when it runs


def _pair_products(vectors_BVD: torch.Tensor) -> torch.Tensor:
    products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
    return products_BVV.flatten(1).index_select(1, pair_positions(vectors_BVD.shape[1], vectors_BVD.device))


class _PairProducts(torch.autograd.Function):
    """`_pair_products` with a cheaper backward.

    V Vt is symmetric. Write each pair's gradient on both sides of the diagonal, G, and V's gradient is G V: one batched
    product where autograd, which cannot know of the symmetry, takes two.
    """

    @staticmethod
    def forward(vectors_BVD: torch.Tensor) -> torch.Tensor:
        return _pair_products(vectors_BVD)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient_BP: torch.Tensor) -> torch.Tensor:
        (vectors_BVD,) = ctx.saved_tensors
        num_vectors, num_pairs = vectors_BVD.shape[1], gradient_BP.shape[1]
        positions_P = pair_positions(num_vectors, gradient_BP.device)
        pair_VV = torch.full((num_vectors, num_vectors), num_pairs, device=gradient_BP.device)
        pair_VV.view(-1)[positions_P] = torch.arange(num_pairs, device=gradient_BP.device)
        pair_VV = torch.minimum(pair_VV, pair_VV.t())  # the diagonal keeps num_pairs: a column of zeros
        gradient_BVV = nn.functional.pad(gradient_BP, (0, 1)).index_select(1, pair_VV.flatten())
        gradient_BVV = gradient_BVV.view(-1, num_vectors, num_vectors)
        return torch.bmm(gradient_BVV.to(vectors_BVD.dtype), vectors_BVD)  # autocast gives narrower gradients


def pair_positions(num_vectors: int, device: torch.device) -> torch.Tensor:
    """Where the pairs i < j lie in a flattened num_vectors x num_vectors matrix, row by row.

    A few microseconds of arithmetic; kept as a buffer they would be garbage after `meta` and `to_empty`.

    >>> pair_positions(3, torch.device("cpu"))          # (0, 1), (0, 2), (1, 2)
    tensor([1, 2, 5])
    """
    first, second = torch.triu_indices(num_vectors, num_vectors, offset=1, device=device)
    return first * num_vectors + second


class InteractionDCNArch(nn.Module):
    """All vectors side by side through a cross network: `[B, (F + 1) * D]` in and out.

    Counterpart: torchrec.models.dlrm.InteractionDCNArch. DCN v2: Wang et al., arXiv:2008.13535.
    """

    def __init__(self, num_sparse_features: int, crossnet: nn.Module) -> None:
        super().__init__()
        self.F = num_sparse_features
        self.crossnet = crossnet

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        if self.F <= 0:
            return dense_features
        return self.crossnet(torch.cat((dense_features, sparse_features.flatten(1)), dim=1))


class InteractionProjectionArch(nn.Module):
    """Dot products between learned mixtures of the vectors instead of between all pairs.

        all vectors [B, (F+1) * D]  -- branch 1 -->  [B, F1, D] \\
                                    -- branch 2 -->  [B, D, F2] -- product [B, F1 * F2], after the dense vector

    Forward: `[B, D]` and `[B, F, D]` to `[B, D + F1 * F2]`.

    Counterpart: torchrec.models.dlrm.InteractionProjectionArch.
    """

    def __init__(
        self, num_sparse_features: int, interaction_branch1: nn.Module, interaction_branch2: nn.Module
    ) -> None:
        super().__init__()
        self.F = num_sparse_features
        self.interaction_branch1 = interaction_branch1
        self.interaction_branch2 = interaction_branch2

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        if self.F <= 0:
            return dense_features
        batch_size, dim = dense_features.shape
        vectors = torch.cat((dense_features, sparse_features.flatten(1)), dim=1)
        left = self.interaction_branch1(vectors).reshape(batch_size, -1, dim)
        right = self.interaction_branch2(vectors).reshape(batch_size, dim, -1)
        return torch.cat((dense_features, torch.bmm(left, right).flatten(1)), dim=1)


class OverArch(nn.Module):
    """The top MLP: ReLU layers, then a Linear without activation that gives the logit.

    Raises:
        ValueError: fewer than two layers.

    Counterpart: torchrec.models.dlrm.OverArch.
    """

    def __init__(self, in_features: int, layer_sizes: list[int], device: torch.device | None = None) -> None:
        super().__init__()
        if len(layer_sizes) < 2:
            raise ValueError(f"OverArch must have multiple layers, got layer_sizes={layer_sizes}")
        self.model = nn.Sequential(
            MLP(in_features, layer_sizes[:-1], bias=True, activation="relu", device=device),
            nn.Linear(layer_sizes[-2], layer_sizes[-1], bias=True, device=device),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model(features)


class DLRM(nn.Module):
    """The recommendation model: dense and sparse features in, one logit per example out.

    >>> from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    >>> film = EmbeddingBagConfig(name="film", num_embeddings=100, embedding_dim=8, feature_names=["film"])
    >>> model = DLRM(EmbeddingBagCollection([film]), 13, [32, 8], [16, 1])
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["film"], torch.tensor([7, 2, 3]), torch.tensor([2, 1]))
    >>> model(torch.zeros(2, 13), ids).shape
    torch.Size([2, 1])

    `dense_arch_layer_sizes` ends with the tables' embedding_dim, `over_arch_layer_sizes` with 1 (one
    task). Children: `sparse_arch.embedding_bag_collection`, `dense_arch.model`, `inter_arch`,
    `over_arch.model`.

    Raises:
        AssertionError: no tables, or tables of different embedding_dim.
        ValueError: the dense arch's last layer is not as wide as an embedding.

    Counterpart: torchrec.models.dlrm.DLRM.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        embedding_dim = _check_dense_width(embedding_bag_collection, dense_arch_layer_sizes)
        self.sparse_arch = SparseArch(embedding_bag_collection)
        num_sparse_features = len(self.sparse_arch.sparse_feature_names)
        self.dense_arch = DenseArch(dense_in_features, dense_arch_layer_sizes, device=dense_device)
        self.inter_arch: nn.Module = InteractionArch(num_sparse_features)  # no parameters, no buffers: no device
        self.over_arch = OverArch(
            embedding_dim + choose(num_sparse_features + 1, 2), over_arch_layer_sizes, device=dense_device
        )

    def compile_dense_path(self, compile_mode: str = "reduce-overhead") -> None:
        """Compile everything but the tables with torch.compile."""
        self.dense_arch = torch.compile(self.dense_arch, mode=compile_mode)
        self.inter_arch = torch.compile(self.inter_arch, mode=compile_mode)
        self.over_arch = torch.compile(self.over_arch, mode=compile_mode)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        # A sharded collection starts its exchange here, the bottom MLP hides it, and `stack` waits for what is left.
        # Backward does the same: gradients of embeddings travel while the bottom MLP computes its own.
        embeddings = self.sparse_arch.embedding_bag_collection(sparse_features)
        embedded_dense = self.dense_arch(dense_features)
        return self.over_arch(self.inter_arch(embedded_dense, self.sparse_arch.stack(embeddings)))


class DLRM_Projection(DLRM):
    """DLRM with InteractionProjectionArch: both branches end in a multiple of the embedding_dim.

    Raises:
        ValueError: a width that does not fit.

    Counterpart: torchrec.models.dlrm.DLRM_Projection.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        interaction_branch1_layer_sizes: list[int],
        interaction_branch2_layer_sizes: list[int],
        dense_device: torch.device | None = None,
    ) -> None:
        dim = _check_dense_width(embedding_bag_collection, dense_arch_layer_sizes)
        for branch, sizes in enumerate((interaction_branch1_layer_sizes, interaction_branch2_layer_sizes), start=1):
            if sizes[-1] % dim != 0:
                raise ValueError(
                    f"Final interaction branch{branch} layer size ({sizes[-1]}) is not a multiple of "
                    f"embedding size ({dim})"
                )
        super().__init__(
            embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device
        )
        num_sparse_features = len(self.sparse_arch.sparse_feature_names)
        vectors_width = (num_sparse_features + 1) * dim
        self.inter_arch = InteractionProjectionArch(
            num_sparse_features,
            DenseArch(vectors_width, interaction_branch1_layer_sizes, dense_device),
            DenseArch(vectors_width, interaction_branch2_layer_sizes, dense_device),
        )
        num_products = (interaction_branch1_layer_sizes[-1] // dim) * (interaction_branch2_layer_sizes[-1] // dim)
        self.over_arch = OverArch(dim + num_products, over_arch_layer_sizes, dense_device)


class DLRM_DCN(DLRM):
    """DLRM with a low-rank cross network, the MLPerf model (arXiv:2008.13535).

    Raises:
        ValueError: the dense arch's last layer is not as wide as an embedding.

    Counterpart: torchrec.models.dlrm.DLRM_DCN.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dcn_num_layers: int,
        dcn_low_rank_dim: int,
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__(
            embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device
        )
        num_sparse_features = len(self.sparse_arch.sparse_feature_names)
        vectors_width = (num_sparse_features + 1) * self.sparse_arch.D
        crossnet = LowRankCrossNet(vectors_width, dcn_num_layers, dcn_low_rank_dim)
        self.inter_arch = InteractionDCNArch(num_sparse_features, crossnet.to(dense_device))
        self.over_arch = OverArch(vectors_width, over_arch_layer_sizes, device=dense_device)


class DLRMTrain(nn.Module):
    """DLRM and its loss, binary cross-entropy with logits, computed from a Batch.

    Forward: a Batch (`dense_features` [B, I], `sparse_features` KJT, `labels` [B] of 0 and 1) to
    `(loss, (loss, logits [B], labels [B]))`; the inner three are detached.

    Counterpart: torchrec.models.dlrm.DLRMTrain.
    """

    def __init__(self, dlrm_module: DLRM) -> None:
        super().__init__()
        self.model = dlrm_module
        self.loss_fn = nn.BCEWithLogitsLoss()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = self.loss_fn(logits, batch.labels.float())
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


class DLRMWrapper(DLRM):
    """DLRM on a ModelInput: `(loss, logits [B, 1])` in training mode, the logits alone in evaluation mode.

    The loss is DLRMTrain's; `float_features` and `idlist_features` are read.

    Raises:
        ValueError: (forward) an input without idlist_features.

    Counterpart: torchrec.models.dlrm.DLRMWrapper.
    """

    def forward(self, model_input: ModelInput) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(model_input.float_features, model_input.required_ids())
        if not self.training:
            return logits
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), model_input.label.float()), logits


def _common_dim(embedding_bag_collection: EmbeddingBagCollection) -> int:
    configs = embedding_bag_collection.embedding_bag_configs()
    assert configs, "At least one embedding bag is required"
    dims = {config.name: config.embedding_dim for config in configs}
    assert len(set(dims.values())) == 1, f"All EmbeddingBagConfigs must have the same dimension, got {dims}"
    return configs[0].embedding_dim


def _check_dense_width(embedding_bag_collection: EmbeddingBagCollection, dense_arch_layer_sizes: list[int]) -> int:
    """The embedding_dim, which has to be the width of the dense arch's last layer too."""
    dim = _common_dim(embedding_bag_collection)
    if not dense_arch_layer_sizes or dense_arch_layer_sizes[-1] != dim:
        raise ValueError(
            f"embedding_bag_collection dimension ({dim}) and final dense arch layer size "
            f"({dense_arch_layer_sizes[-1] if dense_arch_layer_sizes else 'none'}) must match."
        )
    return dim
