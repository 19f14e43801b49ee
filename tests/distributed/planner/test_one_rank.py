"""One rank of many: its tensors against the plan's numbers, on meta and really."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planner_cases import TRILLION_3, TRILLION_125, collection, plan_for, random_shapes, repeated

from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.one_rank import hold_rank
from recsys_edu.distributed.planner.types import PlannerError
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad


@pytest.mark.parametrize("spec, gib", [(TRILLION_125, 80), (TRILLION_3, 141)], ids=["1.25T", "3T"])
def test_rank_37_of_128(spec: list, gib: float) -> None:
    model = repeated(spec)
    apply_optimizer_in_backward(RowWiseAdagrad, model.parameters(), {"lr": 0.01})
    plan = plan_for(model, 128, 8, gib=gib)
    held = hold_rank(model, plan, 37).check()
    assert {shard.weight.device.type for shard in held.shards} == {"meta"}
    assert 0.5 * held.used_bytes < held.held_bytes <= held.used_bytes
    assert any(shard.state_bytes for shard in held.shards)
    frame = held.to_frame()
    assert (
        len(frame) == len(held.shards) and frame["weight_bytes"].sum() + frame["state_bytes"].sum() == held.held_bytes
    )
    assert "rank 37 of 128" in str(held)


def test_all_ranks_together_hold_every_number_once() -> None:
    model = collection(random_shapes(4, 9))
    constraints = {f"t{i}": ParameterConstraints(sharding_types=["row_wise", "table_wise"]) for i in range(9)}
    plan = plan_for(model, 4, 2, constraints=constraints)
    held = [hold_rank(model, plan, rank).check() for rank in range(4)]
    weights = sum(shard.weight_bytes for rank in held for shard in rank.shards)
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert [rank.used_bytes for rank in held] == plan.used_bytes_W2.sum(axis=1).astype(int).tolist()


def test_really_allocated_and_filled() -> None:
    """From real weights every rank takes its rectangles, those of cut and of copied tables alike."""
    configs = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=rows, embedding_dim=columns, feature_names=[f"f{i}"])
        for i, (rows, columns) in enumerate([(1000, 256), (37, 16), (500, 64)])
    ]
    model = EmbeddingBagCollection(tables=configs)
    kinds = {"t0": "column_wise", "t1": "data_parallel", "t2": "row_wise"}
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name, kind in kinds.items()}
    plan = plan_for(model, 8, 4, device="cpu", constraints=constraints)
    for rank in (0, 5):
        held = hold_rank(model, plan, rank, device="cpu").check()
        assert {shard.shard.table for shard in held.shards} >= {"t1", "t2"}
        for piece in held.shards:
            rows, columns = piece.shard.rows, piece.shard.columns
            whole = model.embedding_bags[piece.shard.table].weight
            torch.testing.assert_close(piece.weight, whole[rows.start : rows.stop, columns.start : columns.stop])


def test_a_model_with_two_collections_and_a_dense_part() -> None:
    bags = collection([(2000, 32)])
    sequences = EmbeddingCollection(
        tables=[EmbeddingConfig(name="s", num_embeddings=300, embedding_dim=16, feature_names=["fs"])],
        device=torch.device("meta"),
    )
    model = torch.nn.ModuleDict({"bags": bags, "dense": torch.nn.Linear(4, 4), "sequences": sequences})
    plan = EmbeddingShardingPlanner(topology=Topology(2, "cpu")).plan(model, get_default_sharders())
    held = hold_rank(model, plan, 1).check()
    assert set(held.modules) == {"bags", "sequences"}


def test_wrong_bytes_are_found() -> None:
    model = collection([(100, 8)] * 3)
    plan = plan_for(model, 2, 2)
    held = hold_rank(model, plan, 0)
    wrong = dataclasses.replace(held.shards[0], planned_bytes=1)
    with pytest.raises(PlannerError, match="the plan says 1 bytes, its tensors have"):
        dataclasses.replace(held, shards=(wrong,)).check()
    with pytest.raises(PlannerError, match="planner reserved 1 bytes"):
        dataclasses.replace(held, used_bytes=1).check()
    with pytest.raises(ValueError, match="rank 2: the plan is for ranks 0 to 1"):
        hold_rank(model, plan, 2)
