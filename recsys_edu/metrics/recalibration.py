"""Undo the shift of sampled negatives: where only a share c of them was kept, p becomes p / (p + (1 - p) / c).

    kept 10 % of the negatives:  the model says 0.5  ->  really 0.5 / (0.5 + 0.5 / 0.1) = 0.09

Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 6.3.
"""

from __future__ import annotations

from torch import Tensor


def recalibrated(predictions: Tensor, coefficient: float) -> Tensor:
    """The predictions as if no negative had been left out; ``coefficient`` is the share that was kept.

    >>> import torch
    >>> recalibrated(torch.tensor([0.5]), 0.25)
    tensor([0.2000])
    """
    return predictions / (predictions + (1 - predictions) / coefficient)
