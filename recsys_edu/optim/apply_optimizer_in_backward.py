"""Train a parameter as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer


def apply_optimizer_in_backward(
    optimizer_class: type[Optimizer],
    params: Iterable[nn.Parameter],
    optimizer_kwargs: dict[str, Any],
) -> None:
    """Attach an optimizer to each parameter: backward steps it and drops the gradient.

    >>> import torch
    >>> table = nn.EmbeddingBag(10, 4)
    >>> apply_optimizer_in_backward(torch.optim.SGD, table.parameters(), {"lr": 0.1})
    >>> table(torch.tensor([[1, 2]])).sum().backward()      # weights have moved ...
    >>> table.weight.grad is None                           # ... and no gradient is kept
    True

    What is attached, `_optimizer_classes` and `_optimizer_kwargs` (lists), also tells
    DistributedModelParallel which update to fuse into a sharded table's kernel. Calling it again on the
    same parameter adds a second optimizer, which steps after the first. The marker classes of
    `recsys_edu.optim.optimizers` can be attached but raise NotImplementedError when an unsharded module's
    backward reaches them.

    Counterpart: torchrec.optim.apply_optimizer_in_backward.
    """
    seen: set[int] = set()
    for param in params:
        if id(param) in seen:
            continue
        seen.add(id(param))
        optimizer = optimizer_class([param], **optimizer_kwargs)  # may raise: then nothing was attached
        if not hasattr(param, "_optimizer_classes"):
            param._optimizer_classes = []
            param._optimizer_kwargs = []
            param._in_backward_optimizers = []
            param.register_post_accumulate_grad_hook(_step_attached_optimizers)
        param._optimizer_classes.append(optimizer_class)
        param._optimizer_kwargs.append(dict(optimizer_kwargs))
        param._in_backward_optimizers.append(optimizer)


def _step_attached_optimizers(param: nn.Parameter) -> None:
    for optimizer in param._in_backward_optimizers:
        optimizer.step()
    param.grad = None
