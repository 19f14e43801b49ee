"""Weighted and narrow tables, hosts, traffic, faults that leave everything as it was, by hand and on real ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_cases import (
    TYPES,
    World,
    assert_same_answers,
    assert_same_bits,
    attach,
    bag_tables,
    batches_of_step,
    collection,
    join,
    loss_of,
    plan_of,
    sequence_tables,
    snapshot,
    whole_tables,
)

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.embedding import ShardedEmbeddingCollection
from recsys_edu.distributed.embeddingbag import ShardedEmbeddingBagCollection
from recsys_edu.distributed.sharding import (
    column_wise,
    data_parallel,
    grid,
    row_wise,
    table_column_wise,
    table_row_wise,
    table_wise,
)
from recsys_edu.distributed.sharding.tiling import shards_from
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.distributed.types import ShardingEnv
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.types import DataType

HOST = 2  # ranks per host


# ---------------------------------------------------------------- weights of features


@pytest.mark.parametrize("optimizer", ["dense", "sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("kind", TYPES)
def test_weighted_features_and_the_gradients_of_their_weights(kind: str, optimizer: str) -> None:
    tables = bag_tables()
    world = World(collection(tables, weighted=True), lambda m: plan_of(m, kind, 4, HOST), 4, optimizer, HOST)
    for step in range(3):
        batches = batches_of_step(tables, 4, step, weighted=True)
        joined = join(batches)
        for batch in [*batches, joined]:
            batch.weights().requires_grad_()
        expected = world.oracle.module(joined)
        for weight in world.oracle.weights.values():
            weight.grad = None
        answers = forward_all(world.modules, batches)
        assert_same_answers(answers, expected, batches)
        torch.stack([loss_of(answer) for answer in answers]).sum().backward()
        loss_of(expected).backward()  # of the sum: a weight belongs to one rank, whose own loss it lowers
        keys = joined.keys()
        sizes = [[batch[key].values().numel() for batch in batches] for key in keys]
        parts = joined.weights().grad.split([n for of_key in sizes for n in of_key])
        for rank, batch in enumerate(batches):
            own = torch.cat([parts[index * 4 + rank] for index in range(len(keys))])
            torch.testing.assert_close(batch.weights().grad, own, rtol=1e-4, atol=1e-5)
        for weight in world.oracle.weights.values():
            weight.grad /= 4
        world._compare_gradients({name: w.grad for name, w in world.oracle.weights.items()}, 1e-4, 1e-5)
        for name in world.oracle.weights:
            for parameter in world.parameters_of(name):
                parameter.grad = None
        world.oracle.update(batches)
    world.compare_weights()


def test_weighted_collection_refuses_a_batch_without_weights() -> None:
    module = collection(bag_tables(), weighted=True)
    modules = simulate(module, plan_of(module, "row_wise", 2, 2), 2)
    with pytest.raises(ValueError, match=r"is_weighted.*has no weights"):
        modules[0].start_input(batches_of_step(bag_tables(), 2, 0)[0])


# ---------------------------------------------------------------- narrow tables, several kernels


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "grid", "mixed"])
@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
def test_half_precision_tables(kind: str, data_type: DataType, pooled: bool) -> None:
    tables = bag_tables(data_type) if pooled else sequence_tables(data_type)
    world = World(collection(tables), lambda m: plan_of(m, kind, 4, HOST), 4, "sgd", HOST)
    for step in range(2):
        world.step(batches_of_step(tables, 4, step), rtol=2e-2, atol=2e-2)
    world.compare_weights(rtol=2e-2, atol=1e-2)
    dtypes = {p.dtype for module in world.modules for p in module.parameters()}
    assert dtypes == {torch.float16 if data_type is DataType.FP16 else torch.bfloat16}


@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_row_wise", "grid", "custom"])
def test_tables_of_several_types_and_optimizers_in_one_module(kind: str) -> None:
    """One kernel per rank for each (type, optimizer); rates of one must not leak into the other."""
    tables = bag_tables()
    tables[2].data_type = DataType.BF16
    module = collection(tables)
    unsharded = copy.deepcopy(module)
    bags = module.embedding_bags
    apply_optimizer_in_backward(torch.optim.SGD, bags["t0"].parameters(), {"lr": 0.5})
    apply_optimizer_in_backward(torch.optim.SGD, bags["t1"].parameters(), {"lr": 0.125})
    apply_optimizer_in_backward(RowWiseAdagrad, bags["t2"].parameters(), {"lr": 0.25})
    modules = simulate(module, plan_of(module, kind, 4, HOST), 4, local_size=HOST)
    for sharded in modules:
        sharded.fused_optimizer.zero_grad()  # what a training loop calls; it must not change any rate
    batches = batches_of_step(tables, 4, 0)
    answers = forward_all(modules, batches)
    expected = unsharded(join(batches))
    assert_same_answers(answers, expected, batches, rtol=2e-2, atol=2e-2)
    torch.stack([loss_of(answer) for answer in answers]).sum().backward()
    (loss_of(expected) / 4).backward()
    trained = whole_tables(modules)
    for name, rate in (("t0", 0.5), ("t1", 0.125)):
        weight = unsharded.embedding_bags[name].weight
        torch.testing.assert_close(trained[name], weight.detach() - rate * weight.grad, rtol=1e-4, atol=1e-5)
    moved = (trained["t2"] - unsharded.embedding_bags["t2"].weight.detach().float()).abs().max()
    assert 0.1 < moved < 4 * 0.25


# ---------------------------------------------------------------- by hand


BY_HAND = {
    "table_wise": table_wise.table_wise_by_hand,
    "row_wise": row_wise.row_wise_by_hand,
    "uneven_row_wise": row_wise.row_wise_by_hand,
    "column_wise": column_wise.column_wise_by_hand,
    "table_row_wise": table_row_wise.table_row_wise_by_hand,
    "table_column_wise": table_column_wise.table_column_wise_by_hand,
    "grid": grid.grid_by_hand,
    "data_parallel": data_parallel.data_parallel_by_hand,
}


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("kind", BY_HAND)
def test_engine_equals_by_hand(kind: str, pooling: PoolingType) -> None:
    table = EmbeddingBagConfig(name="t0", num_embeddings=11, embedding_dim=16, feature_names=["f0"], pooling=pooling)
    module = collection([table])
    weight = module.embedding_bags["t0"].weight.detach().clone()
    plan = plan_of(module, kind, 4, HOST)
    modules = simulate(module, plan, 4, local_size=HOST)
    batches = batches_of_step([table], 4, 0)
    by_hand = BY_HAND[kind](
        [(batch["f0"].values(), batch["f0"].lengths()) for batch in batches],
        weight,
        shards_from("t0", plan["t0"], 11, 16),
        pooling.name.lower(),
    )
    for answer, expected in zip(forward_all(modules, batches), by_hand):
        torch.testing.assert_close(answer.values(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- traffic


def traffic(modules, batches) -> tuple[list, list]:
    """Records of every rank, forward and backward."""
    for module in modules:
        module.shards.exchange.log = []
    answers = forward_all(modules, batches)
    forward = [list(module.shards.exchange.log) for module in modules]
    for module in modules:
        module.shards.exchange.log.clear()
    torch.stack([loss_of(answer) for answer in answers]).sum().backward()
    return forward, [list(module.shards.exchange.log) for module in modules]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", TYPES)
def test_two_collectives_in_and_one_per_pattern_out(kind: str, weighted: bool) -> None:
    tables = bag_tables()
    module = attach(collection(tables, weighted), "sgd")
    modules = simulate(module, plan_of(module, kind, 4, HOST), 4, local_size=HOST)
    forward, backward = traffic(modules, batches_of_step(tables, 4, 0, weighted))
    labels = [record.label for record in forward[0]]
    assert all([record.label for record in of_rank] == labels for of_rank in forward)
    outputs = ["pooled embeddings", "partial sums inside hosts", "sums between hosts"]
    inputs = [label for label in labels if label not in outputs]
    assert inputs == ["sizes", "lengths and ids", *(["weights"] if weighted else [])]
    uses_hosts = kind in ("table_row_wise", "last_host", "grid", "mixed")
    returned = outputs if uses_hosts else outputs[:1]
    # Of data-parallel copies every rank keeps its own answers: none come back.
    assert [label for label in labels if label in outputs] == ([] if kind == "data_parallel" else returned)
    # Backward: as many as came back, one for copies trained in backward, one for the gradients of weights.
    copies = kind in ("data_parallel", "mixed")
    assert all(len(of_rank) == len(backward[0]) for of_rank in backward)
    assert len(backward[0]) <= (3 if uses_hosts else 1) + copies + weighted


def test_a_mixed_sequence_module_needs_three_collectives() -> None:
    tables = sequence_tables()
    module = attach(collection(tables), "sgd")
    generators = {"t0": plans.row_wise(), "t1": plans.table_wise(3), "t2": plans.column_wise()}
    plan = plans.construct_module_sharding_plan(module, generators, world_size=4, local_size=2, device_type="cpu")
    forward, backward = traffic(simulate(module, plan, 4), batches_of_step(tables, 4, 0))
    assert [r.label for r in forward[0]] == ["sizes", "lengths and ids", "sequence embeddings"]
    assert [r.label for r in backward[0]] == ["gradients of sequence embeddings"]


@pytest.mark.parametrize("kind", ["table_row_wise", "grid"])
def test_host_sums_send_local_size_times_fewer_bytes_between_hosts(kind: str) -> None:
    tables = bag_tables()
    batches = batches_of_step(tables, 4, 0)
    module = attach(collection(tables), "sgd")
    plan = plan_of(module, kind, 4, HOST)
    between = {}
    for name, local_size in (("two hops", HOST), ("flat", 4)):  # flat: the engine is told of one host of four
        records = traffic(simulate(copy.deepcopy(module), plan, 4, local_size=local_size), batches)
        for direction, of_ranks in zip(("forward", "backward"), records):
            between[name, direction] = sum(
                record.bytes_W[target]
                for rank, of_rank in enumerate(of_ranks)
                for record in of_rank
                if record.label not in ("sizes", "lengths and ids")
                for target in range(4)
                if target // HOST != rank // HOST
            )
    for direction in ("forward", "backward"):
        assert between["two hops", direction] > 0
        assert between["flat", direction] == HOST * between["two hops", direction]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
@pytest.mark.parametrize("bad_id", [13, -1, 2**40])
def test_a_bad_id_on_one_rank_stops_all_and_changes_nothing(pooled: bool, bad_id: int) -> None:
    tables = bag_tables() if pooled else sequence_tables()
    world = World(collection(tables), lambda m: plan_of(m, "mixed", 4, HOST), 4, "rowwise_adagrad", HOST)
    world.step(batches_of_step(tables, 4, 0))
    before = snapshot(world.modules)

    batches = batches_of_step(tables, 4, 1)
    good = batches[2]
    values = good.values().clone()
    values[good.offset_per_key()[good.keys().index("f0")]] = bad_id
    batches[2] = KeyedJaggedTensor(good.keys(), values, lengths=good.lengths(), stride=good.stride())
    flights = [module.start_input(batch) for module, batch in zip(world.modules, batches)]
    for module, flight in zip(world.modules, flights):
        with pytest.raises(IndexError, match=rf"rank 2: feature 'f0' has id {bad_id}, but table 't0' has rows 0 to 12"):
            module.exchange_input(flight)
    assert_same_bits(snapshot(world.modules), before)

    world.step(batches_of_step(tables, 4, 1))
    world.compare_weights()


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequence"])
def test_lengths_that_miss_the_values_on_one_rank_stop_all(pooled: bool) -> None:
    tables = bag_tables() if pooled else sequence_tables()
    world = World(collection(tables), lambda m: plan_of(m, "mixed", 4, HOST), 4, "rowwise_adagrad", HOST)
    before = snapshot(world.modules)
    batches = batches_of_step(tables, 4, 1)
    lengths = batches[1].lengths().clone()
    lengths[0], lengths[1] = lengths[0] + lengths[1] + 1, -1  # the same sum: only the sign tells
    torn = KeyedJaggedTensor(batches[1].keys(), batches[1].values(), lengths=lengths, stride=batches[1].stride())
    batches[1] = torn
    flights = [module.start_input(batch) for module, batch in zip(world.modules, batches)]
    for module, flight in zip(world.modules, flights):
        with pytest.raises(ValueError, match="rank 1: the lengths of its batch"):
            module.exchange_input(flight)
    assert_same_bits(snapshot(world.modules), before)


def test_an_id_too_large_for_one_of_its_tables_names_that_table() -> None:
    tables = bag_tables()  # f1 is read by t0 (13 rows) and t1 (3 rows)
    module = collection(tables)
    (sharded,) = simulate(module, plan_of(module, "row_wise", 1, 1), 1)
    batch = KeyedJaggedTensor(["f0", "f1", "f2", "f3"], torch.tensor([7]), lengths=torch.tensor([0, 1, 0, 0]))
    with pytest.raises(IndexError, match="rank 0: feature 'f1' has id 7, but table 't1' has rows 0 to 2"):
        sharded(batch)


def test_ids_of_features_that_no_table_reads_are_nobodys_business() -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])
    module = collection([table])
    (sharded,) = simulate(module, plan_of(module, "row_wise", 1, 1), 1)
    batch = KeyedJaggedTensor(["other", "f"], torch.tensor([-5, 3]), lengths=torch.tensor([1, 1]))
    assert torch.equal(sharded(batch).values(), module.embedding_bags["t"].weight[3:4])


def test_a_missing_feature_is_named() -> None:
    module = collection(bag_tables())
    (sharded,) = simulate(module, plan_of(module, "row_wise", 1, 1), 1)
    with pytest.raises(KeyError, match="f3"):
        sharded(KeyedJaggedTensor(["f0", "f1", "f2"], torch.tensor([1]), lengths=torch.tensor([1, 0, 0])))


# ---------------------------------------------------------------- real ranks


def train(modules, batches_of_rank) -> dict:
    """Three steps; what came out and what the ranks hold."""
    outputs = []
    for batches in batches_of_rank:
        answers = forward_all(modules, batches)
        outputs.append([[block.detach().clone() for block in _blocks(answer)] for answer in answers])
        torch.stack([loss_of(answer) for answer in answers]).sum().backward()
    return {"outputs": outputs, "state": snapshot(modules)}


def _blocks(answer):
    return [answer.values()] if hasattr(answer, "length_per_key") else [part.values() for part in answer.values()]


def a_module(pooled: bool, kind: str, world_size: int, optimizer: str):
    tables = bag_tables() if pooled else sequence_tables()
    module = attach(collection(tables), optimizer)
    return tables, module, plan_of(module, kind, world_size, world_size // 2)


def train_on_a_rank(rank: int, world_size: int, group, cases: list) -> list:
    results = []
    for pooled, kind, optimizer in cases:
        tables, module, plan = a_module(pooled, kind, world_size, optimizer)
        sharded_class = ShardedEmbeddingBagCollection if pooled else ShardedEmbeddingCollection
        sharded = sharded_class(module, plan, ShardingEnv.from_process_group(group))
        steps = [[batches_of_step(tables, world_size, step)[rank]] for step in range(3)]
        results.append(train([sharded], steps))
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_real_ranks_equal_simulated_ones_to_the_bit(ranks, world_size: int) -> None:
    cases = [
        (True, "mixed", "adagrad"),
        (True, "grid", "rowwise_adagrad"),
        (True, "custom", "adam"),
        (True, "row_wise", "sgd"),
        (False, "mixed", "adagrad"),
        (False, "uneven_row_wise", "adam"),
    ]
    of_ranks = ranks.run(train_on_a_rank, world_size, cases, hosts=2)
    for index, (pooled, kind, optimizer) in enumerate(cases):
        tables, module, plan = a_module(pooled, kind, world_size, optimizer)
        arguments = {"local_size": world_size // 2} if pooled else {}
        modules = simulate(module, plan, world_size, **arguments)
        steps = [batches_of_step(tables, world_size, step) for step in range(3)]
        simulated = train(modules, steps)
        state = {}
        for rank, of_rank in enumerate(of_ranks):
            for step in range(3):
                for real, local in zip(of_rank[index]["outputs"][step][0], simulated["outputs"][step][rank]):
                    assert torch.equal(real, local), (kind, rank, step)
            state |= {n.replace("rank 0 ", f"rank {rank} ", 1): t for n, t in of_rank[index]["state"].items()}
        assert_same_bits(state, simulated["state"])


def build_differently(rank: int, world_size: int, group, what: str) -> str:
    tables = bag_tables()
    if what == "config" and rank == 1:
        tables[0].num_embeddings += 1
    module = attach(collection(tables), "adagrad" if what == "optimizer" and rank == 1 else "sgd")
    plan = plan_of(module, "column_wise" if what == "plan" and rank == 1 else "row_wise", world_size, world_size)
    try:
        ShardedEmbeddingBagCollection(module, plan, ShardingEnv.from_process_group(group), module_fqn="sparse.ebc")
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["plan", "config", "optimizer"])
def test_ranks_that_disagree_are_refused_at_the_start(ranks, what: str) -> None:
    messages = ranks.run(build_differently, 2, what)
    assert messages[0] == messages[1]
    assert "sparse.ebc: ranks [1] differ from rank 0" in messages[0]
    assert set(ranks.run(build_differently, 2, "nothing")) == {"accepted"}


def meet_a_bad_id(rank: int, world_size: int, group) -> tuple[str, bool]:
    tables = bag_tables()
    module = attach(collection(tables), "adagrad")
    sharded = ShardedEmbeddingBagCollection(
        module, plan_of(module, "mixed", world_size, 1), ShardingEnv.from_process_group(group)
    )
    before = snapshot([sharded])
    batch = batches_of_step(tables, world_size, 0)[rank]
    values = batch.values().clone()
    if rank == 1:
        values[batch.offset_per_key()[batch.keys().index("f2")]] = 20
    bad = KeyedJaggedTensor(batch.keys(), values, lengths=batch.lengths(), stride=batch.stride())
    message = ""
    try:
        loss_of(sharded(bad)).backward()
    except IndexError as error:
        message = str(error)
    assert_same_bits(snapshot([sharded]), before)
    loss_of(sharded(batch)).backward()
    after = snapshot([sharded])
    return message, any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.ranks
def test_a_bad_id_on_real_ranks(ranks) -> None:
    (message, trained), (other_message, other_trained) = ranks.run(meet_a_bad_id, 2, hosts=2)
    assert message == other_message
    assert "rank 1: feature 'f2' has id 20, but table 't2' has rows 0 to 19" in message
    assert trained and other_trained
