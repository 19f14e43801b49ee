"""The two halves of DeepFM (Guo et al., arXiv:1703.04247): a factorization machine and a deep network."""

from __future__ import annotations

import torch
from torch import nn


class FactorizationMachine(nn.Module):
    """The sum of all products of two different inputs, without computing them one by one.

        sum over i < j of x_i x_j  =  ((sum of x)^2 - sum of x^2) / 2

    >>> FactorizationMachine()([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])])     # 1*2 + 1*3 + 2*3
    tensor([[11.]])

    Forward: a list of `[B, ...]` tensors, each flattened, to `[B, 1]`.

    Counterpart: torchrec.modules.deepfm.FactorizationMachine. Rendle, ICDM 2010.
    """

    def forward(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
        inputs = flatten_and_concatenate(embeddings)
        square_of_sum = inputs.sum(dim=1, keepdim=True).square()
        sum_of_squares = inputs.square().sum(dim=1, keepdim=True)
        return (square_of_sum - sum_of_squares) / 2


class DeepFM(nn.Module):
    """All embeddings side by side through `dense_module`.

    Forward: a list of `[B, ...]` tensors, each flattened, to whatever `dense_module` makes of `[B, sum]`.

    Counterpart: torchrec.modules.deepfm.DeepFM.
    """

    def __init__(self, dense_module: nn.Module) -> None:
        super().__init__()
        self.dense_module = dense_module

    def forward(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
        return self.dense_module(flatten_and_concatenate(embeddings))


def flatten_and_concatenate(embeddings: list[torch.Tensor]) -> torch.Tensor:
    """`[B, ...]` tensors as one `[B, sum of their sizes]`."""
    return torch.cat([embedding.flatten(1) for embedding in embeddings], dim=1)
