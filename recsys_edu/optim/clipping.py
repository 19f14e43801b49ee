"""Keep one wild batch from throwing the weights far away: bound the gradients before the step."""

from __future__ import annotations

from enum import Enum, unique
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recsys_edu.optim.keyed import KeyedOptimizer, OptimizerWrapper


@unique
class GradientClipping(Enum):
    """NORM scales all gradients together, VALUE clamps each number, NONE does nothing."""

    NORM = "norm"
    VALUE = "value"
    NONE = "none"


class GradientClippingOptimizer(OptimizerWrapper):
    """Clips gradients, then steps the wrapped optimizer.

    >>> from recsys_edu.optim.keyed import KeyedOptimizerWrapper
    >>> weight = nn.Parameter(torch.zeros(2))
    >>> inner = KeyedOptimizerWrapper({"w": weight}, lambda params: torch.optim.SGD(params, lr=1.0))
    >>> clipped = GradientClippingOptimizer(inner, GradientClipping.NORM, max_gradient=1.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])                     # norm 5
    >>> clipped.step()
    >>> [round(number, 3) for number in weight.tolist()]
    [-0.6, -0.8]

    `max_gradient` bounds the total norm (NORM) or each number (VALUE); `norm_type` is the p of the norm,
    "inf" included. With `enable_global_grad_clip`, `param_to_pgs` names for each sharded parameter the
    process groups over which its norm is summed; parameters without an entry are taken to be replicated.
    `track_grad_norm` keeps the last total norm in `last_total_grad_norm`. Parameters without a gradient,
    and those whose optimizer runs in backward, are not clipped.

    Counterpart: torchrec.optim.clipping.GradientClippingOptimizer.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        clipping: GradientClipping = GradientClipping.NONE,
        max_gradient: float = 0.1,
        norm_type: float | str = 2.0,
        enable_global_grad_clip: bool = False,
        param_to_pgs: dict[nn.Parameter, list[dist.ProcessGroup]] | None = None,
        track_grad_norm: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self._clipping = clipping
        self._max_gradient = max_gradient
        self._norm_type = float(norm_type)
        self._enable_global_grad_clip = enable_global_grad_clip
        self._param_to_pgs = param_to_pgs or {}
        self._track_grad_norm = track_grad_norm
        self._last_total_grad_norm: torch.Tensor | None = None

    @property
    def last_total_grad_norm(self) -> torch.Tensor | None:
        """The total norm before the last step's clipping; None unless `track_grad_norm`."""
        return self._last_total_grad_norm

    def step(self, closure: Any = None) -> None:
        if self._clipping is GradientClipping.NORM:
            self.clip_grad_norm_()
        elif self._clipping is GradientClipping.VALUE:
            torch.nn.utils.clip_grad_value_(self._parameters(), self._max_gradient)
        if self._track_grad_norm and self._clipping is not GradientClipping.NORM:
            self._last_total_grad_norm, _ = self.compute_total_grad_norm()
        super().step(closure)

    def compute_total_grad_norm(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The norm of all gradients together, and the gradients."""
        gradients = [param.grad for param in self._parameters()]
        if self._enable_global_grad_clip and self._param_to_pgs:
            return self._global_norm(), gradients
        return torch.nn.utils.get_total_norm(gradients, self._norm_type), gradients

    def clip_grad_norm_(self) -> float | torch.Tensor | None:
        """Scale the gradients so that their total norm is at most `max_gradient`; returns the norm before."""
        total_norm, _ = self.compute_total_grad_norm()
        if self._track_grad_norm:
            self._last_total_grad_norm = total_norm
        torch.nn.utils.clip_grads_with_norm_(self._parameters(), self._max_gradient, total_norm)
        return total_norm

    def _parameters(self) -> list[torch.Tensor]:
        grouped = [param for group in self.param_groups for param in group["params"]]
        return [param for param in grouped if param.grad is not None and not param.grad.is_meta]

    def _global_norm(self) -> torch.Tensor:
        """Sum |g|^p of the shards over their groups (for "inf": the largest), then take the root."""
        is_max = self._norm_type == float("inf")
        by_groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
        for param in self.params.values():  # every rank walks all of them: a rank without gradients still joins
            groups = tuple(self._param_to_pgs.get(param, ()))
            gradients = by_groups.setdefault(groups, [])
            if param.grad is not None and not param.grad.is_meta:
                gradients.append(param.grad)
        parts = []
        for groups, gradients in by_groups.items():
            norm = torch.nn.utils.get_total_norm(gradients, self._norm_type)
            part = norm if is_max else norm**self._norm_type
            for group in groups:
                dist.all_reduce(part, op=dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
            parts.append(part)
        stacked = torch.stack(parts) if parts else torch.zeros(1)
        return stacked.max() if is_max else stacked.sum() ** (1 / self._norm_type)
