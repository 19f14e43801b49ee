"""Checkpoints: any plan to any plan, on other numbers of ranks, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from engine_cases import (
    assert_same_bits,
    attach,
    bag_tables,
    batches_of_step,
    collection,
    loss_of,
    plan_of,
    snapshot,
)

from recsys_edu.distributed import checkpoint
from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.checkpoint import FACTS_FILE, CheckpointError, load_checkpoint, save_checkpoint
from recsys_edu.distributed.embeddingbag import ShardedEmbeddingBagCollection
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.distributed.types import ShardingEnv


def sharded(kind: str, optimizer: str, group=None, world_size: int = 1, seed: int = 0, local_size: int = 1):
    """One rank's end of a collection whose weights come from `seed`."""
    module = attach(collection(bag_tables(), seed=seed), optimizer)
    plan = plan_of(module, kind, world_size, local_size)
    env = ShardingEnv.from_local(1, 0) if group is None else ShardingEnv.from_process_group(group)
    return ShardedEmbeddingBagCollection(module, plan, env, local_size=local_size)


def train(module, rank: int, world_size: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(module(batches_of_step(bag_tables(), world_size, step)[rank]))
        loss.backward()
        losses.append(loss.item())
    return losses


def tiles_of(module) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Weights and state by name: where each tile lies and what it holds."""
    tensors = {f"weight {name}": tensor for name, tensor in module.state_dict().items()}
    for name, state in module.fused_optimizer.state_dict()["state"].items():
        tensors |= {f"{name} {key}": value for key, value in state.items()}
    return {
        name: [(tile.offsets, tile.tensor.clone()) for tile in tensor.tiles]
        if isinstance(tensor, TiledTensor)
        else [((0,) * tensor.dim(), tensor.detach().clone())]
        for name, tensor in tensors.items()
    }


def together(of_ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Whole tensors from the tiles of all ranks."""
    whole = {}
    for name in of_ranks[0]:
        tiles = [tile for of_rank in of_ranks for tile in of_rank[name]]
        size = [max(o[d] + t.shape[d] for o, t in tiles) for d in range(tiles[0][1].dim())]
        whole[name] = torch.full(size, float("nan"))
        for offsets, tensor in tiles:
            whole[name][tuple(slice(o, o + s) for o, s in zip(offsets, tensor.shape))] = tensor.float()
        assert not whole[name].isnan().any(), name
    return whole


# ---------------------------------------------------------------- across plans and numbers of ranks


def make_and_save(rank: int, world_size: int, group, folder: str, kind: str, optimizer: str, local_size: int):
    module = sharded(kind, optimizer, group, world_size, local_size=local_size)
    train(module, rank, world_size, range(3))
    save_checkpoint(folder, module, module.fused_optimizer, {"step": 3})
    return tiles_of(module)


def load_and_save(rank: int, world_size: int, group, source: str, target: str, kind: str, optimizer: str, hosts: int):
    module = sharded(kind, optimizer, group, world_size, seed=1, local_size=max(world_size // hosts, 1))
    extra = load_checkpoint(source, module, module.fused_optimizer)
    save_checkpoint(target, module, module.fused_optimizer, extra)
    return tiles_of(module), extra


@pytest.mark.ranks
@pytest.mark.parametrize(
    "optimizer, kinds",
    [
        ("adagrad", ["grid", "row_wise", "column_wise", "mixed"]),
        ("adam", ["custom", "column_wise", "table_wise", "grid"]),
        # One number per row and column block: exact while the column cuts stay.
        ("rowwise_adagrad", ["uneven_row_wise", "row_wise", "table_wise", "table_row_wise"]),
    ],
)
def test_four_to_two_to_one_to_four_ranks_to_the_bit(ranks, tmp_path: Path, optimizer: str, kinds: list[str]) -> None:
    path = str(tmp_path / "a")
    first = together(ranks.run(make_and_save, 4, path, kinds[0], optimizer, 2, hosts=2))
    assert any("momentum1" in name for name in first)
    for world_size, kind, name in ((2, kinds[1], "b"), (1, kinds[2], "c"), (4, kinds[3], "d")):
        target, hosts = str(tmp_path / name), 2 if world_size == 4 else 1
        results = ranks.run(load_and_save, world_size, path, target, kind, optimizer, hosts, hosts=hosts)
        assert all(extra == {"step": 3} for _, extra in results)
        assert_same_bits(together([tiles for tiles, _ in results]), first)
        path = target


@pytest.mark.ranks
def test_into_an_unsharded_model(ranks, tmp_path: Path) -> None:
    saved = together(ranks.run(make_and_save, 2, str(tmp_path / "a"), "custom", "sgd", 1, hosts=2))
    unsharded = collection(bag_tables(), seed=9)
    assert load_checkpoint(tmp_path / "a", unsharded) == {"step": 3}
    for name, tensor in unsharded.state_dict().items():
        assert torch.equal(tensor, saved[f"weight {name}"]), name


def test_from_an_unsharded_model(tmp_path: Path) -> None:
    unsharded = collection(bag_tables(), seed=3)
    save_checkpoint(tmp_path / "a", unsharded)
    module = sharded("custom", "sgd", seed=1)
    load_checkpoint(tmp_path / "a", module)
    for name, tensor in together([tiles_of(module)]).items():
        assert torch.equal(tensor, unsharded.state_dict()[name.removeprefix("weight ")])


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_training_goes_on_as_if_undisturbed(tmp_path: Path, optimizer: str) -> None:
    undisturbed = sharded("custom", optimizer)
    train(undisturbed, 0, 1, range(3))
    save_checkpoint(tmp_path / "a", undisturbed, undisturbed.fused_optimizer)
    expected = train(undisturbed, 0, 1, range(3, 6))
    resumed = sharded("custom", optimizer, seed=1)
    load_checkpoint(tmp_path / "a", resumed, resumed.fused_optimizer)
    assert train(resumed, 0, 1, range(3, 6)) == expected
    assert_same_bits(snapshot([resumed]), snapshot([undisturbed]))


def test_other_column_cuts_restart_row_wise_state_and_say_so(tmp_path: Path) -> None:
    old = sharded("table_wise", "rowwise_adagrad")
    train(old, 0, 1, range(2))
    save_checkpoint(tmp_path / "a", old, old.fused_optimizer)
    module = attach(collection(bag_tables(), seed=1), "rowwise_adagrad")
    generators = {"t0": plans.column_wise([0, 0]), "t1": plans.table_wise(0), "t2": plans.table_wise(0)}
    plan = plans.construct_module_sharding_plan(module, generators, world_size=1, local_size=1, device_type="cpu")
    new = ShardedEmbeddingBagCollection(module, plan, ShardingEnv.from_local(1, 0))
    train(new, 0, 1, range(1))  # so that there is something to restart
    with pytest.warns(UserWarning, match=r"t0\.momentum1.*starts again from zero") as warned:
        load_checkpoint(tmp_path / "a", new, new.fused_optimizer)
    assert sum("starts again" in str(one.message) for one in warned) == 1
    before, after = together([tiles_of(old)]), together([tiles_of(new)])
    for name in before:
        if "t0.momentum1" in name:
            assert not after[name].any()
        else:
            assert torch.equal(before[name], after[name]), name


def ragged(upper: int, lower: int, seed: int) -> ShardedEmbeddingBagCollection:
    """Every table cut at column `upper` in its upper half and at column `lower` in the other."""

    def cut(request: plans.TilingRequest) -> list[Shard]:
        half, rows, width = request.num_rows // 2, request.num_rows, request.num_columns
        return [
            Shard(request.table, down, across, 0)
            for down, column in ((range(half), upper), (range(half, rows), lower))
            for across in (range(column), range(column, width))
        ]

    module = attach(collection(bag_tables(), seed=seed), "rowwise_adagrad")
    generators = {table.name: plans.custom(cut) for table in bag_tables()}
    plan = plans.construct_module_sharding_plan(module, generators, world_size=1, local_size=1, device_type="cpu")
    return ShardedEmbeddingBagCollection(module, plan, ShardingEnv.from_local(1, 0))


def test_the_same_cuts_in_other_rows_are_other_cuts(tmp_path: Path) -> None:
    old = ragged(4, 8, seed=0)
    train(old, 0, 1, range(2))
    save_checkpoint(tmp_path / "a", old, old.fused_optimizer)
    same = ragged(4, 8, seed=1)
    load_checkpoint(tmp_path / "a", same, same.fused_optimizer)
    assert_same_bits(snapshot([same]), snapshot([old]))
    swapped = ragged(8, 4, seed=1)
    train(swapped, 0, 1, range(1))
    with pytest.warns(UserWarning, match=r"momentum1.*starts again from zero"):
        load_checkpoint(tmp_path / "a", swapped, swapped.fused_optimizer)
    for name, tensor in snapshot([swapped]).items():
        assert "momentum1" not in name or not tensor.any(), name


# ---------------------------------------------------------------- what can be wrong with one


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    module = sharded("row_wise", "adagrad")
    train(module, 0, 1, range(1))
    save_checkpoint(tmp_path / "good", module, module.fused_optimizer, {"step": 1})
    return tmp_path / "good"


def refused(path: Path, module) -> str:
    """The error's words; the module must be what it was."""
    before = snapshot([module])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, module, module.fused_optimizer)
    assert_same_bits(snapshot([module]), before)
    return str(caught.value)


def other_tables(change) -> ShardedEmbeddingBagCollection:
    tables = bag_tables()
    change(tables)
    module = attach(collection(tables, seed=1), "adagrad")
    plan = plans.construct_module_sharding_plan(
        module, {t.name: plans.row_wise() for t in tables}, world_size=1, local_size=1, device_type="cpu"
    )
    return ShardedEmbeddingBagCollection(module, plan, ShardingEnv.from_local(1, 0))


def test_missing_and_superfluous_tables_are_named(saved: Path) -> None:
    def rename(tables) -> None:
        tables[1].name = "other"

    message = refused(saved, other_tables(rename))
    assert "embedding_bags.other.weight is not in the checkpoint" in message
    assert "embedding_bags.t1.weight is in the checkpoint but not in the model" in message


def test_another_shape_is_named(saved: Path) -> None:
    def grow(tables) -> None:
        tables[2].num_embeddings = 21

    assert "embedding_bags.t2.weight is (21, 16) here and (20, 16) in the checkpoint" in refused(
        saved, other_tables(grow)
    )


def test_a_torn_file_is_named(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    assert f"the file {file.name} is damaged" in refused(saved, sharded("row_wise", "adagrad", seed=1))


def test_a_flipped_bit_is_found(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert file.name in refused(saved, sharded("row_wise", "adagrad", seed=1))


def test_truncated_metadata_is_named(saved: Path) -> None:
    file = saved / ".metadata"
    file.write_bytes(file.read_bytes()[:50])
    assert ".metadata is damaged" in refused(saved, sharded("row_wise", "adagrad", seed=1))


def test_a_missing_file_is_named(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    file.unlink()
    assert f"the file {file.name} is missing" in refused(saved, sharded("row_wise", "adagrad", seed=1))


@pytest.mark.parametrize("text", ['{"format": 1', "[]", '{"format": 1}', '{"format": 2}', "\x00\xff"])
def test_damaged_facts_are_refused(saved: Path, text: str) -> None:
    (saved / FACTS_FILE).write_bytes(text.encode("latin-1"))
    assert FACTS_FILE in refused(saved, sharded("row_wise", "adagrad", seed=1))


def test_a_half_written_folder_and_no_folder_are_refused(saved: Path) -> None:
    (saved / FACTS_FILE).unlink()
    assert "is not a complete checkpoint" in refused(saved, sharded("row_wise", "adagrad", seed=1))
    assert "is not a complete checkpoint" in refused(saved / "none", sharded("row_wise", "adagrad", seed=1))


class Foreign:
    """What a malicious pickle would do: run something while it is read."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["FOREIGN_FOLDER"],))


def test_foreign_classes_in_metadata_are_not_loaded(saved: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FOREIGN_FOLDER", str(tmp_path / "made_by_a_pickle"))
    (saved / ".metadata").write_bytes(pickle.dumps(Foreign()))
    facts = json.loads((saved / FACTS_FILE).read_text())
    facts["files"][".metadata"] = checkpoint._checksum(saved / ".metadata")  # an attacker would do so too
    (saved / FACTS_FILE).write_text(json.dumps(facts))
    module = sharded("row_wise", "adagrad", seed=1)
    before = snapshot([module])
    with pytest.raises(CheckpointError, match="no business"):
        load_checkpoint(saved, module, module.fused_optimizer)
    assert not (tmp_path / "made_by_a_pickle").exists()
    assert_same_bits(snapshot([module]), before)


# ---------------------------------------------------------------- overwriting


def test_overwriting_replaces_the_old_one(saved: Path) -> None:
    module = sharded("table_wise", "adagrad", seed=5)
    save_checkpoint(saved, module, module.fused_optimizer, {"step": 2})
    again = sharded("column_wise", "adagrad", seed=1)
    assert load_checkpoint(saved, again, again.fused_optimizer) == {"step": 2}
    assert_same_bits(together([tiles_of(again)]), together([tiles_of(module)]))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["good"]


@pytest.mark.parametrize("moment", ["before the facts", "before the rename", "between the renames"])
def test_a_crash_while_overwriting_leaves_a_checkpoint_that_loads(saved: Path, monkeypatch, moment: str) -> None:
    old = sharded("row_wise", "adagrad", seed=1)
    load_checkpoint(saved, old, old.fused_optimizer)
    expected = snapshot([old])

    class Crash(BaseException):
        pass

    def crash(*args):
        raise Crash

    def crash_at_second(source, target, replace=os.replace):
        if Path(source).suffix == ".saving":  # the first rename has moved the old checkpoint away
            raise Crash
        return replace(source, target)

    if moment == "before the facts":
        monkeypatch.setattr(checkpoint, "_checksum", crash)
    elif moment == "before the rename":
        monkeypatch.setattr(checkpoint, "_replace_folder", crash)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", crash_at_second)
    new = sharded("row_wise", "adagrad", seed=5)
    with pytest.raises(Crash):
        save_checkpoint(saved, new, new.fused_optimizer, {"step": 2})
    monkeypatch.undo()
    again = sharded("row_wise", "adagrad", seed=7)
    assert load_checkpoint(saved, again, again.fused_optimizer) == {"step": 1}
    assert_same_bits(snapshot([again]), expected)
    save_checkpoint(saved, new, new.fused_optimizer, {"step": 2})  # and the next save is not in its way
    assert load_checkpoint(saved, again, again.fused_optimizer) == {"step": 2}


def load_on_a_rank(rank: int, world_size: int, group, path: str) -> str:
    module = sharded("row_wise", "adagrad", group, world_size, seed=1)
    before = snapshot([module])
    try:
        load_checkpoint(path, module, module.fused_optimizer)
    except CheckpointError as error:
        assert_same_bits(snapshot([module]), before)
        return str(error)
    return ""


@pytest.mark.ranks
def test_every_rank_refuses_alike(ranks, saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    shutil.copy(file, saved / "spare")
    file.write_bytes(file.read_bytes()[:-1])
    first, second = ranks.run(load_on_a_rank, 2, str(saved))
    assert first == second
    assert file.name in first
