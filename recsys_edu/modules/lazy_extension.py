"""Lazy modules, whose parameters get their shape from the first input, with two wishes of torch's left open.

Counterpart: torchrec.modules.lazy_extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy


class LazyModuleExtensionMixin(LazyModuleMixin):
    """torch's LazyModuleMixin whose `initialize_parameters` also takes keyword arguments, and whose `apply` is safe.

    >>> class Scale(LazyModuleExtensionMixin, nn.Linear):
    ...     def __init__(self) -> None:
    ...         super().__init__(0, 0, bias=False)
    ...         self.weight = nn.UninitializedParameter()
    ...     def initialize_parameters(self, input: torch.Tensor) -> None:
    ...         with torch.no_grad():
    ...             self.weight.materialize((1, input.shape[-1]))
    ...             self.weight.fill_(2.0)
    >>> scale = Scale()
    >>> scale(input=torch.ones(1, 3))
    tensor([[6.]], grad_fn=<MmBackward0>)

    `apply(fn)` on a module whose parameters have no shape yet would let fn see no data: it raises RuntimeError
    instead; `lazy_apply` waits for the first forward.

    Counterpart: torchrec.modules.lazy_extension.LazyModuleExtensionMixin.
    """

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        """As nn.Module.apply; RuntimeError while this module or one inside it waits for its first input."""
        for path, module in self.named_modules():  # type: ignore[attr-defined]
            waiting = [name for name, tensor in _own_tensors(module) if is_lazy(tensor)]
            if waiting:
                where = f"{type(self).__name__}{f' ({path})' if path else ''}"
                raise RuntimeError(
                    f"{where} has not been initialized: {', '.join(waiting)} get their shape in the first forward."
                    " Run the module once before apply, or use lazy_apply."
                )
        return super().apply(fn)  # type: ignore[misc]

    def _infer_parameters(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        super()._infer_parameters(module, args, kwargs or {})


def lazy_apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    """Apply `fn` to the module and its children: after the first forward, when every parameter exists.

    >>> module = lazy_apply(nn.LazyLinear(1), lambda child: nn.init.ones_(child.weight))
    >>> _ = module(torch.zeros(1, 3))
    >>> module.weight.tolist()
    [[1.0, 1.0, 1.0]]

    Functions given one after the other run in that order, each once. The forward that initialises still computes with
    the values from before `fn`; `fn` runs after it.

    Counterpart: torchrec.modules.lazy_extension.lazy_apply.
    """

    def once(applied_to: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        nn.Module.apply(applied_to, fn)

    handle = module.register_forward_hook(once)
    return module


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]
