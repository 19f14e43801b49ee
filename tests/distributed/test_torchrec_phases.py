"""The phases under TorchRec's names give what `forward` gives, on every rank of two hosts, backward included."""

from __future__ import annotations

import pytest
import torch
from engine_cases import bag_tables, batches_of_step, blocks_of, collection, loss_of, plan_of, sequence_tables

from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.distributed.types import ShardedModule

WORLD_SIZE, LOCAL_SIZE = 4, 2


@pytest.mark.parametrize("kind", ["mixed", "table_row_wise", "column_wise"])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
def test_phases_by_torchrecs_names(kind: str, pooled: bool) -> None:
    module = collection(bag_tables() if pooled else sequence_tables())
    plan = plan_of(module, kind, WORLD_SIZE, LOCAL_SIZE)
    hosts = {"local_size": LOCAL_SIZE} if pooled else {}
    by_forward, by_phases = (simulate(module, plan, WORLD_SIZE, **hosts) for _ in range(2))
    batches = batches_of_step(bag_tables() if pooled else sequence_tables(), WORLD_SIZE, 0)
    expected = forward_all(by_forward, batches)
    sum(loss_of(answer) for answer in expected).backward()

    contexts = [module.create_context() for module in by_phases]
    sizes = [m.input_dist(ctx, batch) for m, ctx, batch in zip(by_phases, contexts, batches)]
    ids = [awaitable.wait() for awaitable in sizes]
    lookups = [m.compute(ctx, each.wait()) for m, ctx, each in zip(by_phases, contexts, ids)]
    if pooled:
        for m, flight in zip(by_phases, lookups):
            m.sum_hosts(flight)
    pending = [m.output_dist(ctx, each) for m, ctx, each in zip(by_phases, contexts, lookups)]
    answers = [each.wait() for each in pending]
    sum(loss_of(answer) for answer in answers).backward()

    for ours, theirs in zip(answers, expected):
        assert all(torch.equal(a, b) for a, b in zip(blocks_of(ours), blocks_of(theirs), strict=True))
    for ours, theirs in zip(by_phases, by_forward):
        assert isinstance(ours, ShardedModule)
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name


def test_one_rank_in_one_line_each() -> None:
    module = collection(bag_tables())
    (sharded,) = simulate(module, plan_of(module, "row_wise", 1, 1), 1)
    (batch,) = batches_of_step(bag_tables(), 1, 0)
    ctx = sharded.create_context()
    answer = sharded.compute_and_output_dist(ctx, sharded.input_dist(ctx, batch).wait().wait())
    assert ctx.flight is not None
    assert torch.equal(answer.wait().values(), sharded(batch).values())
