"""Adagrad with one accumulator per row of a table.

    Adagrad:           sum[r, c] += g[r, c]^2              D numbers of state per row
    row-wise Adagrad:  sum[r]    += mean over c of g[r, c]^2    1 number of state per row

For a table of 64 columns the state shrinks from the size of the table to 1/64 of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class RowWiseAdagrad(Optimizer):
    """Adagrad whose accumulator is the row's mean squared gradient.

    >>> table = nn.Parameter(torch.ones(3, 2))
    >>> optimizer = RowWiseAdagrad([table], lr=0.1)
    >>> table[0].sum().backward()
    >>> _ = optimizer.step()
    >>> table[0].tolist(), table[1].tolist()                # gradient 1, sum 1: the row moves by lr
    ([0.8999999761581421, 0.8999999761581421], [1.0, 1.0])

    With g the gradient (plus `weight_decay` times the weight, minus it if `maximize`), in step t:

        sum    += mean(g^2) of the row
        weight -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    State: `sum` [R, 1] starting at `initial_accumulator_value`, and `step`. Parameters have two or more
    dimensions. This is the dense form: with weight decay it moves every row, a fused kernel only the rows
    a batch touched.

    Raises:
        ValueError: a negative hyper-parameter, or a parameter of fewer than two dimensions.
        RuntimeError: a sparse gradient.

    Counterpart: torchrec.optim.rowwise_adagrad.RowWiseAdagrad.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **unused: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, value in defaults.items():
            if not value >= 0.0:
                raise ValueError(f"Invalid {name} value: {value}, expected 0 or more")
        super().__init__(params, {**defaults, "maximize": maximize})
        for group in self.param_groups:
            for param in group["params"]:
                if param.dim() < 2:
                    raise ValueError(f"RowWiseAdagrad needs rows: expected 2 or more dimensions, got {param.shape}")
                shape, kind = (param.shape[0], 1), {"dtype": param.dtype, "device": param.device}  # meta: no memory
                self.state[param] = {
                    "step": torch.tensor(0.0),
                    "sum": torch.full(shape, initial_accumulator_value, **kind),
                }

    def share_memory(self) -> None:
        """Move the accumulators to shared memory, for training in several processes of one host."""
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"].share_memory_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> torch.Tensor | None:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _update(param, param.grad, self.state[param], group)
        return loss


def _update(param_RD: torch.Tensor, grad_RD: torch.Tensor, state: dict[str, torch.Tensor], group: dict) -> None:
    if grad_RD.is_sparse:
        raise RuntimeError("RowWiseAdagrad takes dense gradients; make the table with sparse=False")
    state["step"] += 1
    if group["maximize"]:
        grad_RD = -grad_RD
    if group["weight_decay"] != 0:
        grad_RD = grad_RD + group["weight_decay"] * param_RD
    rate = group["lr"] / (1 + (state["step"].item() - 1) * group["lr_decay"])  # the counter lives on the host
    state["sum"] += grad_RD.flatten(1).square().mean(dim=1, keepdim=True)
    scale_R1 = (state["sum"].sqrt() + group["eps"]).reciprocal().mul_(-rate)
    param_RD.addcmul_(grad_RD, scale_R1.view(-1, *[1] * (param_RD.dim() - 1)))
