"""DLRM as a server sees it: dense numbers and ragged ids in, a probability out.

    {"float_features": [B, I], "id_list_features.lengths": [F * B], "id_list_features.values": [N]}
        -> {"default": [B]}

Counterpart: torchrec.inference.dlrm_predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.inference.modules import (
    BatchingMetadata,
    PredictFactory,
    PredictModule,
    quantize_inference_model,
    shard_quant_model,
)
from recsys_edu.models.dlrm import DLRM
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

DENSE, LENGTHS, VALUES = "float_features", "id_list_features.lengths", "id_list_features.values"


class DLRMPredictModule(PredictModule):
    """DLRM with a sigmoid behind it.

    Args:
        embedding_bag_collection: the tables, float or quantised.
        dense_in_features: I.
        dense_arch_layer_sizes, over_arch_layer_sizes: as DLRM's.
        id_list_features_keys: the F features, in the order of a request's lengths and values.
        dense_device: where it runs.

    Counterpart: torchrec.inference.dlrm_predict.DLRMPredictModule.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        id_list_features_keys: list[str],
        dense_device: torch.device | None = None,
    ) -> None:
        model = DLRM(
            embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device
        )
        super().__init__(model, None if dense_device is None else str(dense_device))
        self.id_list_features_keys = list(id_list_features_keys)

    def predict_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities, {"default": [B] on the CPU}.

        Raises:
            KeyError: a missing input, by name.
        """
        missing = [name for name in (DENSE, LENGTHS, VALUES) if name not in batch]
        if missing:
            raise KeyError(f"the request has no {missing}; it has {list(batch)}")
        features = KeyedJaggedTensor(
            self.id_list_features_keys, batch[VALUES].to(self.device), lengths=batch[LENGTHS].to(self.device).view(-1)
        )
        logits = self.predict_module(batch[DENSE].to(self.device), features)
        return {"default": logits.float().sigmoid().squeeze(-1).cpu()}


@dataclass(frozen=True)
class DLRMModelConfig:
    """Sizes of a DLRM, and one batch to try it with.

    Counterpart: torchrec.inference.dlrm_predict.DLRMModelConfig.
    """

    dense_arch_layer_sizes: list[int]
    dense_in_features: int
    embedding_dim: int
    id_list_features_keys: list[str]
    num_embeddings_per_feature: list[int]
    num_embeddings: int
    over_arch_layer_sizes: list[int]
    sample_input: Batch


class DLRMPredictFactory(PredictFactory):
    """Makes a DLRM on meta, quantised and sharded; weights come from `load_state_dict`.

    Counterpart: torchrec.inference.dlrm_predict.DLRMPredictFactory.
    """

    def __init__(self, model_config: DLRMModelConfig) -> None:
        self.model_config = model_config

    def create_predict_module(self, world_size: int, device: str) -> nn.Module:
        """The module with int8 tables of zeros over `world_size` devices of the kind of `device`."""
        config = self.model_config
        rows = config.num_embeddings_per_feature or [config.num_embeddings] * len(config.id_list_features_keys)
        tables = [
            EmbeddingBagConfig(count, config.embedding_dim, f"t_{feature}", feature_names=[feature])
            for feature, count in zip(config.id_list_features_keys, rows)
        ]
        module = DLRMPredictModule(
            EmbeddingBagCollection(tables, device=torch.device("meta")),
            config.dense_in_features,
            config.dense_arch_layer_sizes,
            config.over_arch_layer_sizes,
            config.id_list_features_keys,
            torch.device(device),
        )
        quantised = quantize_inference_model(module)
        sharded, _ = shard_quant_model(quantised, world_size, torch.device(device).type)
        return sharded

    def batching_metadata(self) -> dict[str, BatchingMetadata]:
        return {
            DENSE: BatchingMetadata("dense", "cpu", [DENSE]),
            "id_list_features": BatchingMetadata("sparse", "cpu", [LENGTHS, VALUES]),
        }

    def result_metadata(self) -> str:
        return "dict_of_tensor"

    def run_weights_independent_tranformations(self, predict_module: nn.Module) -> nn.Module:
        return predict_module

    def run_weights_dependent_transformations(self, predict_module: nn.Module) -> nn.Module:
        return predict_module
