"""Helpers around quantised models.

Counterpart: torchrec.quant.utils.
"""

from __future__ import annotations

import torch
from torch import nn

from recsys_edu.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection


def meta_to_cpu_placement(module: nn.Module) -> None:
    """Give every quantised collection that is on the meta device memory on the CPU, in place; rows are zero.

    What it holds then comes from `load_state_dict`.
    """
    for child in module.modules():
        if isinstance(child, (EmbeddingBagCollection, EmbeddingCollection)) and child.device.type == "meta":
            child.to_empty(device=torch.device("cpu"))
