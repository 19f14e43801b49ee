"""A table from the meta device never exists whole: each rank allocates its part of it and little else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_edu.distributed.shard import shard
from recsys_edu.distributed.sharding_plan import row_wise
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ROOT = Path(__file__).resolve().parents[2]
ROWS, DIM = 2**18, 64  # 64 MiB
pytestmark = pytest.mark.ranks


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if type(value) is torch.Tensor and value.device.type == "cpu":
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def build_and_train(rank, world_size, group) -> tuple[int, int]:
    table = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])
    with Allocations() as building:
        module = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.1})
        sharded = shard(module, row_wise())
    batch = KeyedJaggedTensor.from_lengths_sync(["f"], torch.randint(0, ROWS, (256,)), torch.full((64,), 4))
    with Allocations() as training:
        sharded(batch).values().square().sum().backward()
    return building.largest, training.largest


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_rank_allocates_more_than_its_part(ranks, world_size):
    part = ROWS * DIM * 4 // world_size
    for building, training in ranks.run(build_and_train, world_size):
        assert part <= building <= 1.05 * part
        # the weights themselves pass through operations; nothing else comes near their size
        assert training <= 1.05 * part


def test_the_benchmark_measures_every_process(tmp_path):
    command = [sys.executable, "benchmarks/large_table.py", "--tiny", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "large_table.json").read_text())
    assert [row["rank"] for row in result["rows"]] == [0, 1, 2, 3]
    for row in result["rows"]:
        assert 0 < row["without table GiB"] <= row["with its part GiB"] <= row["peak GiB"]
        assert row["last loss"] < row["first loss"]
    assert result["gates"][0]["met"]
