"""Semi-synchronous training against loops written out, alone and on two ranks."""

from __future__ import annotations

import copy

import pytest
import torch

from recsys_edu.distributed.testing import RankPool
from recsys_edu.optim.keyed import KeyedOptimizerWrapper
from recsys_edu.optim.semi_sync import SemisyncOptimizer

LOCAL_RATE, GLOBAL_RATE, MOMENTUM, LOCAL_STEPS, STEPS = 0.1, 0.5, 0.9, 3, 7


def make(weight: torch.nn.Parameter, group=None, **arguments) -> SemisyncOptimizer:
    local = KeyedOptimizerWrapper({"w": weight}, lambda ps: torch.optim.SGD(ps, lr=LOCAL_RATE))
    outer = KeyedOptimizerWrapper({"w": weight}, lambda ps: torch.optim.SGD(ps, lr=GLOBAL_RATE, momentum=MOMENTUM))
    return SemisyncOptimizer([("w", weight)], local, outer, LOCAL_STEPS, group, **arguments)


def train(weight: torch.nn.Parameter, optimizer: SemisyncOptimizer, target: float, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()


def by_hand(targets: list[float]) -> list[float]:
    """Each rank's weight after STEPS; plain numbers."""
    weights, start, momentum = [0.0] * len(targets), 0.0, 0.0
    for step in range(1, STEPS + 1):
        weights = [w - LOCAL_RATE * 2 * (w - target) for w, target in zip(weights, targets)]
        if step % LOCAL_STEPS == 0:
            momentum = MOMENTUM * momentum + start - sum(weights) / len(weights)
            start -= GLOBAL_RATE * momentum
            weights = [start] * len(targets)
    return weights


@pytest.mark.parametrize("offload", [False, True])
def test_alone(offload: bool):
    weight = torch.nn.Parameter(torch.zeros(1))
    train(weight, make(weight, offload_global_model=offload), 2.0)
    assert weight.item() == pytest.approx(by_hand([2.0])[0])


def on_rank(rank, world_size, group):
    weight = torch.nn.Parameter(torch.zeros(1))
    train(weight, make(weight, group), float(rank + 1))
    return weight.item()


def test_two_ranks_average_their_moves(ranks: RankPool):
    assert ranks.run(on_rank, 2) == pytest.approx(by_hand([1.0, 2.0]))


def test_state_moves_to_a_copy_at_a_global_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = make(weight)
    train(weight, optimizer, 2.0, steps=2 * LOCAL_STEPS)
    state = copy.deepcopy(optimizer.state_dict())
    assert list(state["state"]) == ["global_w"] or set(state["state"]) == {"local_w", "global_w"}
    fresh = torch.nn.Parameter(weight.detach().clone())
    other = make(fresh)
    other.init_state()
    other.load_state_dict(state)
    other.set_optimizer_step(2 * LOCAL_STEPS)
    train(weight, optimizer, 2.0)
    train(fresh, other, 2.0)
    assert torch.equal(weight, fresh)


def test_bad_arguments():
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = KeyedOptimizerWrapper({"w": weight}, lambda ps: torch.optim.SGD(ps, lr=1.0))
    with pytest.raises(ValueError, match="num_local_steps"):
        SemisyncOptimizer([weight], sgd, sgd, 0)
    with pytest.raises(ValueError, match="not among the global optimizer's"):
        SemisyncOptimizer([torch.nn.Parameter(torch.zeros(2))], sgd, sgd)
