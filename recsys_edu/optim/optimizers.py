"""Names of fused updates, to hand to `apply_optimizer_in_backward`.

torch.optim has no LAMB and no row-wise Adam; the fused kernels of some devices do. These classes only
say which update a sharded table should use. They cannot step by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def in_backward_optimizer_filter(
    named_parameters: Iterator[tuple[str, nn.Parameter]], include: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters that still need an optimizer; with `include` those that do not.

    >>> from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    >>> model = nn.Linear(2, 1)
    >>> apply_optimizer_in_backward(torch.optim.SGD, [model.weight], {"lr": 0.1})
    >>> [name for name, _ in in_backward_optimizer_filter(model.named_parameters())]
    ['bias']

    Counterpart: torchrec.optim.optimizers.in_backward_optimizer_filter.
    """
    for name, parameter in named_parameters:
        if hasattr(parameter, "_optimizer_classes") == include:
            yield name, parameter


class _Marker(Optimizer):
    """An optimizer that only a fused kernel can carry out."""

    def __init__(self, params: Iterable[nn.Parameter], **kwargs: Any) -> None:
        super().__init__(params, kwargs)

    def step(self, closure: Any = None) -> torch.Tensor:
        name = type(self).__name__
        raise NotImplementedError(
            f"recsys_edu.optim.{name} only names the fused update of a sharded table, and this parameter's module is "
            f"not sharded (or no kernel here fuses {name}). Shard the module with DistributedModelParallel, or hand "
            "apply_optimizer_in_backward an optimizer that can step: one of torch.optim, or RowWiseAdagrad."
        )


class SGD(_Marker):
    """Stochastic gradient descent, fused. Counterpart: torchrec.optim.optimizers.SGD."""


class LarsSGD(_Marker):
    """SGD with layer-wise rates (LARS, arXiv:1708.03888). Counterpart: torchrec.optim.optimizers.LarsSGD."""


class LAMB(_Marker):
    """Adam with layer-wise rates (LAMB, arXiv:1904.00962). Counterpart: torchrec.optim.optimizers.LAMB."""


class PartialRowWiseLAMB(_Marker):
    """LAMB with one second moment per row. Counterpart: torchrec.optim.optimizers.PartialRowWiseLAMB."""


class Adam(_Marker):
    """Adam (arXiv:1412.6980), fused. Counterpart: torchrec.optim.optimizers.Adam."""


class PartialRowWiseAdam(_Marker):
    """Adam with one second moment per row. Counterpart: torchrec.optim.optimizers.PartialRowWiseAdam."""


class Adagrad(_Marker):
    """Adagrad (Duchi et al., 2011), fused. Counterpart: torchrec.optim.optimizers.Adagrad."""
