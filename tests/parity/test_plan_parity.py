"""Where TorchRec is installed: the same sizes, offsets, ranks and placements from every plan function."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchrec")

import torchrec.distributed.sharding_plan as theirs
import torchrec.distributed.types as their_types
from torchrec.distributed import comm as their_comm
from torchrec.distributed import utils as their_utils
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TheirSharder

import recsys_edu.distributed.sharding_plan as ours
import recsys_edu.distributed.types as our_types
from recsys_edu.distributed import comm, utils
from recsys_edu.distributed.embedding_types import BaseEmbeddingSharder

WORLDS = [(1, 1), (2, 2), (4, 2), (4, 4), (6, 2), (8, 4), (16, 8)]


def facts(sharding: Any) -> tuple:
    spec = sharding.sharding_spec
    shards = None if spec is None else [(s.shard_offsets, s.shard_sizes, str(s.placement)) for s in spec.shards]
    return sharding.sharding_type, sharding.compute_kernel, sharding.ranks, shards


def both(name: str, parameter: nn.Parameter, world: tuple[int, int], device: str, *args: Any, **kwargs: Any) -> None:
    world_size, local_size = world
    our_plan = getattr(ours, name)(*args, **kwargs)(parameter, local_size, world_size, device, BaseEmbeddingSharder())
    their_plan = getattr(theirs, name)(*args, **kwargs)(parameter, local_size, world_size, device, TheirSharder())
    assert facts(our_plan) == facts(their_plan)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world", WORLDS)
def test_generators(world: tuple[int, int], device: str) -> None:
    rng = random.Random(repr((world, device)))
    world_size, local_size = world
    num_hosts = world_size // local_size
    for _ in range(20):
        num_rows, blocks = rng.randint(1, 60), rng.randint(1, world_size)
        width = 4 * rng.randint(1, 12)
        parameter = nn.Parameter(torch.empty(num_rows, width * blocks, device="meta"))
        ranks = [rng.randrange(world_size) for _ in range(blocks)]
        both("data_parallel", parameter, world, device)
        both("table_wise", parameter, world, device, rng.randrange(world_size))
        both("table_wise", parameter, world, device, 0, compute_kernel="fused")
        both("row_wise", parameter, world, device)
        both("column_wise", parameter, world, device, ranks=ranks)
        both("table_row_wise", parameter, world, device, rng.randrange(num_hosts))
        both("column_wise", parameter, world, device, size_per_rank=[width] * blocks)
        # TorchRec's grid is right where each host's column block is exactly 128 wide.
        hosts = rng.sample(range(num_hosts), rng.randint(1, num_hosts))
        grid_parameter = nn.Parameter(torch.empty(num_rows, 128 * len(hosts), device="meta"))
        both("grid_shard", grid_parameter, world, device, hosts)


def test_buckets() -> None:
    for num_rows, world, num_buckets in ((20, (4, 2), 5), (21, (2, 2), 7), (40, (8, 4), 10), (20, (4, 4), 20)):
        parameter = nn.Parameter(torch.empty(num_rows, 8, device="meta"))
        both("row_wise", parameter, world, "cpu", num_buckets=num_buckets)


def test_kernel_of_a_parameter_with_its_own_optimizer() -> None:
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    parameter = nn.Parameter(torch.empty(10, 8))
    apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.1})
    both("table_wise", parameter, (2, 2), "cpu", 1)
    both("data_parallel", parameter, (2, 2), "cpu")


def test_sizes_and_offsets() -> None:
    rng = random.Random(7)
    for _ in range(400):
        world_size, local_size = rng.choice(WORLDS)
        tensor = torch.empty(rng.randint(1, 100), rng.choice([4, 8, 10, 16, 18, 64, 96, 130, 256, 384, 500, 512]))
        kind = rng.choice(list(our_types.ShardingType)).value
        options: dict[str, Any] = {"col_wise_shard_dim": rng.choice([None, 4, 5, 8, 12, 32, 64, 128, 600])}
        if rng.random() < 0.3:
            options["device_memory_sizes"] = [rng.randint(1, 100) for _ in range(world_size)]
        arguments = (tensor, world_size, local_size, kind)
        our_answer = ours.calculate_shard_sizes_and_offsets(*arguments, **options)
        their_answer = theirs.calculate_shard_sizes_and_offsets(*arguments, **options)
        assert our_answer == their_answer, (tensor.shape, world_size, local_size, kind, options)


def test_placements() -> None:
    for device in ("cpu", "cuda"):
        for rank in range(4):
            assert ours.placement(device, rank, 2) == theirs.placement(device, rank, 2)
            assert ours.placement_helper(device, 1, rank) == theirs.placement_helper(device, 1, rank)


@pytest.mark.parametrize(
    "name", ["ShardingType", "PipelineType", "ParameterStorage", "ComputeKernel", "CommOp", "ShardingStrategy"]
)
def test_enums(name: str) -> None:
    assert {m.name: m.value for m in getattr(our_types, name)} == {m.name: m.value for m in getattr(their_types, name)}


@pytest.mark.parametrize("local_world_size", [None, "2", "3", "4", "8"])
def test_where_a_rank_sits(monkeypatch: pytest.MonkeyPatch, local_world_size: str | None) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    for world_size in (1, 2, 3, 4, 8, 12, 16, 24):
        assert comm.get_local_size(world_size) == their_comm.get_local_size(world_size)
        assert comm.get_num_groups(world_size) == their_comm.get_num_groups(world_size)
        for rank in range(world_size):
            assert comm.get_local_rank(world_size, rank) == their_comm.get_local_rank(world_size, rank)
            assert comm.get_group_rank(world_size, rank) == their_comm.get_group_rank(world_size, rank)


def test_state_names() -> None:
    for prefix, name in (("", "a"), ("a", ""), ("a", "b.c")):
        assert utils.append_prefix(prefix, name) == their_utils.append_prefix(prefix, name)
    state = {"a.b": 1, "ab.c": 2, "a.c.d": 3}
    assert utils.filter_state_dict(state, "a") == their_utils.filter_state_dict(state, "a")


def test_torchrec_drops_columns_of_a_wide_grid_and_we_do_not() -> None:
    parameter = nn.Parameter(torch.empty(10, 512, device="meta"))

    def cells(plan: Any) -> int:
        return sum(s.shard_sizes[0] * s.shard_sizes[1] for s in plan.sharding_spec.shards)

    assert cells(theirs.grid_shard([0, 1])(parameter, 2, 4, "cpu", TheirSharder())) == 10 * 256
    assert cells(ours.grid_shard([0, 1])(parameter, 2, 4, "cpu", BaseEmbeddingSharder())) == 10 * 512
