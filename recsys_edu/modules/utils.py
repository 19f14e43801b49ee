"""Small helpers that build and check dense modules."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn


def extract_module_or_tensor_callable(
    module_or_callable: Callable[[], nn.Module] | nn.Module | Callable[[torch.Tensor], torch.Tensor],
) -> nn.Module | Callable[[torch.Tensor], torch.Tensor]:
    """Accept a module, something that makes one when called without arguments, or a tensor function.

    >>> extract_module_or_tensor_callable(nn.ReLU)
    ReLU()
    >>> extract_module_or_tensor_callable(torch.relu) is torch.relu
    True

    Raises:
        ValueError: a callable without arguments that returns something other than a module.
    """
    if isinstance(module_or_callable, nn.Module) or not _is_callable_without_arguments(module_or_callable):
        return module_or_callable
    made = module_or_callable()
    if not isinstance(made, nn.Module):
        raise ValueError(f"expected a callable without arguments to return a torch.nn.Module, got {type(made)}")
    return made


def get_module_output_dimension(module: Callable[[torch.Tensor], torch.Tensor] | nn.Module, in_features: int) -> int:
    """The width that comes out when `in_features` go in, found by running one row of zeros.

    >>> get_module_output_dimension(nn.Linear(3, 5), 3)
    5
    """
    with torch.no_grad():
        return module(torch.zeros(1, in_features)).shape[-1]


def check_module_output_dimension(module: Iterable[nn.Module] | nn.Module, in_features: int, out_features: int) -> bool:
    """Whether the module, or every module of a list, maps `in_features` to `out_features`.

    >>> check_module_output_dimension([nn.Linear(3, 5), nn.Linear(3, 4)], 3, 5)
    False
    """
    if isinstance(module, nn.Module) and not isinstance(module, nn.ModuleList):
        return get_module_output_dimension(module, in_features) == out_features
    return all(check_module_output_dimension(part, in_features, out_features) for part in module)


def init_mlp_weights_xavier_uniform(m: nn.Module) -> None:
    """Xavier-uniform weights and zero bias if `m` is an nn.Linear; for use with `module.apply`."""
    if isinstance(m, nn.Linear):
        nn.init.xavier_uniform_(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def construct_modulelist_from_single_module(module: nn.Module, sizes: tuple[int, ...]) -> nn.Module:
    """Nested ModuleLists of the given sizes, filled with copies whose Linear layers start anew.

    >>> len(construct_modulelist_from_single_module(nn.Linear(2, 2), (2, 3))[1])
    3
    """
    if not sizes:
        return copy.deepcopy(module).apply(init_mlp_weights_xavier_uniform)
    return nn.ModuleList(construct_modulelist_from_single_module(module, sizes[1:]) for _ in range(sizes[0]))


def convert_list_of_modules_to_modulelist(modules: Iterable[nn.Module], sizes: tuple[int, ...]) -> nn.Module:
    """The modules themselves, arranged in nested ModuleLists of the given sizes.

    >>> len(convert_list_of_modules_to_modulelist([nn.Linear(2, 2), nn.Linear(2, 3)], (2,)))
    2

    Raises:
        AssertionError: a level holds another number of modules than `sizes` says.
    """
    modules = list(modules)
    assert len(modules) == sizes[0], f"got {len(modules)} modules where sizes {sizes} ask for {sizes[0]}"
    if len(sizes) == 1:
        return nn.ModuleList(modules)
    return nn.ModuleList(convert_list_of_modules_to_modulelist(part, sizes[1:]) for part in modules)


def _is_callable_without_arguments(candidate: Callable) -> bool:
    """Whether `candidate()` is a complete call; builtins without a signature take a tensor."""
    try:
        parameters = inspect.signature(candidate).parameters.values()
    except ValueError:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needs = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind in positional]
    return not needs
