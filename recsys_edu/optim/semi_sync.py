"""Semi-synchronous training: many local steps, then one step of a second optimizer on what all ranks moved.

    local:   w -> w1 -> w2 -> ... -> wH          each rank on its own batches, no communication
    global:  pseudo-gradient g = mean over ranks of (w - wH);  w <- global_optimizer(w, g);  every rank goes on from w

With H = num_local_steps the ranks talk H times less often. With plain SGD at rate 1 as the global optimizer this is
local SGD (the ranks' mean); with momentum it is what DiLoCo does.

Source: Douillard et al., DiLoCo, arXiv:2311.08105. Counterpart: torchrec.optim.semi_sync.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_edu.optim.keyed import KeyedOptimizer

LOCAL, GLOBAL = "local_", "global_"


class SemisyncOptimizer(KeyedOptimizer):
    """The local optimizer in every step, the global one after every `num_local_steps` of them.

    >>> from recsys_edu.optim.keyed import KeyedOptimizerWrapper
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> sgd = lambda lr: KeyedOptimizerWrapper({"w": weight}, lambda params: torch.optim.SGD(params, lr=lr))
    >>> optimizer = SemisyncOptimizer([weight], sgd(0.25), sgd(1.0), num_local_steps=2)
    >>> for _ in range(2):
    ...     weight.grad = torch.ones(1)
    ...     optimizer.step()
    >>> weight.tolist()                                      # alone, a global SGD at rate 1 changes nothing
    [0.5]

    Both optimizers work on the same parameters. Their state and groups appear under `local_<name>` and
    `global_<name>`. Gradients are used up by the global step: call `zero_grad` before every backward, as always.

    Args:
        global_params: what the global optimizer trains: tensors, groups (dicts with "params"), or (name, tensor) pairs.
        semi_sync_worker_shard_group: the ranks whose moves are averaged; default: this rank alone.
        offload_global_model: keep the copy of the weights at the last global step in host memory.
        non_blocking: copy that way, where it is on the CPU and pinned.

    Raises:
        ValueError: `num_local_steps` below 1, or a global parameter that the global optimizer does not have.

    Counterpart: torchrec.optim.semi_sync.SemisyncOptimizer.
    """

    def __init__(
        self,
        global_params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        optimizer: KeyedOptimizer,
        global_optimizer: KeyedOptimizer,
        num_local_steps: int = 16,
        semi_sync_worker_shard_group: dist.ProcessGroup | None = None,
        offload_global_model: bool = False,
        non_blocking: bool = False,
    ) -> None:
        if num_local_steps < 1:
            raise ValueError(f"num_local_steps must be at least 1, got {num_local_steps}")
        self._optimizer, self._global_optimizer = optimizer, global_optimizer
        self._num_local_steps, self._group, self._non_blocking = (
            num_local_steps,
            semi_sync_worker_shard_group,
            non_blocking,
        )
        self._worker_params = list(_tensors(global_params))
        known = {id(param) for param in global_optimizer.params.values()}
        strangers = [tuple(param.shape) for param in self._worker_params if id(param) not in known]
        if strangers:
            raise ValueError(f"global_params of shapes {strangers} are not among the global optimizer's parameters")
        copy_to = torch.device("cpu") if offload_global_model else None
        self._global_model = [param.detach().to(copy_to, copy=True) for param in self._worker_params]
        self._local_step_counter = 0
        self._become_torch_optimizer()

    @property
    def params(self) -> Mapping[str, Tensor]:
        return self._merged(lambda optimizer: optimizer.params)

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """State by tensor; a tensor that both optimizers train has entries `local_...` and `global_...`."""
        merged: dict[Tensor, Any] = {}
        for prefix, optimizer in ((LOCAL, self._optimizer), (GLOBAL, self._global_optimizer)):
            for param, entries in optimizer.state.items():
                merged.setdefault(param, {}).update({f"{prefix}{key}": value for key, value in entries.items()})
        return merged

    @property
    def param_groups(self) -> Collection[Mapping[str, Any]]:
        return [*self._optimizer.param_groups, *self._global_optimizer.param_groups]

    def _merged(self, part) -> dict[str, Any]:
        parts = ((LOCAL, part(self._optimizer)), (GLOBAL, part(self._global_optimizer)))
        return {f"{prefix}{name}": value for prefix, values in parts for name, value in values.items()}

    def step(self, closure: Any = None) -> None:
        """One local step; after every `num_local_steps`-th also the global one."""
        self._optimizer.step(closure)
        self._local_step_counter += 1
        if self._local_step_counter % self._num_local_steps == 0:
            self._global_step()

    @torch.no_grad()
    def _global_step(self) -> None:
        kept = [param.grad for param in self._worker_params]
        for param, start in zip(self._worker_params, self._global_model):
            start = start.to(param.device, non_blocking=self._non_blocking)
            moved = start - param
            if self._group is not None:
                dist.all_reduce(moved, group=self._group)
                moved /= self._group.size()
            param.copy_(start)
            param.grad = moved
        self._global_optimizer.step()
        for param, start, gradient in zip(self._worker_params, self._global_model, kept):
            start.copy_(param, non_blocking=self._non_blocking)
            param.grad = gradient

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Make both optimizers' lazily created state exist; the weights stay."""
        self._optimizer.init_state(sparse_grad_parameter_names)
        self._global_optimizer.init_state(sparse_grad_parameter_names)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)
        self._global_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' state by name, `local_<name>` and `global_<name>`."""
        parts = {LOCAL: self._optimizer.state_dict(), GLOBAL: self._global_optimizer.state_dict()}
        saved: dict[str, Any] = {"state": {f"{p}{n}": v for p, part in parts.items() for n, v in part["state"].items()}}
        if self.defaults["_save_param_groups"]:
            saved["param_groups"] = [group for part in parts.values() for group in part["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load both; the weights of now become the start of the next local steps.

        Raises:
            ValueError: state that does not fit, as KeyedOptimizer's.
        """
        first, groups = 0, state_dict.get("param_groups")
        for prefix, optimizer in ((LOCAL, self._optimizer), (GLOBAL, self._global_optimizer)):
            names = {name: v for name, v in state_dict["state"].items() if name.startswith(prefix)}
            part: dict[str, Any] = {"state": {name.removeprefix(prefix): value for name, value in names.items()}}
            if groups is not None:
                count = len(optimizer.param_groups)
                part["param_groups"], first = groups[first : first + count], first + count
            optimizer.load_state_dict(part)
        self.post_load_state_dict()

    def post_load_state_dict(self) -> None:
        self._optimizer.post_load_state_dict()
        self._global_optimizer.post_load_state_dict()
        with torch.no_grad():
            for param, start in zip(self._worker_params, self._global_model):
                start.copy_(param)

    def save_param_groups(self, save: bool) -> None:
        super().save_param_groups(save)
        self._optimizer.save_param_groups(save)
        self._global_optimizer.save_param_groups(save)

    def set_optimizer_step(self, step: int) -> None:
        """Local steps done so far, for optimizers that count; the global step follows it."""
        self._local_step_counter = step
        self._optimizer.set_optimizer_step(step)
        self._global_optimizer.set_optimizer_step(step // self._num_local_steps)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        self._optimizer.update_hyper_parameters(params_dict)
        self._global_optimizer.update_hyper_parameters(params_dict)


def _tensors(params: Iterable[Any]) -> Iterator[Tensor]:
    for item in params:
        if isinstance(item, dict):
            yield from _tensors(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item
