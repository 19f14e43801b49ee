"""Optimizers that know their parameters by name, so that a checkpoint outlives the order of parameters.

A torch optimizer's state_dict numbers its parameters 0, 1, 2, ...; after resharding or after an edit of
the model those numbers mean something else. A KeyedOptimizer writes names:

    {"state": {"over_arch.model.1.weight": {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}, ...}}

Reading order: KeyedOptimizer (the state dict), KeyedOptimizerWrapper (a name for each parameter of an
ordinary optimizer), CombinedOptimizer (many as one), OptimizerWrapper (base of clipping and warm-up).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import optim


class KeyedOptimizer(optim.Optimizer):
    """An optimizer whose state_dict goes by parameter names.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> keyed = KeyedOptimizer({"w": weight}, {weight: {"momentum": torch.zeros(2)}}, [{"params": [weight], "lr": 0.1}])
    >>> keyed.state_dict()
    {'state': {'w': {'momentum': tensor([0., 0.])}}}

    `params` maps names to tensors, `state` maps those tensors to their state, `param_groups` is torch's
    list of groups. `step` is left to the classes below.

    Raises:
        ValueError: a key of `state` is not one of the parameters.

    Counterpart: torchrec.optim.keyed.KeyedOptimizer.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        state: Mapping[Any, Any],
        param_groups: Collection[Mapping[str, Any]],
    ) -> None:
        known = {id(param) for param in params.values()}
        strangers = [key for key in state if id(key) not in known]
        if strangers:
            raise ValueError(f"All state keys must be params. The following keys are not: {strangers}.")
        self.params = params
        self.state = state
        self.param_groups = param_groups
        self._become_torch_optimizer()

    def _become_torch_optimizer(self) -> None:
        """Set up what torch's schedulers and hooks expect, without torch's copying of groups.

        `torch.optim.Optimizer.__init__` would insist on making its own groups and state; restoring
        from a pickle is its documented way to take them as they are.
        """
        super().__setstate__({"defaults": {"_save_param_groups": False}})

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name; groups too, with sorted names, after `save_param_groups(True)`.

        Tensors are the live ones, not copies. A state value that has a `state_dict` of its own is
        replaced by what that returns.
        """
        saved: dict[str, Any] = {
            "state": {
                name: _expand_state_dicts(self.state[param])
                for name, param in self.params.items()
                if param in self.state
            }
        }
        if self.defaults["_save_param_groups"]:
            saved["param_groups"] = self._named_param_groups()
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a saved state into the existing tensors; everything is checked before anything is written.

        Raises:
            ValueError: parameters, state entries, shapes or groups that differ from this optimizer's.
        """
        if "state" not in state_dict:
            raise ValueError(f"not an optimizer state: no key 'state' among {sorted(state_dict)}")
        current, loaded = self.state_dict(), state_dict
        _check_same_names(current["state"], loaded["state"])
        for name, entries in current["state"].items():
            _check_same_structure(entries, loaded["state"][name], name)
        if self.defaults["_save_param_groups"]:
            loaded_groups = self._match_param_groups(loaded.get("param_groups"))
        params = self.params
        state = self.state
        for name in current["state"]:
            _copy_into(state[params[name]], loaded["state"][name])
        if self.defaults["_save_param_groups"]:
            for group, loaded_group in zip(self.param_groups, loaded_groups):
                group.update({key: copy.deepcopy(value) for key, value in loaded_group.items() if key != "params"})
        self.post_load_state_dict()

    def post_load_state_dict(self) -> None:
        """Hook for subclasses; runs after a state was loaded."""

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Make lazily created state exist: one step with zero gradients that leaves the weights alone.

        A checkpoint can then be loaded in place before the first real step. The learning rate is 0
        during that step, so weight decay moves nothing; gradients are put back as they were. Step
        counters have counted it. `sparse_grad_parameter_names` names the parameters whose gradients
        are sparse.
        """
        sparse_names = sparse_grad_parameter_names or set()
        previous_grads = {name: param.grad for name, param in self.params.items()}
        previous_rates = [group["lr"] for group in self.param_groups if "lr" in group]
        for name, param in self.params.items():
            if param.requires_grad:
                zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
                param.grad = zeros.to_sparse(1) if name in sparse_names else zeros
        try:
            for group in self.param_groups:
                if "lr" in group:
                    group["lr"] = 0.0
            self.step(closure=None)
        finally:
            rates: Iterator[Any] = iter(previous_rates)
            for group in self.param_groups:
                if "lr" in group:
                    group["lr"] = next(rates)
            for name, param in self.params.items():
                param.grad = previous_grads[name]

    def save_param_groups(self, save: bool) -> None:
        """Whether `state_dict` holds the groups (learning rates and the like) as well."""
        self.defaults["_save_param_groups"] = save

    def add_param_group(self, param_group: Any) -> None:
        """Not possible: a group has no names for its parameters."""
        raise NotImplementedError("a KeyedOptimizer's parameters are fixed; make one with all of them")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch's own would drop the names

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)

    def _named_param_groups(self) -> list[dict[str, Any]]:
        names = {id(param): name for name, param in self.params.items()}
        return [
            {**group, "params": sorted(names[id(param)] for param in group["params"])} for group in self.param_groups
        ]

    def _match_param_groups(self, loaded_groups: Collection[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
        """The loaded group of each of ours, found by its parameters' names."""
        if loaded_groups is None:
            raise ValueError(
                "this optimizer saves param_groups (save_param_groups(True)), the state to load has none; "
                "save with groups or call save_param_groups(False)"
            )
        own_groups = self._named_param_groups()
        if len(own_groups) != len(loaded_groups):
            raise ValueError(f"Different param_groups count: {len(own_groups)} vs {len(loaded_groups)}")
        by_names = {tuple(sorted(group["params"])): group for group in loaded_groups}
        matched = []
        for group in own_groups:
            names = tuple(group["params"])
            if names not in by_names:
                raise ValueError(f"Group {', '.join(names)} not found; loaded: {sorted(by_names)}")
            if group.keys() != by_names[names].keys():
                raise ValueError(
                    f"Different param_group of {', '.join(names)}: {sorted(group)} vs {sorted(by_names[names])}"
                )
            matched.append(by_names[names])
        return matched


class KeyedOptimizerWrapper(KeyedOptimizer):
    """Names for the parameters of an ordinary torch optimizer.

    >>> model = torch.nn.Linear(2, 1)
    >>> keyed = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda params: torch.optim.Adam(params, lr=0.1))
    >>> keyed.init_state()
    >>> list(keyed.state_dict()["state"])
    ['weight', 'bias']

    `optim_factory` gets the list of parameters, or with `pass_params_dict` the mapping itself. State and
    groups are shared with the inner optimizer, so a scheduler may work on either.

    Counterpart: torchrec.optim.keyed.KeyedOptimizerWrapper.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        optim_factory: Callable[[list[torch.Tensor]], optim.Optimizer],
        pass_params_dict: bool = False,
    ) -> None:
        self._optimizer = optim_factory(params if pass_params_dict else list(params.values()))
        super().__init__(params, self._optimizer.state, self._optimizer.param_groups)

    def zero_grad(self, set_to_none: bool = False) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure)

    def set_optimizer_step(self, step: int) -> None:
        """Pass the step count to an inner optimizer that wants it; others keep their own."""
        if hasattr(self._optimizer, "set_optimizer_step"):
            self._optimizer.set_optimizer_step(step)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        """Pass new hyper-parameters to an inner optimizer that has such a method."""
        if hasattr(self._optimizer, "update_hyper_parameters"):
            self._optimizer.update_hyper_parameters(params_dict)


class CombinedOptimizer(KeyedOptimizer):
    """Several keyed optimizers behind one `step`: fused tables here, dense layers there.

        CombinedOptimizer([model.fused_optimizer, ("dense", KeyedOptimizerWrapper(...))])
        state names:       embedding_bags.film.weight      dense.over_arch.model.1.weight

    An item is an optimizer, or a pair of a key and an optimizer; the key and a dot go before the names.

    Raises:
        ValueError: two parts name a parameter alike.

    Counterpart: torchrec.optim.keyed.CombinedOptimizer.
    """

    def __init__(self, optims: list[KeyedOptimizer | tuple[str, KeyedOptimizer]]) -> None:
        self._optims = [item if isinstance(item, tuple) else ("", item) for item in optims]
        seen: set[str] = set()
        for opt_key, optimizer in self._optims:
            for name in optimizer.params:
                full_name = self.prepend_opt_key(name, opt_key)
                if full_name in seen:
                    raise ValueError(f"Duplicate param key {full_name}: give the optimizers different keys")
                seen.add(full_name)
        self._become_torch_optimizer()

    @staticmethod
    def prepend_opt_key(name: str, opt_key: str) -> str:
        """`"<opt_key>.<name>"`, or the name alone when the key is empty."""
        return f"{opt_key}.{name}" if opt_key else name

    @property
    def optimizers(self) -> list[tuple[str, KeyedOptimizer]]:
        """The parts and their keys, in the order given."""
        return self._optims

    @property
    def params(self) -> Mapping[str, torch.Tensor]:
        return {
            self.prepend_opt_key(name, opt_key): param
            for opt_key, optimizer in self._optims
            for name, param in optimizer.params.items()
        }

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        return {param: entries for _, optimizer in self._optims for param, entries in optimizer.state.items()}

    @property
    def param_groups(self) -> Collection[Mapping[str, Any]]:
        return [group for _, optimizer in self._optims for group in optimizer.param_groups]

    def __repr__(self) -> str:
        parts = [f"{opt_key}: {optimizer!r}" if opt_key else repr(optimizer) for opt_key, optimizer in self._optims]
        return "CombinedOptimizer(" + ", ".join(parts) + ")"

    def zero_grad(self, set_to_none: bool = False) -> None:
        for _, optimizer in self._optims:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> None:
        for _, optimizer in self._optims:
            optimizer.step(closure=closure)

    def post_load_state_dict(self) -> None:
        for _, optimizer in self._optims:
            optimizer.post_load_state_dict()

    def save_param_groups(self, save: bool) -> None:
        super().save_param_groups(save)
        for _, optimizer in self._optims:
            optimizer.save_param_groups(save)

    def set_optimizer_step(self, step: int) -> None:
        for _, optimizer in self._optims:
            if hasattr(optimizer, "set_optimizer_step"):
                optimizer.set_optimizer_step(step)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        for _, optimizer in self._optims:
            if hasattr(optimizer, "update_hyper_parameters"):
                optimizer.update_hyper_parameters(params_dict)


class OptimizerWrapper(KeyedOptimizer):
    """Base of optimizers that do something before or after another one's step; everything else is passed on.

    Counterpart: torchrec.optim.keyed.OptimizerWrapper.
    """

    def __init__(self, optimizer: KeyedOptimizer) -> None:
        self._optimizer = optimizer
        self.params = optimizer.params
        self.state = optimizer.state
        self.param_groups = optimizer.param_groups
        self._become_torch_optimizer()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._optimizer!r})"

    def zero_grad(self, set_to_none: bool = False) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Any = None) -> None:
        self._optimizer.step(closure=closure)

    def add_param_group(self, param_group: Any) -> None:
        self._optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def post_load_state_dict(self) -> None:
        self._optimizer.post_load_state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def save_param_groups(self, save: bool) -> None:
        self._optimizer.save_param_groups(save)

    def set_optimizer_step(self, step: int) -> None:
        if hasattr(self._optimizer, "set_optimizer_step"):
            self._optimizer.set_optimizer_step(step)

    def update_hyper_parameters(self, params_dict: dict[str, Any]) -> None:
        if hasattr(self._optimizer, "update_hyper_parameters"):
            self._optimizer.update_hyper_parameters(params_dict)


def _expand_state_dicts(value: Any) -> Any:
    """`value` with every object inside it that has a state_dict replaced by that state_dict."""
    if isinstance(value, Mapping):
        return {key: _expand_state_dicts(entry) for key, entry in value.items()}
    if not isinstance(value, torch.Tensor) and hasattr(value, "state_dict"):
        return value.state_dict()
    return value


def _check_same_names(current: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    if len(current) != len(loaded):
        hint = "; call init_state() first: this optimizer has no state yet" if not current else ""
        raise ValueError(f"Different parameter count: {len(current)} vs {len(loaded)}{hint}")
    for name in current:
        if name not in loaded:
            raise ValueError(f"Parameter {name} not found; the loaded state has {sorted(loaded)}")


def _check_same_structure(current: Any, loaded: Any, where: str) -> None:
    """Raise unless `loaded` could be copied into `current`: same keys, same lengths, same shapes."""
    if isinstance(current, Mapping):
        if not isinstance(loaded, Mapping) or len(current) != len(loaded):
            got = len(loaded) if isinstance(loaded, Mapping) else type(loaded).__name__
            raise ValueError(f"Different state size: {len(current)} vs {got} (state of {where})")
        for key, entry in current.items():
            if key not in loaded:
                raise ValueError(f"State key {key} of {where} not found; loaded: {sorted(map(str, loaded))}")
            _check_same_structure(entry, loaded[key], f"{where}.{key}")
    elif isinstance(current, (list, tuple)):
        if not isinstance(loaded, (list, tuple)) or len(current) != len(loaded):
            raise ValueError(f"state {where}: expected {len(current)} items, got {loaded!r}")
        for index, (entry, loaded_entry) in enumerate(zip(current, loaded)):
            _check_same_structure(entry, loaded_entry, f"{where}.{index}")
    elif hasattr(current, "local_shards"):
        own, other = current.local_shards(), loaded.local_shards() if hasattr(loaded, "local_shards") else []
        if [tuple(shard.tensor.shape) for shard in own] != [tuple(shard.tensor.shape) for shard in other]:
            raise ValueError(f"state {where}: the loaded local shards differ in number or shape")
    elif isinstance(current, torch.Tensor) and getattr(loaded, "shape", None) != current.shape:
        got = tuple(loaded.shape) if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise ValueError(f"state {where}: expected shape {tuple(current.shape)}, got {got}")


@torch.no_grad()
def _copy_into(current: Any, loaded: Any) -> None:
    """Write `loaded` into the containers and tensors of `current`."""
    if hasattr(current, "local_shards"):
        for shard, loaded_shard in zip(current.local_shards(), loaded.local_shards()):
            shard.tensor.copy_(loaded_shard.tensor)
        return
    if isinstance(current, torch.Tensor):
        current.copy_(loaded)
        return
    items = current.items() if isinstance(current, Mapping) else enumerate(current)
    for key, entry in list(items):
        if isinstance(entry, (torch.Tensor, Mapping, list)) or hasattr(entry, "local_shards"):
            _copy_into(entry, loaded[key])
        elif hasattr(entry, "load_state_dict"):
            entry.load_state_dict(loaded[key])
        elif isinstance(entry, tuple):
            current[key] = tuple(copy.deepcopy(loaded[key]))
        else:
            current[key] = copy.deepcopy(loaded[key])
