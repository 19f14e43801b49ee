"""State-dict names, copies across devices, materialising meta modules, merging kernel settings.

Counterpart: torchrec.distributed.utils
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_edu.distributed.embedding_types import OptimType
from recsys_edu.distributed.types import ParameterSharding, ShardedModule

T = TypeVar("T")


def append_prefix(prefix: str, name: str) -> str:
    """Join with a dot, unless a part is empty: `append_prefix("", "over")` is `"over"`."""
    return ".".join(part for part in (prefix, name) if part)


def filter_state_dict(state_dict: OrderedDict[str, Tensor], name: str) -> OrderedDict[str, Tensor]:
    """The entries under `name.`, without that prefix."""
    prefix = f"{name}."
    return OrderedDict((key.removeprefix(prefix), value) for key, value in state_dict.items() if key.startswith(prefix))


def add_prefix_to_state_dict(state_dict: dict[str, Any], prefix: str) -> None:
    """Put `prefix`, as it is, before every key, in place and in order."""
    for key in list(state_dict):
        state_dict[prefix + key] = state_dict.pop(key)


def get_unsharded_module_names(model: nn.Module) -> list[str]:
    """Paths of the largest submodules that hold no sharded module, in the model's order.

        dlrm: (ebc: sharded, over: MLP, dense: MLP)      ["over", "dense"]

    Empty where nothing in the model is sharded: there is then nothing to tell apart.
    """
    sharded = [path for path, module in model.named_modules() if isinstance(module, ShardedModule)]

    def holds_sharded(path: str) -> bool:
        return any(_is_inside(other, path) for other in sharded)

    return [
        path
        for path, _ in model.named_modules()
        if path
        and not holds_sharded(path)
        and holds_sharded(path.rpartition(".")[0])
        and not any(_is_inside(path, other) for other in sharded)
    ]


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def copy_to_device(module: nn.Module, current_device: torch.device, to_device: torch.device) -> nn.Module:
    """A deep copy whose tensors on `current_device` are on `to_device`; others stay where they are.

    Process groups are shared with the original, not copied: a copy talks to the same ranks. A tensor that two
    modules share is shared in the copy too.
    """
    memo: dict[int, Any] = {}
    for submodule in module.modules():
        for value in vars(submodule).values():
            if isinstance(value, dist.ProcessGroup):
                memo[id(value)] = value
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device == current_device:
            moved = tensor.detach().to(to_device, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if is_parameter else moved
    return copy.deepcopy(module, memo)


def init_parameters(module: nn.Module, device: torch.device) -> None:
    """Materialise what is on the meta device, initialise it with `reset_parameters`, move the rest to `device`.

    Children come first, then a parent that was on meta as a whole may set them differently. Meta parameters that no
    `reset_parameters` covers get memory without values, and a warning that names them: load a checkpoint before use.
    """
    unset = _materialise(module, "", device)
    module.to(device)
    if unset:
        warnings.warn(
            f"no initial values for {', '.join(unset)}: built on the meta device, and neither that module nor one "
            "around it has a reset_parameters method. Load a checkpoint, or give it one",
            stacklevel=2,
        )


def _materialise(module: nn.Module, path: str, device: torch.device) -> list[str]:
    """Materialise one module's subtree; returns the paths whose values nobody has set."""
    whole = [*module.parameters(), *module.buffers()]
    own_is_meta = any(t.is_meta for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
    all_is_meta = bool(whole) and all(t.is_meta for t in whole)
    unset = [
        unset_path
        for name, child in module.named_children()
        for unset_path in _materialise(child, append_prefix(path, name), device)
    ]
    if own_is_meta:
        module.to_empty(device=device, recurse=False)
    if not (own_is_meta or all_is_meta):
        return unset
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
        return []
    return [*unset, path or type(module).__name__] if own_is_meta else unset


def merge_fused_params(
    fused_params: dict[str, Any] | None = None, param_fused_params: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A new dict: the module's settings, overridden by the parameter's."""
    return {**(fused_params or {}), **(param_fused_params or {})}


def add_params_from_parameter_sharding(
    fused_params: dict[str, Any] | None, parameter_sharding: ParameterSharding
) -> dict[str, Any]:
    """A new dict: the settings, and what the plan says about this table's cache and rounding."""
    merged = dict(fused_params or {})
    cache = parameter_sharding.cache_params
    if cache is not None:
        settings = {
            "cache_algorithm": cache.algorithm,
            "cache_load_factor": cache.load_factor,
            "cache_reserved_memory": cache.reserved_memory,
            "cache_precision": cache.precision,
            "prefetch_pipeline": cache.prefetch_pipeline,
            "multipass_prefetch_config": cache.multipass_prefetch_config,
        }
        merged.update({name: value for name, value in settings.items() if value is not None})
    for name in ("enforce_hbm", "stochastic_rounding", "bounds_check_mode", "output_dtype"):
        value = getattr(parameter_sharding, name)
        if value is not None:
            merged[name] = value
    return merged


def optimizer_type_to_emb_opt_type(optimizer_class: type[torch.optim.Optimizer]) -> OptimType:
    """Which update inside backward an optimizer class stands for: torch's own, or the markers of `recsys_edu.optim`.

    >>> optimizer_type_to_emb_opt_type(torch.optim.Adagrad)
    <OptimType.ADAGRAD: 'ADAGRAD'>

    TorchRec answers with FBGEMM's enum; ours is the same list of names and needs no FBGEMM.

    Raises:
        ValueError: a class that has no such form, with the list of those that have.
    """
    from recsys_edu.optim import optimizers as markers
    from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad

    known = {
        torch.optim.SGD: OptimType.SGD,
        torch.optim.Adagrad: OptimType.ADAGRAD,
        torch.optim.Adam: OptimType.ADAM,
        RowWiseAdagrad: OptimType.ROWWISE_ADAGRAD,
        markers.SGD: OptimType.SGD,
        markers.LarsSGD: OptimType.LARS_SGD,
        markers.LAMB: OptimType.LAMB,
        markers.PartialRowWiseLAMB: OptimType.PARTIAL_ROWWISE_LAMB,
        markers.Adam: OptimType.ADAM,
        markers.PartialRowWiseAdam: OptimType.PARTIAL_ROWWISE_ADAM,
        markers.Adagrad: OptimType.ADAGRAD,
    }
    if optimizer_class not in known:
        names = sorted({f"{c.__module__}.{c.__name__}" for c in known})
        raise ValueError(f"{optimizer_class.__name__} cannot run inside backward; these can: {', '.join(names)}")
    return known[optimizer_class]


def none_throws(optional: T | None, message: str = "Unexpected `None`") -> T:
    """The value, or an AssertionError where there is none."""
    if optional is None:
        raise AssertionError(message)
    return optional
