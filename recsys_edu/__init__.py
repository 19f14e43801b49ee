"""How the world's largest recommenders are trained and served, small enough to read and real enough to run.

    from recsys_edu import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

Everything is loaded on first use, so that `recsys_edu doctor` can still speak where torch cannot.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
    from recsys_edu.modules.embedding_modules import (
        EmbeddingBagCollection,
        EmbeddingBagCollectionInterface,
        EmbeddingCollection,
    )
    from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
    from recsys_edu.streamable import Multistreamable, Pipelineable
    from recsys_edu.types import DataType

__version__ = "0.1.0"

_HOMES = {
    "DataType": "types",
    "EmbeddingBagCollection": "modules.embedding_modules",
    "EmbeddingBagCollectionInterface": "modules.embedding_modules",
    "EmbeddingBagConfig": "modules.embedding_configs",
    "EmbeddingCollection": "modules.embedding_modules",
    "EmbeddingConfig": "modules.embedding_configs",
    "JaggedTensor": "sparse.jagged_tensor",
    "KeyedJaggedTensor": "sparse.jagged_tensor",
    "KeyedTensor": "sparse.jagged_tensor",
    "Multistreamable": "streamable",
    "Pipelineable": "streamable",
    "PoolingType": "modules.embedding_configs",
}
_SUBPACKAGES = ("datasets", "distributed", "inference", "metrics", "models", "modules", "optim", "quant", "sparse")

__all__ = [
    "DataType",
    "EmbeddingBagCollection",
    "EmbeddingBagCollectionInterface",
    "EmbeddingBagConfig",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "JaggedTensor",
    "KeyedJaggedTensor",
    "KeyedTensor",
    "Multistreamable",
    "Pipelineable",
    "PoolingType",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
