"""Routing copies nothing where ids lie in lane order already, and the wire is the same."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.routing import Router
from recsys_edu.distributed.simulation import simulate
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ROWS, FEATURES, BATCH = 10, ["a", "b", "c"], 5
KINDS = {
    "row_wise": (lambda index: plans.row_wise(), True),
    "table_wise": (lambda index: plans.table_wise(rank=index % 2), False),
    "mixed": (lambda index: plans.row_wise() if index != 1 else plans.table_wise(rank=1), False),
}


@pytest.mark.parametrize("keys", [FEATURES, ["c", "a", "b"], ["a", "unused", "b", "c"]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_source", [False, True])
def test_ids_in_lane_order_are_left_alone(kind: str, keys: list[str], with_source: bool) -> None:
    maker, all_split = KINDS[kind]
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=ROWS, embedding_dim=4, feature_names=[name])
        for name in FEATURES
    ]
    collection = EmbeddingBagCollection(tables=tables)
    generators = {table.name: maker(index) for index, table in enumerate(tables)}
    plan = plans.construct_module_sharding_plan(collection, generators, local_size=2, world_size=2, device_type="cpu")
    layout = simulate(collection, plan, 2)[0].shards.layout
    lengths = torch.randint(0, 4, (len(keys) * BATCH,), generator=torch.Generator().manual_seed(1))
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=torch.Generator().manual_seed(2))
    kjt = KeyedJaggedTensor(keys, values, lengths=lengths)

    router, thorough = (Router(layout, keys, torch.device("cpu")) for _ in range(2))
    assert router.lanes_in_order or not all_split
    assert router.splits_all_in_order == (all_split and keys == FEATURES)
    thorough.lanes_in_order = thorough.splits_all_in_order = thorough.is_identity = False
    wire, expected = (each.route(kjt, with_source) for each in (router, thorough))
    for name in ("lengths_LB", "values_N", "source_N"):
        mine, theirs = getattr(wire, name), getattr(expected, name)
        assert (mine is None) == (theirs is None) == (name == "source_N" and not with_source)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
