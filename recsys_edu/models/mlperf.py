"""MLPerf's DLRM-DCNv2 (training v3.0 on, Criteo 1 TB multi-hot): its numbers, and the model made from them.

    tables     26, 204,184,588 rows of 128 columns, about 97 GiB in float32; at most 40 million rows per table
    dense      13 -> 512 -> 256 -> 128          cross network  3 layers of rank 512 over 27 x 128 = 3,456 columns
    over       1024 -> 1024 -> 512 -> 256 -> 1  batch 65,536, Adagrad, learning rate 0.005, target AUC 0.80275

Source: MLCommons training reference, recommendation_v2/torchrec_dlrm (rows, bag sizes, layers), and Wang et al.,
DCN V2, WWW 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recsys_edu.datasets.criteo import DEFAULT_CAT_NAMES, INT_FEATURE_COUNT
from recsys_edu.models.dlrm import DLRM_DCN
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

# fmt: off
NUM_EMBEDDINGS_PER_FEATURE = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10,
    2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
MULTI_HOT_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
# fmt: on


@dataclass(frozen=True)
class DLRMDCNv2Config:
    """The benchmark's settings; `scaled` shrinks the tables for a laptop and leaves the rest."""

    num_embeddings_per_feature: tuple[int, ...] = NUM_EMBEDDINGS_PER_FEATURE
    multi_hot_sizes: tuple[int, ...] = MULTI_HOT_SIZES
    embedding_dim: int = 128
    dense_arch_layer_sizes: tuple[int, ...] = (512, 256, 128)
    over_arch_layer_sizes: tuple[int, ...] = (1024, 1024, 512, 256, 1)
    dcn_num_layers: int = 3
    dcn_low_rank_dim: int = 512
    global_batch_size: int = 65_536
    learning_rate: float = 0.005
    target_auc: float = 0.80275

    def scaled(self, max_rows: int) -> DLRMDCNv2Config:
        """The same with at most `max_rows` rows per table.

        >>> sum(DLRMDCNv2Config().scaled(1000).num_embeddings_per_feature)
        18369
        """
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        rows = tuple(min(rows, max_rows) for rows in self.num_embeddings_per_feature)
        return DLRMDCNv2Config(**{**self.__dict__, "num_embeddings_per_feature": rows})

    def tables(self) -> list[EmbeddingBagConfig]:
        """One table per categorical feature of Criteo, `t_cat_0` to `t_cat_25`, summed bags."""
        return [
            EmbeddingBagConfig(
                name=f"t_{feature}", num_embeddings=rows, embedding_dim=self.embedding_dim, feature_names=[feature]
            )
            for feature, rows in zip(DEFAULT_CAT_NAMES, self.num_embeddings_per_feature)
        ]

    def table_bytes(self) -> int:
        """Bytes of all weights in float32."""
        return 4 * self.embedding_dim * sum(self.num_embeddings_per_feature)


def dlrm_dcnv2(
    config: DLRMDCNv2Config | None = None,
    embedding_device: torch.device | None = None,
    dense_device: torch.device | None = None,
) -> DLRM_DCN:
    """The benchmark's model. Make the tables on `meta` and let DistributedModelParallel fill them shard by shard.

    >>> model = dlrm_dcnv2(DLRMDCNv2Config().scaled(100), torch.device("meta"), torch.device("meta"))
    >>> model.inter_arch.crossnet.W_kernels[0].shape
    torch.Size([3456, 512])
    """
    config = config or DLRMDCNv2Config()
    return DLRM_DCN(
        EmbeddingBagCollection(config.tables(), device=embedding_device),
        INT_FEATURE_COUNT,
        list(config.dense_arch_layer_sizes),
        list(config.over_arch_layer_sizes),
        config.dcn_num_layers,
        config.dcn_low_rank_dim,
        dense_device,
    )
