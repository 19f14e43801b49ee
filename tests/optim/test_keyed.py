"""KeyedOptimizer and its kin: names in the state dict, strict and atomic loading."""

import copy
import pickle

import pytest
import torch
from torch import nn

from recsys_edu.optim import (
    CombinedOptimizer,
    EmptyFusedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    OptimizerWrapper,
)


def adam(names: tuple[str, ...] = ("a", "b"), lr: float = 0.1, **options) -> KeyedOptimizerWrapper:
    params = {name: nn.Parameter(torch.arange(1.0, 4.0) * (i + 1)) for i, name in enumerate(names)}
    return KeyedOptimizerWrapper(params, lambda tensors: torch.optim.Adam(tensors, lr=lr, **options))


def descend(optimizer: KeyedOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum((param**2).sum() for param in optimizer.params.values()).backward()
        optimizer.step()


def keyed() -> KeyedOptimizer:
    weight = nn.Parameter(torch.ones(2))
    state = {weight: {"m": torch.ones(2), "nested": {"x": torch.ones(1)}, "list": [torch.ones(1)], "count": 3}}
    return KeyedOptimizer({"w": weight}, state, [{"params": [weight], "lr": 0.1}])


def test_state_of_strangers_is_refused() -> None:
    with pytest.raises(ValueError, match="All state keys must be params"):
        KeyedOptimizer({"a": nn.Parameter(torch.ones(1))}, {nn.Parameter(torch.ones(1)): {}}, [])


def test_state_dict_goes_by_names_and_groups_are_optional() -> None:
    optimizer = adam()
    assert optimizer.state_dict() == {"state": {}}
    descend(optimizer)
    assert list(optimizer.state_dict()) == ["state"] and list(optimizer.state_dict()["state"]) == ["a", "b"]
    optimizer.save_param_groups(True)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["params"] == ["a", "b"] and group["lr"] == 0.1


def test_saved_and_loaded_training_continues_alike() -> None:
    first, second = adam(), adam()
    first.save_param_groups(True), second.save_param_groups(True)
    descend(first, 2)
    first.param_groups[0]["lr"] = 0.01
    saved = copy.deepcopy(first.state_dict())
    second.init_state()
    second.load_state_dict(saved)
    for name, param in second.params.items():
        param.data.copy_(first.params[name])
    descend(first, 2), descend(second, 2)
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
    assert second.param_groups[0]["lr"] == 0.01


def test_init_state_makes_state_and_moves_nothing() -> None:
    optimizer = adam(weight_decay=0.5)
    before = {name: param.detach().clone() for name, param in optimizer.params.items()}
    optimizer.init_state()
    assert set(optimizer.state_dict()["state"]["a"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(param, before[name]) and param.grad is None for name, param in optimizer.params.items())
    assert optimizer.param_groups[0]["lr"] == 0.1
    table = nn.Parameter(torch.ones(3, 2))
    sparse = KeyedOptimizerWrapper({"t": table}, lambda params: torch.optim.SparseAdam(params, lr=0.1))
    sparse.init_state({"t"})
    assert torch.equal(table, torch.ones(3, 2)) and "exp_avg" in sparse.state_dict()["state"]["t"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda saved: saved["state"].pop("w"), "Different parameter count: 1 vs 0"),
        (lambda saved: saved["state"].update(v=saved["state"].pop("w")), "Parameter w not found"),
        (lambda saved: saved["state"]["w"].pop("m"), "Different state size: 4 vs 3"),
        (lambda saved: saved["state"]["w"].update(z=saved["state"]["w"].pop("m")), "State key m of w not found"),
        (
            lambda saved: saved["state"]["w"].update(list=[torch.ones(7)]),
            r"w.list.0: expected shape \(1,\), got \(7,\)",
        ),
        (lambda saved: saved["param_groups"].clear(), "Different param_groups count: 1 vs 0"),
        (lambda saved: saved["param_groups"][0].update(params=["v"]), "Group w not found"),
        (lambda saved: saved["param_groups"][0].pop("lr"), "Different param_group of w"),
        (lambda saved: saved.pop("param_groups"), "the state to load has none"),
        (lambda saved: saved.pop("state"), "no key 'state'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(damage, message: str) -> None:
    optimizer = keyed()
    optimizer.save_param_groups(True)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"]["w"].update(m=torch.zeros(2), count=99)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    state = optimizer.state_dict()["state"]["w"]
    assert state["m"].tolist() == [1, 1] and state["count"] == 3 and optimizer.param_groups[0]["lr"] == 0.1


def test_loading_copies_into_the_existing_tensors() -> None:
    optimizer = keyed()
    live = optimizer.state_dict()["state"]["w"]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"]["w"].update(m=torch.full((2,), 7.0), nested={"x": torch.tensor([8.0])}, count=9)
    optimizer.load_state_dict(saved)
    assert live["m"].tolist() == [7, 7] and live["nested"]["x"].item() == 8
    assert optimizer.state_dict()["state"]["w"]["count"] == 9


def test_loading_before_there_is_state_says_what_to_do() -> None:
    trained = adam()
    descend(trained)
    with pytest.raises(ValueError, match=r"Different parameter count: 0 vs 2; call init_state\(\)"):
        adam().load_state_dict(trained.state_dict())


def test_values_with_a_state_dict_are_expanded() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 4

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    weight, counter = nn.Parameter(torch.ones(1)), Counter()
    optimizer = KeyedOptimizer({"w": weight}, {weight: {"counter": counter}}, [])
    assert optimizer.state_dict() == {"state": {"w": {"counter": {"count": 4}}}}
    optimizer.load_state_dict({"state": {"w": {"counter": {"count": 6}}}})
    assert counter.count == 6


def test_pickle_and_deepcopy_keep_names_and_groups() -> None:
    for twin in (pickle.loads(pickle.dumps(keyed())), copy.deepcopy(keyed())):
        assert list(twin.state_dict()["state"]) == ["w"] and twin.param_groups[0]["lr"] == 0.1
    wrapped = adam()
    descend(wrapped)
    twin = copy.deepcopy(wrapped)
    descend(twin)
    assert not torch.equal(twin.params["a"], wrapped.params["a"])


def test_add_param_group_is_refused() -> None:
    for optimizer in (adam(), CombinedOptimizer([adam()]), OptimizerWrapper(adam())):
        with pytest.raises(NotImplementedError):
            optimizer.add_param_group({})


def test_factory_may_get_the_mapping() -> None:
    seen = []

    def factory(params):
        seen.append(params)
        return torch.optim.SGD(list(params.values()), lr=0.1)

    params = {"a": nn.Parameter(torch.ones(1))}
    KeyedOptimizerWrapper(params, factory, pass_params_dict=True)
    assert seen == [params]


def test_combined_names_steps_and_loads() -> None:
    combined = CombinedOptimizer([("left", adam(("a",))), adam(("b",)), EmptyFusedOptimizer()])
    assert list(combined.params) == ["left.a", "b"] and len(combined.param_groups) == 2
    before = {name: param.detach().clone() for name, param in combined.params.items()}
    descend(combined)
    assert all(not torch.equal(param, before[name]) for name, param in combined.params.items())
    combined.save_param_groups(True)
    saved = copy.deepcopy(combined.state_dict())
    assert [group["params"] for group in saved["param_groups"]] == [["left.a"], ["b"]]
    saved["state"]["b"]["exp_avg"].fill_(5.0)
    saved["param_groups"][1]["lr"] = 0.5
    combined.load_state_dict(saved)
    inner = combined.optimizers[1][1]
    assert bool((inner.state_dict()["state"]["b"]["exp_avg"] == 5).all()) and inner.param_groups[0]["lr"] == 0.5
    combined.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in combined.params.values())


def test_combined_refuses_equal_names() -> None:
    with pytest.raises(ValueError, match="Duplicate param key a"):
        CombinedOptimizer([adam(("a",)), adam(("a",))])
    assert list(CombinedOptimizer([("x", adam(("a",))), ("y", adam(("a",)))]).params) == ["x.a", "y.a"]
    assert CombinedOptimizer.prepend_opt_key("w", "") == "w"


def test_hyper_parameters_reach_the_parts_that_take_them() -> None:
    class Custom(torch.optim.SGD):
        def set_optimizer_step(self, step: int) -> None:
            self.seen_step = step

        def update_hyper_parameters(self, params_dict) -> None:
            self.seen = params_dict

    wrapped = KeyedOptimizerWrapper({"a": nn.Parameter(torch.ones(1))}, lambda params: Custom(params, lr=0.1))
    combined = CombinedOptimizer([OptimizerWrapper(wrapped), adam(("b",))])
    combined.set_optimizer_step(5)
    combined.update_hyper_parameters({"lr": 3})
    assert wrapped._optimizer.seen_step == 5 and wrapped._optimizer.seen == {"lr": 3}


def test_schedulers_work_on_all_of_them() -> None:
    for optimizer in (adam(), CombinedOptimizer([adam()]), OptimizerWrapper(adam())):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        descend(optimizer)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_wrapper_passes_everything_on() -> None:
    inner = adam()
    outer = OptimizerWrapper(inner)
    descend(outer)
    outer.save_param_groups(True)
    assert outer.state_dict().keys() == inner.state_dict().keys() == {"state", "param_groups"}
    saved = copy.deepcopy(outer.state_dict())
    saved["state"]["a"]["exp_avg"].fill_(2.0)
    outer.load_state_dict(saved)
    assert bool((inner.state_dict()["state"]["a"]["exp_avg"] == 2).all())


def test_empty_fused_optimizer() -> None:
    optimizer = EmptyFusedOptimizer()
    optimizer.step(), optimizer.zero_grad()
    assert optimizer.state_dict() == {"state": {}} and optimizer.params == {}
