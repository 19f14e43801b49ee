"""Activations that torch.nn does not have."""

from __future__ import annotations

import torch
from torch import nn


class SwishLayerNorm(nn.Module):
    """Gates every input by how it stands among its neighbours: `x * sigmoid(LayerNorm(x))`.

    >>> SwishLayerNorm(4)(torch.ones(2, 4)).tolist()[0]      # equal inputs: LayerNorm is 0, sigmoid 1/2
    [0.5, 0.5, 0.5, 0.5]

    Shapes: `[..., *input_dims]` float in and out. Parameters `norm.0.weight`, `norm.0.bias`.

    Counterpart: torchrec.modules.activation.SwishLayerNorm.
    """

    def __init__(self, input_dims: int | list[int] | torch.Size, device: torch.device | None = None) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(input_dims, device=device), nn.Sigmoid())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.norm(input)
