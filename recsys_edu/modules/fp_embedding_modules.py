"""Feature processors in front of a weighted EmbeddingBagCollection, as one module.

    ids -> processors give every id a weight -> weighted sum of the ids' rows

Counterpart: torchrec.modules.fp_embedding_modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.feature_processor_ import FeatureProcessor, FeatureProcessorsCollection, with_weights
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


def apply_feature_processors_to_kjt(
    features: KeyedJaggedTensor, feature_processors: Mapping[str, nn.Module]
) -> KeyedJaggedTensor:
    """Run each feature through its processor and put the weights together again; others get the weight 1.

    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([7, 2]), torch.tensor([2]))
    >>> apply_feature_processors_to_kjt(kjt, {}).weights().tolist()
    [1.0, 1.0]
    """
    weights = []
    for key in features.keys():
        jt = features[key]
        if key in feature_processors:
            weights.append(feature_processors[key](jt).weights())
        else:
            weights.append(torch.ones(len(jt.values()), dtype=torch.float32, device=features.device()))
    return with_weights(features, torch.cat(weights) if weights else features.values().new_zeros(0).float())


class FeatureProcessorDictWrapper(FeatureProcessorsCollection):
    """A ModuleDict of per-feature processors as one FeatureProcessorsCollection; child `_feature_processors`."""

    def __init__(self, feature_processors: nn.ModuleDict) -> None:
        super().__init__()
        self._feature_processors = feature_processors

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return apply_feature_processors_to_kjt(features, self._feature_processors)


class FeatureProcessedEmbeddingBagCollection(nn.Module):
    """A weighted EmbeddingBagCollection whose weights come from feature processors.

    >>> from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
    >>> from recsys_edu.modules.feature_processor_ import PositionWeightedModule
    >>> ebc = EmbeddingBagCollection(is_weighted=True, tables=[
    ...     EmbeddingBagConfig(name="film", num_embeddings=10, embedding_dim=4, feature_names=["seen"])])
    >>> module = FeatureProcessedEmbeddingBagCollection(ebc, {"seen": PositionWeightedModule(3)})
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["seen"], torch.tensor([7, 2]), torch.tensor([2]))
    >>> module(kjt)["seen"].shape
    torch.Size([1, 4])

    Children: `_feature_processors` (the collection, or a ModuleDict by feature), `_embedding_bag_collection`.
    Features of the input that have no table are ignored.

    Raises:
        AssertionError: a collection that is not weighted; processors that do not cover exactly its features.
        KeyError: (forward) a feature that the input does not have.

    Counterpart: torchrec.modules.fp_embedding_modules.FeatureProcessedEmbeddingBagCollection.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        feature_processors: dict[str, FeatureProcessor] | FeatureProcessorsCollection,
    ) -> None:
        super().__init__()
        assert embedding_bag_collection.is_weighted(), (
            "feature processors make weights: the EmbeddingBagCollection has to be made with is_weighted=True"
        )
        self._feature_names = table_features(embedding_bag_collection)
        self._embedding_bag_collection = embedding_bag_collection
        self._feature_processors: FeatureProcessorsCollection | nn.ModuleDict
        if isinstance(feature_processors, FeatureProcessorsCollection):
            self._feature_processors = feature_processors
        else:
            wanted, given = set(self._feature_names), set(feature_processors)
            assert wanted == given, (
                f"one processor for each feature of the tables is needed: missing {sorted(wanted - given)},"
                f" without a table {sorted(given - wanted)}"
            )
            self._feature_processors = nn.ModuleDict(feature_processors)

    def split(self) -> tuple[FeatureProcessorsCollection, EmbeddingBagCollection]:
        """(processors, embedding bag collection)."""
        processors = self._feature_processors
        if isinstance(processors, nn.ModuleDict):
            processors = FeatureProcessorDictWrapper(processors)
        return processors, self._embedding_bag_collection

    def is_weighted(self) -> bool:
        """Always: the weights are what the processors are for."""
        return True

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs of the collection inside."""
        return self._embedding_bag_collection.embedding_bag_configs()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self._embedding_bag_collection(self.process(features))

    def process(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of the tables, with the weights that the processors give them."""
        return run_processors(self._feature_processors, only(features, self._feature_names))


def run_processors(
    processors: FeatureProcessorsCollection | nn.ModuleDict, kjt: KeyedJaggedTensor
) -> KeyedJaggedTensor:
    """All features through their processors, whichever form those have."""
    if isinstance(processors, nn.ModuleDict):
        return apply_feature_processors_to_kjt(kjt, processors)
    return processors(kjt)


def table_features(collection: EmbeddingBagCollection) -> list[str]:
    """Every feature of the collection once, in table order."""
    return list(dict.fromkeys(name for config in collection.embedding_bag_configs() for name in config.feature_names))


def only(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """The named features, in that order; KeyError for one that is missing."""
    if features.keys() == names:
        return features
    index_of = features.index_per_key()
    missing = [name for name in names if name not in index_of]
    if missing:
        raise KeyError(f"the input has no features {missing}; it has {features.keys()}")
    return features.permute([index_of[name] for name in names])
