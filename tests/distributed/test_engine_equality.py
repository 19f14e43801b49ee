"""Sharded equals unsharded: every sharding type, optimizer and world size, outputs, gradients and trained weights."""

from __future__ import annotations

import pytest
from engine_cases import (
    OPTIMIZERS,
    TYPES,
    World,
    bag_tables,
    batches_of_step,
    collection,
    plan_of,
    sequence_tables,
)

WORLDS = {1: 1, 2: 2, 4: 2}  # world size to ranks per host


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
def test_five_steps_equal_the_unsharded_collection(kind: str, world_size: int, optimizer: str, pooled: bool) -> None:
    tables = bag_tables() if pooled else sequence_tables()
    local_size = WORLDS[world_size]
    world = World(
        collection(tables),
        lambda module: plan_of(module, kind, world_size, local_size),
        world_size,
        optimizer,
        local_size,
    )
    before = {name: weight.detach().clone() for name, weight in world.oracle.weights.items()}
    for step in range(5):
        world.step(batches_of_step(tables, world_size, step))
    world.compare_weights()
    for name, weight in world.oracle.weights.items():  # a test in which nothing is trained would prove nothing
        assert (weight - before[name]).abs().max() > 0.01
