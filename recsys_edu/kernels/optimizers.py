"""Fused row optimizers: what happens to the rows that a batch touched, and to no other row.

A batch of 2048 examples touches a few thousand rows of a table of millions. A fused update therefore gathers the
touched rows and their state, applies an ordinary optimizer's formula to them, and scatters them back. Below, `w` are
the touched rows' weights [U, D], `g` the gradients summed per row, and `m1`, `m2` their state.

| kind                 | momentum1 | momentum2 | FBGEMM fuses it on |
|----------------------|-----------|-----------|--------------------|
| SGD                  |           |           | CPU, CUDA          |
| ADAGRAD              | [R, D]    |           | CPU, CUDA          |
| ROWWISE_ADAGRAD      | [R]       |           | CPU, CUDA          |
| ADAM                 | [R, D]    | [R, D]    | CUDA               |
| PARTIAL_ROWWISE_ADAM | [R, D]    | [R]       | CUDA               |
| LAMB                 | [R, D]    | [R, D]    | (this file)        |
| LARS_SGD             | [R, D]    |           | (this file)        |

Where FBGEMM does not fuse one, its fast forward is followed by the update of this file. So it is for the first three
with `weight_decay > 0`: FBGEMM's SGD and Adagrad have no decay, and its pooled row-wise Adagrad on CPU ignores it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from recsys_edu.kernels.spec import OptimizerSpec, TableSpec

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, OptimizerSpec, float, int], Tensor]


def sgd(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """w - lr * g."""
    return w - lr * _with_l2(g, w, spec)


def adagrad(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """m1 sums squared gradients, per element. Duchi et al., JMLR 2011."""
    g = _with_l2(g, w, spec)
    state["momentum1"] += g * g
    return w - lr * g / (state["momentum1"].sqrt() + spec.eps)


def rowwise_adagrad(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """Adagrad with one number per row, the sum of mean squared gradients. Gupta et al., arXiv:1406.6200."""
    g = _with_l2(g, w, spec)
    state["momentum1"] += (g * g).mean(dim=1)
    return w - (lr / (state["momentum1"].sqrt() + spec.eps)).unsqueeze(1) * g


def adam(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """Adam (arXiv:1412.6980) with decoupled decay (arXiv:1711.05101).

    An untouched row's moments do not decay, yet the bias correction counts every step, as in FBGEMM's kernel and in
    torch.optim.SparseAdam.
    """
    return w - lr * (_adam_direction(g, g * g, state, spec, step) + spec.weight_decay * w)


def partial_rowwise_adam(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """Adam whose second moment is one number per row: the row's mean squared gradient."""
    mean_square = (g * g).mean(dim=1)
    return w - lr * (_adam_direction(g, mean_square, state, spec, step) + spec.weight_decay * w)


def lamb(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """Adam's direction rescaled, per row, to the length of the row's weights. You et al., arXiv:1904.00962."""
    direction = _adam_direction(g, g * g, state, spec, step) + spec.weight_decay * w
    w_norm, direction_norm = w.norm(dim=1, keepdim=True), direction.norm(dim=1, keepdim=True)
    trust = torch.where((w_norm > 0) & (direction_norm > 0), w_norm / direction_norm, 1.0)
    return w - lr * trust * direction


def lars_sgd(w: Tensor, g: Tensor, state: State, spec: OptimizerSpec, lr: float, step: int) -> Tensor:
    """Momentum SGD with a learning rate per row, eta * |w| / (|g| + decay * |w|). You et al., arXiv:1708.03888."""
    w_norm, g_norm = w.norm(dim=1, keepdim=True), g.norm(dim=1, keepdim=True)
    denominator = g_norm + spec.weight_decay * w_norm
    trust = torch.where((w_norm > 0) & (denominator > 0), spec.eta * w_norm / denominator, 1.0)
    state["momentum1"].mul_(spec.momentum).add_(lr * trust * _with_l2(g, w, spec))
    return w - state["momentum1"]


def _with_l2(g: Tensor, w: Tensor, spec: OptimizerSpec) -> Tensor:
    return g + spec.weight_decay * w if spec.weight_decay else g


def _adam_direction(g: Tensor, square: Tensor, state: State, spec: OptimizerSpec, step: int) -> Tensor:
    first, second = state["momentum1"], state["momentum2"]
    first.mul_(spec.beta1).add_(g, alpha=1 - spec.beta1)
    second.mul_(spec.beta2).add_(square, alpha=1 - spec.beta2)
    root = (second / (1 - spec.beta2**step)).sqrt() + spec.eps
    return first / (1 - spec.beta1**step) / (root if root.dim() == 2 else root.unsqueeze(1))


@dataclass(frozen=True)
class RowOptimizer:
    """One kind's formula and what it remembers: state per element ([R, D]) or per row ([R])."""

    rule: Rule
    state: Mapping[str, str] = field(default_factory=dict)  # name -> "element" or "row"
    counts_steps: bool = False
    fbgemm_devices: tuple[str, ...] = ()


ROW_OPTIMIZERS: Mapping[str, RowOptimizer] = MappingProxyType(
    {
        "SGD": RowOptimizer(sgd, fbgemm_devices=("cpu", "cuda")),
        "ADAGRAD": RowOptimizer(adagrad, {"momentum1": "element"}, fbgemm_devices=("cpu", "cuda")),
        "ROWWISE_ADAGRAD": RowOptimizer(rowwise_adagrad, {"momentum1": "row"}, fbgemm_devices=("cpu", "cuda")),
        "ADAM": RowOptimizer(adam, {"momentum1": "element", "momentum2": "element"}, True, ("cuda",)),
        "PARTIAL_ROWWISE_ADAM": RowOptimizer(
            partial_rowwise_adam, {"momentum1": "element", "momentum2": "row"}, True, ("cuda",)
        ),
        "LAMB": RowOptimizer(lamb, {"momentum1": "element", "momentum2": "element"}, True),
        "LARS_SGD": RowOptimizer(lars_sgd, {"momentum1": "element"}),
    }
)


def new_state(kind: str, table: TableSpec, device: torch.device) -> State:
    """Zeroed float32 state for one table: {} for SGD, {"momentum1": [R, D]} for ADAGRAD, ..."""
    shapes = {"element": (table.num_rows, table.dim), "row": (table.num_rows,)}
    return {name: torch.zeros(shapes[per], device=device) for name, per in ROW_OPTIMIZERS[kind].state.items()}


@torch.no_grad()
def update_rows(
    spec: OptimizerSpec,
    learning_rate: float,
    step: int,
    weights_RD: Tensor,
    state: State,
    rows_U: Tensor,
    gradients_UD: Tensor,
) -> None:
    """Apply one optimizer step in place to the rows `rows_U` (unique) of a table and of its state.

    `step` counts from 1. Arithmetic is float32; weights are rounded to their dtype once, at the end.

    >>> weights = torch.zeros(3, 2)
    >>> update_rows(OptimizerSpec("SGD"), 0.5, 1, weights, {}, torch.tensor([2]), torch.ones(1, 2))
    >>> weights[2]
    tensor([-0.5000, -0.5000])
    """
    if rows_U.numel() == 0:
        return
    optimizer = ROW_OPTIMIZERS[spec.kind]
    touched = {name: state[name].index_select(0, rows_U) for name in optimizer.state}
    old_UD = weights_RD.index_select(0, rows_U).float()
    new_UD = optimizer.rule(old_UD, gradients_UD, touched, spec, learning_rate, step)
    weights_RD.index_copy_(0, rows_U, new_UD.to(weights_RD.dtype))
    for name, rows in touched.items():
        state[name].index_copy_(0, rows_U, rows)
