"""DistributedModelParallel on real ranks: a whole DLRM, step by step beside one process with the joined batch."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from engine_cases import join, make_batch, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_edu.datasets.utils import Batch
from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.testing import RankPool
from recsys_edu.distributed.tiled_tensor import Tile, TiledTensor
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.keyed import KeyedOptimizerWrapper
from recsys_edu.optim.optimizers import in_backward_optimizer_filter

PATH = "model.sparse_arch.embedding_bag_collection"
WIDTH, BATCH = 16, 6
ROWS = {"t0": 40, "t1": 30, "t2": 5, "t3": 21}


def dlrm_tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=WIDTH,
            feature_names=[f"f{index}"],
            pooling=PoolingType.MEAN if index % 2 else PoolingType.SUM,
        )
        for index, (name, rows) in enumerate(ROWS.items())
    ]


def dlrm(optimizer: str, device: str = "cpu") -> DLRMTrain:
    torch.manual_seed(7)
    ebc = EmbeddingBagCollection(dlrm_tables(), device=torch.device(device))
    model = DLRMTrain(DLRM(ebc, 5, [8, WIDTH], [8, 1], dense_device=torch.device(device)))
    if optimizer == "adagrad":
        apply_optimizer_in_backward(torch.optim.Adagrad, ebc.parameters(), {"lr": 0.1, "eps": 1e-4})
    return model


def mixed_plan(model: nn.Module, world_size: int) -> ShardingPlan:
    hosts = 2
    generators = {
        "t0": plans.row_wise() if world_size == 2 else plans.grid_shard([1, 0]),
        "t1": plans.column_wise([world_size - 1, 0]),
        "t2": plans.data_parallel(),
        "t3": plans.table_row_wise(host_index=1),
    }
    ebc = model.get_submodule(PATH)
    local_size = world_size // hosts
    module_plan = plans.construct_module_sharding_plan(
        ebc, generators, local_size=local_size, world_size=world_size, device_type="cpu"
    )
    return ShardingPlan({PATH: module_plan})


def batch_of(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    features = {f"f{index}": rows for index, rows in enumerate(ROWS.values())}
    dense = torch.randn(BATCH, 5, generator=generator)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).float()
    return Batch(dense, make_batch(features, BATCH, False, generator), labels)


def joined_batch(step: int, world_size: int) -> Batch:
    batches = [batch_of(step, rank) for rank in range(world_size)]
    return Batch(
        torch.cat([b.dense_features for b in batches]),
        join([b.sparse_features for b in batches]),
        torch.cat([b.labels for b in batches]),
    )


def outer_optimizer(model: nn.Module) -> KeyedOptimizerWrapper:
    """For everything that does not train in backward."""
    params = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(params, lambda values: torch.optim.SGD(values, lr=1.0))


def train(model: nn.Module, batches, optimizer) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def portable(state: dict) -> dict:
    """A state dict whose tiles survive the way to another process."""
    return {
        name: ("tiles", tuple(value.shape), [(tile.offsets, tile.tensor.clone()) for tile in value.tiles])
        if isinstance(value, TiledTensor)
        else value.detach().clone()
        for name, value in state.items()
    }


def assemble(of_ranks: list[dict]) -> dict[str, torch.Tensor]:
    def tiled(value):
        if not isinstance(value, tuple):
            return value
        return TiledTensor(value[1], [Tile(*tile) for tile in value[2]])

    return {name: whole([tiled(of_rank[name]) for of_rank in of_ranks]) for name in of_ranks[0]}


# ---------------------------------------------------------------- training


def train_on_ranks(rank: int, world_size: int, group, optimizer: str) -> dict:
    model = dlrm(optimizer)
    dmp = DistributedModelParallel(model, plan=mixed_plan(model, world_size))
    start = portable(dmp.state_dict())
    losses = train(dmp, [batch_of(step, rank) for step in range(5)], outer_optimizer(dmp))
    return {
        "start": start,
        "losses": losses,
        "state": portable(dmp.state_dict()),
        "is_ddp": isinstance(dmp._dmp_wrapped_module, DistributedDataParallel),
        "names": [name for name, _ in dmp.named_parameters()],
        "bare": [name for name, _ in dmp.bare_named_parameters()],
        "fused": {name: sorted(state) for name, state in dmp.fused_optimizer.state_dict()["state"].items()},
    }


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", ["adagrad", "sgd outside"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_dlrm_trains_as_one_process_with_the_joined_batch(ranks, world_size: int, optimizer: str) -> None:
    results = ranks.run(train_on_ranks, world_size, optimizer, hosts=2)
    single = dlrm(optimizer)
    start = copy.deepcopy(single.state_dict())

    kept = assemble([result["start"] for result in results])
    assert list(kept) == list(start)
    for name, value in start.items():  # sharding a module keeps its weights
        assert torch.equal(kept[name], value), name
    losses = train(single, [joined_batch(step, world_size) for step in range(5)], outer_optimizer(single))
    mean = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-4, atol=1e-5)
    trained = assemble([result["state"] for result in results])
    for name, value in single.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)
        if name.endswith("weight"):
            assert (value - start[name]).abs().max() > 1e-3, name
    for result in results:
        assert result["is_ddp"]
        # A rank names the tables of which it holds something; with several shards there is one more name for each.
        unsharded = [name for name, _ in single.named_parameters()]
        assert [name for name in result["names"] if PATH not in name] == [n for n in unsharded if PATH not in n]
        assert {name for name in result["names"] if PATH in name} <= {n for n in unsharded if PATH in n}
        if optimizer == "adagrad":
            assert not any(PATH in name for name in result["bare"])
            assert result["fused"] == {
                f"{PATH}.embedding_bags.{table}.weight": [f"{table}.momentum1"] for table in ROWS
            }
        else:
            assert result["bare"] == result["names"]


def construct_on_meta(rank: int, world_size: int, group, num_rows: int) -> dict:
    class Largest(TorchDispatchMode):
        """The largest tensor with memory that any operation returns."""

        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.device.type != "meta" and type(value) is torch.Tensor:
                    storage = value.untyped_storage().nbytes() // max(value.element_size(), 1)
                    Largest.numel = max(Largest.numel, value.numel(), storage)
            return result

    tables = [EmbeddingBagConfig(name="big", num_embeddings=num_rows, embedding_dim=8, feature_names=["f0"])]
    with Largest():
        ebc = EmbeddingBagCollection(tables, device=torch.device("meta"))
        apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
        module_plan = plans.construct_module_sharding_plan(ebc, {"big": plans.row_wise()}, device_type="cpu")
        dmp = DistributedModelParallel(nn.Sequential(ebc), plan=ShardingPlan({"0": module_plan}))
        generator = torch.Generator().manual_seed(rank)
        batch = make_batch({"f0": num_rows}, 4, False, generator)
        dmp(batch).values().sum().backward()
        (tile,) = dmp.state_dict()["0.embedding_bags.big.weight"].tiles
    spread = tile.tensor[:500].std().item() * num_rows**0.5
    return {"largest": Largest.numel, "tile": tuple(tile.tensor.shape), "spread": spread}


@pytest.mark.ranks
def test_a_table_on_meta_never_exists_whole(ranks) -> None:
    num_rows = 40_000
    for result in ranks.run(construct_on_meta, 4, num_rows):
        assert result["tile"] == (num_rows // 4, 8)
        assert num_rows // 4 * 8 <= result["largest"] <= num_rows // 4 * 8 * 1.15
        assert 0.4 < result["spread"] < 0.8  # uniform over +-bound has 0.577


def meta_dlrm(rank: int, world_size: int, group) -> dict:
    model = dlrm("adagrad", device="meta")
    dmp = DistributedModelParallel(model, init_data_parallel=False)
    assert not any(parameter.is_meta for parameter in dmp.parameters())
    dmp.init_data_parallel()
    dmp.init_data_parallel()  # a second time changes nothing
    losses = train(dmp, [batch_of(step, rank) for step in range(2)], outer_optimizer(dmp))
    dense = {name: value for name, value in portable(dmp.state_dict()).items() if PATH not in name}
    return {"losses": losses, "plan": str(dmp.plan), "dense": dense}


def copy_and_train(rank: int, world_size: int, group) -> dict:
    torch.manual_seed(0)
    dmp = DistributedModelParallel(dlrm("adagrad"))
    twin = copy.deepcopy(dmp)
    before = portable(copy.deepcopy(dmp).state_dict())
    losses = train(twin, [batch_of(step, rank) for step in range(2)], outer_optimizer(twin))
    untouched = portable(dmp.state_dict())
    again = train(dmp, [batch_of(step, rank) for step in range(2)], outer_optimizer(dmp))
    return {"losses": losses, "again": again, "before": assemble([before]), "untouched": assemble([untouched])}


@pytest.mark.ranks
def test_a_copy_of_a_sharded_model_is_a_model_of_its_own(ranks) -> None:
    for result in ranks.run(copy_and_train, 2):
        assert result["losses"] == result["again"]
        assert result["losses"][0] != result["losses"][1]
        assert result["before"].keys() == result["untouched"].keys()
        for name, value in result["before"].items():
            assert torch.equal(value, result["untouched"][name]), name


@pytest.mark.ranks
def test_defaults_plan_and_initialise_a_meta_model(ranks) -> None:
    first, second = ranks.run(meta_dlrm, 2)
    assert first["plan"] == second["plan"]
    assert all(torch.isfinite(torch.tensor(result["losses"])).all() for result in (first, second))
    for name, value in first["dense"].items():
        assert torch.equal(value, second["dense"][name]), name


# ---------------------------------------------------------------- one process, no group


def test_the_announcements_dlrm_runs_without_a_process_group() -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name="t1", embedding_dim=8, num_embeddings=100, feature_names=["f1"]),
        EmbeddingBagConfig(name="t2", embedding_dim=8, num_embeddings=100, feature_names=["f2"]),
    ]
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=100,
        dense_arch_layer_sizes=[20, 8],
        over_arch_layer_sizes=[5, 1],
    )
    model = DistributedModelParallel(model)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch({"f1": 100, "f2": 100}, 2, False, generator)
    logits = model(dense_features=torch.rand((2, 100)), sparse_features=batch)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert model.module.dense_arch.model._mlp[0]._linear.weight.grad is not None


def test_learning_rate_changes_take_effect() -> None:
    model = dlrm("adagrad")
    dmp = DistributedModelParallel(model)
    optimizer = outer_optimizer(dmp)
    tables = {name: tensor for name, tensor in dmp.state_dict().items() if PATH in name}
    before = {name: tensor.tiles[0].tensor.clone() for name, tensor in tables.items()}
    for group in dmp.fused_optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1)
        group["lr"] = 0.0  # the next forward hands it over
    train(dmp, [batch_of(0, 0)], optimizer)
    for name, tensor in tables.items():
        assert torch.equal(tensor.tiles[0].tensor, before[name])
    for group in dmp.fused_optimizer.param_groups:
        group["lr"] = 0.1
    train(dmp, [batch_of(0, 0)], optimizer)
    for name, tensor in tables.items():
        assert not torch.equal(tensor.tiles[0].tensor, before[name])


def test_whole_state_dicts_load_and_wrong_ones_are_refused() -> None:
    dmp = DistributedModelParallel(dlrm("adagrad"))
    other = dlrm("adagrad")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    dmp.load_state_dict(other.state_dict())
    for name, value in assemble([portable(dmp.state_dict())]).items():
        assert torch.equal(value, other.state_dict()[name]), name
    missing = {name: value for name, value in other.state_dict().items() if "t1" not in name}
    with pytest.raises(RuntimeError, match=r"embedding_bags\.t1\.weight"):
        dmp.load_state_dict(missing)
    wrong = other.state_dict() | {f"{PATH}.embedding_bags.t1.weight": torch.zeros(3, WIDTH)}
    with pytest.raises(RuntimeError, match=r"t1\.weight: expected \(30, 16\), got \(3, 16\)"):
        dmp.load_state_dict(wrong)


def test_a_plan_for_something_else_is_refused() -> None:
    model = dlrm("adagrad")
    module_plan = mixed_plan(model, 2).plan[PATH]
    with pytest.raises(ValueError, match=r"names 'model\.nowhere', which is no module"):
        DistributedModelParallel(model, plan=ShardingPlan({"model.nowhere": module_plan}))
    with pytest.raises(ValueError, match=r"names 'model\.dense_arch', a DenseArch"):
        DistributedModelParallel(model, plan=ShardingPlan({"model.dense_arch": module_plan}))


def test_the_root_may_be_the_collection() -> None:
    collection = EmbeddingCollection([])
    assert DistributedModelParallel(collection).module is not None
    ebc = EmbeddingBagCollection(dlrm_tables())
    weights = copy.deepcopy(ebc.state_dict())
    dmp = DistributedModelParallel(ebc)
    assert list(dmp.state_dict()) == list(weights)
    expected = EmbeddingBagCollection(dlrm_tables())
    expected.load_state_dict(weights)
    features = batch_of(0, 0).sparse_features
    torch.testing.assert_close(dmp(features).values(), expected(features).values(), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- resharding while training


def train_and_reshard(rank: int, world_size: int, group, reshard: bool) -> dict:
    model = dlrm("adagrad")
    ebc = model.get_submodule(PATH)

    def module_plan(generators):
        return plans.construct_module_sharding_plan(ebc, generators, local_size=world_size, world_size=world_size)

    # Rank 1 has no sharded table at first.
    first = module_plan({name: plans.table_wise(0) for name in ROWS})
    second = module_plan(
        {"t0": plans.row_wise(), "t1": plans.table_wise(1), "t2": plans.column_wise(), "t3": plans.table_wise(1)}
    )
    dmp = DistributedModelParallel(model, plan=ShardingPlan({PATH: first}))
    optimizer = outer_optimizer(dmp)
    losses = train(dmp, [batch_of(step, rank) for step in range(2)], optimizer)
    if reshard:
        dmp.reshard({PATH: (0.0, second)})
        assert all(group["lr"] == pytest.approx(0.1) for group in dmp.fused_optimizer.param_groups)
        dmp.fused_optimizer.zero_grad()
    losses += train(dmp, [batch_of(step, rank) for step in range(2, 4)], optimizer)
    state = dmp.fused_optimizer.state_dict()["state"]
    momenta = {name: next(iter(entries.values())) for name, entries in state.items()}
    return {"losses": losses, "state": portable(dmp.state_dict()), "momenta": portable(momenta)}


@pytest.mark.ranks
def test_resharding_while_training_changes_nothing_but_the_plan(ranks) -> None:
    plain = ranks.run(train_and_reshard, 2, False)
    moved = ranks.run(train_and_reshard, 2, True)
    for one, other in zip(plain, moved):
        torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=1e-5, atol=1e-6)
    for what in ("state", "momenta"):
        expected, actual = (assemble([result[what] for result in results]) for results in (plain, moved))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- a rank that dies


def die_in_mid_step(rank: int, world_size: int, group) -> None:
    model = dlrm("adagrad")
    dmp = DistributedModelParallel(model, plan=mixed_plan(model, world_size))
    train(dmp, [batch_of(0, rank)], outer_optimizer(dmp))
    ebc = dmp.module.get_submodule(PATH)
    flight = ebc.start_input(batch_of(1, rank).sparse_features)
    if rank == 1:
        os._exit(17)
    ebc(flight).values()


@pytest.mark.ranks
def test_the_others_end_with_an_error_when_a_rank_dies() -> None:
    pool = RankPool()  # of its own: it does not outlive this
    try:
        with pytest.raises(RuntimeError) as caught:
            pool.run(die_in_mid_step, 4, hosts=2, timeout=30)
    finally:
        pool.close()
    words = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "rank 1 of 4 died with exit code 17" in words
    assert "were still running" not in words
    for survivor in (0, 2, 3):
        assert f"rank {survivor} of 4: the exchange" in words
    assert "broke off: another rank failed, left, or did not reach it in time" in words
