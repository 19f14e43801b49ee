"""The division that the ratio metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0 (no examples, or none of any weight).

    >>> ratio_or_zero(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0]))
    tensor([0.2500, 0.0000])
    """
    zero = denominator == 0
    return torch.where(zero, torch.zeros_like(numerator), numerator / denominator)
